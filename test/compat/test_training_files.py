"""The files of adapters that kt_kernel.sft writes and reads, and what transformers asks while loading."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tiny_wrapped import ALPHA, RANK, adapted, logits, wrapped
from torch import nn

from ktops.compat.kt_kernel import sft
from ktops.compat.kt_kernel.sft import (
    KTAMXConfigError,
    KTArtifactError,
    KTConfig,
    artifacts,
    load_kt_adapter_artifacts,
    save_kt_adapter_artifacts,
    wrap_moe_layers_with_kt_wrapper,
)
from ktops.compat.kt_kernel.sft.adapter_files import expert_adapters
from ktops.compat.kt_kernel.sft.convert_kt_to_sglang_adapter import convert_kt_to_sglang_adapter
from ktops.compat.lora import shapes
from ktops.testing.budgets import model_budget, relative_error

pytestmark = pytest.mark.usefixtures("single_thread")

BUDGET = model_budget(torch.float32, 64, 16)
FUSED, MANIFEST = "fused_expert_lora.safetensors", "kt_adapter_manifest.json"
INT8 = KTConfig(kt_backend="AMXINT8", kt_lora_rank=RANK, kt_lora_alpha=ALPHA)


@pytest.fixture
def saved(tmp_path):
    """A folder with the adapters of ``adapted()``."""
    model = adapted()
    model.save_pretrained(tmp_path)
    save_kt_adapter_artifacts(model, tmp_path)
    return tmp_path


def test_the_file_has_kt_kernels_keys_and_shapes(saved):
    tensors = load_file(saved / FUSED)
    expected = shapes(8, 32, 24, RANK)
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        f"layers.{layer}.experts.{name}": shape for layer in range(2) for name, shape in expected.items()
    }
    manifest = json.loads((saved / MANIFEST).read_text())
    assert (manifest["version"], manifest["status"]) == (1, "ready")
    assert manifest["lora"] == {"rank": RANK, "alpha": ALPHA}
    assert manifest["expert_weight_format"] == "bf16"
    record = manifest["artifacts"][FUSED]
    assert record["size"] == (saved / FUSED).stat().st_size and record["tensor_count"] == len(tensors)
    assert record["tensors"]["layers.1.experts.up_lora_b"] == {"shape": [8, 24, RANK], "dtype": "F32"}
    assert not list(saved.rglob("*.tmp")) and not list(saved.rglob("*.partial"))


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_plain_peft_reads_the_whole_adapter(architecture, tmp_path):
    model = adapted(architecture=architecture)
    model.save_pretrained(tmp_path)
    save_kt_adapter_artifacts(model, tmp_path)
    plain = PeftModel.from_pretrained(tiny_model(architecture).eval(), tmp_path / "exported" / "peft")
    assert relative_error(logits(plain), logits(model)) <= BUDGET
    assert relative_error(logits(plain), logits(tiny_model(architecture).eval())) > 0.1
    assert relative_error(logits(plain.merge_and_unload()), logits(model)) <= BUDGET


def test_another_process_reads_what_one_wrote(saved):
    other = adapted(seed=2)
    manifest = load_kt_adapter_artifacts(other, saved)
    assert manifest.payload["lora"]["rank"] == RANK
    expected = load_file(saved / FUSED)
    assert all(torch.equal(value, expected[name]) for name, value in expert_adapters(other).items())
    fresh = wrapped(KTConfig(kt_lora_rank=8, kt_lora_alpha=16))
    load_kt_adapter_artifacts(fresh, saved)
    assert all(torch.equal(value, expected[name]) for name, value in expert_adapters(fresh).items())
    assert {wrapper.experts.adapters[1] for wrapper in fresh._kt_wrappers} == {ALPHA / RANK}


def test_a_file_of_kt_kernel_in_bfloat16_without_a_manifest(saved):
    (saved / MANIFEST).unlink()
    expected = {name: tensor.bfloat16() for name, tensor in load_file(saved / FUSED).items()}
    save_file(expected, saved / FUSED)
    model = adapted(seed=2)
    assert load_kt_adapter_artifacts(model, saved) is None
    found = expert_adapters(model)
    assert all(torch.equal(found[name].bfloat16(), value) for name, value in expected.items())


def change(saved, **tensors: torch.Tensor | None) -> None:
    """Replaces tensors of layer 0 in the file, or removes them, without a manifest."""
    (saved / MANIFEST).unlink()
    found = load_file(saved / FUSED) | {f"layers.0.experts.{name}": value for name, value in tensors.items()}
    save_file({name: value for name, value in found.items() if value is not None}, saved / FUSED)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda saved: change(saved, up_lora_a=None), r"no layers\.0\.experts\.up_lora_a"),
        (lambda saved: change(saved, q_lora_a=torch.ones(2)), r"unknown layers\.0\.experts\.q_lora_a"),
        (
            lambda saved: change(saved, up_lora_a=torch.ones(8, 1, 32)),
            r"must have shape \[8, 2, 32\], got \[8, 1, 32\]",
        ),
        (
            lambda saved: change(saved, up_lora_a=torch.ones(8, 2, 32).int()),
            r"must be a float tensor, got torch\.int32",
        ),
        (lambda saved: (saved / FUSED).write_bytes(b"\0" * 8), "damaged or changed|bytes"),
        (lambda saved: (saved / FUSED).unlink(), "missing"),
        (lambda saved: (saved / MANIFEST).write_text("{"), MANIFEST),
        (lambda saved: (saved / MANIFEST).write_text("{}"), "must have status ready"),
        (lambda saved: [(saved / name).unlink() for name in (MANIFEST, FUSED)], "no such file"),
        (
            lambda saved: [(saved / MANIFEST).unlink(), (saved / FUSED).write_bytes(b"\0" * 8)],
            "safetensors header",
        ),
    ],
)
def test_files_that_do_not_fit_change_nothing(damage, message, saved):
    damage(saved)
    model = adapted(seed=2)
    before = {name: value.clone() for name, value in expert_adapters(model).items()}
    with pytest.raises(KTArtifactError, match=message):
        load_kt_adapter_artifacts(model, saved)
    assert all(torch.equal(value, before[name]) for name, value in expert_adapters(model).items())


def test_adapters_of_another_run_are_refused(saved):
    with pytest.raises(KTArtifactError, match=r"has rank 2 and alpha 6\.0, but this run has .* alpha 7\.0"):
        load_kt_adapter_artifacts(adapted(KTConfig(kt_lora_rank=RANK, kt_lora_alpha=7.0)), saved)
    with pytest.raises(KTArtifactError, match="has adapters of experts, which this model does not use"):
        load_kt_adapter_artifacts(adapted(KTConfig(kt_backend="AMXBF16_SkipLoRA")), saved)
    with pytest.raises(KTArtifactError, match="nowhere: no such directory"):
        load_kt_adapter_artifacts(adapted(), saved / "nowhere")
    with pytest.raises(KTAMXConfigError, match="no experts of"):
        load_kt_adapter_artifacts(tiny_model("qwen3_moe"), saved)


def test_saving_leaves_no_manifest_of_what_it_could_not_write(saved, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ktops.compat.kt_kernel.sft.adapter_files.SafetensorsStream.write", full)
    before = (saved / FUSED).read_bytes()
    with pytest.raises(OSError, match="No space left"):
        save_kt_adapter_artifacts(adapted(seed=2), saved)
    assert (saved / FUSED).read_bytes() == before and not (saved / MANIFEST).exists()
    assert not list(saved.rglob("*.tmp"))


def test_saving_needs_what_peft_writes_first(tmp_path):
    with pytest.raises(KTArtifactError, match=r"expected adapter_config\.json and adapter_model"):
        save_kt_adapter_artifacts(adapted(), tmp_path)
    assert not list(tmp_path.iterdir())
    assert save_kt_adapter_artifacts(adapted(KTConfig(kt_backend="bf16_SkipLoRA")), tmp_path) is None


def test_conversion_for_sglang(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sglang")
    tiny_model("qwen3_moe").save_pretrained(folder / "model")
    given = {"base_model_name_or_path": folder / "model"}
    summary = convert_kt_to_sglang_adapter(saved, folder / "out", **given)
    written = load_file(folder / "out" / "adapter_model.safetensors")
    assert (summary["rank"], summary["tensor_count"]) == (RANK, len(written))
    assert sum(".experts." in name for name in written) == 2 * 8 * 3 * 2
    with pytest.raises(ValueError, match="already exists"):
        convert_kt_to_sglang_adapter(saved, folder / "out", **given)
    assert convert_kt_to_sglang_adapter(saved, folder / "out", overwrite=True, **given) == summary
    assert not (folder / "out.new").exists()
    with pytest.raises(NotImplementedError, match="expert_output_dir must be None"):
        convert_kt_to_sglang_adapter(saved, folder / "other", expert_output_dir=folder, **given)


def test_experts_as_three_tensors(tmp_path):
    model = tiny_model("qwen3_moe", dtype=torch.bfloat16)
    model.config.architectures = ["Qwen3MoeForCausalLM"]
    model.save_pretrained(tmp_path)
    arch = sft.get_moe_arch_config(model.config)
    block = model.model.layers[1].mlp
    gate, up, down = sft.extract_moe_weights(block, arch)
    assert torch.equal(torch.cat([gate, up], dim=1), block.experts.gate_up_proj)
    assert torch.equal(down, block.experts.down_proj)
    files = [str(tmp_path / "model.safetensors")]
    read = sft.load_experts_from_checkpoint_files(files, None, "model.layers", arch, 1)
    assert all(torch.equal(one, other) for one, other in zip(read, (gate, up, down), strict=True))
    with pytest.raises(TypeError, match="the experts are in a format"):
        sft.extract_moe_weights(wrapped(INT8).model.layers[0].mlp, arch)


def test_contract_of_int4_checkpoints():
    weights = {"num_bits": 4, "symmetric": True, "group_size": 32}
    quantization = {"format": "pack-quantized", "config_groups": {"group_0": {"weights": weights}}}
    config = SimpleNamespace(quantization_config=quantization)
    assert sft.get_rawint4_checkpoint_contract(config).group_size == 32
    assert sft.get_rawint4_runtime().weight_layout == "int4"
    weights["num_bits"] = 8
    for other in (config, SimpleNamespace(quantization_config=None)):
        with pytest.raises(ValueError, match="RAWINT4 needs a checkpoint of compressed-tensors"):
            sft.get_rawint4_checkpoint_contract(other)


def begin(config: KTConfig, model: nn.Module) -> tuple[str, ...]:
    """Makes the calls of transformers up to the loading of weights."""
    assert artifacts.resolve_kt_pretrained_artifacts(config, "model", None) is None
    assert not artifacts.should_disable_kt_source_quantizer(config, model.config, None)
    return artifacts.claim_kt_routed_expert_subtrees(model)


def test_transformers_loads_dense_experts_itself():
    model = tiny_model("qwen3_moe")
    assert artifacts.is_kt_supported_moe_model(model)
    assert not artifacts.is_kt_supported_moe_model(nn.Linear(2, 2))
    assert begin(KTConfig(kt_backend="AMXBF16"), model) == ()
    assert not artifacts.is_kt_routed_expert_parameter_name("model.layers.0.mlp.experts.gate_up_proj")
    with pytest.raises(ValueError, match="kt_non_expert_weight_path must be absent"):
        begin({"kt_non_expert_weight_path": "cache"}, model)


def test_transformers_leaves_out_experts_that_ktops_stores_otherwise(tmp_path):
    """Such as it leaves them, as placeholders; ktops reads the checkpoint and quantizes."""
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path)
    assert begin(INT8, model) == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    for name in ("layers.0.mlp.experts.3.up_proj.weight", "model.layers.0.mlp.experts.down_proj"):
        assert artifacts.is_kt_routed_expert_parameter_name(name)
    for name in ("layers.0.mlp.gate.weight", "model.layers.0.mlp.shared_experts.up_proj.weight"):
        assert not artifacts.is_kt_routed_expert_parameter_name(name)
    for layer in model.model.layers:
        for name, parameter in list(layer.mlp.experts.named_parameters()):
            empty = torch.zeros(()).expand(parameter.shape)
            setattr(layer.mlp.experts, name, nn.Parameter(empty, requires_grad=False))
            assert artifacts.is_kt_routed_expert_base_parameter(layer.mlp.experts.get_parameter(name))
    with pytest.raises(KTAMXConfigError, match="kt_checkpoint_files must name the checkpoint"):
        wrap_moe_layers_with_kt_wrapper(model, INT8)
    runtime = SimpleNamespace(config=INT8, kt_checkpoint_files=[str(tmp_path / "model.safetensors")])
    wrappers = wrap_moe_layers_with_kt_wrapper(model, runtime)
    assert {wrapper.experts.down_proj.format for wrapper in wrappers} == {"int8"}
    assert not artifacts.is_kt_routed_expert_parameter_name("model.layers.0.mlp.experts.gate_up_proj")
    expected = wrapped(INT8)
    assert torch.equal(logits(model.eval()), logits(expected))


def test_weights_beside_the_experts_must_be_there():
    complete = {"missing_keys": ["model.layers.0.mlp.experts.gate_up_proj"], "unexpected_keys": ["x"]}
    artifacts.validate_kt_prequantized_loading_info(INT8, complete, None)
    info = SimpleNamespace(missing_keys={"model.norm.weight"}, mismatched_keys=set(), error_msgs=[])
    with pytest.raises(KTArtifactError, match=r"missing_keys: model\.norm\.weight"):
        artifacts.validate_kt_prequantized_loading_info(INT8, info, None)


def test_experts_stay_in_cpu_memory():
    model = tiny_model("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    with artifacts.project_kt_routed_experts_out_of_device_map(model):
        assert [parameter.numel() for parameter in experts.parameters()] == [0, 0]
    assert experts.down_proj.numel()
    names = [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
    prepare = artifacts.prepare_kt_non_expert_device_map
    assert prepare(model, {"": "cuda:0"}) == {"": "cuda:0", **dict.fromkeys(names, "cpu")}
    assert prepare(model, {"": 0, f"{names[0]}.gate_up_proj": 0}) == {"": 0, **dict.fromkeys(names, "cpu")}
    assert prepare(model, {"": "cpu"}) == {"": "cpu"}
    with artifacts.hide_kt_routed_experts_from_dispatch(model):
        assert not list(model.model.layers[0].mlp.experts.parameters())
    assert model.model.layers[0].mlp.experts is experts


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("validate_kt_pretrained_load", 3),
        ("mark_kt_int8_routed_expert_base_parameters", 2),
        ("write_kt_non_expert_cache_manifest", 1),
        ("KTPretrainedLoadPlan", 0),
    ],
)
def test_no_load_plans(name, arguments):
    with pytest.raises(NotImplementedError, match="leave kt_non_expert_weight_path out"):
        getattr(artifacts, name)(*[None] * arguments)
