"""Hidden states on an accelerator, experts in CPU memory."""

from ktops.devices import kernels, moe_fwd_streamed  # noqa: F401  (register the operators for accelerators)
