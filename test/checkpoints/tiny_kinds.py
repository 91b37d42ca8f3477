"""Tiny models in published form: plain, composite, with an MTP module; in every scheme."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_published import ATTENTIONS, PUBLISHED
from tiny_schemes import plain

E, H, I, LAYERS = 2, 128, 128, 2  # noqa: E741

_TEXT = {
    "vocab_size": 61, "hidden_size": H, "intermediate_size": 96, "moe_intermediate_size": I,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
    "num_experts": E, "num_experts_per_tok": 2,
}  # fmt: skip
_HYBRID = {
    **_TEXT, "shared_expert_intermediate_size": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "layer_types": ["full_attention"] * LAYERS,
}  # fmt: skip
_VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": H,
    "num_position_embeddings": 16,
}  # fmt: skip

SCHEMES = {"bf16": (plain(torch.bfloat16), None), **PUBLISHED}
"""Maps names to (make, the quantization_config of config.json)."""

ATTENTION = re.compile(r"layers\.\d\.self_attn\.[qkvo]_proj\.weight")
DENSE_MODULES = {"fp8": "modules_to_not_convert", "compressed-tensors": "ignore"}


class Kind(NamedTuple):
    """A model class, its configuration, and the names of its layers and of an MTP layer, if any."""

    model: type
    config: transformers.PreTrainedConfig
    layers: str
    mtp: str | None = None


KINDS = {
    "plain": Kind(transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig(**_TEXT), "model.layers"),
    "composite": Kind(
        transformers.Qwen3_5MoeForConditionalGeneration,
        transformers.Qwen3_5MoeConfig(text_config=_HYBRID, vision_config=_VISION),
        "model.language_model.layers",
        "mtp.layers.0",
    ),
    "mtp": Kind(
        transformers.Qwen3NextForCausalLM,
        transformers.Qwen3NextConfig(**_HYBRID),
        "model.layers",
        "mtp.layers.0",
    ),
}


class Published(NamedTuple):
    """A directory with the experts [E, 2I, H], [E, H, I] of its layers and its quantized attention [N, K]."""

    path: Path
    kind: Kind
    scheme: str
    experts: list[tuple[torch.Tensor, torch.Tensor]]
    attention: dict[str, torch.Tensor]


def publish(folder: Path, kind: str, scheme: str, *, attention: bool) -> Published:
    """Writes a random model; tensors outside the scheme are written as transformers does."""
    made = KINDS[kind]
    torch.manual_seed(0)
    made.model(made.config).bfloat16().save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in saved.items() if ".mlp.experts." not in name}
    rng = numpy.random.default_rng(0)

    def put(name: str, rows: int, columns: int, scheme: str = scheme) -> torch.Tensor:
        parts, dense = SCHEMES[scheme][0](rng, rows, columns)
        tensors.pop(f"{name}.weight", None)
        tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
        return dense

    experts = [_put_experts(put, f"{made.layers}.{layer}") for layer in range(LAYERS)]
    if made.mtp:
        _put_experts(put, made.mtp)
    quantized = {}
    for name in [name for name in tensors if attention and ATTENTION.search(name)]:
        module = name.removesuffix(".weight")
        quantized[module] = put(module, *tensors[name].shape, scheme=ATTENTIONS.get(scheme, scheme))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if SCHEMES[scheme][1] is not None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = _with_dense_modules(SCHEMES[scheme][1], tensors)
        (folder / "config.json").write_text(json.dumps(config))
    return Published(folder, made, scheme, experts, quantized)


def _put_experts(put, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    made = []
    for expert in range(E):
        name = f"{layer}.mlp.experts.{expert}"
        gate, up = (put(f"{name}.{projection}_proj", I, H) for projection in ("gate", "up"))
        made.append((torch.cat([gate, up]), put(f"{name}.down_proj", H, I)))
    gate_up, down = zip(*made, strict=True)
    return torch.stack(gate_up), torch.stack(down)


def _with_dense_modules(quantization: dict, tensors: dict[str, torch.Tensor]) -> dict:
    """Returns the config with the names of unquantized layers under the key that its method uses."""
    key = DENSE_MODULES.get(quantization["quant_method"])
    floats = (torch.bfloat16, torch.float32)
    dense = [n.removesuffix(".weight") for n, t in tensors.items() if t.dim() == 2 and t.dtype in floats]
    return {**quantization, key: [*quantization.get(key, ()), *dense]} if key else quantization
