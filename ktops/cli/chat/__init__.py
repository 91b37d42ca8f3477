"""`ktops chat`: answers prompts in a terminal."""
