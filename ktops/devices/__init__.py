"""Hidden states on an accelerator, experts in CPU memory."""

from ktops.devices import kernels  # noqa: F401  (registers the operators for accelerators)
