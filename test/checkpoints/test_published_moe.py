"""Models as their authors publish them, quantized, against transformers' own decoding of the same files."""

import json
import re
from collections.abc import Callable
from typing import NamedTuple

import every_model
import numpy
import pytest
import torch
from model_runs import MODEL_BUDGET
from safetensors.torch import load_file, save_file
from tiny_checkpoints import decode, expect_equal
from tiny_schemes import fp8_blocks, fp8_channel, mxfp4_deepseek, mxfp8
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import ktops
from ktops.checkpoints import open_checkpoint
from ktops.checkpoints.match import match_layers
from ktops.nn import KTExperts
from ktops.testing.budgets import relative_error

pytestmark = pytest.mark.usefixtures("enabled")

SIZES = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 64}


def fp8_powers(rng, rows, columns):
    """FP8 in blocks with E8M0 scales."""
    tensors, dense = fp8_blocks(rng, rows, columns)
    return {"weight": tensors["weight"], "scale": tensors["weight_scale_inv"].to(torch.float8_e8m0fnu)}, dense


def mxfp8_scale(rng, rows, columns):
    """MXFP8 as Inkling-2 names it."""
    tensors, dense = mxfp8(rng, rows, columns)
    return {"weight": tensors["weight"], "weight_scale": tensors["weight_scale_inv"]}, dense


def of_deepseek_v4(name: str) -> str:
    return name.removeprefix("model.").replace("embed_tokens", "embed")


class Published(NamedTuple):
    """How a model is published.

    Attributes:
        format: the format in which ktops reads the experts.
        experts, others: the schemes of the experts and of most of attention; None: as transformers saves it.
        quantization: the quantization_config.
        rename: makes the published name from the one that transformers saves.
        whole: whether it is the model with vision that is published.
    """

    format: str
    experts: Callable
    others: Callable | None
    quantization: dict
    rename: Callable[[str], str] = str
    whole: bool = False


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
FP4 = {**FP8, "scale_fmt": "ue8m0", "expert_dtype": "fp4"}
MXFP8 = {"quant_method": "mxfp8", "scale_fmt": "ue8m0", "weight_block_size": [1, 32]}

MODELS = {
    "deepseek_v4": Published("mxfp4", mxfp4_deepseek, fp8_powers, FP4, of_deepseek_v4),
    "glm5_next": Published("fp8_e4m3", fp8_blocks, fp8_blocks, FP8),
    "glm_moe_dsa": Published("fp8_e4m3", fp8_blocks, None, FP8),
    "hy_v4": Published("fp8_e4m3", fp8_blocks, None, FP8),
    "inkling2": Published("mxfp8", mxfp8_scale, None, MXFP8),
    "minimax_m3_vl": Published("mxfp8", mxfp8, mxfp8, MXFP8, whole=True),
    "step3p7": Published("fp8_e4m3", fp8_blocks, None, FP8),
}

EXPERTS = re.compile(
    r"experts\.\d+\.\w+\.weight|\.moe\.\w+_proj\.weight|experts\.(w13_weight|w2_weight|\w+_proj)"
)
ATTENTION = re.compile(r"attn\.(wq_a|wo_b)\.weight|self_attn\.(q|o)_proj\.weight")


def quantized(rng, make: Callable, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the tensors of random weights of one matrix, or of all experts, with small scales."""
    if weight.dim() == 3:
        made = [quantized(rng, make, part) for part in weight]
        return {kind: torch.stack([parts[kind] for parts in made]) for kind in made[0]}
    parts, _ = make(rng, *weight.shape)
    for kind, part in parts.items():
        if kind != "weight":
            exponents = torch.from_numpy(rng.integers(-11, -8, tuple(part.shape)))
            powers = (exponents + 127).to(torch.uint8)
            parts[kind] = (
                powers.view(part.dtype) if part.element_size() == 1 else torch.exp2(exponents.float()) * 1.125
            )
    return parts


def decoded(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns float32 weights, as transformers decodes them."""
    scale = next(part for kind, part in parts.items() if kind != "weight")
    return Fp8Dequantize(None)._dequantize_one(parts["weight"], scale, torch.float32)


def write(path, folder: str) -> type:
    """Writes a random model, as it is published and decoded; returns its class."""
    case = MODELS[folder]
    model_type, model_class = every_model.model_classes(folder)[-1 if case.whole else 0]
    model = every_model.tiny_model(folder)
    if case.whole:
        model = model_class(every_model.tiny_config(model_type))
    for name in ("decoded", "published"):
        model.save_pretrained(path / name)
    rng, tensors, plain = numpy.random.default_rng(0), {}, []
    saved = load_file(path / "decoded" / "model.safetensors")
    for name, weight in saved.items():
        make = case.experts if EXPERTS.search(name) else case.others if ATTENTION.search(name) else None
        renamed = case.rename(name)
        if make is None:
            tensors[renamed] = weight
            plain.append(name.removesuffix(".weight"))
            continue
        parts = quantized(rng, make, weight)
        saved[name] = decoded(parts)
        base = re.sub(r"weight$", "", renamed)
        for kind, part in parts.items():
            tensors[base + (kind if base != renamed else kind.removeprefix("weight"))] = part
    save_file(saved, path / "decoded" / "model.safetensors", {"format": "pt"})
    save_file(tensors, path / "published" / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "published" / "config.json").read_text())
    config["quantization_config"] = {**case.quantization, "modules_to_not_convert": plain}
    (path / "published" / "config.json").write_text(json.dumps(config))
    return model_class


@pytest.mark.parametrize("folder", MODELS)
@torch.no_grad()
def test_logits(tmp_path, monkeypatch, folder):
    for key, size in SIZES.items():
        monkeypatch.setitem(every_model.SIZES, key, size)
    model_class = write(tmp_path, folder)
    batch = every_model.tiny_batch(folder)
    eager = model_class.from_pretrained(tmp_path / "decoded", experts_implementation="eager").eval()
    model, info = model_class.from_pretrained(
        tmp_path / "published",
        quantization_config=ktops.KTConfig(),
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(info.values())
    experts = {name: m for name, m in model.named_modules() if isinstance(m, KTExperts)}
    assert {module.down_proj.format for module in experts.values()} == {MODELS[folder].format}
    for name, module in experts.items():
        module.compute = "bf16"
        dense = eager.get_submodule(name)
        for key in (module.function.first_name, "down_proj"):
            assert torch.equal(decode(getattr(module, key)), getattr(dense, key))
    assert relative_error(model.eval()(**batch).logits, eager(**batch).logits) < MODEL_BUDGET


@pytest.mark.parametrize("scheme", ["bf16", "fp8 per channel"])
def test_llama4(tmp_path, scheme):
    """Transposed in bfloat16; in FP8, the experts have tensors of their own, which are not transposed."""
    model = every_model.tiny_model("llama4").bfloat16()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    modules = {name: module for name, module in model.named_modules() if name.endswith(".experts")}
    dense = {name: (m.gate_up_proj.mT.float(), m.down_proj.mT.float()) for name, m in modules.items()}
    if scheme != "bf16":
        rng = numpy.random.default_rng(0)
        for name, both in dense.items():
            del tensors[f"{name}.gate_up_proj"], tensors[f"{name}.down_proj"]
            made = [_put_llama4(rng, tensors, f"{name}.{expert}", both) for expert in range(len(both[0]))]
            dense[name] = tuple(torch.stack(weights) for weights in zip(*made, strict=True))
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    layers = match_layers(open_checkpoint(tmp_path), model, modules)
    for name, both in dense.items():
        expect_equal(layers[name], *both)
        assert layers[name].scheme == {"bf16": "bf16 transposed"}.get(scheme, scheme)


def _put_llama4(rng, tensors: dict, name: str, both: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds random tensors of one expert; returns its gate_up and down."""
    hidden_size, intermediate_size = both[1].shape[1:]
    found = {}
    for key in ("gate_proj", "up_proj", "down_proj"):
        shape = (intermediate_size, hidden_size)[:: -1 if key == "down_proj" else 1]
        parts, found[key] = fp8_channel(rng, *shape)
        tensors.update({f"{name}.{key}.{kind}": part for kind, part in parts.items()})
    return torch.cat([found["gate_proj"], found["up_proj"]]), found["down_proj"]
