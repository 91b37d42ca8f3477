"""Methods and functions of other libraries that ktops replaces while it is enabled."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType

from torch import nn


class Replacements:
    """Replaces methods of classes and functions of modules, until they are restored or the block ends.

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

    def __enter__(self) -> "Replacements":
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

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


@contextmanager
def replaced_in(modules: Iterable[nn.Module], name: str, method: Callable) -> Iterator[None]:
    """Replaces a method of single modules; the replacement gets the module first, as a method does.

    Args:
        modules: none of which has an attribute of its own with this name.
        name: of the method.
        method: takes its place within the block.
    """
    modules = list(modules)
    for module in modules:
        module.__dict__[name] = functools.partial(method, module)
    try:
        yield
    finally:
        for module in modules:
            module.__dict__.pop(name, None)
