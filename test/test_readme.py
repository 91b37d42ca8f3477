"""README.md and docs/ are correct: examples run, commands match CI, and tables match the tree."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ktops
from ktops.ops.activation import ACTIVATIONS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
EXAMPLES = dict(
    re.findall(r"^<!-- example: (\w+) -->\n```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
)
OPS = (
    "moe_fwd", "moe_fwd_streamed", "moe_fwd_begin", "moe_fwd_end", "moe_sft_fwd", "moe_sft_bwd",
    "cpu_capability", "cpu_capabilities", "cpu_refusals", "set_cpu_capability", "measure_peak",
    "sum_words", "set_profiling", "profiling", "profiled_steps", "paths", "force_path", "set_numa_nodes",
    "numa_rows", "empty_cache", "memory_stats", "ask_for_huge_pages", "load_cuda", "synchronize_streams",
    "stop_streams", "empty_stream_cache", "staged_bytes", "dequantize", "quantize", "prepare_moe",
    "moe_fwd_prepared", "release_moe",
)  # fmt: skip


def check_plain(printed: str) -> None:
    assert printed.startswith("torch.Size([16, 64])")


def check_transformers(printed: str) -> None:
    """Every factor of the experts has a gradient."""
    assert printed.count("lora_A") == printed.count("lora_B") == 4


def check_formats(printed: str) -> None:
    assert "KTExperts(" in printed and "int4" in printed


def check_compile(printed: str) -> None:
    assert printed == ""


CHECKS = {
    "plain": check_plain,
    "transformers": check_transformers,
    "formats": check_formats,
    "compile": check_compile,
}
"""Maps the name of each example to the check of its output."""


def test_every_example_has_a_name_a_check_and_about_15_lines():
    assert len(re.findall(r"^```python$", README, re.MULTILINE)) == len(EXAMPLES)
    assert EXAMPLES.keys() == CHECKS.keys()
    lines = {name: len([line for line in text.splitlines() if line]) for name, text in EXAMPLES.items()}
    assert max(lines.values()) <= 15, lines


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path):
    """The example must not warn about ktops."""
    command = [sys.executable, "-W", "error::UserWarning:ktops", "-c", EXAMPLES[name]]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    CHECKS[name](result.stdout)


def test_the_speed_on_the_first_screen_is_measured():
    [file] = (ROOT / "bench" / "results").glob("peers-*-2threads-amx_bf16.json")
    record = json.loads(file.read_text())
    case = {"shape": "qwen3_30b", "mode": "training", "lora_rank": 16, "tokens": 512, "status": "ok"}
    rows = {row["contestant"]: row for row in record["rows"] if case.items() <= row.items()}
    ms = {name: f"{row['seconds'] * 1e3:.0f} ms" for name, row in rows.items()}
    first_screen = " ".join(README.split("## Two commands")[0].split())
    assert (
        f"{ms['ktops']} with ktops, {ms['LoRA grouped_mm']} written by hand with torch's grouped_mm, "
        f"{ms['kt-kernel']} with kt-kernel 0.7.2 and {ms['PEFT']} with PEFT {record['machine']['peft']}"
    ) in first_screen
    assert "kt-kernel==0.7.2" in (ROOT / "docs" / "performance.md").read_text()


def test_ci_runs_the_test_command_of_the_readme():
    printed = subprocess.run(
        [ROOT / ".ci" / "run", "--print"], capture_output=True, text=True, check=True
    ).stdout
    blocks = re.findall(r"^<!-- command: test -->\n```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert blocks == [printed]
    assert printed.endswith("pytest -n 2 --dist worksteal test\n")


@pytest.mark.parametrize("command", re.findall(r"^python3 -m venv.*$", README, re.MULTILINE))
def test_commands_name_a_torch_and_build_against_it(command):
    assert re.search(r"pip install -q torch==\d+\.\d+\.\d+ ", command)
    assert all("--no-build-isolation" in part for part in command.split("&&") if "[" in part)
    assert "index-url" not in command


def test_the_support_table_is_complete():
    rows = dict(re.findall(r"^\| ([A-Z][^|]+) \| (.+) \|$", README, re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", rows["Kernels"])) - {"KTOPS_ISA"} == set(ktops.cpu_capabilities())
    assert set(re.findall(r"`(\w+)`", rows["Activations"])) == set(ACTIVATIONS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_map_of_the_tree():
    block = README.split("## The tree")[1].split("```")[1]
    top = ""
    for line in block.strip().splitlines():
        for folder in line.split("  ")[0 if not line.startswith(" ") else 1].split():
            top = top if line.startswith(" ") else folder
            assert (ROOT / (top if line.startswith(" ") else "") / folder).is_dir(), line
    described = set(re.findall(r"^(?:  )?(\w+)/", block, re.MULTILINE))
    for package in ("ktops", "ktops_csrc"):
        folders = {
            path.parent.name for path in (ROOT / package).glob("*/*") if path.suffix in (".py", ".cpp", ".h")
        }
        assert folders - {"__pycache__"} <= described


@pytest.mark.parametrize("op", OPS)
def test_the_ops_page_gives_the_schema(op):
    page = (ROOT / "docs" / "ops.md").read_text()
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    blocks = [text for language, text in fenced if not language]
    arguments, *schemas = (" ".join(block.split()) for block in blocks)
    page = "\n".join(schemas).replace("ARGUMENTS", arguments)
    assert str(getattr(torch.ops.kt, op).default._schema) in page


def test_every_op_is_in_the_list_above():
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("kt::")
    }
    assert registered == set(OPS)
