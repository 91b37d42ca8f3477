"""Writes test/checkpoints/published: a layer's experts, quantized by the libraries that people publish with.

Run it by hand, because the libraries and the tests need different versions of packages:

    pip install auto-round==0.16.1 llmcompressor==0.14.0.1 gptqmodel==7.7.0
    python test/checkpoints/publish.py

Each case consists of {case}.safetensors, the experts' tensors as saved by the library; {case}.json, its
quantization_config and the library with its version; and {weights}.npz, expert 1 in float16 by the library's
own dequantizer. Cases with equal weights share the last file; the script asserts that they are equal.
"""

import functools
import importlib
import json
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

OUT = Path(__file__).parent / "published"
EXPERTS = "model.layers.0.mlp.experts"

AUTO_ROUND = {  # case: (format, scheme, options, name of the weights)
    "auto_round": ("auto_round", "W4A16", {"sym": False}, "uint4_rtn"),
    "auto_round_sym": ("auto_round", "W4A16", {}, "int4_rtn"),
    "auto_round_w8": ("auto_round", "W8A16", {}, "int8_rtn"),
    "auto_round_gptqmodel": ("auto_round:gptqmodel", "W4A16", {"sym": False}, "uint4"),
    "auto_round_auto_awq": ("auto_round:auto_awq", "W4A16", {"sym": False}, "uint4"),
    "auto_gptq": ("auto_gptq", "W4A16", {"sym": False}, "uint4"),
    "auto_awq": ("auto_awq", "W4A16", {"sym": False}, "uint4"),
    "extra_config": (
        "auto_gptq",
        "W4A16",
        {"layer_config": {f"{EXPERTS}.1.up_proj": {"bits": 8}, f"{EXPERTS}.1.down_proj": {"bits": 16}}},
        "mixed",
    ),
    "llm_compressor": ("llm_compressor", "W4A16", {"sym": False}, "uint4"),
    "llm_compressor_mxfp4": ("llm_compressor", "MXFP4", {}, "mxfp4"),
    "mxint4": ("auto_round", "MXINT4", {}, None),
}
LLM_COMPRESSOR = {  # case: (bits, symmetric, name of the weights)
    "llmcompressor_w4_zero_points": (4, False, "uint4_llmcompressor"),
    "llmcompressor_w8": (8, True, "int8_llmcompressor"),
    "llmcompressor_w8_zero_points": (8, False, None),
}
GPTQMODEL = {  # case: (format, bits, symmetric, name of the weights)
    "gptqmodel": ("gptq", 4, False, "gptqmodel"),
    "gptqmodel_v2": ("gptq_v2", 4, False, "gptqmodel"),
    "gptqmodel_w8_v2": ("gptq_v2", 8, True, "gptqmodel_w8"),
}


def write_model(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    config = Qwen3MoeConfig(**sizes, **heads, num_hidden_layers=1, num_experts=2, num_experts_per_tok=1)
    Qwen3MoeForCausalLM(config).half().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


def read(folder: Path) -> tuple[dict, dict[str, dict[str, torch.Tensor]]]:
    """Returns the quantization_config and the tensors of every matrix of the experts."""
    (config,) = folder.rglob("config.json")
    matrices = defaultdict(dict)
    for name, tensor in load_file(config.parent / "model.safetensors").items():
        if name.startswith(f"{EXPERTS}."):
            module, _, kind = name.rpartition(".")
            matrices[module][kind] = tensor
    return json.loads(config.read_text())["quantization_config"], matrices


def write(case: str, library: str, config: dict, matrices: dict, weights: str | None, decode) -> None:
    tensors = {f"{module}.{kind}": t for module, parts in matrices.items() for kind, t in parts.items()}
    save_file(tensors, OUT / f"{case}.safetensors")
    made = f"{library} {importlib.import_module(library).__version__}"
    said = {key: value for key, value in config.items() if key != "meta"}
    note = {"library": made, "weights": weights, "quantization_config": said}
    (OUT / f"{case}.json").write_text(json.dumps(note, indent=1) + "\n")
    if weights is None:
        return
    path = OUT / f"{weights}.npz"
    dense = {
        module: (parts["weight"] if "weight" in parts else decode(parts)).half().numpy()
        for module, parts in matrices.items()
        if module.startswith(f"{EXPERTS}.1.")
    }
    if path.exists():
        for module, known in numpy.load(path).items():
            assert numpy.array_equal(known, dense[module]), (case, module)
    else:
        numpy.savez_compressed(path, **dense)


def dequantized(config: dict, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Dequantizes with the modules of AutoRound that compute with these tensors."""
    if "weight_packed" in parts:
        return decompressed(config, parts)
    from auto_round.export.export_to_autoround.export import dynamic_import_quant_linear_for_packing
    from auto_round.export.export_to_awq.utils import dequantize_gemm

    named = {"gptq": "auto_round:auto_gptq", "awq": "auto_round:auto_awq"}.get(config["quant_method"])
    packing = config.get("packing_format", named)
    rows, group = parts["scales"].shape[1], config["group_size"]
    if "awq" in packing:
        return dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], config["bits"], group).T
    bits = parts["qzeros"].shape[1] * 32 // rows
    columns = parts["qweight"].shape[0] * 32 // bits
    kind = dynamic_import_quant_linear_for_packing(packing, bits, group, config["sym"])
    kind = getattr(kind, "func", kind)  # it accepts only square matrices with g_idx, which is in order here
    module = kind(bits, group, columns, rows, bias=False, weight_dtype=torch.float16)
    module.load_state_dict(parts, strict=False)
    return module(torch.eye(columns, dtype=torch.float16)).T


def decompressed(config: dict, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    (group,) = config["config_groups"].values()
    scheme = QuantizationScheme(**{**group, "format": None})
    name = "pack-quantized" if parts["weight_packed"].dtype == torch.int32 else "mxfp4-pack-quantized"
    return BaseCompressor.get_value_from_registry(name).decompress(parts, scheme)["weight"]


def auto_round(source: Path, folder: Path) -> None:
    from auto_round import AutoRound

    for case, (layout, scheme, options, weights) in AUTO_ROUND.items():
        if scheme.startswith("W"):
            options = {"group_size": 32, **options}
        settings = {"iters": 0, "disable_opt_rtn": True, "device_map": "cpu"}
        AutoRound(str(source), scheme=scheme, **settings, **options).quantize_and_save(
            str(folder / case), format=layout
        )
        config, matrices = read(folder / case)
        write(case, "auto_round", config, matrices, weights, functools.partial(dequantized, config))


def llm_compressor(source: Path, folder: Path) -> None:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    for case, (bits, symmetric, weights) in LLM_COMPRESSOR.items():
        model = Qwen3MoeForCausalLM.from_pretrained(source, dtype=torch.float16)
        arguments = {"num_bits": bits, "strategy": "group", "group_size": 32, "symmetric": symmetric}
        groups = {"experts": {"targets": ["Linear"], "weights": arguments}}
        recipe = QuantizationModifier(config_groups=groups, ignore=["lm_head", "re:.*mlp.gate$"])
        oneshot(model=model, recipe=recipe)
        model.save_pretrained(folder / case, save_compressed=True)
        config, matrices = read(folder / case)
        decode = functools.partial(decompressed, config)
        write(case, "llmcompressor", config, matrices, weights, decode)


def gptqmodel(source: Path, folder: Path) -> None:
    """Uses its modules, rounding to nearest, because quantizing a whole model needs calibration data."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    for case, (layout, bits, symmetric, weights) in GPTQMODEL.items():
        config = QuantizeConfig(bits=bits, group_size=32, sym=symmetric, format=layout, desc_act=False)
        matrices, dense = {}, {}
        for name, weight in experts(source).items():
            rows, columns = weight.shape
            groups = weight.float().unflatten(1, (-1, 32))
            low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
            if symmetric:
                high = groups.abs().amax(-1)
                low = -high
            scale = (high - low) / (2**bits - 1)
            zero = (
                torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round().clamp_min(1)
            )
            linear = torch.nn.Linear(columns, rows, bias=False, dtype=torch.float16)
            linear.weight.data = weight
            module = TorchLinear(
                bits,
                32,
                symmetric,
                False,
                columns,
                rows,
                bias=False,
                pack_dtype=torch.int32,
                register_buffers=True,
            )
            g_idx = torch.arange(columns, dtype=torch.int32) // 32
            module.pack(linear, scale, zero, g_idx)
            module.post_init()
            dense[name] = module.dequantize_weight().T
            if layout == "gptq":
                convert_gptq_v2_to_v1_format_module(module, config)
            kinds = ("qweight", "qzeros", "scales", "g_idx")
            matrices[name] = {kind: getattr(module, kind).contiguous() for kind in kinds}
        by_parts = {id(parts): dense[name] for name, parts in matrices.items()}
        write(case, "gptqmodel", config.to_dict(), matrices, weights, lambda parts, d=by_parts: d[id(parts)])


def experts(source: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(source / "model.safetensors")
    return {
        name.removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{EXPERTS}.")
    }


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for path in OUT.iterdir():
        path.unlink()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        write_model(source)
        auto_round(source, Path(folder))
        llm_compressor(source, Path(folder))
        gptqmodel(source, Path(folder))


if __name__ == "__main__":
    main()
