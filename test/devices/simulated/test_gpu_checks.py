"""run_on_gpu.py on the simulated device: the checks that need no streams."""

import itertools

import pytest
import run_on_gpu
from gpu_runtimes import Simulated

pytestmark = pytest.mark.usefixtures("enabled", "single_thread")


def test_every_check_passes(device, trainers_use, capsys):
    trainers_use(device)
    status = run_on_gpu.run(Simulated(), [], itertools.count().__next__)
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "17 of 17 checks passed on simgpu" in printed and "| T | " in printed
