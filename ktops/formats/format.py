"""What a weight format is to Python: its tensors, and the two directions between them and floats."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

METHODS = ("rtn", "mse", "hqq")
"""How :func:`ktops.quantize` chooses scales."""


class Codes(NamedTuple):
    """The tensors of weights [..., N, K] in a format; what a format does not have is None."""

    weight: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Codes":
        """The same of each tensor there is."""
        return Codes._make(None if tensor is None else function(tensor) for tensor in self)


def stacked(experts: Iterable[Codes], count: int) -> Codes:
    """The codes of so many experts, at least one, as tensors [count, ...], filled as they come."""
    out: Codes | None = None
    for index, codes in enumerate(experts):
        if out is None:
            out = codes.map(lambda tensor: tensor.new_empty(count, *tensor.shape))
        for whole, part in zip(out, codes, strict=True):
            if whole is not None:
                assert part is not None
                whole[index] = part
    assert out is not None
    return out


class Format(ABC):
    """A weight format: the Python half of ``ktops_csrc/formats``.

    Attributes:
        name: in ``weight_format``, ``ExpertWeight.format`` and files.
        dtype: of the weight tensor, whose last dimension is :meth:`row_elements` long.
        group_sizes: what ``group_size`` may be: 0 stands for one scale per row, or for blocks that hold their
            own scales; -1 in the tuple for any multiple of 32.
        methods: of quantization that it knows.
        has_scale, has_zero: which tensors there are besides the weight.
        written: whether weights can be quantized to it, or only read.
    """

    name: str
    dtype: torch.dtype
    group_sizes: tuple[int, ...] = (0,)
    methods: tuple[str, ...] = ("rtn",)
    has_scale = False
    has_zero = False
    default_group_size = 0
    written = True

    @abstractmethod
    def row_elements(self, columns: int) -> int:
        """Elements of the weight tensor that hold a row of ``columns`` weights.

        Raises:
            ValueError: a row of so many weights cannot be stored.
        """

    @abstractmethod
    def quantize(self, weight: Tensor, group_size: int, method: str) -> Codes:
        """The codes nearest to float32 weights [..., N, K], by one of ``methods``."""

    def require_finite(self, weight: Tensor) -> None:
        """Raises ValueError if a weight is NaN or infinite, which codes and scales cannot hold."""
        if not bool(weight.isfinite().all()):
            raise ValueError(f"format {self.name!r} needs finite weights, got NaN or infinity")

    @abstractmethod
    def dequantize(self, codes: Codes, columns: int, group_size: int) -> Tensor:
        """The float32 weights [..., N, columns]: the specification of the kernels' decoding, bit for bit."""

    def scale_shape(self, rows: int, columns: int, group_size: int) -> tuple[int, ...]:
        """The last two dimensions of the scale, and of the zero point if there is one."""
        return rows, num_groups(columns, group_size)

    def check(self, codes: Codes, shape: torch.Size, group_size: int) -> None:
        """Raises ValueError or TypeError, naming the tensor, unless these are codes of weights [E, N, K]."""
        self.check_group_size(group_size)
        num_experts, rows, columns = shape
        expect("weight", codes.weight, (self.dtype,), (num_experts, rows, self.row_elements(columns)))
        grouped = (num_experts, *self.scale_shape(rows, columns, group_size))
        for name, tensor, wanted, dtypes in (
            ("scale", codes.scale, self.has_scale, self.scale_dtypes()),
            ("zero", codes.zero, self.has_zero, (*FLOAT_SCALES, torch.uint8)),
        ):
            if not wanted and tensor is not None:
                raise ValueError(f"{name} must be None for format {self.name!r}, got a tensor")
            if wanted:
                expect(name, tensor, dtypes, grouped)

    def scale_dtypes(self) -> tuple[torch.dtype, ...]:
        return FLOAT_SCALES

    def check_written(self) -> None:
        """Raises ValueError if weights cannot be quantized to the format."""
        return

    def has_group_size(self, group_size: int) -> bool:
        return group_size in self.group_sizes or (
            -1 in self.group_sizes and group_size > 0 and group_size % 32 == 0
        )

    def check_group_size(self, group_size: int) -> None:
        """Raises ValueError for a group_size that the format does not have."""
        if not self.has_group_size(group_size):
            names = ", ".join("any multiple of 32" if size == -1 else str(size) for size in self.group_sizes)
            raise ValueError(f"group_size must be one of {names} for format {self.name!r}, got {group_size}")

    def check_settings(self, group_size: int | None, method: str) -> int:
        """Checks what weights are to be quantized with.

        Returns:
            The group size: for None, the format's default.

        Raises:
            ValueError: the format does not have the group size or the method.
        """
        if method not in self.methods:
            raise ValueError(
                f"method must be one of {', '.join(self.methods)} for format {self.name!r}, got {method!r}"
            )
        group_size = self.default_group_size if group_size is None else group_size
        self.check_group_size(group_size)
        return group_size

    def check_quantizable(self, columns: int, group_size: int | None, method: str) -> int:
        """The same for rows of so many weights.

        Raises:
            ValueError: also if the format can only be read, or cannot hold such rows.
        """
        group_size = self.check_settings(group_size, method)
        self.row_elements(columns)
        self.check_written()
        return group_size


FLOAT_SCALES = (torch.float32, torch.bfloat16, torch.float16)


def expect(name: str, tensor: Tensor | None, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    """Raises unless the tensor has one of the dtypes and the shape."""
    if tensor is None:
        raise ValueError(f"{name} must be a tensor of shape {list(shape)}, got None")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {names}, got {tensor.dtype}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def num_groups(columns: int, group_size: int) -> int:
    """Groups in a row; the last one may be shorter."""
    return 1 if group_size == 0 else -(-columns // group_size)


def in_groups(weight: Tensor, group_size: int) -> Tensor:
    """[..., K] -> [..., G, group_size], zeros beyond the end."""
    columns = weight.shape[-1]
    groups, size = num_groups(columns, group_size), group_size or columns
    return torch.nn.functional.pad(weight, (0, groups * size - columns)).unflatten(-1, (groups, size))


def spread(per_group: Tensor, columns: int, group_size: int) -> Tensor:
    """[..., G] -> [..., columns] or [..., 1]: the value of every column's group, as float32."""
    per_group = per_group.float()
    return per_group if group_size == 0 else per_group.repeat_interleave(group_size, dim=-1)[..., :columns]
