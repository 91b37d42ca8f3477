"""The ktops command."""
