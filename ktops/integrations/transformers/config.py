"""KTConfig: ``from_pretrained(..., quantization_config=KTConfig(...))`` loads experts in a weight format."""

from transformers.utils.quantization_config import QuantizationConfigMixin

from ktops.checkpoints.config import LOADER
from ktops.formats import METHODS, get_format

NAME = "ktops"
"""``quant_method`` of a KTConfig."""


class KTConfig(QuantizationConfigMixin):
    """Specifies how ``from_pretrained`` loads a model's experts; other weights load as they would without it.

    If another library has quantized the other tensors too, its quantizer loads those and ktops loads the
    experts. If that quantizer can decode (FP8, compressed-tensors), the other weights become dense, in the
    model's dtype, so that they can be used on the CPU.

    With a ``device_map``, the other weights are loaded to its devices; experts always to CPU memory.

    Args:
        weight_format: one of ``ktops.formats.names()``; None keeps the checkpoint's formats.
        group_size, method: as in :func:`ktops.quantize`; used only for weights that ktops quantizes.
        experts_path: another checkpoint to load the experts from, a directory or a GGUF file. Default: the
            checkpoint being loaded.
        prefix, mmap: as in :func:`ktops.load_experts`.
        other: the quantization_config of all tensors except the experts. Default: the one in config.json.

    Raises:
        ValueError: unknown format or method, or the format does not support the group size.
        TypeError: unknown argument.

    Example:
        >>> ktops.enable()
        >>> config = ktops.KTConfig(weight_format="int4", group_size=128)
        >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", quantization_config=config)
    """

    def __init__(
        self,
        weight_format: str | None = None,
        group_size: int | None = None,
        method: str = "rtn",
        experts_path: str | None = None,
        prefix: str | None = None,
        mmap: bool = False,
        other: dict | QuantizationConfigMixin | None = None,
        **given,
    ) -> None:
        unknown = given.keys() - {"loader", "quant_method"}  # which config.json may have as well
        if unknown:
            raise TypeError(f"KTConfig: unknown arguments {', '.join(sorted(unknown))}")
        self.quant_method = NAME
        self.weight_format, self.group_size, self.method = weight_format, group_size, method
        self.experts_path, self.prefix, self.mmap, self.other = experts_path, prefix, mmap, other
        try:
            if weight_format is not None:
                get_format(weight_format).check_settings(group_size, method)
            elif method not in METHODS:
                raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        except ValueError as error:
            raise ValueError(f"KTConfig: {error}") from None

    def to_dict(self) -> dict:
        """Returns what config.json stores, without where and how to find the experts of a saved model."""
        made: dict = {"loader": LOADER}
        if self.weight_format is not None:
            made |= {
                "weight_format": self.weight_format,
                "group_size": self.group_size,
                "method": self.method,
            }
        if self.other is not None:
            made["other"] = self.other if isinstance(self.other, dict) else self.other.to_dict()
        return made
