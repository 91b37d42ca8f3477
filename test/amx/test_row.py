"""The amx_bf16 kernels under the emulator: the op tests, tile instructions, and use without permission.

The kernels also use AVX-512 vectors, which are not emulated. On a CPU without AVX512_BF16 they cannot run at
all, and the tests check that the emulator reports this.
"""

import errno
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import ktops
from ktops.testing import amx_emulator

ROOT = Path(__file__).parents[2]
CAN_RUN = ktops.cpu_capabilities()["avx512_bf16"]
HAS_AMX = ktops.cpu_capabilities()["amx_bf16"]

OP_TESTS = [
    "test_moe_sft.py",
    "test_moe_fwd.py",
    "test_paths.py",
    "test_determinism.py",
    "test_autograd.py",
    "test_moe_sft_memory.py",
    "test_transposed_weights.py",
    "test_gating.py",
    "test_measure_peak.py",
    "test_formats.py::test_a_format_and_a_group_size_for_each_projection",
    "test_int8_compute.py::test_products_of_integers[amx_bf16-int8:0-T30-H4160-I64-dtype1]",
    "test_int8_compute.py::test_products_of_integers[amx_bf16-int4:128-T20-H160-I96-dtype0]",
    "test_int8_compute.py::test_more_tokens_than_panels_have_room_for[amx_bf16-int4-128]",
    "test_homes_and_bits.py::test_bits_are_those_of_one_node[amx_bf16-bfloat16]",
    "test_homes_and_bits.py::test_bits_are_those_of_one_node[amx_bf16-int4 in integers]",
    "test_homes_and_bits.py::test_one_thread_finds_the_tasks_of_its_node[amx_bf16]",
    "test_accuracy.py::test_no_less_accurate_than_eager[qwen3_30b-amx_bf16]",
]


def environment(folder) -> dict[str, str]:
    return amx_emulator.row_environment(counts=folder, path=[Path(ktops.__file__).parents[1], ROOT])


def python(code: str, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True)


def run_op_tests(folder: Path) -> tuple[dict[str, int], str]:
    """Returns ({"tests": ..., "skipped": ..., "failures": ..., "errors": ...}, pytest's output)."""
    report = folder / "report.xml"
    options = ["-q", "-p", "no:cacheprovider", "--junitxml", str(report), "--rootdir", str(ROOT)]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *options,
        *(str(ROOT / "test" / "ops" / name) for name in OP_TESTS),
    ]
    result = subprocess.run(command, env=environment(folder), cwd=folder, capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert report.exists(), output
    suite = ElementTree.parse(report).getroot().find("testsuite")
    return {name: int(suite.get(name)) for name in ("tests", "skipped", "failures", "errors")}, output


STEPS = """
import json, sys, torch
from ktops.testing import amx_emulator
from ktops.testing.compare import random_grad_output
from ktops.testing.inputs import moe_inputs, require_grad
import ktops

def counted(function):
    before = amx_emulator.counts()
    result = function()
    after = amx_emulator.counts()
    after.subtract(before)
    return result, dict(after)

def in_l2(iterations):
    _, executed = counted(lambda: torch.ops.kt.measure_peak("amx_bf16", "bfloat16", iterations, from_l2=True))
    return executed["tdpbf16ps"]

steps = []
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    for full in (False, True):
        inputs = moe_inputs(T=96, H=96, I=64, E=3, K=2, dtype=torch.bfloat16, lora_rank=8)
        names = ["hidden_states", "gate_up_lora_A", "down_lora_B"] + ["gate_up_proj", "down_proj"] * full
        inputs = require_grad(inputs, *names)
        output, forward = counted(lambda: ktops.moe_sft(**inputs))
        gradient = random_grad_output(inputs)
        _, backward = counted(lambda: torch.autograd.grad(output, [inputs[n] for n in names], gradient))
        steps.append({"threads": threads, "forward": forward, "backward": backward})
print(json.dumps({"steps": steps, "in_l2": in_l2(3) - in_l2(1)}))
"""


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """The output of STEPS: instructions of forward and backward for several numbers of threads, and in L2."""
    folder = tmp_path_factory.mktemp("steps")
    result = python(STEPS, environment(folder), folder)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


if CAN_RUN:

    @pytest.mark.long
    @pytest.mark.timeout(900)
    def test_op_tests(tmp_path):
        """Runs whole files in a separate process, in which no tile instruction runs on the hardware."""
        results, output = run_op_tests(tmp_path)
        assert results["tests"] > 500
        assert (results["skipped"], results["failures"], results["errors"]) == (0, 0, 0), output[-5000:]
        executed = amx_emulator.read_counts(tmp_path)
        assert executed["tdpbf16ps"] > 10000 and executed["tdpbusd"] > 1000, executed
        assert executed["ldtilecfg"] == executed["tilerelease"] > 1000, executed

    def test_forward_and_backward_use_tiles(counts):
        for step in counts["steps"]:
            for name in ("forward", "backward"):
                assert step[name]["tdpbf16ps"] > 50 and step[name]["tileloadd"] > 50, step

    def test_tiles_are_configured_once_per_thread_and_region(counts):
        """Each operator call has one region: one for forward, one for backward."""
        for step in counts["steps"]:
            for name in ("forward", "backward"):
                configured = step[name]["ldtilecfg"]
                assert 1 <= configured <= step["threads"], step
                assert step[name]["tilerelease"] == configured

    def test_products_in_l2_are_counted(counts):
        """Two more iterations of kt::measure_peak: 32 x 2048 by 2048 x 64, in tiles of 16 x 32 x 16."""
        assert counts["in_l2"] == 2 * (32 // 16) * (64 // 16) * (2048 // 32)

else:

    def test_the_row_cannot_run_here():
        with pytest.raises(RuntimeError, match="AVX-512 with BF16, which this CPU lacks"):
            amx_emulator.row_environment()


def refused_environment(number: int) -> dict[str, str]:
    env = amx_emulator.environment(refuse=number)
    env["PYTHONPATH"] = str(Path(ktops.__file__).parents[1])
    return {name: value for name, value in env.items() if name not in ("KTOPS_ISA", "KTOPS_ISA_UNCHECKED")}


REASON = {
    number: f"this CPU has AMX, but the operating system refused permission to use it (arch_prctl: "
    f"{os.strerror(number)}, errno {number})"
    for number in (errno.EPERM, errno.EINVAL)
}
LACKING = "must be supported by this CPU (amx_bf16=0,"


def reason(number: int) -> str:
    """Returns what the kernels lack: permission on a CPU with AMX, instructions on others."""
    return REASON[number] if HAS_AMX else LACKING


@pytest.mark.parametrize("number", REASON)
def test_a_row_without_permission_is_an_error(tmp_path, number):
    code = "import ktops\nwith ktops.use_isa('amx_bf16'): pass"
    result = python(code, refused_environment(number), tmp_path)
    assert result.returncode == 1 and reason(number) in result.stderr, result.stderr
    assert "kt::set_cpu_capability: name must be" in result.stderr and "got 'amx_bf16'" in result.stderr


def test_a_row_of_the_environment_without_permission_is_an_error(tmp_path):
    env = refused_environment(errno.EPERM) | {"KTOPS_ISA": "amx_bf16"}
    result = python("import ktops; print(ktops.cpu_capability())", env, tmp_path)
    assert result.returncode == 1 and reason(errno.EPERM) in result.stderr, result.stderr
    assert "KTOPS_ISA must be" in result.stderr


DEFAULT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import ktops
    ktops.cpu_capability()
    ktops.cpu_capabilities()
print(ktops.cpu_capability())
print([str(w.message) for w in caught if "ktops" in str(w.message)])
"""


def test_the_next_row_is_chosen_with_one_warning(tmp_path):
    best = next(name for name, runs in ktops.cpu_capabilities().items() if runs and name != "amx_bf16")
    result = python(DEFAULT, refused_environment(errno.EPERM), tmp_path)
    expected = [f"ktops uses the {best} kernels, which are not the fastest. amx_bf16: {REASON[errno.EPERM]}"]
    assert result.stdout.splitlines() == [best, str(expected if HAS_AMX else [])], result.stderr


def test_no_warning_for_a_row_of_choice(tmp_path):
    env = refused_environment(errno.EPERM) | {"KTOPS_ISA": "scalar"}
    assert python(DEFAULT, env, tmp_path).stdout.splitlines() == ["scalar", "[]"]


def test_no_warning_with_permission(tmp_path):
    env = amx_emulator.environment() | {"PYTHONPATH": str(Path(ktops.__file__).parents[1])}
    assert python(DEFAULT, env, tmp_path).stdout.splitlines()[1] == "[]"
