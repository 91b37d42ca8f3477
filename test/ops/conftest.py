"""Op tests run with poisoned allocations; those that take ``isa`` run with all kernels that work here."""

import hypothesis
import pytest

import ktops
from ktops.testing.isa import available_isas
from ktops.testing.poison import poisoned_memory

hypothesis.settings.register_profile("ktops", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("ktops")


@pytest.fixture(autouse=True)
def poison():
    with poisoned_memory():
        yield


@pytest.fixture(params=available_isas())
def isa(request):
    with ktops.use_isa(request.param):
        yield request.param
