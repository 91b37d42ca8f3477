"""Exported adapters change the model as PEFT does, as read by readers of each program."""

import json
import re

import pytest
import readers
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import (
    EXPERTS,
    adapted,
    base_model,
    change_config,
    expect_equal,
    load,
    save,
    save_config,
    swap_roles,
    updates,
)

import ktops


def read(layout: str, architecture: str, path):
    if layout == "peft":
        return updates(load(architecture, path))
    return getattr(readers, layout.replace(".", "_"))(architecture, path)


WEIGHTS = "adapter_model.safetensors"
LAYOUTS = ["peft", "vllm", "sglang", "llama.cpp"]
MODELS = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"]


@pytest.mark.parametrize("architecture", MODELS)
def test_every_layout(architecture, tmp_path):
    model, base = adapted(architecture), save_config(architecture, tmp_path)
    adapter = save(model, tmp_path / "adapter")
    for layout in LAYOUTS:
        if layout != "llama.cpp" or architecture in ("qwen3_moe", "mixtral"):
            assert ktops.export_adapter(adapter, tmp_path / layout, layout, base=base) == []
            expect_equal(read(layout, architecture, tmp_path / layout), updates(model))


PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]
FORMS = {
    "names": {"target_modules": ["q_proj", "v_proj", *PROJECTIONS], "target_parameters": None},
    "ranks": {
        "rank_pattern": {"q_proj": 2, "gate_up_proj": 3},
        "alpha_pattern": {"o_proj": 5, "down_proj": 7},
    },
    "one layer's rank": {"rank_pattern": {r"layers\.1\.mlp\.experts\.down_proj": 7}},
    "rslora": {"use_rslora": True, "rank_pattern": {"down_proj": 2}},
    "gate_up only": {"target_parameters": EXPERTS[:1], "target_modules": []},
    "down only": {"target_parameters": EXPERTS[1:], "target_modules": ["q_proj"]},
    "attention only": {"target_parameters": None},
    "one layer": {"target_parameters": [f"layers.1.{name}" for name in EXPERTS]},
    "all linear": {"target_modules": "all-linear", "target_parameters": None},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form, tmp_path):
    model, base = adapted("qwen3_moe", **FORMS[form]), save_config("qwen3_moe", tmp_path)
    adapter = save(model, tmp_path / "adapter")
    for layout in LAYOUTS:
        ktops.export_adapter(adapter, tmp_path / layout, layout, base=base)
        expect_equal(read(layout, "qwen3_moe", tmp_path / layout), updates(model))


def test_dense_layers_and_shared_experts(tmp_path):
    """As ``lora_target: all`` makes them: linear layers with the names of projections are parameters."""
    names = [f"{block}.{name}.weight" for block in ("mlp", "shared_experts") for name in PROJECTIONS]
    attention = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]
    model = adapted("deepseek_v3", target_modules=attention, target_parameters=[*EXPERTS, *names])
    adapter, base = save(model, tmp_path / "adapter"), save_config("deepseek_v3", tmp_path)
    assert {name for name in updates(model) if "shared" in name or "layers.0.mlp" in name}
    for layout in LAYOUTS:
        ktops.export_adapter(adapter, tmp_path / layout, layout, base=base)
        expect_equal(read(layout, "deepseek_v3", tmp_path / layout), updates(model))


def test_kt_kernel_rounds_to_bfloat16(tmp_path):
    model, base = adapted("qwen3_moe", dtype=torch.bfloat16, lora_alpha=8), save_config("qwen3_moe", tmp_path)
    adapter = save(model, tmp_path / "adapter")
    assert ktops.export_adapter(adapter, tmp_path / "exact", "kt", base=base) == []
    expect_equal(readers.kt("qwen3_moe", tmp_path / "exact"), updates(model.float()))
    model = adapted("qwen3_moe")
    adapter = save(model, tmp_path / "float32")
    (note,) = ktops.export_adapter(adapter, tmp_path / "rounded", "kt", base=base)
    assert "bfloat16" in note
    expect_equal(readers.kt("qwen3_moe", tmp_path / "rounded"), updates(model), tolerance=2**-7)


def test_factors_are_copied_where_the_scaling_allows(tmp_path):
    model, base = adapted("qwen3_moe", dtype=torch.bfloat16), save_config("qwen3_moe", tmp_path)
    adapter = save(model, tmp_path / "adapter")
    ktops.export_adapter(adapter, tmp_path / "vllm", "vllm", base=base)
    ktops.export_adapter(tmp_path / "vllm", tmp_path / "peft", "peft", base=base)
    before, after = (load_file(path / WEIGHTS) for path in (adapter, tmp_path / "peft"))
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    down = "base_model.model.model.layers.0.mlp.experts.lora_B.weight"
    assert torch.equal(before[down], after[down])


def test_roles_that_old_peft_swaps(tmp_path):
    """Before 0.19.1, PEFT took stacked weights for [E, in, out]: A is [r E, 2I], B is [H, r E]."""
    model, base = adapted("qwen3_moe"), save_config("qwen3_moe", tmp_path)
    adapter, swapped = save(model, tmp_path / "adapter"), tmp_path / "swapped"
    swap_roles(adapter, swapped)
    for layout in LAYOUTS:
        ktops.export_adapter(swapped, tmp_path / layout, layout, base=base)
        expect_equal(read(layout, "qwen3_moe", tmp_path / layout), updates(model))


@pytest.mark.parametrize("parameters", [EXPERTS[:1], EXPERTS[1:], EXPERTS])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "square"])
def test_sizes_or_version_tell_the_roles(architecture, parameters, tmp_path):
    """The experts of "square" are as wide as the model, so the sizes of down alone do not tell."""
    model = adapted(architecture, target_parameters=parameters)
    base, adapter = save_config(architecture, tmp_path), save(model, tmp_path / "adapter")
    swap_roles(adapter, tmp_path / "0.18.1")
    swap_roles(adapter, tmp_path / "0.19.0", "0.19.0")
    for source in ("adapter", "0.18.1", "0.19.0"):
        ktops.export_adapter(tmp_path / source, tmp_path / f"{source} peft", "peft", base=base)
        expect_equal(updates(load(architecture, tmp_path / f"{source} peft")), updates(model))


def test_experts_that_do_not_say_that_they_are_transposed(tmp_path):
    parameters = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
    model, base = adapted("llama4", target_parameters=parameters), save_config("llama4", tmp_path)
    adapter = save(model, tmp_path / "adapter")
    ktops.export_adapter(adapter, tmp_path / "peft", "peft", base=base)
    expect_equal(updates(load("llama4", tmp_path / "peft")), updates(model))
    ktops.export_adapter(adapter, tmp_path / "sglang", "sglang", base=base)
    gate_up = updates(model)["model.layers.1.feed_forward.experts.gate_up_proj"].mT
    tensors = load_file(tmp_path / "sglang" / WEIGHTS)
    name = "base_model.model.model.layers.1.feed_forward.experts.3.{}_proj.lora_{}.weight"
    for half, expected in zip(("gate", "up"), gate_up[3].chunk(2), strict=True):
        update = 1.5 * tensors[name.format(half, "B")] @ tensors[name.format(half, "A")]
        assert torch.allclose(update, expected, atol=1e-5)


@pytest.mark.parametrize("names", [["up_proj"], ["down_proj"], ["up_proj", "down_proj"]])
def test_experts_without_a_gate(names, tmp_path):
    """The sizes of up are those of down with exchanged roles."""
    model = adapted("nemotron_h", target_modules=[], target_parameters=[f"experts.{name}" for name in names])
    base, adapter = save_config("nemotron_h", tmp_path), save(model, tmp_path / "adapter")
    ktops.export_adapter(adapter, tmp_path / "vllm", "vllm", base=base)
    ktops.export_adapter(tmp_path / "vllm", tmp_path / "peft", "peft", base=base)
    expect_equal(updates(load("nemotron_h", tmp_path / "peft")), updates(model))
    tensors = load_file(tmp_path / "vllm" / WEIGHTS)
    assert {name.split(".")[-3] for name in tensors} == {"up_proj", "down_proj"}


def test_names_of_projections_without_patterns(tmp_path):
    """PEFT doubles rank and alpha of gate_up_proj when it loads such a config."""
    model, base = adapted("qwen3_moe", **FORMS["names"]), save_config("qwen3_moe", tmp_path)
    adapter = save(model, tmp_path / "adapter")
    names = FORMS["names"]["target_modules"]
    change_config(adapter, rank_pattern={}, alpha_pattern={}, target_modules=names, target_parameters=None)
    expect_equal(updates(load("qwen3_moe", adapter)), updates(model))
    ktops.export_adapter(adapter, tmp_path / "vllm", "vllm", base=base)
    expect_equal(readers.vllm("qwen3_moe", tmp_path / "vllm"), updates(model))


def test_sum_of_adapters(tmp_path):
    base, both = save_config("qwen3_moe", tmp_path), []
    forms = {}, {"r": 2, "target_modules": ["q_proj", "o_proj"], "target_parameters": EXPERTS[:1]}
    for index, form in enumerate(forms):
        model = adapted("qwen3_moe", seed=index + 1, **form)
        both.append((save(model, tmp_path / str(index)), updates(model)))
    (first, one), (second, other) = both
    expected = {
        name: 0.25 * one[name] - 1.5 * other[name] if name in other else 0.25 * one[name] for name in one
    }
    for layout in LAYOUTS:
        ktops.export_adapter([first, second], tmp_path / layout, layout, base=base, weights=[0.25, -1.5])
        expect_equal(read(layout, "qwen3_moe", tmp_path / layout), expected)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("source", ["kt", "vllm", "sglang"])
def test_import_into_peft(source, architecture, tmp_path):
    model = adapted(architecture, dtype=torch.bfloat16, lora_alpha=8)
    base = save_config(architecture, tmp_path)
    adapter = save(model, tmp_path / "adapter")
    ktops.export_adapter(adapter, tmp_path / source, source, base=base)
    ktops.export_adapter(tmp_path / source, tmp_path / "peft", "peft", base=base)
    expect_equal(updates(load(architecture, tmp_path / "peft")), updates(model.float()))


def test_head_and_embedding(tmp_path):
    """PEFT saves a copy of their weights too."""
    model = adapted("qwen3_moe", target_modules=["lm_head", "embed_tokens"])
    adapter, base = save(model, tmp_path / "adapter"), save_config("qwen3_moe", tmp_path)
    ktops.export_adapter(adapter, tmp_path / "peft", "peft", base=base)
    expect_equal(updates(load("qwen3_moe", tmp_path / "peft")), updates(model))


def test_import_of_stacked_projections(tmp_path):
    """SGLang also reads the factors of a projection of all experts, [E, r, in] and [E, out, r]."""
    model, base = adapted("qwen3_moe", dtype=torch.bfloat16, lora_alpha=8), save_config("qwen3_moe", tmp_path)
    source = tmp_path / "kt"
    ktops.export_adapter(save(model, tmp_path / "adapter"), source, "kt", base=base)
    stacks, beside = (load_file(source / name) for name in ("fused_expert_lora.safetensors", WEIGHTS))
    for name, tensor in stacks.items():
        layer, projection, factor = re.fullmatch(r"layers\.(\d)\.experts\.(\w+)_lora_(\w)", name).groups()
        beside[f"model.layers.{layer}.mlp.experts.{projection}_proj.lora_{factor.upper()}.weight"] = tensor
    save_file(beside, source / WEIGHTS)
    (source / "fused_expert_lora.safetensors").unlink()
    ktops.export_adapter(source, tmp_path / "peft", "peft", base=base)
    expect_equal(updates(load("qwen3_moe", tmp_path / "peft")), updates(model.float()))


def test_incomplete_experts_are_filled_up_with_zeros(tmp_path):
    """Other programs write factors only for the projections and the experts that they trained."""
    model, base = adapted("qwen3_moe"), save_config("qwen3_moe", tmp_path)
    ktops.export_adapter(save(model, tmp_path / "adapter"), tmp_path / "some", "sglang", base=base)
    file = tmp_path / "some" / WEIGHTS
    kept = {k: v for k, v in load_file(file).items() if not re.search(r"experts\.(3\.|\d+\.gate_proj)", k)}
    save_file(kept, file)
    ktops.export_adapter(tmp_path / "some", tmp_path / "peft", "peft", base=base)
    expected = updates(model)
    for name, update in expected.items():
        if "experts" in name:
            update[3] = 0
            if "gate_up" in name:
                update[:, :24] = 0
    expect_equal(updates(load("qwen3_moe", tmp_path / "peft")), expected)


def test_a_negative_weight(tmp_path):
    model, base = adapted("qwen3_moe"), save_config("qwen3_moe", tmp_path)
    ktops.export_adapter(
        save(model, tmp_path / "adapter"), tmp_path / "vllm", "vllm", base=base, weights=[-1]
    )
    assert json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())["lora_alpha"] > 0
    expect_equal(
        readers.vllm("qwen3_moe", tmp_path / "vllm"),
        {name: -update for name, update in updates(model).items()},
    )


def test_trained_tokens(tmp_path):
    model = adapted("qwen3_moe", trainable_token_indices=[1, 5])
    [delta] = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
    with torch.no_grad():
        delta.add_(1)
    adapter, base = save(model, tmp_path / "adapter"), save_config("qwen3_moe", tmp_path)
    ktops.export_adapter(adapter, tmp_path / "peft", "peft", base=base)
    expected, found = (load("qwen3_moe", path).merge_and_unload() for path in (adapter, tmp_path / "peft"))
    rows = found.model.embed_tokens.weight
    assert torch.equal(rows, expected.model.embed_tokens.weight)
    assert not torch.equal(rows, base_model("qwen3_moe").model.embed_tokens.weight)
    [note] = ktops.export_adapter(adapter, tmp_path / "vllm", "vllm", base=base)
    assert "trainable_tokens_delta" in note


def test_a_router_that_is_no_linear_layer(tmp_path):
    """PEFT adapts such a module through target_parameters only."""
    model = adapted("gpt_oss", target_parameters=["mlp.router.weight", *EXPERTS])
    adapter, base = save(model, tmp_path / "adapter"), save_config("gpt_oss", tmp_path)
    ktops.export_adapter(adapter, tmp_path / "peft", "peft", base=base)
    expect_equal(updates(load("gpt_oss", tmp_path / "peft")), updates(model))


def test_modules_to_save(tmp_path):
    model, base = adapted("qwen3_moe", modules_to_save=["lm_head"]), save_config("qwen3_moe", tmp_path)
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    with torch.no_grad():
        head.add_(1)
    adapter = save(model, tmp_path / "adapter")
    assert ktops.export_adapter(adapter, tmp_path / "peft", "peft", base=base) == []
    again = load("qwen3_moe", tmp_path / "peft")
    assert torch.equal(again.base_model.model.lm_head.modules_to_save["default"].weight, head)
    (note,) = ktops.export_adapter(adapter, tmp_path / "vllm", "vllm", base=base)
    assert "lm_head" in note
    expect_equal(readers.vllm("qwen3_moe", tmp_path / "vllm"), updates(model))
