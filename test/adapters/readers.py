"""Readers of exported adapters, written from what each program does with names, shapes and scalings.

Each returns the updates of a model's weights under the names of transformers' parameters. None uses ktops.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_adapters import Updates, base_model

from ktops.nn.layout import declared_gating


def _read(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = load_file(path / "adapter_model.safetensors")
    return config, {name: tensor.float() for name, tensor in tensors.items()}


def _in_model(architecture: str, module: str, gate, up, down) -> Updates:
    """Stacks [E, out, in] as the experts of the model hold them."""
    experts = base_model(architecture).get_submodule(module)
    if declared_gating(experts) == "interleaved":
        gate_up = torch.stack([gate, up], dim=2).flatten(1, 2)
    else:
        gate_up = torch.cat([gate, up], dim=1)
    if getattr(experts, "is_transposed", False):
        gate_up, down = gate_up.mT, down.mT
    return {f"{module}.gate_up_proj": gate_up, f"{module}.down_proj": down}


def _num_experts(architecture: str, module: str) -> int:
    return base_model(architecture).get_submodule(module).down_proj.shape[0]


VLLM_EXPERTS = {"mixtral": ("block_sparse_moe.experts", ("w1", "w2", "w3"))}
"""Names of experts and of gate, down and up where a model of vLLM differs from mlp.experts and gate_proj."""


def vllm(architecture: str, path: Path) -> Updates:
    """vLLM: LoRAModel.from_local_checkpoint, PEFTHelper and PackedLoRALayerWeights.pack_moe."""
    config, tensors = _read(path)
    assert not config.get("modules_to_save") and not config.get("use_dora")
    assert config.get("bias", "none") == "none" and isinstance(config["r"], int)
    scaling = config["lora_alpha"] / config["r"]
    loras: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        assert name.startswith("base_model.model.")
        *module, factor, weight = name.removeprefix("base_model.model.").split(".")
        assert factor in ("lora_A", "lora_B") and weight == "weight"
        loras[".".join(module)][factor] = tensor
        assert tensor.shape[0 if factor == "lora_A" else 1] % config["r"] == 0
    if architecture == "gpt_oss":
        return _vllm_stacked(architecture, loras, config["r"], scaling)
    experts, (w1, w2, w3) = VLLM_EXPERTS.get(
        architecture, ("mlp.experts", ("gate_proj", "down_proj", "up_proj"))
    )
    found: Updates = {}
    for block in {name.split(f".{experts}.")[0] for name in loras if f".{experts}." in name}:
        module = f"{block}.mlp.experts"
        stacks = {
            word: _stack(
                [
                    loras.pop(f"{block}.{experts}.{e}.{word}")
                    for e in range(_num_experts(architecture, module))
                ],
                config["r"],
                scaling,
            )
            for word in (w1, w2, w3)
        }
        found |= _in_model(architecture, module, stacks[w1], stacks[w3], stacks[w2])
    return found | {f"{name}.weight": _product(pair, scaling) for name, pair in loras.items()}


def _stack(pairs: list[dict[str, torch.Tensor]], rank: int, scaling: float) -> torch.Tensor:
    a = torch.stack([pair["lora_A"] for pair in pairs])
    b = torch.stack([pair["lora_B"] for pair in pairs])
    assert a.shape[1] == b.shape[2] == rank
    return scaling * b @ a


def _product(pair: dict[str, torch.Tensor], scaling: float) -> torch.Tensor:
    return scaling * pair["lora_B"] @ pair["lora_A"]


def _vllm_stacked(architecture: str, loras: dict, rank: int, scaling: float) -> Updates:
    """LoRAModelManager._stack_moe_lora_weights, for models with is_3d_moe_weight."""
    found: Updates = {}
    for name in [name for name in loras if name.endswith(".experts")]:
        count, halves = _num_experts(architecture, name), []
        for pair in (loras.pop(f"{name}.base_layer"), loras.pop(name)):
            a, b = pair["lora_A"], pair["lora_B"]
            a = a.reshape(count, -1, a.shape[-1])
            b = b.reshape(b.shape[0], -1, count).permute(2, 0, 1)
            assert a.shape[1] == rank
            halves.append(scaling * b @ a)
        gate_up, down = halves
        found |= _in_model(architecture, name, gate_up[:, 0::2], gate_up[:, 1::2], down)
    return found | {f"{name}.weight": _product(pair, scaling) for name, pair in loras.items()}


def sglang(architecture: str, path: Path) -> Updates:
    """SGLang: LoRAAdapter._normalize_weights, which joins q, k, v and gate, up, and LoRAMemoryPool."""
    config, tensors = _read(path)
    rank, scaling = config["r"], config["lora_alpha"] / config["r"]
    found: Updates = {}
    experts: dict[str, dict[str, dict[int, tuple]]] = defaultdict(lambda: defaultdict(dict))
    layers: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        number = re.search(r"layers\.(\d+)\.", name)
        assert number is not None and any(word in name for word in config["target_modules"])
        layers[number[1]][name.removeprefix("base_model.model.")] = tensor
    for weights in layers.values():
        _join(weights, ("q_proj", "k_proj", "v_proj"))
        _join(weights, ("gate_proj", "up_proj"))
        _join(weights, ("q_a_proj", "kv_a_proj_with_mqa"))
        for name in [name for name in weights if ".lora_A." in name]:
            a, b = weights[name], weights[name.replace("lora_A", "lora_B")]
            words = name.split(".lora_A.")[0].split(".")
            joined = words[-1].split("+")
            sizes = [base.weight.shape[0] if base is not None else len(b) // len(joined)
                     for base in (_module(architecture, [*words[:-1], word]) for word in joined)]  # fmt: skip
            parts = [scaling * rows @ cols for rows, cols in zip(b.split(sizes), a.split(rank), strict=True)]
            expert = re.fullmatch(r"(.+\.mlp\.experts)\.(\d+)\.(.+)", ".".join(words))
            for word, part in zip(joined, parts, strict=True):
                if expert:
                    experts[expert[1]][word][int(expert[2])] = part
                else:
                    found[".".join([*words[:-1], word, "weight"])] = part
    for module, projections in experts.items():
        count = _num_experts(architecture, module)
        gate, up, down = (
            torch.stack([projections[word][e] for e in range(count)])
            for word in ("gate_proj", "up_proj", "down_proj")
        )
        found |= _in_model(architecture, module, gate, up, down)
    return found


def _module(architecture: str, words: list[str]):
    try:
        return base_model(architecture).get_submodule(".".join(words))
    except AttributeError:
        return None


def _join(weights: dict[str, torch.Tensor], words: tuple[str, ...]) -> None:
    """Stacks the factors of several weights; all must be there."""
    for name in [name for name in weights if f".{words[0]}." in name]:
        names = [name.replace(f".{words[0]}.", f".{word}.") for word in words]
        weights[name.replace(f".{words[0]}.", f".{'+'.join(words)}.")] = torch.cat(
            [weights.pop(n) for n in names]
        )


def llama_cpp(architecture: str, path: Path) -> Updates:
    """llama.cpp: convert_lora_to_gguf.py; a factor is scaled by lora_alpha over its own rank."""
    config, tensors = _read(path)
    experts, (w1, w2, w3) = VLLM_EXPERTS.get(
        architecture, ("mlp.experts", ("gate_proj", "down_proj", "up_proj"))
    )
    pairs: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", name)
        assert match is not None
        pairs[match[1]][match[2]] = tensor
    products = {
        name: _product(pair, config["lora_alpha"] / pair["lora_B"].shape[-1]) for name, pair in pairs.items()
    }
    found: Updates = {}
    for block in {name.split(f".{experts}.")[0] for name in products if f".{experts}." in name}:
        module = f"{block}.mlp.experts"
        count = _num_experts(architecture, module)
        gate, up, down = (
            torch.stack([products.pop(f"{block}.{experts}.{e}.{word}") for e in range(count)])
            for word in (w1, w3, w2)
        )
        found |= _in_model(architecture, module, gate, up, down)
    return found | {f"{name}.weight": product for name, product in products.items()}


def kt(architecture: str, path: Path) -> Updates:
    """kt-kernel: _load_fused_expert_lora, which takes exactly six bfloat16 tensors for each layer."""
    config, tensors = _read(path)
    scaling = config["lora_alpha"] / config["r"]
    fused = load_file(path / "fused_expert_lora.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in fused.values())
    found: Updates = {}
    for layer in {re.match(r"layers\.(\d+)\.", name)[1] for name in fused}:
        module = f"model.layers.{layer}.mlp.experts"
        parts = {}
        for word in ("gate", "up", "down"):
            a, b = (fused.pop(f"layers.{layer}.experts.{word}_lora_{factor}").float() for factor in "ab")
            assert a.shape[:2] == (_num_experts(architecture, module), config["r"])
            parts[word] = scaling * b @ a
        found |= _in_model(architecture, module, **parts)
    assert not fused
    for name, tensor in tensors.items():
        assert name.startswith("base_model.model.")
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").split(".lora_A.")[0]
            found[f"{module}.weight"] = scaling * tensors[name.replace("lora_A", "lora_B")] @ tensor
    return found
