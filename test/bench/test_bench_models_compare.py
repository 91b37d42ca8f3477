"""``bench.models compare`` and ``convert``: the same model in both files, and figures from known times."""

import subprocess

import gguf
import numpy
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bench.models import __main__ as models
from bench.models import compare, convert, layout
from bench.models.gguf_model import make_gguf
from bench.models.ktops_host import Host
from bench.models.make import make

SMALL = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4,
    "num_experts_per_tok": 2, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
TEXT = "Mara went to the market. " * 20


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory without experts, and a GGUF file with everything."""
    folder = tmp_path_factory.mktemp("models")
    make(
        layout.changed_config(layout.read_config("qwen3-30b-a3b"), 2) | SMALL, folder / "rest", experts=False
    )
    make_gguf(folder / "rest", folder / "whole.gguf", others="q8_0")
    return folder


def test_both_files_hold_one_model(files):
    rest = load_file(files / "rest" / "model.safetensors")
    assert not any("experts" in name for name in rest)
    reader = gguf.GGUFReader(files / "whole.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(rest) + 2 * 3
    embeddings = gguf.dequantize(tensors["token_embd.weight"].data, tensors["token_embd.weight"].tensor_type)
    expected = rest["model.embed_tokens.weight"].float().numpy()
    numpy.testing.assert_allclose(embeddings, expected, atol=numpy.abs(expected).max() / 127)
    router = rest["model.layers.1.mlp.gate.weight"].float().numpy()
    numpy.testing.assert_array_equal(tensors["blk.1.ffn_gate_inp.weight"].data, router)
    down = tensors["blk.1.ffn_down_exps.weight"]
    assert down.tensor_type == gguf.GGMLQuantizationType.Q4_K
    weights = gguf.dequantize(down.data, down.tensor_type)
    assert weights.shape == (4, 256, 256)
    assert weights.std() == pytest.approx(0.02, rel=0.1)
    assert not numpy.array_equal(weights[0], weights[1])
    fields = reader.fields
    assert fields["qwen3moe.expert_count"].contents() == 4
    assert fields["qwen3moe.attention.key_length"].contents() == 32


def test_ktops_answers(files, tmp_path, single_thread):
    """The host's logits are those of transformers with the experts of the file."""
    host = Host()
    assert host.load(str(files / "rest"), {"experts_path": str(files / "whole.gguf")})["version"]
    prompt = host.tokens(TEXT, 24)
    assert len(prompt["tokens"]) == 24
    reply = host.answer(prompt["text"], 4)
    assert reply["tokens"] == 4
    assert min(reply["prompt_seconds"], reply["answer_seconds"], reply["cpu_seconds"]) > 0
    host.logits(prompt["tokens"], str(tmp_path / "logits.npy"))
    with pytest.raises(ValueError, match="the text has 0 tokens when it is cut to 5"):
        host.tokens("", 5)

    model = AutoModelForCausalLM.from_config(host.loaded.model.config, dtype=torch.float32)
    model.load_state_dict(load_file(files / "rest" / "model.safetensors"), strict=False)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(files / "whole.gguf").tensors}
    for number, layer in enumerate(model.model.layers):
        matrices = {
            name: gguf.dequantize(tensor.data, tensor.tensor_type)
            for name in ("gate", "up", "down")
            for tensor in [tensors[f"blk.{number}.ffn_{name}_exps.weight"]]
        }
        gate_up = numpy.concatenate([matrices["gate"], matrices["up"]], axis=1)
        layer.mlp.experts.gate_up_proj.data = torch.from_numpy(gate_up)
        layer.mlp.experts.down_proj.data = torch.from_numpy(matrices["down"])
    with torch.no_grad():
        expected = model(torch.tensor([prompt["tokens"]])).logits[0, -1].numpy()
    result = numpy.load(tmp_path / "logits.npy")
    assert numpy.corrcoef(result, expected)[0, 1] > 0.999


def test_figures_are_medians(capsys):
    replies = [{"prompt_seconds": p, "answer_seconds": a} for p, a in ((2.0, 7.0), (99.0, 99.0), (1.0, 3.5))]
    assert compare.speeds(replies, prompt=512, answer=64) == (256.0, 9.0)
    compare.print_table({"ktops": (256.0, 9.0), "llama.cpp": (128.0, 18.0)}, ("prompt", "answer"))
    assert capsys.readouterr().out.splitlines()[-1].split() == ["ratio", "2.00", "0.50"]


def test_the_bytes_alone(tmp_path, monkeypatch, capsys):
    """As much is written as `ktops convert` wrote, and nothing stays."""
    source, scratch, written = tmp_path / "source", tmp_path / "scratch", []
    source.mkdir()
    (source / "model.safetensors").write_bytes(bytes(1 << 20))

    def converted(_, out, options):
        assert options == ["--weight-format", "int8"]
        out.mkdir(parents=True)
        for number in range(2):
            (out / f"{number}.safetensors").write_bytes(bytes(1000 + number))
        return 8.0, 4.0

    def read_and_write(*args, run=convert.read_and_write):
        seconds = run(*args)
        written.extend(file.stat().st_size for file in sorted((scratch / "bytes").iterdir()))
        assert min(seconds) > 0
        return 2.0, 1.0

    monkeypatch.setattr(convert, "convert", converted)
    monkeypatch.setattr(convert, "read_and_write", read_and_write)
    options = ["--rounds", "1", "--options", "--weight-format", "int8"]
    assert models.main(["convert", str(source), str(scratch), *options]) == 0
    assert written == [1000, 1001]
    assert not list(scratch.iterdir())
    out = capsys.readouterr().out
    assert "1.0 MiB read, 2.0 KiB written" in out
    assert out.splitlines()[-1].split() == ["ratio", "4.00", "4.00"]


def test_a_failed_command_is_named(tmp_path, monkeypatch, capfd):
    def fail(*_):
        raise subprocess.CalledProcessError(3, ["ktops", "convert"])

    monkeypatch.setattr(convert, "convert", fail)
    assert models.main(["convert", str(tmp_path / "missing"), str(tmp_path / "out")]) == 1
    assert capfd.readouterr().err == "error: ktops convert ended with status 3\n"
    assert models.main(["compare", str(tmp_path), "--like", "mixtral-8x7b", "--llama-cpp", "python"]) == 2
    assert "must be a Qwen3-MoE for llama.cpp, got mixtral-8x7b" in capfd.readouterr().err
