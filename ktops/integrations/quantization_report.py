"""What quantizing the experts of a model has changed: sizes and errors, layer by layer."""

from dataclasses import dataclass

import torch

from ktops._display import format_bytes

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32", torch.float64: "f64"}


@dataclass(frozen=True)
class QuantizedLayer:
    """The result for the experts of one layer.

    Attributes:
        name: the name of the experts module.
        gate_up_error, down_error: ``||dequantized - w|| / ||w||`` of its weights, or of the first expert's if
            they were quantized while loading.
        bytes_before, bytes_after: size of gate_up_proj and down_proj together.
    """

    name: str
    gate_up_error: float
    down_error: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantizationReport:
    """The result of quantizing experts, in memory or while loading; ``str()`` summarizes it in one line.

    Attributes:
        weight_format, group_size, method: as requested, or the format's default.
        dtype: the dtype of the dense weights, "bf16", "f16", "f32" or "f64"; for experts quantized while
            loading, the one they compute in.
        layers: one entry per experts module, in model order.
    """

    weight_format: str
    group_size: int
    method: str
    dtype: str
    layers: tuple[QuantizedLayer, ...]

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def ratio(self) -> float:
        """How many times smaller the experts have become."""
        return self.bytes_before / self.bytes_after

    @property
    def relative_error(self) -> float:
        """The root mean square of the errors of all weights."""
        errors = [error for layer in self.layers for error in (layer.gate_up_error, layer.down_error)]
        return (sum(error**2 for error in errors) / len(errors)) ** 0.5

    def __str__(self) -> str:
        group = f", group {self.group_size}" if self.group_size else ""
        return (
            f"experts: {format_bytes(self.bytes_after)} in {self.weight_format}{group} "
            f"({self.dtype}: {format_bytes(self.bytes_before)}, {self.ratio:.2f} times smaller), "
            f"relative error {self.relative_error:.2g}"
        )
