"""Int8Linear: a linear layer with frozen int8 weights."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ktops._huge_pages import in_huge_pages
from ktops.formats import quantize

COLUMNS = 16
"""in_features must be a multiple of it: ``torch._weight_int8pack_mm`` reads whole vectors."""

_CHUNK_BYTES = 4 << 20
"""Size of decoded weights at a time. They stay in the cache, and their memory is used again."""

_FEW_ROWS = 8
"""With fewer rows, decoding the weights would take longer than multiplying codes."""


def _is_few(rows: Tensor) -> bool:
    """True if PyTorch multiplies these rows with codes as fast as it reads them."""
    return rows.shape[0] < _FEW_ROWS and rows.dtype == torch.bfloat16 and rows.is_cpu


def _chunks(qweight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yields some rows of the weights at a time, without their scales: (rows, [n, K])."""
    step = max(1, _CHUNK_BYTES // (qweight.shape[1] * dtype.itemsize))
    for begin in range(0, qweight.shape[0], step):
        rows = slice(begin, begin + step)
        yield rows, qweight[rows].to(dtype)


def _product(rows: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
    """Returns rows W^T, [M, K] -> [M, N]."""
    if _is_few(rows):
        return torch._weight_int8pack_mm(rows.contiguous(), qweight, scale)
    if torch.compiler.is_compiling():
        return nn.functional.linear(rows, qweight.to(rows.dtype)) * scale
    product = rows.new_empty(rows.shape[0], qweight.shape[0])
    for part, weight in _chunks(qweight, rows.dtype):
        torch.mm(rows, weight.t(), out=product[:, part])
    return product.mul_(scale)


class _Product(torch.autograd.Function):
    """rows W^T with the gradient of rows; W is frozen."""

    @staticmethod
    def forward(ctx, rows: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(qweight, scale)
        return _product(rows, qweight, scale)

    @staticmethod
    def backward(ctx, grad_product: Tensor) -> tuple[Tensor, None, None]:
        qweight, scale = ctx.saved_tensors
        scaled = grad_product * scale
        dtype = torch.promote_types(scaled.dtype, torch.float32)
        sums = scaled.new_zeros(scaled.shape[0], qweight.shape[1], dtype=dtype)
        for part, weight in _chunks(qweight, scaled.dtype):
            sums += scaled[:, part] @ weight
        return sums.to(scaled.dtype), None, None


class Int8Linear(nn.Linear):
    """``y = x W^T + b`` with W as int8 codes and a scale for each row, half as large as in bfloat16.

    W is frozen, and ``weight`` is None: merging an adapter, and anything else that needs the dense weights,
    fails instead of using the codes as weights. Inputs get gradients, so adapters of PEFT on this
    layer, which takes it for an ``nn.Linear``, and on earlier ones can be trained.

    Up to 7 rows in bfloat16 on the CPU are multiplied with codes as they are; for others, the weights are
    decoded a few at a time.

    Attributes:
        qweight: int8 [out_features, in_features]; PEFT knows the name.
        scale: [out_features], in the dtype to compute in.
        bias: [out_features] or None.

    Example:
        >>> layer = ktops.nn.Int8Linear.from_linear(nn.Linear(64, 32, dtype=torch.bfloat16))
        >>> layer(torch.randn(3, 64, dtype=torch.bfloat16)).shape
        torch.Size([3, 32])
    """

    qweight: Tensor
    scale: Tensor

    def __init__(self, qweight: Tensor, scale: Tensor, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = qweight.shape
        self.register_buffer("qweight", qweight)
        self.register_buffer("scale", scale)
        self.register_parameter("weight", None)
        self.register_parameter("bias", bias)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear) -> "Int8Linear":
        """Quantizes the weight of a linear layer, each row by the scale that covers its largest weight.

        Args:
            linear: its weight may have any floating dtype, and in_features must be a multiple of 16.

        Raises:
            ValueError, TypeError: see :meth:`check`.
        """
        cls.check(linear)
        weight = linear.weight
        qweight = in_huge_pages(torch.empty(weight.shape, dtype=torch.int8, device=weight.device))
        scale = torch.empty(weight.shape[0], dtype=weight.dtype, device=weight.device)
        step = max(1, _CHUNK_BYTES // (4 * linear.in_features))
        for begin in range(0, linear.out_features, step):
            rows = slice(begin, begin + step)
            codes = quantize(weight[None, rows], "int8", group_size=0).codes
            assert codes.scale is not None
            qweight[rows], scale[rows] = codes.weight[0], codes.scale[0, :, 0]
        return cls(qweight, scale, linear.bias).train(linear.training)

    @staticmethod
    def check(linear: nn.Linear) -> None:
        """Raises an error unless :meth:`from_linear` can convert the layer.

        Raises:
            ValueError: in_features is no multiple of 16, or a weight is NaN or infinite.
            TypeError: the weight does not have a floating dtype.
        """
        weight = linear.weight
        if linear.in_features % COLUMNS:
            raise ValueError(
                f"Int8Linear: in_features must be a multiple of {COLUMNS}, got {linear.in_features}"
            )
        if not weight.is_floating_point():
            raise TypeError(f"Int8Linear: weight must have a floating-point dtype, got {weight.dtype}")
        if weight.numel() and not all(bool(extreme.isfinite()) for extreme in weight.aminmax()):
            raise ValueError("Int8Linear: weight must be finite, got NaN or infinity")

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that PEFT gives adapters."""
        return self.scale.dtype

    def dequantize(self) -> Tensor:
        """Returns the dense weights [out_features, in_features] in the dtype of the scales."""
        return self.qweight.to(self.scale.dtype) * self.scale[:, None]

    def reset_parameters(self) -> None:
        """Raises TypeError, because the weights are frozen."""
        raise TypeError("Int8Linear: weights in int8 are frozen and cannot be reset")

    def forward(self, input: Tensor) -> Tensor:
        """Returns [..., out_features] in the dtype of ``input``; computes in that of the scales."""
        rows = input.reshape(-1, self.in_features).to(self.scale.dtype)
        if torch.is_grad_enabled() and rows.requires_grad:
            product = _Product.apply(rows, self.qweight, self.scale)
        else:
            product = _product(rows, self.qweight, self.scale)
        if self.bias is not None:
            product = product + self.bias
        return product.to(input.dtype).view(*input.shape[:-1], self.out_features)
