"""Methods and functions of other libraries that ktops replaces while it is enabled."""

import inspect
from collections.abc import Callable
from types import ModuleType


class Replacements:
    """Replaces methods of classes and functions of modules, and restores them.

    Attributes:
        original: name -> the class's or the module's own.

    Example:
        >>> replacements = Replacements()
        >>> replacements.install(BaseTuner, inject_adapter=_inject_adapter)
        >>> replacements.original["inject_adapter"](tuner, model, "default")
        >>> replacements.restore()
    """

    def __init__(self) -> None:
        self.original: dict[str, Callable] = {}
        self._stored: list[tuple[type | ModuleType, str, object]] = []

    def __bool__(self) -> bool:
        return bool(self._stored)

    def install(self, owner: type | ModuleType, **methods: object) -> None:
        """Replaces methods of a class, or functions of a module.

        A static method must be given as ``staticmethod``.
        """
        for name, method in methods.items():
            self.original[name] = getattr(owner, name)
            self._stored.append((owner, name, inspect.getattr_static(owner, name)))
            setattr(owner, name, method)

    def restore(self) -> None:
        """Restores the original ones."""
        while self._stored:
            setattr(*self._stored.pop())
        self.original.clear()
