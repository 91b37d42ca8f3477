"""The rows of kernels that this machine can run, for parametrized tests."""

import ktops


def available_isas() -> list[str]:
    """Names of the rows compiled into ktops that this CPU supports, best first.

    Example:
        >>> @pytest.mark.parametrize("isa", available_isas())
        ... def test_forward(isa):
        ...     with ktops.use_isa(isa): ...
    """
    return [name for name, supported in ktops.cpu_capabilities().items() if supported]
