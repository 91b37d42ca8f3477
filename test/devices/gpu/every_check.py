"""Defines the checks, in the order in which they run: what others build on first, long ones last."""

from gpu import operators, in_stream_order, models, many_tokens, speed  # noqa: F401, I001  (the order)
