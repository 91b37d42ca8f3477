"""The base class of weight formats: their tensors, and the conversion from and to floats."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ktops._huge_pages import in_huge_pages

METHODS = ("rtn", "mse", "hqq")
"""How :func:`ktops.quantize` chooses scales."""


class Codes(NamedTuple):
    """The tensors that hold weights [..., N, K] in a format; None for those the format does not have."""

    weight: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Codes":
        """Applies a function to every tensor that is not None."""
        return Codes._make(None if tensor is None else function(tensor) for tensor in self)


def stacked(experts: Iterable[Codes], count: int) -> Codes:
    """Stacks the codes of ``count`` experts, at least one, into tensors [count, ...], filled one by one."""
    out: Codes | None = None
    for index, codes in enumerate(experts):
        if out is None:
            out = codes.map(lambda tensor: in_huge_pages(tensor.new_empty(count, *tensor.shape)))
        for whole, part in zip(out, codes, strict=True):
            if whole is not None:
                assert part is not None
                whole[index] = part
    assert out is not None
    return out


class Format(ABC):
    """A weight format: the Python half of ``ktops_csrc/formats``.

    Attributes:
        name: used in ``weight_format``, ``ExpertWeight.format`` and files.
        dtype: of the weight tensor, whose last dimension has :meth:`row_elements` elements.
        group_sizes: valid values of ``group_size``. 0 means one scale per row, or blocks that contain their
            own scales; -1 allows any multiple of 32.
        methods: the supported quantization methods.
        has_scale, has_zero: which tensors the format has in addition to the weight.
        default_group_size: the group size if none is given.
        written: whether weights can be quantized to it, or only read.
        has_quantizer: whether ``kt::quantize`` has kernels for it.
    """

    name: str
    dtype: torch.dtype
    group_sizes: tuple[int, ...] = (0,)
    methods: tuple[str, ...] = ("rtn",)
    has_scale = False
    has_zero = False
    default_group_size = 0
    written = True
    has_quantizer = False

    @abstractmethod
    def row_elements(self, columns: int) -> int:
        """Returns the number of elements of the weight tensor that hold a row of ``columns`` weights.

        Raises:
            ValueError: the format cannot store a row of ``columns`` weights.
        """

    @abstractmethod
    def quantize_reference(self, weight: Tensor, group_size: int, method: str) -> Codes:
        """Quantizes float32 weights [..., N, K] with one of ``methods``, on their device.

        The kernels must return the same bits. The scale of weights that are not finite is not either.
        """

    def quantize(self, weight: Tensor, group_size: int, method: str) -> Codes:
        """Quantizes weights [..., N, K] of any floating-point dtype with one of ``methods``.

        On the CPU, kernels read the weights in their dtype, with any strides, on PyTorch's threads.

        Raises:
            ValueError: weights are NaN or infinite, or too large for the scales.
        """
        if self.has_quantizer and weight.device.type == "cpu":
            native = weight if weight.dtype in FLOAT_SCALES else weight.float()
            matrices = native.reshape(-1, *native.shape[-2:])
            codes = Codes(*torch.ops.kt.quantize(matrices, self.name, group_size, method))
            codes = codes.map(lambda tensor: tensor.view(*weight.shape[:-2], *tensor.shape[1:]))
        else:
            codes = self.quantize_reference(weight.float(), group_size, method)
        if not self.has_finite_scales(codes):
            self.require_finite(weight)
            low, high = weight.aminmax()
            raise ValueError(
                f"format {self.name!r} needs finite weights, with {self.scale_limit}; "
                f"got weights from {low:.3g} to {high:.3g}"
            )
        return codes

    @property
    def scale_limit(self) -> str:
        return "ranges of groups up to the largest float32"

    def has_finite_scales(self, codes: Codes) -> bool:
        """True unless a weight was not finite, or too large for the scales."""
        scale = codes.scale
        assert scale is not None
        return bool((scale != NAN_EXPONENT if scale.dtype == torch.uint8 else scale.isfinite()).all())

    def require_finite(self, weight: Tensor) -> None:
        """Raises ValueError if a weight is NaN or infinite, which codes and scales cannot hold."""
        if not bool(weight.isfinite().all()):
            raise ValueError(f"format {self.name!r} needs finite weights, got NaN or infinity")

    @abstractmethod
    def dequantize(self, codes: Codes, columns: int, group_size: int) -> Tensor:
        """Returns the float32 weights [..., N, columns], on the device of the codes.

        The kernels must decode to the same bits.
        """

    def scale_shape(self, rows: int, columns: int, group_size: int) -> tuple[int, ...]:
        """Returns the last two dimensions of the scale, and of the zero point if the format has one."""
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
        """Raises ValueError if the format is read-only."""
        return

    def has_group_size(self, group_size: int) -> bool:
        any_multiple = -1 in self.group_sizes and group_size % 32 == 0
        return group_size >= 0 and (group_size in self.group_sizes or any_multiple)

    def check_group_size(self, group_size: int) -> None:
        """Raises ValueError if the format does not support the group_size."""
        if not self.has_group_size(group_size):
            names = ", ".join("any multiple of 32" if size == -1 else str(size) for size in self.group_sizes)
            raise ValueError(f"group_size must be one of {names} for format {self.name!r}, got {group_size}")

    def check_settings(self, group_size: int | None, method: str) -> int:
        """Checks the settings for quantizing to this format.

        Returns:
            The group size; for None, the format's default.

        Raises:
            ValueError: the format does not support the group size or the method.
        """
        if method not in self.methods:
            raise ValueError(
                f"method must be one of {', '.join(self.methods)} for format {self.name!r}, got {method!r}"
            )
        group_size = self.default_group_size if group_size is None else group_size
        self.check_group_size(group_size)
        return group_size

    def check_quantizable(self, columns: int, group_size: int | None, method: str) -> int:
        """Like :meth:`check_settings`, for rows of ``columns`` weights.

        Raises:
            ValueError: also if the format can only be read, or cannot store such rows.
        """
        group_size = self.check_settings(group_size, method)
        self.row_elements(columns)
        self.check_written()
        return group_size


NAN_EXPONENT = 255
"""The scale of a group without a finite one, in formats whose scales are exponents."""

FLOAT_SCALES = (torch.float32, torch.bfloat16, torch.float16)


def expect(name: str, tensor: Tensor | None, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    """Raises ValueError or TypeError unless the tensor has one of the dtypes and the shape."""
    if tensor is None:
        raise ValueError(f"{name} must be a tensor of shape {list(shape)}, got None")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {names}, got {tensor.dtype}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def num_groups(columns: int, group_size: int) -> int:
    """Returns the number of groups in a row; the last one may be shorter."""
    return 1 if group_size == 0 else -(-columns // group_size)


def scale_dtype(group_size: int) -> torch.dtype:
    """Returns float32 for the scale of a row; bfloat16 for those of groups, which take noticeable memory."""
    return torch.float32 if group_size == 0 else torch.bfloat16


def in_groups(weight: Tensor, group_size: int) -> Tensor:
    """Splits [..., K] into [..., G, group_size], zero-padded at the end."""
    columns = weight.shape[-1]
    groups, size = num_groups(columns, group_size), group_size or columns
    return torch.nn.functional.pad(weight, (0, groups * size - columns)).unflatten(-1, (groups, size))


def spread(per_group: Tensor, columns: int, group_size: int) -> Tensor:
    """Expands [..., G] to the value of each column's group, float32 [..., columns] or [..., 1]."""
    per_group = per_group.float()
    return per_group if group_size == 0 else per_group.repeat_interleave(group_size, dim=-1)[..., :columns]
