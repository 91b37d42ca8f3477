"""A tiny model in published layouts, with quantized experts and optionally attention."""

import json
import re

import numpy
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_compressed_tensors import FP8, INT4, maker
from tiny_schemes import awq, fp8_blocks, gptq, gptq_act_order

EXPERTS = r"model\.layers\.\d\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight"
ATTENTION = r"model\.layers\.\d\.self_attn\.[qkvo]_proj\.weight"
IGNORE = ["lm_head", "re:.*mlp.gate$"]


def config(**changes) -> transformers.Qwen3MoeConfig:
    """Keys and values have 192 rows: one and a half blocks of FP8."""
    sizes = {
        "vocab_size": 61, "hidden_size": 128, "intermediate_size": 80, "moe_intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 96,
        "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True,
    }  # fmt: skip
    return transformers.Qwen3MoeConfig(**{**sizes, **changes})


def scaled(make, factor: float = 2.0**-8):
    """Wraps ``make`` to return tensors with scales reduced to suit the weights of a model."""

    def made(rng, rows, columns):
        tensors, dense = make(rng, rows, columns)
        small = {name: tensor * factor if "scale" in name else tensor for name, tensor in tensors.items()}
        return small, dense * factor

    return made


def compressed_config(layout: str, weights: dict) -> dict:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": layout}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": IGNORE,
    }


def compressed(layout: str, weights: dict):
    return scaled(maker(layout, weights), 2.0**-4), compressed_config(layout, weights)


def mixed_config() -> dict:
    """Writes attention in FP8 and experts in int4, as Kimi-K2.5 is published."""
    made = compressed_config("float-quantized", {**FP8, "strategy": "channel"})
    experts = compressed_config("pack-quantized", {**INT4, "strategy": "group", "group_size": 32})
    groups = {"group_0": made["config_groups"]["group_0"], "group_1": experts["config_groups"]["group_0"]}
    groups["group_0"]["targets"] = ["re:.*self_attn.*"]
    groups["group_1"]["targets"] = ["re:.*experts.*"]
    return {**made, "format": "mixed-precision", "config_groups": groups}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
PUBLISHED = {
    "fp8": (
        scaled(fp8_blocks, 2.0**-11),
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
        },
    ),
    "compressed fp8": compressed("float-quantized", {**FP8, "strategy": "channel"}),
    "compressed int4": compressed("pack-quantized", {**INT4, "strategy": "group", "group_size": 32}),
    "compressed mixed": (
        compressed("pack-quantized", {**INT4, "strategy": "group", "group_size": 32})[0],
        mixed_config(),
    ),
    "gptq": (scaled(gptq), GPTQ),
    "gptq act-order": (scaled(gptq_act_order), {**GPTQ, "desc_act": True, "sym": False}),
    "awq": (scaled(awq), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
}
"""Maps names to (make, the quantization_config of config.json)."""

ATTENTIONS = {"compressed mixed": "compressed fp8"}
"""The scheme whose make attention uses, if it is a different one."""

DECODED = ("fp8", "compressed fp8", "compressed int4", "compressed mixed")
"""Schemes whose attention transformers decodes on any machine; the others need GPU libraries."""


def write(folder, scheme: str, *, attention: bool, **changes):
    """Writes the published directory and returns one with the decoded weights."""
    make, quantization = PUBLISHED[scheme]
    torch.manual_seed(0)
    dense, published = folder / "dense", folder / "published"
    transformers.Qwen3MoeForCausalLM(config(**changes)).save_pretrained(dense)
    published.mkdir()
    rng = numpy.random.default_rng(0)
    tensors, written = load_file(dense / "model.safetensors"), {}
    for name, tensor in tensors.items():
        of_attention = attention and re.fullmatch(ATTENTION, name)
        if of_attention or re.fullmatch(EXPERTS, name):
            attention_make, _ = PUBLISHED[ATTENTIONS.get(scheme, scheme)]
            parts, tensors[name] = (attention_make if of_attention else make)(rng, *tensor.shape)
            written |= {f"{name.removesuffix('.weight')}.{kind}": part for kind, part in parts.items()}
        else:
            written[name] = tensor
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    save_file(written, published / "model.safetensors", {"format": "pt"})
    said = json.loads((dense / "config.json").read_text())
    (published / "config.json").write_text(json.dumps({**said, "quantization_config": quantization}))
    return published, dense
