"""Runs tests on the simulated device, in a process of their own because it becomes torch's accelerator."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import ktops

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
HELPERS = [ROOT / "test" / folder for folder in ("integrations", "cli", "checkpoints", "compat")]

OP_TESTS = (
    "test_moe_sft.py",
    "test_moe_fwd.py::test_equals_training_bitwise",
    "test_gating.py",
    "test_float16.py",
    "test_transposed_weights.py",
    "test_determinism.py",
    "test_formats.py::test_a_format_and_a_group_size_for_each_projection",
)
ONLY_ON_THE_CPU = "fake_results or compiled or without_a_copy or wide_slabs or many_terms"
"""Tests that move tensors themselves or count what the CPU does, whose counterparts are in ``simulated``, and
large sizes at which kernels, but not devices, compute in another way."""


def run(folder: Path, *arguments: str) -> dict[str, int]:
    """Returns {"tests": ..., "skipped": ..., ...} of pytest in a new process; prints what failed."""
    report = folder / "report.xml"
    paths = [Path(ktops.__file__).parents[1], HERE, *HELPERS, *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "KTOPS_SIMULATED": "1"}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--junitxml", report, "--rootdir", ROOT]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert report.exists(), result.stdout + result.stderr
    print(result.stdout[-5000:])
    suite = ElementTree.parse(report).getroot().find("testsuite")
    return {name: int(suite.get(name)) for name in ("tests", "skipped", "failures", "errors")}


def passed(results: dict[str, int]) -> bool:
    return (results["skipped"], results["failures"], results["errors"]) == (0, 0, 0)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_op_tests_with_tokens_on_the_device(tmp_path):
    tests = (str(ROOT / "test/ops" / name) for name in OP_TESTS)
    results = run(tmp_path, "-p", "on_device", "-k", f"not ({ONLY_ON_THE_CPU})", *tests)
    assert results["tests"] > 200 and passed(results)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_what_only_devices_have(tmp_path):
    results = run(tmp_path, str(HERE / "simulated"))
    assert results["tests"] > 20 and passed(results)
