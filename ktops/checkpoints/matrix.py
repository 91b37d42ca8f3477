"""A matrix [N, K] of one expert in a checkpoint, described as the tensors of a weight format."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ktops.checkpoints.errors import CheckpointError
from ktops.checkpoints.view import View
from ktops.formats.format import Codes


@dataclass(frozen=True)
class Field:
    """A tensor of a format that is not read yet: either bytes of a file, or the result of a function.

    Attributes:
        shape, dtype: of the tensor.
        view: its place in a file, or None.
        make: creates the tensor if there is no view.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    view: View | None = None
    make: Callable[[], Tensor] | None = None

    @classmethod
    def of(cls, view: View) -> "Field":
        return cls(view.shape, view.dtype, view=view)

    def read(self) -> Tensor:
        if self.make is not None:
            return self.make()
        assert self.view is not None
        return self.view.read()

    def read_into(self, out: Tensor) -> None:
        if self.make is not None:
            out.copy_(self.make())
        else:
            assert self.view is not None
            self.view.read_into(out)

    def then(self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype=None) -> "Field":
        """Returns a field that applies ``change`` to this tensor when it is read."""
        return Field(shape, dtype or self.dtype, make=lambda: change(self.read()))


class Fields(NamedTuple):
    """Like :class:`ktops.formats.Codes`, but not read yet."""

    weight: Field
    scale: Field | None = None
    zero: Field | None = None

    def read(self) -> Codes:
        return Codes._make(None if field is None else field.read() for field in self)


@dataclass(frozen=True)
class Matrix:
    """A matrix [rows, columns] in a format.

    Attributes:
        scheme: name of the checkpoint's storage scheme.
        name: name of its weight and of the file, for messages.
        refusal: the error message if ktops has no format for it and ``format`` only holds its values.
    """

    format: str
    group_size: int
    rows: int
    columns: int
    fields: Fields
    scheme: str
    name: str
    refusal: str | None = None

    def __str__(self) -> str:
        kinds = ", ".join(f"{field.dtype} {list(field.shape)}" for field in self.fields if field)
        return f"{self.format} [{self.rows}, {self.columns}] of {kinds}"

    @property
    def layout(self) -> tuple:
        """The properties that all experts of a projection must share."""
        kinds = tuple(field and (field.dtype, field.shape) for field in self.fields)
        return self.format, self.group_size, self.rows, self.columns, kinds


def expect(view: View, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """Raises CheckpointError unless the tensor has the shape and one of the dtypes."""
    if dtypes and view.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise CheckpointError(f"{view}: must be {names}, got {view.dtype}")
    if view.shape != tuple(shape):
        raise CheckpointError(f"{view}: must have shape {list(shape)}, got {list(view.shape)}")


def expect_dim(view: View, dim: int) -> None:
    if view.dim != dim:
        raise CheckpointError(f"{view}: must have {dim} dimensions, got shape {list(view.shape)}")
