"""One matrix [N, K] of one expert in a checkpoint, as the tensors of a weight format."""

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
    """A tensor of a format, known before it is read: bytes of a file as they are, or what is made of them.

    Attributes:
        shape, dtype: of the tensor.
        view: where it lies in a file, if it does.
        make: makes it, if not.
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
        """What ``change`` makes of this tensor."""
        return Field(shape, dtype or self.dtype, make=lambda: change(self.read()))


class Fields(NamedTuple):
    """As :class:`ktops.formats.Codes`, not yet read."""

    weight: Field
    scale: Field | None = None
    zero: Field | None = None

    def read(self) -> Codes:
        return Codes._make(None if field is None else field.read() for field in self)


@dataclass(frozen=True)
class Matrix:
    """A matrix [rows, columns] in a format.

    Attributes:
        scheme: what the checkpoint's way of storing it is called.
        name: of its weight in the file, with the file: for messages.
    """

    format: str
    group_size: int
    rows: int
    columns: int
    fields: Fields
    scheme: str
    name: str

    @property
    def layout(self) -> tuple:
        """What all experts of a projection have in common."""
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
