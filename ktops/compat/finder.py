"""Serves the modules of KTransformers' kt-kernel by their own names.

Imports the standard library alone, so that a process can install the finder at its start without importing
torch: load this file by its path, as the module ``ktops.compat.finder``.
"""

import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType

VERSION = "0.7.2+ktops"
"""The version of kt-kernel whose names are served, marked as ours."""

FOLDER = Path(__file__).parent
PACKAGES = ("kt_kernel", "kt_kernel_ext")
ALIASES = {"llamafactory.model.model_utils.kt_moe": "kt_moe"}


class AliasLoader(Loader):
    """Loads a module of ktops.compat under another name, as the same object under both names."""

    def __init__(self, target: str) -> None:
        self.target = target

    def exec_module(self, module: ModuleType) -> None:
        """Replaces the new, empty module by the target, which is the documented way to do so."""
        assert module.__spec__ is not None
        sys.modules[module.__spec__.name] = importlib.import_module(self.target)


class KTKernelDistribution(Distribution):
    """What ``importlib.metadata`` reports for kt-kernel."""

    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        return (
            f"Metadata-Version: 2.1\nName: kt-kernel\nVersion: {VERSION}\n"
            "Summary: The names of kt-kernel, served by ktops\n"
        )

    def locate_file(self, path) -> Path:
        return FOLDER / path


class KTKernelFinder(DistributionFinder):
    """Finds kt_kernel, kt_kernel_ext and their submodules in ``ktops.compat``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        ours = fullname if fullname.partition(".")[0] in PACKAGES else ALIASES.get(fullname)
        if ours is None:
            return None
        if fullname in ALIASES and PathFinder.find_spec(fullname, path):
            return None
        if fullname in PACKAGES:
            refuse_beside_real()
        module = FOLDER.joinpath(*ours.split("."))
        package = module / "__init__.py"
        file = package if package.exists() else module.with_name(f"{module.name}.py")
        if not file.exists():
            return None
        spec = ModuleSpec(
            fullname, AliasLoader(f"ktops.compat.{ours}"), origin=str(file), is_package=file == package
        )
        if spec.submodule_search_locations is not None:
            spec.submodule_search_locations.append(str(module))
        return spec

    def find_distributions(self, context=None) -> Iterator[Distribution]:
        name = None if context is None else context.name
        if name is None or name.lower().replace("_", "-").replace(".", "-") == "kt-kernel":
            yield KTKernelDistribution()


def _is_ours(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).is_relative_to(FOLDER)


def _installed() -> list[MetaPathFinder]:
    return [finder for finder in sys.meta_path if isinstance(finder, KTKernelFinder)]


def refuse_beside_real() -> None:
    """Raises RuntimeError if the real kt-kernel is installed, or has been imported."""
    for name in PACKAGES:
        spec = PathFinder.find_spec(name)
        found = getattr(spec, "origin", None)
        loaded = sys.modules.get(name)
        if loaded is not None and not _is_ours(loaded):
            found = getattr(loaded, "__file__", None) or found
        if found is not None:
            raise RuntimeError(
                f"ktops cannot serve the module {name} beside the real one, {found}: "
                "pip uninstall kt-kernel, or leave ktops.compat.install() and ktops' launcher out"
            )


def install() -> None:
    """Makes ``import kt_kernel`` import ktops' replacement, in this process.

    Code that imports ``kt_kernel``, ``kt_kernel.sft`` or ``kt_kernel_ext``, tests for them with
    ``importlib.util.find_spec``, or asks ``importlib.metadata`` for the version of ``kt-kernel`` then finds
    them. Calling it again has no effect.

    Raises:
        RuntimeError: the real kt-kernel is installed.

    Example:
        >>> ktops.compat.install()
        >>> from kt_kernel import KTMoEWrapper
        >>> KTMoEWrapper is ktops.compat.KTMoEWrapper
        True
    """
    if not _installed():
        refuse_beside_real()
        sys.meta_path.insert(0, KTKernelFinder())


def uninstall() -> None:
    """Undoes :func:`install`. Modules imported under these names work on, under ktops' own."""
    for finder in _installed():
        sys.meta_path.remove(finder)
    for name, module in list(sys.modules.items()):
        if (name in ALIASES or name.partition(".")[0] in PACKAGES) and _is_ours(module):
            del sys.modules[name]
