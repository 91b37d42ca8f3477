"""An installed ktops: version, types, cheap imports."""

import os
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
        "print(tuple(ktops.moe_sft(**moe_inputs(T=3, H=8, I=4, E=4, K=2)).shape))"
    )
    assert python(code) == "(3, 8)"


def test_dir_has_what_is_imported_late():
    assert set(ktops.__all__) <= set(dir(ktops))


@pytest.mark.parametrize("name", ktops.__all__)
def test_public_names(name):
    assert getattr(ktops, name) is not None


def test_packages_are_imported_when_used():
    """As the documentation writes them, after ``import ktops`` alone."""
    python("import ktops; ktops.checkpoints.open_checkpoint; ktops.integrations; ktops.compat.install()")
    assert {"checkpoints", "compat", "integrations"} <= set(dir(ktops))


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'ktops' has no attribute 'moe_stf'"):
        ktops.moe_stf  # noqa: B018


def test_source_distribution_can_be_built(tmp_path):
    """SOURCES.txt lists every file of the package and of the C++ sources, including headers."""
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


def test_startup_file_of_ktops_launch_is_installed():
    """Else: pip install --no-build-isolation --no-deps -e ."""
    assert "ktops_launch.pth" in {str(file) for file in metadata.files("ktops")}


def test_dependencies():
    """Only torch is needed; everything else is an extra."""
    required = [line for line in metadata.requires("ktops") if "extra ==" not in line]
    assert [re.match(r"[\w-]+", line).group() for line in required] == ["torch"]


def test_tools_of_the_tests_are_pinned():
    """Versions are pinned except where an older Python needs an older one."""
    project = (ROOT / "pyproject.toml").read_text()
    extra = re.search(r"^test = \[\n(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    lines = re.findall(r'"(.+)"', extra[1])
    pinned = {line.split("==")[0] for line in lines if re.match(r"[\w-]+==\d", line)}
    assert {"ruff", "mypy", "hypothesis", "pytest", "compressed-tensors", "gguf"} <= pinned
    others = [line for line in lines if not re.match(r"[\w-]+==\d", line)]
    assert all(line == "ktops[cli,formats]" or line.endswith("python_version<'3.11'") for line in others)


def test_lower_bounds_are_those_of_the_messages():
    bounds = dict(re.findall(r'"(transformers|peft)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    integrations = ROOT / "ktops" / "integrations"
    [transformers] = re.findall(
        r"needs transformers>=([\d.]+):", (integrations / "transformers" / "__init__.py").read_text()
    )
    [peft] = re.findall(r'^MIN_VERSION = "(.+)"', (integrations / "peft.py").read_text(), re.MULTILINE)
    assert bounds == {"transformers": transformers, "peft": peft}
    docs = ROOT / "docs"
    assert f"Needs `transformers>={transformers}`" in (docs / "transformers.md").read_text()
    assert f"Needs `peft>={peft}`" in (docs / "peft.md").read_text()


def test_ci_reads_the_lower_bounds_of_the_installed_package(tmp_path):
    folder = tmp_path / "ktops-0.0.0.dist-info"
    folder.mkdir()
    requires = [
        "torch>=2.10",
        "gguf; extra == 'formats'",
        "transformers>=5.0; extra == 'transformers'",
        'peft>=0.18; extra == "transformers"',
        "ktops[transformers]; extra == 'cli'",
    ]
    head = "Metadata-Version: 2.4\nName: ktops\nVersion: 0.0.0\n"
    (folder / "METADATA").write_text(head + "".join(f"Requires-Dist: {line}\n" for line in requires))
    command = [sys.executable, ROOT / ".ci" / "oldest.py"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    printed = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["transformers==5.0", "peft==0.18"]
