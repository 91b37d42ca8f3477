"""Lists the kernels that this machine can run, for parametrized tests."""

import os

import ktops


def available_isas() -> list[str]:
    """Returns the names of the kernels compiled into ktops that this CPU supports, best first.

    With ``KTOPS_ISA_UNCHECKED=1`` (for emulators), returns only the name in ``KTOPS_ISA``.

    Example:
        >>> @pytest.mark.parametrize("isa", available_isas())
        ... def test_forward(isa):
        ...     with ktops.use_isa(isa): ...
    """
    if os.environ.get("KTOPS_ISA_UNCHECKED") == "1" and os.environ.get("KTOPS_ISA"):
        return [os.environ["KTOPS_ISA"]]
    return [name for name, supported in ktops.cpu_capabilities().items() if supported]
