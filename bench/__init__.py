"""Measures the speed of the operators as a fraction of what this machine can do: ``python -m bench.run``."""
