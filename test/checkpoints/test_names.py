"""Names of expert tensors as transformers publishes them, and directories with other files."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from every_architecture import (
    architectures,
    expected,
    model_without_weights,
    published,
    stacked_experts,
)
from safetensors.torch import save_file
from tiny_checkpoints import expect_checkpoint, write_gguf, write_per_expert
from tiny_composites import save
from tiny_schemes import plain
from transformers.core_model_loading import ConversionOps, WeightConverter

import ktops
from ktops.checkpoints import CheckpointError, open_checkpoint
from ktops.checkpoints.match import match_layers
from ktops.checkpoints.model_names import ModelNames
from ktops.checkpoints.names import family, summary
from ktops.integrations.loading import experts_modules

MUST_BE_READ = {
    "deepseek_v3", "dots1", "ernie4_5_moe", "flex_olmo", "glm4_moe", "gpt_oss", "granitemoe",
    "granitemoehybrid", "hunyuan_v1_moe", "jamba", "lfm2_moe", "minimax", "mixtral", "nemotron_h", "olmoe",
    "phimoe",
    "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_vl_moe",
}  # fmt: skip
"""Architectures that the test below must reach."""


def expect_read(path, model) -> None:
    """Reading the model as transformers would publish it gives its weights."""
    modules = stacked_experts(model)
    weights, tensors = published(model, modules)
    save_file(tensors, path)
    layers = match_layers(open_checkpoint(path), model, modules)
    assert layers.keys() == modules.keys()
    for name, layer in layers.items():
        read, wanted = layer.read(), expected(name, modules[name], weights)
        for key, value, dense in zip(read._fields, read, wanted, strict=True):
            value = value.weight if isinstance(value, ktops.ExpertWeight) else value
            same = value is dense is None or (dense is not None and torch.equal(value, dense))
            assert same, f"{name}.{key}"
        written = ModelNames(model, modules).key(f"{layer.written_name}.gate_up_proj.weight")
        assert written.module == name


def test_every_architecture(tmp_path):
    """Covers the installed transformers, as published by its own save_pretrained."""
    done, failed = set(), {}
    for model_type, model_class in architectures():
        try:
            model = model_without_weights(model_type, model_class)
        except Exception:
            continue
        if not stacked_experts(model):
            continue
        try:
            expect_read(tmp_path / "model.safetensors", model)
            done.add(model_type)
        except Exception as error:
            failed[model_type] = error
    assert not failed, failed
    assert not MUST_BE_READ - done, MUST_BE_READ - done


class Scrambled(ConversionOps):
    """An operation that ktops does not know."""

    def convert(self, *args, **kwargs):
        raise NotImplementedError


def test_unknown_conversion(tmp_path):
    model = model_without_weights("qwen3_moe", transformers.Qwen3MoeForCausalLM)
    modules = stacked_experts(model)
    tensors = {f"{name}.scrambled": torch.zeros(4, 16, 8) for name in modules}
    save_file(tensors, tmp_path / "model.safetensors")
    converter = WeightConverter("mlp.experts.scrambled", "mlp.experts.gate_up_proj", [Scrambled()])
    with pytest.raises(CheckpointError, match=r"scrambled .* the operation Scrambled, which ktops does not"):
        match_layers(open_checkpoint(tmp_path), model, modules, conversions=[converter])


@pytest.mark.parametrize(
    ("model_type", "model_class", "message"),
    [
        ("jetmoe", "JetMoeForCausalLM", "its weights are not stacked"),
        (
            "switch_transformers",
            "SwitchTransformersForConditionalGeneration",
            "its weights are not stacked",
        ),
    ],
)
def test_experts_that_ktops_does_not_load(tmp_path, model_type, model_class, message):
    """load_experts and KTConfig raise an error that gives the reason, before anything is changed."""
    model = model_without_weights(model_type, getattr(transformers, model_class))
    with pytest.raises(ValueError, match=f"ktops cannot load .*: {message}"):
        experts_modules(model)


def gguf_file(path, names: list[str]) -> None:
    shapes = ((2, 64, 32) if "down" in name else (2, 32, 64) for name in names)
    write_gguf(path, {name: torch.randn(shape).numpy() for name, shape in zip(names, shapes, strict=True)})


EXPERTS = [f"blk.0.ffn_{name}_exps.weight" for name in ("gate", "up", "down")]
OF_THE_MATRIX = [f"blk.0.ffn_{name}_exps.weight.in_sum2" for name in ("gate", "up", "down")]


@pytest.mark.parametrize(
    "stray", ["visual.blocks.0.mlp.fc1.weight", "mm_projector.weight", *OF_THE_MATRIX[:1]]
)
def test_stray_safetensors_beside_gguf(tmp_path, stray):
    """A vision projector or an importance matrix is ignored."""
    gguf_file(tmp_path / "model-Q8_0.gguf", EXPERTS)
    save_file({stray: torch.zeros(3)}, tmp_path / "mmproj.safetensors")
    assert [layer.name for layer in open_checkpoint(tmp_path).layers] == ["blk.0"]


def test_stray_gguf_beside_gguf(tmp_path):
    """Vision projectors in two precisions have the same names."""
    gguf_file(tmp_path / "model.gguf", EXPERTS)
    gguf_file(tmp_path / "imatrix.gguf", OF_THE_MATRIX)
    for precision in ("F16", "F32"):
        gguf_file(tmp_path / f"mmproj-{precision}.gguf", ["v.blk.0.attn_q.weight"])
    assert list(open_checkpoint(tmp_path).tensors) == EXPERTS
    gguf_file(tmp_path / "model-Q4_0.gguf", EXPERTS)
    with pytest.raises(CheckpointError, match=r"model.gguf: the tensor is also in .*model-Q4_0.gguf"):
        open_checkpoint(tmp_path)


def test_safetensors_with_experts_come_before_gguf(tmp_path):
    save("granite", tmp_path)
    gguf_file(tmp_path / "model.gguf", EXPERTS)
    layers = open_checkpoint(tmp_path).layers
    assert [layer.module for layer in layers] == [
        f"model.layers.{i}.block_sparse_moe.experts" for i in range(2)
    ]


def test_model_safetensors_is_the_model(tmp_path):
    """Reads only the file that transformers would load, whatever else the directory contains."""
    save("mixtral", tmp_path)
    save_file(
        {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(1)}, tmp_path / "consolidated.safetensors"
    )
    assert [layer.num_experts for layer in open_checkpoint(tmp_path).layers] == [8, 8]


def test_no_experts_at_all(tmp_path):
    save_file(
        {"model.layers.3.mlp.up.weight": torch.zeros(2), "lm_head.weight": torch.zeros(2)},
        tmp_path / "a.safetensors",
    )
    model = model_without_weights("qwen3_moe", transformers.Qwen3MoeForCausalLM)
    with pytest.raises(
        CheckpointError,
        match=r"does not recognize any tensor name as an expert's. The names are "
        r"model.layers.\*.mlp.up.weight, lm_head",
    ):
        ktops.load_experts(model, tmp_path)


def test_configuration_that_transformers_cannot_read(tmp_path):
    """Uses the usual names with a warning, and without one if transformers doesn't know the model at all."""
    dense = write_per_expert(tmp_path, plain(torch.float32), config={"model_type": "unheard_of"})
    expect_checkpoint(open_checkpoint(tmp_path), dense)
    config = {"model_type": "qwen3_moe", "num_hidden_layers": "two", "architectures": ["Qwen3MoeForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="cannot create the 'qwen3_moe' model that config.json describes"):
        expect_checkpoint(open_checkpoint(tmp_path), dense)


def test_without_transformers(tmp_path):
    """Reading the usual names needs only torch."""
    write_per_expert(tmp_path, plain(torch.bfloat16), config={"model_type": "qwen3_moe"})
    code = (
        "import sys; sys.modules['transformers'] = None; from ktops.checkpoints import open_checkpoint; "
        "print([(layer.index, layer.module) for layer in open_checkpoint(sys.argv[1]).layers])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "[(0, None), (1, None)]\n", done.stderr


def test_names_for_people():
    assert (
        family("blk.3") == "blk."
        and family("layers.3.experts") == "layers."
        and family("experts") == "experts"
    )
    assert summary([]) == "none"
    assert summary(["a.weight", "h.0.moe.w", "h.1.moe.w"]) == "h.*.moe.w, a.weight"
    assert summary(f"a{index}" for index in range(20)).endswith(" and 8 more")
