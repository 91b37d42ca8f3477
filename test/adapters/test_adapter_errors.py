"""Adapters that cannot be exported or merged: the message says why, and nothing is written."""

import copy
import errno
import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, load_file, save_file
from tiny_adapters import adapted, change_config, save, save_base, save_config
from tiny_models import tiny_model

import ktops
from ktops.adapters import AdapterError
from ktops.adapters.directory import LOCK, new_directory
from ktops.checkpoints import CheckpointError
from ktops.checkpoints.stream import SafetensorsStream

WEIGHTS = "adapter_model.safetensors"
FUSED = "fused_expert_lora.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The base's config, its checkpoint, and an adapter."""
    folder = tmp_path_factory.mktemp("made")
    adapter = save(adapted("qwen3_moe"), folder / "adapter")
    return save_config("qwen3_moe", folder), save_base("qwen3_moe", folder), adapter


@pytest.fixture
def adapter(made, tmp_path):
    """A copy of the adapter to change."""
    return shutil.copytree(made[2], tmp_path / "adapter")


def refuses(made, adapter, message: str, layout: str = "vllm", error=AdapterError, **options) -> None:
    """Asserts that export and merge fail, and leave nothing."""
    base, checkpoint, _ = made
    before = sorted(adapter.parent.iterdir())
    with pytest.raises(error, match=message):
        ktops.export_adapter(adapter, adapter.parent / "out", layout, **{"base": base, **options})
    if not options and layout == "vllm":
        with pytest.raises(error, match=message):
            ktops.merge_adapter(checkpoint, adapter, adapter.parent / "out")
    assert sorted(adapter.parent.iterdir()) == before


def change_tensors(adapter, change) -> None:
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS)


def test_damaged_files(made, adapter):
    data = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(data[:-100])
    refuses(made, adapter, f"{WEIGHTS}: truncated", error=CheckpointError)
    (adapter / WEIGHTS).write_bytes(b"{}")
    refuses(made, adapter, f"{WEIGHTS}: truncated", error=CheckpointError)
    (adapter / WEIGHTS).unlink()
    refuses(made, adapter, f"expected {WEIGHTS} or {FUSED}")
    (adapter / "adapter_config.json").write_text("{")
    refuses(made, adapter, "adapter_config.json: cannot be read", error=CheckpointError)
    (adapter / "adapter_config.json").unlink()
    refuses(made, adapter, "expected a directory with adapter_config.json")


def test_incomplete_tensors(made, adapter):
    name = "base_model.model.model.layers.1.mlp.experts.lora_B.weight"
    change_tensors(adapter, lambda tensors: tensors.pop(name))
    refuses(made, adapter, "layers.1.mlp.experts.lora_A.* the other factor .* is missing")


def test_config_that_does_not_match(made, adapter):
    change_config(adapter, r=3)
    refuses(made, adapter, "has rank 4, but .*adapter_config.json says 3")
    change_config(adapter, r=4, lora_alpha=None)
    refuses(made, adapter, "lora_alpha must be a positive number, got None")


@pytest.mark.parametrize(
    "change",
    [{"use_dora": True}, {"lora_bias": True}, {"peft_type": "LOHA"}, {"init_lora_weights": "pissa_niter_4"}],
    ids=lambda change: next(iter(change)),
)
def test_other_kinds(change, made, adapter):
    change_config(adapter, **change)
    refuses(made, adapter, next(iter(change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern must map names to positive numbers, got \['q_proj'\]"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern must map names to positive numbers"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern has '\(', which is no regular expression"),
        ({"target_modules": 5}, "target_modules must be a list of names, got 5"),
        ({"target_parameters": [5]}, r"target_parameters must be a list of names, got \[5\]"),
    ],
)
def test_config_with_wrong_values(change, message, made, adapter):
    change_config(adapter, **change)
    refuses(made, adapter, f"adapter_config.json: {message}")


def test_directory_in_the_way(made, adapter, tmp_path):
    """A directory is written under another name first; what has that name already is not deleted."""
    base, checkpoint, _ = made
    source = adapter.rename(tmp_path / "out.partial")
    before = sorted(file.read_bytes() for file in source.iterdir())
    for adapters, message in (([source], "must not be"), ([made[2]], "has contents")):
        with pytest.raises(AdapterError, match=rf"out\.partial: {message}"):
            ktops.export_adapter(adapters, tmp_path / "out", "peft", base=base)
        with pytest.raises(AdapterError, match=rf"out\.partial: {message}"):
            ktops.merge_adapter(checkpoint, adapters, tmp_path / "out")
    assert sorted(file.read_bytes() for file in source.iterdir()) == before


def test_two_processes_at_once(tmp_path):
    with new_directory(tmp_path / "out") as folder:
        (folder / "file").write_text("first")
        with (
            pytest.raises(AdapterError, match="out: another process is writing it"),
            new_directory(folder.parent / "out"),
        ):
            pass
    assert [(file.name, file.read_text()) for file in (tmp_path / "out").iterdir()] == [("file", "first")]


def test_what_a_killed_process_left_is_deleted(tmp_path):
    left = tmp_path / "out.partial"
    (left / "model.partial").mkdir(parents=True)
    for file in (left / LOCK, left / "file.tmp", left / "model.partial" / "file"):
        file.write_text("half")
    with new_directory(tmp_path / "out") as folder:
        (folder / "file").write_text("whole")
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "file"]


def test_adapter_of_another_model(made, tmp_path):
    refuses(made, save(adapted("gpt_oss"), tmp_path / "gpt_oss"), "for another model")
    refuses(
        made,
        save(adapted("deepseek_v3"), tmp_path / "deepseek"),
        "has no module .*kv_a_proj_with_mqa. .* another model",
    )
    mixtral = adapted("mixtral", target_modules=["q_proj"])
    refuses(made, save(mixtral, tmp_path / "mixtral"), "for another model")


def test_base_model(made, adapter):
    refuses(made, adapter, r"names no base model\. Pass base", base=None)
    change_config(adapter, base_model_name_or_path="no/such-model")
    refuses(made, adapter, "names 'no/such-model', which is not on this machine", base=None)
    refuses(made, adapter, "expected a model directory with config.json", base=adapter)
    change_config(adapter, base_model_name_or_path=str(made[0]))
    ktops.export_adapter(adapter, adapter.parent / "out", "vllm")
    assert (adapter.parent / "out" / WEIGHTS).exists()


def test_destination(made, adapter, tmp_path):
    base, checkpoint, _ = made
    (tmp_path / "there").mkdir()
    for path, message in (
        (tmp_path / "there", "already exists"),
        (adapter / "in", "inside it"),
        (adapter, "must not be"),
    ):
        with pytest.raises(AdapterError, match=message):
            ktops.export_adapter(adapter, path, "peft", base=base)
        with pytest.raises(AdapterError, match=message):
            ktops.merge_adapter(checkpoint, adapter, path)
    with pytest.raises(AdapterError, match="inside it"):
        ktops.merge_adapter(checkpoint, adapter, checkpoint / "in")
    assert not any((tmp_path / "there").iterdir())


def test_arguments(made, adapter):
    refuses(made, adapter, "layout='tgi': expected one of peft, vllm", layout="tgi")
    refuses(made, adapter, "expected one for each of the 1 adapters, got 2", weights=[1, 1])
    refuses(made, adapter, "must be finite and not 0", weights=[0])
    with pytest.raises(AdapterError, match=r"expected a model directory with config\.json, got a file"):
        ktops.merge_adapter(made[1] / "model.safetensors", adapter, adapter.parent / "out")


def test_what_layouts_cannot_hold(made, tmp_path):
    base = save_config("gpt_oss", tmp_path)
    adapter = save(adapted("gpt_oss"), tmp_path / "adapter")
    refuses(made, adapter, "gate and up alternate. Merge", layout="llama.cpp", base=base)
    deepseek = save(adapted("deepseek_v3"), tmp_path / "deepseek")
    refuses(
        made, deepseek, "kv_b_proj.* Merge", layout="llama.cpp", base=save_config("deepseek_v3", tmp_path)
    )
    attention = save(adapted("qwen3_moe", target_parameters=None), tmp_path / "attention")
    refuses(made, attention, "no adapters on experts", layout="kt")


def test_sum_of_saved_modules(made, adapter, tmp_path):
    saved = save(adapted("qwen3_moe", modules_to_save=["lm_head"]), tmp_path / "saved")
    with pytest.raises(AdapterError, match=r"lm_head.* cannot be weighted or added"):
        ktops.export_adapter([adapter, saved], tmp_path / "out", "peft", base=made[0])


def test_files_of_kt_kernel(made, adapter):
    base = made[0]
    source = adapter.parent / "kt"
    ktops.export_adapter(adapter, source, "kt", base=base)
    whole = (source / FUSED).read_bytes()
    (source / FUSED).write_bytes(whole[:-1] + b"\1")
    refuses(made, source, f"{FUSED}: damaged or changed: its sha256")
    (source / FUSED).write_bytes(whole[:-1])
    refuses(made, source, f"{FUSED}: damaged or changed: its size")
    (source / "kt_adapter_manifest.json").unlink()
    tensors = {name: tensor for name, tensor in load(whole).items() if name != "layers.1.experts.up_lora_b"}
    save_file(tensors, source / FUSED)
    refuses(made, source, "layer 1 has no up_lora_b")
    save_file({"layers.7.experts.gate_lora": torch.zeros(1)}, source / FUSED)
    refuses(made, source, "unknown key")


def test_merge_of_a_checkpoint_that_lacks_weights(made, tmp_path):
    _, checkpoint, adapter = made
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match=r"has no model\.layers\.1\.self_attn\.o_proj\.weight of its own"):
        ktops.merge_adapter(broken, adapter, tmp_path / "out")
    no_experts = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.experts" not in name}
    save_file(no_experts, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match=r"has no experts for model\.layers\.1\.mlp\.experts"):
        ktops.merge_adapter(broken, adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


@pytest.mark.parametrize("changed", ["lm_head", "embed_tokens"])
def test_merge_into_tied_weights(changed, tmp_path):
    """transformers leaves the head out of such checkpoints, and PEFT adapts only one of the two."""
    tied = tiny_model("qwen3_moe", tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "base")
    for name, lora in (("lora", {"target_modules": [changed]}), ("saved", {"modules_to_save": [changed]})):
        keys = {"target_modules": ["q_proj"], **lora}
        adapter = save(get_peft_model(copy.deepcopy(tied), LoraConfig(r=2, **keys)), tmp_path / name)
        with pytest.raises(AdapterError, match=rf"changes .*{changed}\.weight, but .* are one weight"):
            ktops.merge_adapter(tmp_path / "base", adapter, tmp_path / "out")


def test_merge_of_trained_tokens(made, tmp_path):
    adapter = save(adapted("qwen3_moe", trainable_token_indices=[1, 2]), tmp_path / "adapter")
    with pytest.raises(AdapterError, match="trainable_token_indices cannot be merged"):
        ktops.merge_adapter(made[1], adapter, tmp_path / "out")


def test_a_checkpoint_of_ktops_is_merged_into_a_format_only(made, tmp_path):
    _, checkpoint, adapter = made
    ktops.merge_adapter(checkpoint, adapter, tmp_path / "int8", weight_format="int8")
    with pytest.raises(AdapterError, match=r"written by ktops\. Merge into the checkpoint"):
        ktops.merge_adapter(tmp_path / "int8", adapter, tmp_path / "out")
    ktops.merge_adapter(tmp_path / "int8", adapter, tmp_path / "again", weight_format="int8")
    assert json.loads((tmp_path / "again" / "ktops.json").read_text())["files"]


@pytest.mark.parametrize("weight_format", [None, "int8"])
def test_full_disk(weight_format, made, adapter, monkeypatch, ktops_command):
    base, checkpoint, _ = made
    written = 0

    def pwrite(descriptor, data, offset):
        nonlocal written
        written += len(data)
        if written > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", pwrite)
    options = () if weight_format is None else ("--weight-format", weight_format)
    for arguments in (
        ("export", adapter, "out", "--for", "vllm", "--base", base),
        ("merge", checkpoint, adapter, "out", *options),
    ):
        written = 0
        status, _, err = ktops_command(*arguments)
        assert status == 1 and "No space left on device. Nothing was written" in err
        assert sorted(path.name for path in adapter.parent.iterdir()) == ["adapter"]


def test_interruption(made, adapter, monkeypatch, ktops_command):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(SafetensorsStream, "write", interrupt)
    status, _, err = ktops_command("export", adapter, "out", "--for", "peft", "--base", made[0])
    assert status == 130 and "Nothing was written" in err
    assert sorted(path.name for path in adapter.parent.iterdir()) == ["adapter"]


def test_command(made, adapter, ktops_command):
    base, checkpoint, _ = made
    status, out, _ = ktops_command(
        "export", adapter, adapter, "sum", "--for", "llama.cpp", "--base", base, "--weights", "0.5,0.5"
    )
    assert status == 0 and "written: sum" in out and "convert_lora_to_gguf.py" in out
    assert json.loads((adapter.parent / "sum" / "adapter_config.json").read_text())["r"] == 8
    status, _, err = ktops_command(
        "export", adapter, "two", "--for", "peft", "--base", base, "--weights", "0.5,0.5"
    )
    assert status == 1 and "expected one for each of the 1 adapters" in err
    status, _, err = ktops_command(
        "export", adapter, "two", "--for", "peft", "--base", base, "--weights", "half"
    )
    assert status == 1 and "--weights: expected numbers separated by commas" in err
    status, _, err = ktops_command("export", adapter, "two", "--for", "tgi", "--base", base)
    assert status == 1 and "--for: expected one of peft, vllm" in err
    status, out, _ = ktops_command("merge", checkpoint, adapter, "merged")
    assert status == 0 and (adapter.parent / "merged" / "model.safetensors").exists()
    for option in (("--group-size", "32"), ("--quantize-method", "mse"), ("--method", "mse")):
        status, _, err = ktops_command("merge", checkpoint, adapter, "other", *option)
        assert status == 1 and "--group-size and --quantize-method need --weight-format" in err
