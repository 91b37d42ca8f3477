"""ktops.compat.install: kt_kernel by its own name."""

import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest

from ktops import compat
from ktops.compat import finder


def test_kt_kernel_is_found_only_while_installed(installed):
    assert importlib.util.find_spec("kt_kernel") and importlib.util.find_spec("kt_kernel_ext")
    assert importlib.util.find_spec("kt_kernel.sft").submodule_search_locations
    assert importlib.metadata.version("kt-kernel") == importlib.metadata.version("kt_kernel")
    assert importlib.metadata.version("kt-kernel").startswith("0.7.")
    compat.uninstall()
    assert importlib.util.find_spec("kt_kernel") is None
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("kt-kernel")


def test_modules_are_those_of_compat(installed):
    import kt_kernel
    import kt_kernel.experts
    import kt_kernel.sft

    import ktops.compat.kt_kernel.sft

    assert kt_kernel is sys.modules["ktops.compat.kt_kernel"]
    assert kt_kernel.sft is ktops.compat.kt_kernel.sft
    assert kt_kernel.KTMoEWrapper is kt_kernel.experts.KTMoEWrapper is compat.KTMoEWrapper
    assert kt_kernel.AMXSFTMoEWrapper and kt_kernel.generate_gpu_experts_masks and kt_kernel.__cpu_variant__
    with pytest.raises(AttributeError, match=r"ktops does not serve kt_kernel\.nothing; it serves "):
        kt_kernel.nothing  # noqa: B018
    assert kt_kernel.__version__ == importlib.metadata.version("kt-kernel")
    assert kt_kernel.__spec__.name == "ktops.compat.kt_kernel"


def test_other_distributions_and_modules_are_not_ours(installed):
    assert importlib.metadata.version("torch")
    assert importlib.util.find_spec("kt_kernel.nothing") is None
    with pytest.raises(ModuleNotFoundError, match=r"kt_kernel\.nothing"):
        importlib.import_module("kt_kernel.nothing")
    names = [distribution.name for distribution in importlib.metadata.distributions()]
    assert names.count("kt-kernel") == 1 and "torch" in names


def test_install_twice_is_install_once():
    before = list(sys.meta_path)
    compat.install()
    compat.install()
    assert len(sys.meta_path) == len(before) + 1
    compat.uninstall()
    assert sys.meta_path == before


def test_a_real_kt_kernel_is_never_shadowed(tmp_path, monkeypatch):
    (tmp_path / "kt_kernel").mkdir()
    (tmp_path / "kt_kernel" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = list(sys.meta_path)
    with pytest.raises(RuntimeError, match=r"beside the real one.*pip uninstall kt-kernel"):
        compat.install()
    assert sys.meta_path == before


def test_a_real_kt_kernel_that_comes_later_is_an_error(installed, tmp_path, monkeypatch):
    (tmp_path / "kt_kernel").mkdir()
    (tmp_path / "kt_kernel" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match="beside the real one"):
        importlib.import_module("kt_kernel")


def test_a_folder_of_that_name_is_no_kt_kernel(tmp_path, monkeypatch):
    (tmp_path / "kt_kernel").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    compat.install()
    compat.uninstall()


@pytest.mark.parametrize("theirs", [False, True])
def test_the_usage_documents_module_of_llamafactory(installed, tmp_path, monkeypatch, theirs):
    folder = tmp_path / "llamafactory" / "model" / "model_utils"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent, folder.parent.parent):
        (package / "__init__.py").write_text("")
    if theirs:
        (folder / "kt_moe.py").write_text("MOELayerWrapper = None")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        from llamafactory.model.model_utils.kt_moe import MOELayerWrapper

        assert MOELayerWrapper is (None if theirs else compat.MOELayerWrapper)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "llamafactory"]:
            del sys.modules[name]


LIGHT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("ktops.compat.finder", {path!r})
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
module.install()
import importlib.metadata
assert importlib.util.find_spec("kt_kernel") and importlib.metadata.version("kt-kernel")
assert "torch" not in sys.modules and "ktops" not in sys.modules
from kt_kernel import KTMoEWrapper, generate_gpu_experts_masks
import kt_kernel.sft, ktops.compat
assert "transformers" not in sys.modules and "torch._dynamo" not in sys.modules
assert kt_kernel.sft is ktops.compat.kt_kernel.sft
assert ktops.compat.install is module.install
ktops.compat.install()
assert sum(type(finder).__name__ == "KTKernelFinder" for finder in sys.meta_path) == 1
"""


def test_the_finder_can_be_installed_without_torch():
    result = subprocess.run([sys.executable, "-c", LIGHT.format(path=finder.__file__)], capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
