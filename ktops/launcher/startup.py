"""Calls ktops when a library that it integrates with has been imported.

Imports the standard library alone, and nothing of ktops until a hook runs: ``ktops_launch.pth`` loads this
file by its path at the start of every Python process under ``ktops launch``.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

HOOKS = {
    "transformers.modeling_utils": "ktops.integrations.transformers.default:enable",
    "transformers.trainer_callback": "ktops.integrations.training:enable",
    "transformers.cli.serving.model_manager": "ktops.cli.serve:enable",
    "peft": "ktops.integrations.peft:enable",
    "llamafactory.extras.misc": "ktops.integrations.llamafactory:allow_versions",
    "llamafactory.hparams.parser": "ktops.integrations.llamafactory.arguments:enable",
    "llamafactory.model.loader": "ktops.integrations.llamafactory.model:enable",
    "llamafactory.v1.core.base_trainer": "ktops.integrations.llamafactory.v1:enable",
}
"""Module -> the function, without arguments, that is called as soon as the module has been imported."""


class PostImportFinder(MetaPathFinder):
    """Finds a module where the other finders do, and calls its hook after the module's own code."""

    def __init__(self, hooks: dict[str, str]) -> None:
        self.hooks = hooks

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.hooks:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (
            finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec")
        )
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            _call_after(spec.loader, self.hooks[fullname])
        return spec


def _call_after(loader, hook: str) -> None:
    """Makes a loader's next ``exec_module`` call the hook at its end. The loader stays what it is, because
    libraries ask it for sources and resources."""
    execute: Callable[[ModuleType], None] = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        del loader.exec_module
        execute(module)
        _call(hook)

    loader.exec_module = exec_module


def _call(hook: str) -> None:
    where, _, name = hook.partition(":")
    getattr(importlib.import_module(where), name)()


def _load_finder() -> ModuleType:
    """Returns ``ktops.compat.finder``, without importing ktops and so torch."""
    name = "ktops.compat.finder"
    if name not in sys.modules:
        file = Path(__file__).parents[1] / "compat" / "finder.py"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def is_installed() -> bool:
    """True if this process waits for imports."""
    return any(isinstance(finder, PostImportFinder) for finder in sys.meta_path)


def install() -> None:
    """Waits for the imports in HOOKS, and serves the module ``kt_kernel``; a second call does nothing.

    Hooks of modules that have been imported already, by another file that Python runs at startup, are called.

    Raises:
        RuntimeError: the real kt-kernel is installed.
    """
    if not is_installed():
        sys.meta_path.insert(0, PostImportFinder(HOOKS))
        for hook in [hook for module, hook in HOOKS.items() if module in sys.modules]:
            _call(hook)
    _load_finder().install()
