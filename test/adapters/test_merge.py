"""Merged checkpoints: the names and files of the original, and the weights that PEFT's merge gives."""

import copy
import json

import pytest
import test_gpt_oss
import tiny_published
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft_models import randomize
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_adapters import EXPERTS, adapted, base_model, save, save_base, updates

import ktops
from ktops.checkpoints import open_checkpoint
from ktops.checkpoints.experts import float_rows
from ktops.testing.budgets import relative_error

HEADS = ["lm_head", "embed_tokens"]
MODELS = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"]


def kinds(folder) -> dict[str, tuple]:
    """Returns file, dtype and shape of every tensor of a checkpoint."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = path.name, part.get_dtype(), tuple(part.get_shape())
    return found


def expect_merged(folder, architecture: str, model, tolerance: float = 1e-6) -> None:
    """Asserts that transformers loads the base weights plus the updates."""
    base = base_model(architecture)
    expected = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for name, update in updates(model).items():
        expected[name] = expected[name] + update
    loaded, info = type(base).from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in loaded.state_dict().items():
        assert torch.allclose(tensor.float(), expected[name].float(), rtol=tolerance, atol=tolerance), name


@pytest.mark.parametrize("architecture", MODELS)
def test_names_files_and_weights(architecture, tmp_path):
    model, base = adapted(architecture), tmp_path / "base"
    base_model(architecture).save_pretrained(base, max_shard_size="40KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    ktops.merge_adapter(base, save(model, tmp_path / "adapter"), tmp_path / "merged")
    assert kinds(tmp_path / "merged") == kinds(base)
    index = "model.safetensors.index.json"
    before, after = (json.loads((folder / index).read_text()) for folder in (base, tmp_path / "merged"))
    assert after["weight_map"] == before["weight_map"]
    assert sorted(path.name for path in base.iterdir()) == sorted(
        p.name for p in (tmp_path / "merged").iterdir()
    )
    expect_merged(tmp_path / "merged", architecture, model)


def test_experts_that_do_not_say_that_they_are_transposed(tmp_path):
    parameters = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
    model, base = adapted("llama4", target_parameters=parameters), save_base("llama4", tmp_path)
    ktops.merge_adapter(base, save(model, tmp_path / "adapter"), tmp_path / "merged")
    assert kinds(tmp_path / "merged") == kinds(base)
    expect_merged(tmp_path / "merged", "llama4", model)


def test_sums_in_bfloat16_are_rounded_once(tmp_path):
    model, base = adapted("qwen3_moe"), tmp_path / "base"
    half = copy.deepcopy(base_model("qwen3_moe")).to(torch.bfloat16)
    half.save_pretrained(base)
    ktops.merge_adapter(base, save(model, tmp_path / "adapter"), tmp_path / "merged")
    merged = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    for name, update in updates(model).items():
        exact = half.state_dict()[name].double() + update.double()
        error = (merged[name].double() - exact).abs()
        assert merged[name].dtype == torch.bfloat16
        assert (error <= 2**-8 * exact.abs() + 1e-6).all(), name


def test_several_adapters_and_a_replaced_module(tmp_path):
    base = save_base("qwen3_moe", tmp_path)
    first, second = adapted("qwen3_moe"), adapted("qwen3_moe", seed=2, target_modules=HEADS, r=2)
    both = [save(model, tmp_path / str(i)) for i, model in enumerate((first, second))]
    ktops.merge_adapter(base, both, tmp_path / "sum", weights=[0.5, 2])
    merged = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "sum").state_dict()
    one, two = updates(first), updates(second)
    for name, weight in base_model("qwen3_moe").state_dict().items():
        expected = weight + 0.5 * one.get(name, 0) + 2 * two.get(name, 0)
        assert torch.allclose(merged[name], expected, atol=1e-5), name

    replacing = adapted("qwen3_moe", modules_to_save=["lm_head"])
    head = replacing.base_model.model.lm_head.modules_to_save["default"].weight
    with torch.no_grad():
        head.add_(1)
    ktops.merge_adapter(base, save(replacing, tmp_path / "replacing"), tmp_path / "replaced")
    loaded = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "replaced")
    assert torch.equal(loaded.lm_head.weight, head)


def test_trained_biases(tmp_path):
    model, base = adapted("gpt_oss", bias="all", target_modules=["q_proj"]), save_base("gpt_oss", tmp_path)
    biases = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if n.endswith("proj.bias")}
    with torch.no_grad():
        for bias in biases.values():
            bias.add_(1)
    ktops.merge_adapter(base, save(model, tmp_path / "adapter"), tmp_path / "merged")
    loaded = transformers.GptOssForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert len(biases) == 6
    for name, bias in biases.items():
        assert torch.equal(loaded.get_parameter(name.removeprefix("base_model.model.")), bias), name


def adapt(folder, path):
    """Writes an adapter for the model in a directory."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "o_proj"], target_parameters=EXPERTS)
    model = get_peft_model(loaded, lora)
    randomize(model)
    return save(model, path)


@pytest.mark.parametrize("scheme", ["fp8", "compressed int4", "gptq"])
def test_quantized_weights_are_decoded(scheme, tmp_path):
    published, dense = tiny_published.write(tmp_path, scheme, attention=True)
    adapter = adapt(dense, tmp_path / "adapter")
    ktops.merge_adapter(published, adapter, tmp_path / "merged")
    ktops.merge_adapter(dense, adapter, tmp_path / "expected")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    merged, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "expected"))
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        is_decoded = ("experts" in name or "self_attn" in name) and "norm" not in name
        assert tensor.dtype == (torch.bfloat16 if is_decoded else torch.float32), name
        assert relative_error(tensor.float(), expected[name]) < 2**-8, name


def test_mxfp4_of_gpt_oss(tmp_path):
    test_gpt_oss.write_mxfp4(tmp_path / "published")
    test_gpt_oss.random_model().save_pretrained(tmp_path / "bf16")
    adapter = adapt(tmp_path / "bf16", tmp_path / "adapter")
    ktops.merge_adapter(tmp_path / "published", adapter, tmp_path / "merged")
    assert kinds(tmp_path / "merged") == kinds(tmp_path / "bf16")
    lora = load_file(adapter / "adapter_model.safetensors")
    layers = (open_checkpoint(tmp_path / name).layers for name in ("published", "merged"))
    for layer, other in zip(*layers, strict=True):
        module = f"base_model.model.{layer.module}"
        pairs = (
            (f"{module}.base_layer", layer.gate_up_proj, other.gate_up_proj),
            (module, layer.down_proj, other.down_proj),
        )
        for key, before, after in pairs:
            a, b = (lora[f"{key}.lora_{factor}.weight"] for factor in "AB")
            for expert in range(4):
                update = 1.5 * b.reshape(len(b), -1, 4)[:, :, expert] @ a.reshape(4, -1, a.shape[1])[expert]
                expected = torch.cat(list(float_rows(before, expert))) + update
                found = torch.cat(list(float_rows(after, expert)))
                assert relative_error(found, expected) < 2**-8


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_in_a_weight_format(architecture, tmp_path):
    """The experts have the codes of the merged ones quantized afterward."""
    model, base = adapted(architecture), save_base(architecture, tmp_path)
    adapter = save(model, tmp_path / "adapter")
    ktops.merge_adapter(base, adapter, tmp_path / "merged")
    ktops.merge_adapter(base, adapter, tmp_path / "int8", weight_format="int8")
    layers = zip(
        open_checkpoint(tmp_path / "merged").layers, open_checkpoint(tmp_path / "int8").layers, strict=True
    )
    for dense, quantized in layers:
        for one, other in zip(dense.read("int8")[:2], quantized.read()[:2], strict=True):
            assert other.format == "int8"
            assert torch.equal(one.weight, other.weight) and torch.equal(one.scale, other.scale)
    others = open_checkpoint(tmp_path / "int8").other_tensors()
    dense = open_checkpoint(tmp_path / "merged").other_tensors()
    assert others.keys() == dense.keys()
    assert all(torch.equal(view.read(), dense[name].read()) for name, view in others.items())
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert config["quantization_config"] == {"loader": "ktops"}
