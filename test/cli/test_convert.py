"""`ktops convert` from a checkpoint to a directory that ktops loads, interrupted or not."""

import errno
import itertools
import json
import os
import signal
import threading
import time
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import ktops
from ktops._workers import require_not_stopped
from ktops.checkpoints import CheckpointError, open_checkpoint
from ktops.checkpoints.checkpoint import PROGRESS
from ktops.cli.models import load_model
from ktops.formats.error import relative_error

ARGUMENTS = ("--weight-format", "int4", "--group-size", 32, "--quantize-method", "mse")


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def besides_plan(out: str) -> list[str]:
    return [line for line in out.splitlines() if not line.startswith("  plan: ")]


def test_what_is_written(convert, model_directory, tmp_path):
    status, out, err = convert("out", *ARGUMENTS, "--report", "full")
    assert (status, err) == (0, "")
    assert "2 layers of experts: 14.0 KiB in int4, group 32 (bf16: 48.0 KiB, 3.43 times smaller)" in out
    source, checkpoint = open_checkpoint(model_directory), open_checkpoint(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "ktops-report.json").read_text())
    assert [layer.name for layer in checkpoint.layers] == [layer["name"] for layer in report["layers"]]
    model = load_model(str(model_directory), torch.float32, "ktops")
    for layer, said in zip(checkpoint.layers, report["layers"], strict=True):
        experts, errors = model.get_submodule(layer.name), {}
        for kind, weight in zip(("gate_up", "down"), layer.read()[:2], strict=True):
            dense = getattr(experts, f"{kind}_proj").detach()
            expected = ktops.quantize(dense, "int4", group_size=32, method="mse")
            assert torch.equal(weight.weight, expected.weight) and torch.equal(weight.scale, expected.scale)
            errors[kind] = relative_error(weight, dense)
            assert said[f"{kind}_error"] == pytest.approx(errors[kind])
        assert max(errors.values()) < said["output_error"] < 2.5 * max(errors.values())
        assert said["measured_experts"] == said["num_experts"] == 8
    assert report["report"] == "full" and report["measured_fraction"] == 1
    assert report["ratio"] == 24 / 7 and 0.05 < report["relative_error"] < 0.15
    assert checkpoint.config == source.config | {"quantization_config": {"loader": "ktops"}}
    for name, view in source.other_tensors().items():
        assert torch.equal(checkpoint.other_tensors()[name].read(), view.read())
    assert files(tmp_path / "out")["tokenizer.json"] == files(model_directory)["tokenizer.json"]
    loaded = load_model(str(tmp_path / "out"), torch.float32, "ktops")
    ktops.quantize_experts(model, "int4", group_size=32, method="mse")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert not list(tmp_path.glob("out.*"))


def test_short_names_of_the_options(convert, tmp_path):
    assert convert("long", *ARGUMENTS)[0] == 0
    assert convert("short", "--format", "int4", "--group-size", 32, "--method", "mse")[0] == 0
    assert files(tmp_path / "long") == files(tmp_path / "short")


def test_another_report_keeps_the_layers(convert, stop_after_a_layer, tmp_path):
    assert convert("out", *ARGUMENTS)[0] == 130
    written = stop_after_a_layer()
    assert convert("out", *ARGUMENTS, "--report", "full")[0] == 0
    assert written == ["model.layers.1.mlp.experts"]
    assert convert("whole", *ARGUMENTS, "--report", "full")[0] == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("cause", ["Ctrl-C", "disk full"])
def test_stopped_while_threads_write(convert, monkeypatch, tmp_path, cause):
    """After the first layer; the threads have ended when the command has."""
    pwrite, count = os.pwrite, itertools.count()
    progress = tmp_path / "out.partial" / PROGRESS

    def failing(file, *arguments):
        in_thread = threading.current_thread() is not threading.main_thread()
        if in_thread and "experts-00001" in os.readlink(f"/proc/self/fd/{file}"):
            while "experts-00000" not in progress.read_text():
                time.sleep(0.001)
            if next(count) == 0:
                if cause == "disk full":
                    raise OSError(errno.ENOSPC, "No space left on device")
                os.kill(os.getpid(), signal.SIGINT)
                while True:
                    require_not_stopped()
        return pwrite(file, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        status, _, err = convert("out", *ARGUMENTS, "--num-threads", 2)
    if cause == "Ctrl-C":
        assert (status, err) == (130, "Interrupted. Run the same command again to continue.\n")
    else:
        err = " ".join(err.split())
        assert status == 1 and "No space left on device" in err and "KiB more are needed" in err
        assert "out.partial keeps what is finished: run the same command again to continue" in err
    assert not any(thread.name.startswith("ktops_") for thread in threading.enumerate())
    assert not list((tmp_path / "out.partial").glob("*.tmp"))
    status, out, _ = convert("out", *ARGUMENTS)
    assert status == 0 and "continuing: 1 of 2 layers are written and verified" in out
    assert convert("whole", *ARGUMENTS)[0] == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_interrupted_and_continued(convert, stop_after_a_layer, tmp_path):
    status, _, err = convert("out", *ARGUMENTS)
    assert (status, err) == (130, "Interrupted. Run the same command again to continue.\n")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=r"out\.partial: still being written, or writing was inter"):
        open_checkpoint(tmp_path / "out.partial")
    written = stop_after_a_layer()
    status, out, err = convert("out", *ARGUMENTS)
    assert (status, err) == (0, "") and "continuing: 1 of 2 layers are written and verified" in out
    assert written == ["model.layers.1.mlp.experts"]
    assert convert("whole", *ARGUMENTS)[0] == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("change", ["a bit", "options"])
def test_starts_anew_if_it_must(convert, stop_after_a_layer, tmp_path, change):
    assert convert("out", *ARGUMENTS)[0] == 130
    if change == "a bit":
        file = tmp_path / "out.partial" / "experts-00000.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    written = stop_after_a_layer()
    arguments = ARGUMENTS if change == "a bit" else ("--weight-format", "int8")
    status, out, err = convert("out", *arguments)
    assert (status, err) == (0, "") and len(written) == 2
    assert "out.partial is damaged, or the options or the source changed: starting over" in out
    assert {layer.formats[0] for layer in open_checkpoint(tmp_path / "out").layers} == {arguments[1]}
    assert not list(tmp_path.glob("out.*"))


def test_a_converted_directory_is_a_source(convert, tmp_path):
    assert convert("int8", "--weight-format", "int8")[0] == 0
    assert convert("again", "--weight-format", "int8", source="int8")[0] == 0
    report = json.loads((tmp_path / "again" / "ktops-report.json").read_text())
    assert report["relative_error"] == report["output_error"] == 0


def test_experts_are_not_quantized_twice(convert, tmp_path):
    assert convert("int4", *ARGUMENTS)[0] == 0
    status, out, err = convert("int8", "--weight-format", "int8", source="int4")
    assert (status, out) == (1, "") and not list(tmp_path.glob("int8*"))
    assert err == (
        "ktops: --weight-format int8: the experts in int4 are already quantized, to int4, group 32. Convert "
        "the original model\n"
    )
    assert convert("bf16", "--weight-format", "bf16", source="int4")[0] == 0
    decoded, quantized = (open_checkpoint(tmp_path / name).layers[0].read() for name in ("bf16", "int4"))
    assert torch.equal(decoded.down_proj.weight, quantized.down_proj.dequantize())


def test_overwrite(convert, tmp_path):
    assert convert("out", "--weight-format", "int8")[0] == 0
    status, out, err = convert("out", *ARGUMENTS)
    assert (status, out, err) == (1, "", "ktops: out already exists. Add --overwrite to replace it\n")
    assert convert("out", *ARGUMENTS, "--overwrite")[0] == 0
    assert open_checkpoint(tmp_path / "out").layers[0].formats == ("int4", "int4")
    (tmp_path / "mine").mkdir()
    status, _, err = convert("mine", *ARGUMENTS, "--overwrite")
    assert status == 1 and "mine has no ktops.json; only directories converted by ktops are replaced" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--weight-format", "int3"],
            "--weight-format int3: format must be one of bf16, fp16, fp32, int8, int4, uint4, ",
        ),
        (
            ["--weight-format", "int4", "--group-size", 7],
            "--weight-format int4: group_size must be one of 0, any multiple",
        ),
        (
            ["--weight-format", "int4", "--quantize-method", "hqq"],
            "--weight-format int4: method must be one of rtn, mse for format 'int4', got",
        ),
        (
            ["--weight-format", "int4", "--report", "all"],
            "--report must be one of full, sample, none, got 'all'",
        ),
        (
            ["--weight-format", "mxfp4"],
            "--weight-format mxfp4: model.layers.0.mlp.experts: format 'mxfp4' needs rows of a",
        ),
    ],
)
def test_bad_options(convert, tmp_path, arguments, message):
    status, out, err = convert("out", *arguments)
    assert (status, out) == (1, "") and message in err and "Traceback" not in err
    assert not list(tmp_path.glob("out*"))


def test_bad_sources(convert, model_directory, tmp_path):
    def refused(source, destination="out") -> str:
        status, out, err = convert(destination, *ARGUMENTS, source=source)
        assert status == 1 and besides_plan(out) == [] and "Traceback" not in err
        return err

    assert "nowhere: no such file or directory" in refused("nowhere")
    assert "SRC and DST must not be the same or contain each other" in refused(
        model_directory, model_directory / "out"
    )
    (tmp_path / "damaged").mkdir()
    data = (model_directory / "model.safetensors").read_bytes()
    (tmp_path / "damaged" / "model.safetensors").write_bytes(data[:-1])
    assert "damaged/model.safetensors" in refused("damaged")
    tensors = {
        name: tensor * torch.nan if "experts.3.up" in name else tensor
        for name, tensor in load_file(model_directory / "model.safetensors").items()
    }
    (tmp_path / "nan").mkdir()
    save_file(tensors, tmp_path / "nan" / "model.safetensors")
    err = refused("nan")
    assert "experts.3.up_proj" in err and "needs finite weights, got NaN or infinity" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "options"), [("uint4", ("--group-size", 32)), ("q4_k", ("--quantize-method", "mse"))]
)
def test_gguf_files(convert, tmp_path, name, options):
    """Experts come from ggml's blocks, the rest of the model from its Hugging Face directory."""
    rng, kind = numpy.random.default_rng(0), gguf.GGMLQuantizationType.Q8_0
    file = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen3moe")
    file.add_tensor("token_embd.weight", rng.standard_normal((5, 32)).astype(numpy.float32))
    dense = {}
    for proj in ("gate", "up", "down"):
        data = gguf.quantize(rng.standard_normal((2, 256, 256)).astype(numpy.float32), kind)
        dense[proj] = torch.from_numpy(gguf.dequantize(data, kind))
        file.add_tensor(f"blk.7.ffn_{proj}_exps.weight", data, raw_dtype=kind)
    for write in (file.write_header_to_file, file.write_kv_data_to_file, file.write_tensors_to_file):
        write()
    file.close()
    assert convert("out", "--weight-format", name, *options, source="model.gguf")[0] == 0
    checkpoint = open_checkpoint(tmp_path / "out")
    (layer,) = checkpoint.layers
    assert layer.name == "model.layers.7.mlp.experts" and not checkpoint.other_tensors()
    settings = {"method": "mse"} if name == "q4_k" else {"group_size": 32}
    both = torch.cat([dense["gate"], dense["up"]], 1), dense["down"]
    for written, weights in zip((layer.read().gate_up_proj, layer.read().down_proj), both, strict=True):
        expected = ktops.quantize(weights, name, **settings)
        assert all(a is b or torch.equal(a, b) for a, b in zip(written.codes, expected.codes, strict=True))
    assert "already quantized, to " + name in convert("again", "--weight-format", "int8", source="out")[2]


def test_weights_that_the_format_cannot_hold(convert, tmp_path):
    names = (
        f"model.layers.0.mlp.experts.{e}.{p}_proj.weight" for e in (0, 1) for p in ("gate", "up", "down")
    )
    tensors = {name: torch.ones(256, 256, dtype=torch.bfloat16) for name in names}
    tensors["model.layers.0.mlp.experts.1.up_proj.weight"][3, 5] = 1e30
    (tmp_path / "wide").mkdir()
    save_file(tensors, tmp_path / "wide" / "model.safetensors")
    status, out, err = convert("out", "--weight-format", "q4_k", source="wide")
    assert status == 1 and besides_plan(out) == [] and not (tmp_path / "out").exists()
    err = " ".join(err.split())
    assert "expert 1 of model.layers.0.mlp.experts.1.gate_proj" in err
    assert "and model.layers.0.mlp.experts.1.up_proj" in err
    assert "format 'q4_k' needs finite weights" in err


@pytest.mark.parametrize("scaled", [False, True])
def test_the_quantizer_of_other_tensors_stays(convert, tmp_path, scaled):
    """FP8 experts become ktops weights; FP8 attention keeps the source's quantization_config."""
    (tmp_path / "fp8").mkdir()
    base = "model.layers.0"
    tensors = {f"{base}.self_attn.q_proj.weight": torch.randn(32, 32).to(torch.bfloat16)}
    if scaled:
        tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
        tensors[f"{base}.self_attn.q_proj.weight_scale_inv"] = torch.rand(1, 1)
    for expert in range(2):
        for name in ("gate", "up", "down"):
            key = f"{base}.mlp.experts.{expert}.{name}_proj.weight"
            tensors[key] = torch.randn(32, 32).to(torch.float8_e4m3fn)
            tensors[f"{key}_scale_inv"] = torch.rand(1, 1)
    save_file(tensors, tmp_path / "fp8" / "model.safetensors")
    fp8 = {"quant_method": "fp8"}
    config = {"model_type": "x", "text_config": {"hidden_act": "silu", "quantization_config": fp8}}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    expected = {"loader": "ktops", "other": fp8} if scaled else {"loader": "ktops"}
    for source, destination in (("fp8", "out"), ("out", "again")):
        assert convert(destination, "--weight-format", "int8", source=source)[0] == 0
        checkpoint = open_checkpoint(tmp_path / destination)
        assert checkpoint.config == {
            "model_type": "x",
            "text_config": {"hidden_act": "silu"},
            "quantization_config": expected,
        }
        assert checkpoint.layers[0].formats == ("int8", "int8")
        assert len(checkpoint.other_tensors()) == 1 + scaled
    report = json.loads((tmp_path / "out" / "ktops-report.json").read_text())
    assert report["layers"][0]["scheme"] == "fp8 blocks" and 0 < report["relative_error"] < 0.02


def test_experts_that_ktops_cannot_load(convert, tmp_path):
    """The message comes before hours of work, because no from_pretrained loads the result."""
    import transformers

    sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    heads["hidden_act"] = "tanh"
    config = transformers.Llama4TextConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=1)
    config.interleave_moe_layer_step = 1
    transformers.Llama4ForCausalLM(config).save_pretrained(tmp_path / "source")
    status, out, _ = convert("out", "--weight-format", "int8", source=tmp_path / "source")
    assert status == 0 and "ktops has no activation Tanh" in " ".join(out.split())
    assert "ktops cannot load model.layers.0." in out and "from_pretrained will refuse out" in out
    assert json.loads((tmp_path / "out" / "ktops-report.json").read_text())["output_error"] is None
