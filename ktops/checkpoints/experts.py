"""Provides the experts of a projection [E, N, K] one by one, from files or memory, or quantized."""

import copy
import ctypes
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ktops._display import Step, no_step
from ktops._huge_pages import in_huge_pages
from ktops._workers import Workers, require_not_stopped
from ktops.checkpoints.errors import CheckpointError
from ktops.checkpoints.matrix import Field, Matrix
from ktops.checkpoints.view import View
from ktops.checkpoints.windows import fit_windows, map_windows
from ktops.formats import Codes, ExpertWeight, get_format
from ktops.formats.plain import PLAIN

CHUNK_WEIGHTS = 1 << 18
"""Number of weights held as floats at a time, rounded to blocks of 128 rows."""

QUANTIZED_WEIGHTS = 1 << 21
"""Number of weights quantized at a time without decoding them, likewise; conversions can stop in between."""


class Experts(ABC):
    """Weights [E, N, K] that are produced expert by expert.

    Attributes:
        format, group_size, shape: as in :class:`ktops.ExpertWeight`.
        gating: of gate_up_proj or up_proj, its order of rows; None if unknown, and for down_proj.
        mapped: number of bytes that :meth:`read` maps instead of reading.
        refusal: the error message if their format in the files cannot be kept, otherwise None.
    """

    format: str
    group_size: int
    shape: tuple[int, int, int]
    gating: str | None = None
    refusal: str | None = None

    @property
    def mapped(self) -> int:
        return 0

    @abstractmethod
    def expert(self, index: int) -> Codes:
        """Returns the tensors of one expert: weight [N, ...], scale and zero [N, G].

        Several threads may ask for different experts at once.
        """

    @property
    def stand_in(self) -> Codes:
        """The tensors of one expert on the meta device: their dtypes and shapes."""
        return self.expert(0).map(lambda tensor: tensor.to("meta"))

    @property
    def nbytes(self) -> int:
        """Size of all experts in memory, in bytes."""
        return len(self) * sum(tensor.nbytes for tensor in self.stand_in if tensor is not None)

    def name(self, index: int) -> str:
        """Returns the name of an expert for error messages."""
        return f"expert {index}"

    def part(self, experts: range) -> "Experts":
        """Returns consecutive ones of these experts, such as those of one process."""
        return Part(self, experts)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Codes]:
        return (self.expert(index) for index in range(len(self)))

    def read(self, dtype: torch.dtype = torch.bfloat16, step: Step = no_step) -> ExpertWeight:
        """Reads all experts into memory, as an ExpertWeight that computes in dtype."""
        codes = self.stand_in.map(lambda tensor: _new((len(self), *tensor.shape), tensor.dtype))

        def fill(index: int) -> None:
            for whole, part in zip(codes, self.expert(index), strict=True):
                if whole is not None:
                    assert part is not None
                    whole[index] = part

        with Workers() as workers:
            for _ in workers.in_order(partial(fill, index) for index in range(len(self))):
                step(1)
        give_back_freed_memory()
        return self._weight(codes, dtype)

    def _weight(self, codes: Codes, dtype: torch.dtype) -> ExpertWeight:
        return ExpertWeight(self.format, self.shape, *codes, group_size=self.group_size, dtype=dtype)


class Part(Experts):
    """Consecutive ones of other experts."""

    def __init__(self, source: Experts, experts: range) -> None:
        self.source, self.first = source, experts.start
        self.format, self.group_size, self.gating = source.format, source.group_size, source.gating
        self.shape = len(experts), *source.shape[1:]

    def expert(self, index: int) -> Codes:
        return self.source.expert(self.first + index)

    def name(self, index: int) -> str:
        return self.source.name(self.first + index)


class Held(Experts):
    """The experts of an :class:`ktops.ExpertWeight`."""

    def __init__(self, weight: ExpertWeight) -> None:
        num_experts, rows, columns = weight.shape
        self.weight, self.shape = weight, (num_experts, rows, columns)
        self.format, self.group_size = weight.format, weight.group_size

    def expert(self, index: int) -> Codes:
        return self.weight.expert(index)


class StoredExperts(Experts):
    """The experts of a projection as a checkpoint stores them.

    Attributes:
        scheme: name of the checkpoint's storage scheme.
        mmap: whether :meth:`read` also maps experts that are scattered over a file; see :meth:`in_place`.
    """

    scheme: str
    mmap = False

    def in_place(self) -> "StoredExperts":
        """Returns these experts, to be used where they lie in the files if at all possible.

        The tensors then have gaps between the experts, and may begin at any address.
        """
        made = copy.copy(self)
        made.mmap = True
        return made


class FileExperts(StoredExperts):
    """Experts in files, mapped if their bytes are contiguous in the layout of a format, otherwise read.

    Args:
        experts: for every expert, the matrices to stack by rows: one, or gate and up.

    Attributes:
        first: the number of the first expert in its layer.
    """

    first = 0

    def __init__(self, experts: list[list[Matrix]]) -> None:
        self.experts = experts
        first = experts[0]
        for index, parts in enumerate(experts):
            for part, expected in zip(parts, first, strict=True):
                if part.layout != expected.layout:
                    raise CheckpointError(
                        f"{part.name}: expert {index} differs from expert 0: expected {expected}, got {part}"
                    )
        if any(part.columns != first[0].columns for part in first):
            raise CheckpointError(
                f"{first[1].name}: must have {first[0].columns} columns, like {first[0].name}, got "
                f"{first[1].columns}"
            )
        self.scheme = " and ".join(dict.fromkeys(part.scheme for part in first))
        self.shape = len(experts), sum(part.rows for part in first), first[0].columns
        self.format, self.group_size = first[0].format, first[0].group_size
        self.refusal = next((part.refusal for part in first if part.refusal), None)
        if 0 in self.shape:
            raise CheckpointError(f"{first[0].name}: must not be empty, got shape {list(self.shape)}")
        codes = self.stand_in.map(lambda tensor: tensor.expand(len(self), *tensor.shape))
        try:
            get_format(self.format).check(codes, torch.Size(self.shape), self.group_size)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{first[0].name}: {error}") from None

    def part(self, experts: range) -> "FileExperts":
        """Returns consecutive ones of these experts, mapped where they are."""
        made = FileExperts(self.experts[experts.start : experts.stop])
        made.gating, made.mmap, made.first = self.gating, self.mmap, self.first + experts.start
        return made

    @property
    def stand_in(self) -> Codes:
        """The tensors of one expert on the meta device: their dtypes and shapes."""
        return Codes._make(fields and _stand_in(fields) for fields in self._fields(0))

    def _fields(self, index: int) -> Iterator[list[Field] | None]:
        """Yields the parts of every tensor of the format, in row order; None for one it lacks."""
        for fields in zip(*(part.fields for part in self.experts[index]), strict=True):
            yield [field for field in fields if field is not None] or None

    def expert(self, index: int) -> Codes:
        return Codes._make(fields and _read_stacked(fields) for fields in self._fields(index))

    def name(self, index: int) -> str:
        return f"expert {self.first + index} of {' and '.join(part.name for part in self.experts[index])}"

    def read(self, dtype: torch.dtype = torch.bfloat16, step: Step = no_step) -> ExpertWeight:
        """Maps all experts or reads them into memory, as an ExpertWeight that computes in dtype."""
        columns = list(zip(*(self._fields(index) for index in range(len(self))), strict=True))
        steps = (step, no_step, no_step)
        codes = (
            None if experts[0] is None else self._read_tensor(experts, step)
            for experts, step in zip(columns, steps, strict=True)
        )
        return self._weight(Codes._make(codes), dtype)

    @property
    def mapped(self) -> int:
        """Number of bytes that :meth:`read` maps."""
        columns = zip(*(self._fields(index) for index in range(len(self))), strict=True)
        views = (self._views(experts) for experts in columns if experts[0] is not None)
        return sum(view.nbytes for found in views for view in found or ())

    def _views(self, experts: Sequence[list[Field]]) -> list[View] | None:
        """Returns what to map: one view of all experts, or of each with ``mmap``; None to read them."""
        whole = contiguous([field.view for fields in experts for field in fields])
        if whole is not None:
            return [whole]
        if not self.mmap:
            return None
        found = (contiguous([field.view for field in fields]) for fields in experts)
        views = [view for view in found if view is not None]
        return views if len(views) == len(experts) and fit_windows(views) else None

    def _read_tensor(self, experts: Sequence[list[Field]], step: Step) -> Tensor:
        views = self._views(experts)
        shape = (len(experts), *_stacked_shape(experts[0]))
        if views is not None:
            step(len(experts))
            if len(views) == 1:
                return views[0].viewed(views[0].dtype, *shape).map()
            return map_windows(views, shape[1:])
        out = _new(shape, experts[0][0].dtype)
        tasks = (partial(_read_stacked, *pair) for pair in zip(experts, out, strict=True))
        with Workers() as workers:
            for _ in workers.in_order(tasks):
                step(1)
        return out


def _new(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return in_huge_pages(torch.empty(shape, dtype=dtype, device="cpu"))


def _stand_in(fields: list[Field]) -> Tensor:
    return torch.empty(_stacked_shape(fields), dtype=fields[0].dtype, device="meta")


def _stacked_shape(fields: list[Field]) -> tuple[int, ...]:
    return sum(field.shape[0] for field in fields), *fields[0].shape[1:]


def _read_stacked(fields: list[Field], out: Tensor | None = None) -> Tensor:
    """Reads the parts of one expert's tensor, stacked by rows."""
    if out is None:
        if len(fields) == 1:
            return fields[0].read()
        out = torch.empty(_stacked_shape(fields), dtype=fields[0].dtype)
    row = 0
    for field in fields:
        field.read_into(out[row : row + field.shape[0]])
        row += field.shape[0]
    return out


def contiguous(views: list[View | None]) -> View | None:
    """Returns the views as one view if they are adjacent in a file, in order and aligned; otherwise None."""
    first = views[0]
    if first is None or first.offset % first.dtype.itemsize:
        return None
    end = first.offset
    for view in views:
        if view is None or view.file is not first.file or view.offset != end:
            return None
        end += view.nbytes
    count = (end - first.offset) // first.dtype.itemsize
    return View(first.name, first.file, first.offset, first.dtype, (count,))


class Requantized(Experts):
    """Experts converted to another format, through float32.

    Args:
        source: the experts.
        format, group_size, method: as in :func:`ktops.quantize`.

    Raises:
        ValueError: the format does not support the group size or the method, cannot hold such rows, or can
            only be read.
    """

    def __init__(
        self, source: Experts, format: str, group_size: int | None = None, method: str = "rtn"
    ) -> None:
        self.known = get_format(format)
        self.source, self.method = source, method
        self.format, self.shape, self.gating = format, source.shape, source.gating
        self.group_size = self.known.check_quantizable(self.shape[-1], group_size, method)

    def part(self, experts: range) -> "Requantized":
        """Returns consecutive ones of these experts."""
        return Requantized(self.source.part(experts), self.format, self.group_size, self.method)

    @property
    def stand_in(self) -> Codes:
        """The tensors of one expert on the meta device: their dtypes and shapes."""
        _, rows, columns = self.shape
        dtypes = self.known.quantize(torch.zeros(min(rows, 128), columns), self.group_size, self.method)
        per_group = self.known.scale_shape(rows, columns, self.group_size)
        shapes = (rows, self.known.row_elements(columns)), per_group, per_group
        return Codes._make(
            tensor if tensor is None else torch.empty(shape, dtype=tensor.dtype, device="meta")
            for tensor, shape in zip(dtypes, shapes, strict=True)
        )

    def expert(self, index: int) -> Codes:
        try:
            made = [
                self.known.quantize(rows, self.group_size, self.method)
                for rows in _rows_of(self.source, index)
            ]
        except ValueError as error:
            raise CheckpointError(f"{self.source.name(index)}: {error}") from None
        tensors = zip(*made, strict=True)
        return Codes._make(None if rows[0] is None else torch.cat(rows) for rows in tensors)


def _rows_of(experts: Experts, index: int) -> Iterator[Tensor]:
    """Yields the weights of an expert, some rows at a time: in their dtype or, for codes, in float32."""
    if experts.format in PLAIN.values():
        for rows in experts.expert(index).weight.split(_num_rows(QUANTIZED_WEIGHTS, experts.shape[-1])):
            require_not_stopped()
            yield rows
    else:
        yield from float_rows(experts, index)


def float_rows(experts: Experts, index: int, ranges: Iterable[range] | None = None) -> Iterator[Tensor]:
    """Yields the weights of an expert in float32, some rows at a time; equal shapes give equal pieces.

    Args:
        ranges: the rows, from multiples of 128 on. Default: all.
    """
    codes, (_, rows, columns) = experts.expert(index), experts.shape
    chunk = _num_rows(CHUNK_WEIGHTS, columns)
    for wanted in [range(rows)] if ranges is None else ranges:
        for row in range(wanted.start, wanted.stop, chunk):
            require_not_stopped()
            part = codes.map(partial(_rows, begin=row, end=min(wanted.stop, row + chunk), rows=rows))
            made = part.map(lambda tensor: tensor[None].contiguous())
            yield torch.ops.kt.dequantize(*made, experts.format, experts.group_size, columns)[0]


def _num_rows(weights: int, columns: int) -> int:
    """Returns the multiple of 128 rows that has about so many weights."""
    return max(1, weights // (128 * columns)) * 128


def give_back_freed_memory() -> None:
    """Returns freed memory to the system; glibc keeps blocks of up to 32 MiB, far more than is in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it; others keep less
    if trim is not None:
        trim(0)


def _rows(tensor: Tensor, begin: int, end: int, rows: int) -> Tensor:
    """Returns the rows [begin, end) of a tensor that has one entry per row, or one per 128 rows."""
    if tensor.shape[0] == rows:
        return tensor[begin:end]
    return tensor[begin // 128 : -(-end // 128)]
