"""save_pretrained of models with experts in formats: from_pretrained loads the same bits."""

import copy
import json

import pytest
import torch
import transformers
from moe_blocks import InferBlock, LoopBlock
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_trainer import losses, trainer
from tiny_models import ARCHITECTURES, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter

import ktops
from ktops.nn import KTExperts, KTExpertSequence

TOKENS = torch.arange(24).reshape(2, 12)

pytestmark = pytest.mark.usefixtures("enabled")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(TOKENS).logits


def loaded(path, kind=AutoModelForCausalLM, **options):
    model, info = kind.from_pretrained(path, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def quantized(architecture: str = "qwen3_moe", **options):
    model = tiny_model(architecture, **options).eval()
    ktops.quantize_experts(model, "int8", show_progress=False)
    return model


def change(experts: KTExperts) -> None:
    """Gives every expert the weights of another."""
    weight = experts.down_proj
    codes = weight.codes.map(lambda tensor: tensor.roll(1, dims=0))
    experts.down_proj = ktops.ExpertWeight(
        weight.format, weight.shape, *codes, group_size=weight.group_size, dtype=weight.dtype
    )


def from_files(architecture: str, folder):
    """Uses a model loaded by transformers, with experts that ktops loaded from the same files."""
    tiny_model(architecture).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ktops.load_experts(model, folder, "int4", group_size=32, show_progress=False)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("way", ["quantize_experts", "load_experts"])
def test_architectures(tmp_path, architecture, way):
    """Saves in one file and in several."""
    if way == "quantize_experts":
        model, size = quantized(architecture), "5GB"
    else:
        model, size = from_files(architecture, tmp_path / "dense"), "30KB"
    model.save_pretrained(tmp_path / "saved", max_shard_size=size)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1 - (size == "5GB")
    again = loaded(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    expected, state = model.state_dict(), again.state_dict()
    assert expected.keys() == state.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    said = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert said["quantization_config"] == {"loader": "ktops"}


def test_two_formats_and_group_sizes(tmp_path):
    model = tiny_model("qwen3_moe").eval()
    ktops.quantize_experts(model, "fp32", show_progress=False)
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.gate_up_proj = ktops.quantize(experts.gate_up_proj.weight, "uint4", group_size=32)
        experts.down_proj = ktops.quantize(experts.down_proj.weight, "int4", group_size=0)
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert torch.equal(logits(again), logits(model))
    experts = again.model.layers[0].mlp.experts
    assert (experts.gate_up_proj.group_size, experts.down_proj.group_size) == (32, 0)


@pytest.mark.parametrize("original", [True, False])
def test_other_ways_to_save(tmp_path, original):
    tiny_model("mixtral").save_pretrained(tmp_path / "dense")
    model = loaded(tmp_path / "dense", dtype=torch.bfloat16)
    ktops.quantize_experts(model, "int8", show_progress=False)
    for each in (model, copy.deepcopy(model)):
        each.save_pretrained(tmp_path / "whole", save_original_format=original)
        assert torch.equal(logits(loaded(tmp_path / "whole")), logits(model))
    model.model.save_pretrained(tmp_path / "base", save_original_format=original)
    with torch.no_grad():
        base = loaded(tmp_path / "base", transformers.AutoModel)(TOKENS).last_hidden_state
        assert torch.equal(base, model.model(TOKENS).last_hidden_state)
    assert model.float() is model and logits(model).dtype == torch.float32


def test_saved_where_it_was_loaded_from(tmp_path):
    """Weights in mapped files survive, and leftovers of an earlier save are not read."""
    model = quantized()
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    for size in ("5GB", "30KB"):
        model = loaded(tmp_path / "saved")
        model.save_pretrained(tmp_path / "saved", max_shard_size=size)
        assert torch.equal(logits(model), expected) and torch.equal(
            logits(loaded(tmp_path / "saved")), expected
        )
    (tmp_path / "saved" / "model.safetensors").unlink()
    model = loaded(tmp_path / "saved")
    change(model.model.layers[1].mlp.experts)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    assert torch.equal(logits(loaded(tmp_path / "saved")), logits(model))


def test_saved_over_a_converted_directory(tmp_path):
    from rich.console import Console

    from ktops.cli.convert import Options, convert

    tiny_model("qwen3_moe").save_pretrained(tmp_path / "dense")
    convert(Options(tmp_path / "dense", tmp_path / "out", "int8"), Console(quiet=True))
    model = loaded(tmp_path / "out")
    change(model.model.layers[1].mlp.experts)
    for size in ("30KB", "5GB"):
        model.save_pretrained(tmp_path / "out", max_shard_size=size)
        assert torch.equal(logits(loaded(tmp_path / "out")), logits(model))


def test_swapped_experts(tmp_path):
    """Dense experts are saved under the model's published names."""
    model = tiny_model("qwen3_moe")
    names = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ktops.swap_experts(model)
    model.save_pretrained(tmp_path)
    ktops.disable()
    state = loaded(tmp_path).state_dict()
    assert state.keys() == names.keys() and all(torch.equal(state[name], names[name]) for name in names)


class ListConfig(PreTrainedConfig):
    model_type = "list_of_experts"
    block = "loop"


class ListModel(PreTrainedModel):
    """A transformers model whose blocks iterate a ModuleList."""

    config_class = ListConfig
    blocks = {"loop": LoopBlock, "infer": InferBlock}  # noqa: RUF012

    def __init__(self, config: ListConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList([self.blocks[config.block]() for _ in range(2)])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("block", ListModel.blocks)
def test_lists_of_experts(tmp_path, block):
    torch.manual_seed(0)
    dense = ListModel(ListConfig(block=block)).eval()
    x = torch.randn(7, dense.layers[0].gate.weight.shape[1])
    swapped = copy.deepcopy(dense)
    ktops.swap_experts(swapped)
    swapped.save_pretrained(tmp_path / "dense")
    again = loaded(tmp_path / "dense", ListModel)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), dense.parameters(), strict=True))

    model = copy.deepcopy(dense)
    ktops.quantize_experts(model, "int8", show_progress=False)
    model.save_pretrained(tmp_path / "int8")
    with torch.no_grad():
        expected = model(x)
        for path, options in (
            ("int8", {}),
            ("dense", {"quantization_config": ktops.KTConfig("int8")}),
        ):
            made = loaded(tmp_path / path, ListModel, **options)
            assert isinstance(made.layers[0].experts, KTExpertSequence)
            assert torch.equal(made(x), expected)
    assert "layers.0.experts.gate_up_proj.weight" in model.state_dict()
    other = copy.deepcopy(dense)
    ktops.quantize_experts(other, "int8", show_progress=False)
    change(other.layers[0].experts.stacked)
    with torch.no_grad():
        assert not torch.equal(other(x), expected)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), expected)


class TransposedConfig(ListConfig):
    model_type = "list_of_experts_with_transposed_routers"


class TransposedModel(ListModel):
    config_class = TransposedConfig


def test_other_tensors_that_files_have_in_another_layout(tmp_path):
    """Weights are written in the layout of the files: transposed, under the same name."""
    transposed = WeightConverter("gate.weight", "gate.weight", operations=[Transpose(0, 1)])
    register_checkpoint_conversion_mapping(TransposedConfig.model_type, [transposed], overwrite=True)
    model = TransposedModel(TransposedConfig()).eval()
    ktops.quantize_experts(model, "int8", show_progress=False)
    for each in (model, loaded_from(model, tmp_path / "first", TransposedModel)):
        again = loaded_from(each, tmp_path / "again", TransposedModel)
        assert torch.equal(again.layers[0].gate.weight, model.layers[0].gate.weight)
        written = load_file(tmp_path / "again" / "model.safetensors")["layers.0.gate.weight"]
        assert torch.equal(written, model.layers[0].gate.weight.T)


def loaded_from(model, path, kind):
    model.save_pretrained(path)
    return loaded(path, kind)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_trainer_without_peft(tmp_path, architecture):
    """All dense parts, such as router and attention, are trained, and a run resumes where it stopped."""
    whole = trainer(tmp_path / "whole", quantized(architecture))
    whole.train()
    parts = trainer(tmp_path / "parts", quantized(architecture), save_strategy="steps", save_steps=2)
    parts.train()
    resumed = trainer(tmp_path / "parts", quantized(architecture))
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert len(losses(whole)) == 4 and losses(resumed) == losses(whole)
    again = loaded(tmp_path / "parts" / "checkpoint-4")
    assert torch.equal(logits(again), logits(whole.model))
    trainer(tmp_path / "loaded", again, max_steps=1, save_strategy="steps", save_steps=1).train()
    assert isinstance(loaded(tmp_path / "loaded" / "checkpoint-1").model.layers[0].mlp.experts, KTExperts)


def test_adapters(tmp_path):
    """Merging adapters works on attention; on experts in a format it is an error and changes nothing."""
    attention, experts = {"target_modules": ["q_proj"]}, {"target_parameters": ["mlp.experts.down_proj"]}
    model = quantized()
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **attention, **experts))
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    from peft import PeftModel

    assert torch.equal(
        logits(PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / "adapter")), expected
    )
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(NotImplementedError, match="down_proj in format 'int8' cannot be merged"):
            merge()
    assert torch.equal(logits(adapted), expected)
    adapted.unload().save_pretrained(tmp_path / "unloaded")
    assert torch.equal(logits(loaded(tmp_path / "unloaded")), logits(loaded(tmp_path / "base")))

    merged = get_peft_model(
        quantized(), LoraConfig(r=2, init_lora_weights=False, **attention)
    ).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded(tmp_path / "merged")), logits(merged))
