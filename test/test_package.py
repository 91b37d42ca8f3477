"""What an installed ktops is: version, types, imports that cost nothing."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import ktops

ROOT = Path(__file__).parents[1]
OPTIONAL = ("transformers", "peft", "accelerate", "typer", "rich", "matplotlib", "safetensors", "tokenizers")


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?(dev|rc|a|b)\d+)?", ktops.__version__)
    assert metadata.version("ktops") == ktops.__version__


def test_types_are_announced():
    assert (Path(ktops.__file__).parent / "py.typed").exists()


def test_extension_is_a_stable_abi_module():
    from ktops import _C

    assert _C.__file__.endswith(".abi3.so")


def test_import_brings_only_torch():
    loaded = python(
        f"import sys, ktops; print([name for name in {OPTIONAL} if name in sys.modules])\n"
        "import ktops.compat, ktops.testing.inputs, ktops.testing.compare, ktops.testing.budgets\n"
        f"print([name for name in {OPTIONAL} if name in sys.modules])"
    )
    assert loaded == "[]\n[]"


def test_import_without_the_optional_packages():
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL}))\n"
        "import torch, ktops\n"
        "from ktops.testing.inputs import moe_inputs\n"
        "print(tuple(ktops.moe_sft(**moe_inputs(3, 8, 4, 4, 2)).shape))"
    )
    assert python(code) == "(3, 8)"


@pytest.mark.parametrize("name", ktops.__all__)
def test_public_names(name):
    assert getattr(ktops, name) is not None


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'ktops' has no attribute 'moe_stf'"):
        ktops.moe_stf  # noqa: B018


def test_source_distribution_can_be_built(tmp_path):
    """It has every file of the package and of the C++ sources, headers too."""
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    listed = set((tmp_path / "ktops.egg-info" / "SOURCES.txt").read_text().splitlines())
    needed = [path for folder in ("ktops", "ktops_csrc") for path in (ROOT / folder).rglob("*.*")]
    needed = [path for path in needed if path.suffix not in (".pyc", ".so")]
    assert {str(path.relative_to(ROOT)) for path in needed} <= listed
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= listed


def test_command_is_installed():
    (entry,) = [point for point in metadata.entry_points(group="console_scripts") if point.name == "ktops"]
    assert callable(entry.load())


def test_dependencies():
    """Only torch is needed; everything else is an extra."""
    required = [line for line in metadata.requires("ktops") if "extra ==" not in line]
    assert [re.match(r"[\w-]+", line).group() for line in required] == ["torch"]
