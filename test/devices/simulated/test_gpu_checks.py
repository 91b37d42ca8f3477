"""run_on_gpu.py on the simulated device: the checks that need no streams."""

import itertools

import pytest
import run_on_gpu
from accelerate.state import AcceleratorState, PartialState
from gpu_runtimes import Simulated

pytestmark = pytest.mark.usefixtures("enabled", "single_thread")


@pytest.fixture
def device_of_trainers(device, monkeypatch):
    def forget():
        AcceleratorState._reset_state()
        PartialState._reset_state()

    forget()
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", str(device))
    yield
    forget()


def test_every_check_passes(device_of_trainers, capsys):
    status = run_on_gpu.run(Simulated(), [], itertools.count().__next__)
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "15 of 15 checks passed on simgpu" in printed and "| T | " in printed
