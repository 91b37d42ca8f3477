"""kt-kernel's methods by name, on codes from a file, using the C++ class that KTMoEWrapper uses.

KTMoEWrapper cannot be constructed for inference without an accelerator, because it pins memory. It reads
experts that are already quantized only from a checkpoint, so here its classes get the pointers that its
loaders would pass. SFT methods use KTMoEWrapper itself.
"""

import torch
from kt_kernel import kt_kernel_ext
from kt_kernel.sft.weights import BlockFP8ExpertWeights, RAWINT4ExpertWeights
from kt_kernel.utils import amx
from torch import Tensor

from bench.layer import Layer
from bench.peers import kt_kernel_moe
from bench.peers.kt_kernel_moe import MAX_TOKENS, PROJECTIONS

_CLASSES = {
    "AMXINT4": ("AMXInt4_MOE",),
    "AMXINT8": ("AMXInt8_MOE",),
    "MOE_INT4": ("Int4_KERNEL_MOE",),
    "MOE_INT8": ("Int8_KERNEL_MOE",),
    "BF16": ("AMXBF16_MOE", "AVX2BF16_MOE"),
    "FP8": ("AMXFP8_MOE", "AVX2FP8_MOE"),
    "FP8_PERCHANNEL": ("AMXFP8PerChannel_MOE",),
    "LLAMAFILE": ("MOE",),
}
"""Maps each method to the classes of kt_kernel_ext.moe, best first."""

_NO_LIMIT = 1e30  # MXFP4_SFT requires a limit for its activation


def inference_class(method: str, group_size: int):
    """Returns the class that KTMoEWrapper would construct.

    Raises:
        NotImplementedError: this build of kt-kernel has no such class.
    """
    if method in _CLASSES:
        names = _CLASSES[method]
        found = next((c for c in (getattr(kt_kernel_ext.moe, n, None) for n in names) if c), None)
    else:
        names, select = ("one",), getattr(amx, f"_select_{method.lower()}_backend")
        found = select() if method.startswith("MX") else select(group_size)
    if found is None:
        raise NotImplementedError(f"this build of kt-kernel has no {names[-1]} for {method}")
    return found


def gptq_words(codes: Tensor) -> Tensor:
    """Converts nibbles [N, K/2], even columns low, to GPTQ's int32 [K/8, N], column k in bits 4 (k mod 8)."""
    return codes.contiguous().view(torch.int32).t().contiguous()


def e8m0_to_bfloat16(scale: Tensor) -> Tensor:
    """Returns 2^(e - 127) for uint8 exponents e > 0."""
    return (scale.to(torch.int16) << 7).view(torch.bfloat16)


class Contestant(kt_kernel_moe.Contestant):
    """Provides forward for methods of mode inference, training for those of mode sft.

    Args:
        method: a method name of KTMoEWrapper.
        file: {"gate_up": {...}, "down": {...}}, each with "format", "group_size", "weight" and "scale".
            Methods that quantize use the layer's weights instead.
    """

    def __init__(self, layer: Layer, rank: int, method: str, file: str) -> None:
        super().__init__(layer, rank)
        self.method = self.sft_method = method
        if method == "MXFP4_SFT":
            self.sft_options = {"group_size": 32, "zero_point": False, "swiglu_limit": _NO_LIMIT}
        stored = torch.load(file, mmap=True, weights_only=True)
        self.format, self.group_size = (stored["down"][name] for name in ("format", "group_size"))
        halves: dict[str, tuple] = {
            name: (None, None) if stored["gate_up"][name] is None else stored["gate_up"][name].chunk(2, dim=1)
            for name in ("weight", "scale")
        }
        self.weights = {
            "gate": self._weights(halves["weight"][0]),
            "up": self._weights(halves["weight"][1]),
            "down": self._weights(stored["down"]["weight"]),
        }
        self.scales = {
            "gate": self._scales(halves["scale"][0]),
            "up": self._scales(halves["scale"][1]),
            "down": self._scales(stored["down"]["scale"]),
        }

    def _weights(self, codes: Tensor) -> list[Tensor]:
        if self.method == "GPTQ_INT4":
            return [gptq_words(expert) for expert in codes]
        return list(codes.clone(memory_format=torch.contiguous_format))

    def _scales(self, scales: Tensor | None) -> list[Tensor]:
        """Returns each expert's scales in the dtype and order that the method's loader produces, or []."""
        if scales is None:
            return []
        if self.method == "GPTQ_INT4":
            return [scale.float().t().contiguous() for scale in scales]
        if self.method.startswith("MXFP4"):
            scales = e8m0_to_bfloat16(scales)
        elif self.method in ("RAWINT4", "RAWINT4_SFT", "AMXINT4_KGroup_SFT"):
            scales = scales.bfloat16()
        elif self.method != "MXFP8":
            scales = scales.float()
        return list(scales.clone(memory_format=torch.contiguous_format))

    def _make_moe(self, config):
        found = inference_class(self.method, self.group_size)
        if self.method == "LLAMAFILE":
            self._set_blocks(config)
        elif "INT" in self.method and self.method not in ("RAWINT4", "GPTQ_INT4"):
            for name in PROJECTIONS:
                setattr(config, f"{name}_proj", getattr(self, name).data_ptr())
        else:
            for name in PROJECTIONS:
                weights, scales = self.weights[name], self.scales[name]
                pointers = [scale.data_ptr() for scale in scales] if scales else [0] * len(weights)
                setattr(config, f"{name}_projs", [[weight.data_ptr() for weight in weights]])
                setattr(config, f"{name}_scales", [pointers])
            config.quant_config.bits = 4 if "4" in self.method else 8
            config.quant_config.group_size = self.group_size
            config.quant_config.per_channel = self.method == "FP8_PERCHANNEL"
            config.quant_config.zero_point = False
        return found(config)

    def _set_blocks(self, config) -> None:
        types = kt_kernel_ext.kvcache.ggml_type
        config.m_block, config.group_min_len, config.group_max_len = 32, 10, MAX_TOKENS
        config.hidden_type = types.BF16
        for name in PROJECTIONS:
            self.weights[name] = list(torch.stack(self.weights[name]))
            setattr(config, f"{name}_proj", self.weights[name][0].data_ptr())
            setattr(config, f"{name}_type", types.__members__[self.format.upper()])

    def _load(self, wrapper) -> None:
        weights, scales = self.weights, self.scales
        wrapper.share_backward_bb = self.method == "AMXFP8_SFT"  # required there
        if self.method == "MXFP4_SFT":
            experts = weights | {f"{name}_scale": scales[name] for name in PROJECTIONS}
            wrapper.load_mxfp4_weights(experts, self.experts)
        elif self.method in ("AMXFP8_SFT", "RAWINT4_SFT", "AMXINT4_KGroup_SFT"):
            pairs = [part for name in PROJECTIONS for part in (weights[name], scales[name])]
            if self.method == "AMXFP8_SFT":
                wrapper.load_block_fp8_weights(BlockFP8ExpertWeights(*pairs), self.experts)
            else:
                stacked = RAWINT4ExpertWeights(*map(torch.stack, pairs))
                wrapper.load_rawint4_weights(stacked, self.experts)
        elif self.method in ("AMXINT8_SFT", "INT8_SFT"):
            # load_weights_from_tensors refuses, though the class quantizes tensors that it is given
            wrapper.gate_proj, wrapper.up_proj, wrapper.down_proj = self.gate, self.up, self.down
            wrapper.load_weights(self.experts)
        else:
            super()._load(wrapper)
