"""`ktops plan`: what a command needs, computed from a model's config before anything is loaded."""
