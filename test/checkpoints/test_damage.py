"""From damaged files, load_experts reads what was written, or raises CheckpointError and keeps the model."""

import json
import os
import shutil

import gguf
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_published import CASES, PUBLISHED
from tiny_checkpoints import OneLayer, write_gguf, write_per_expert
from tiny_schemes import SCHEMES, gptq, mxfp4_gpt_oss

from ktops.checkpoints import CheckpointError, CheckpointWriter, open_checkpoint
from ktops.integrations.load_experts import load_experts

E, H, I = 2, 64, 32  # noqa: E741
SIZES = {"num_experts": E, "hidden": H, "intermediate": I, "layers": 1}
EXAMPLES = int(os.environ.get("KTOPS_FUZZ_EXAMPLES", "40"))
"""Damaged checkpoints of each kind."""


def tiny_model(name: str) -> OneLayer:
    """The model of a checkpoint."""
    return OneLayer(E, H, I, bias=name == "gpt-oss")


def per_expert(make):
    return lambda folder: write_per_expert(folder, make, **SIZES)


def write_gpt_oss(folder) -> None:
    rng, tensors = numpy.random.default_rng(0), {}
    for name, shape in (("gate_up_proj", (2 * I, H)), ("down_proj", (H, I))):
        made = [mxfp4_gpt_oss(rng, *shape)[0] for _ in range(E)]
        for kind in made[0]:
            tensors[f"model.layers.0.mlp.experts.{name}_{kind}"] = torch.stack([t[kind] for t in made])
        tensors[f"model.layers.0.mlp.experts.{name}_bias"] = torch.zeros(E, shape[0])
    save_file(tensors, folder / "model.safetensors")


def write_own(folder) -> None:
    write_per_expert(folder, SCHEMES["awq"][0], **SIZES)
    writer = CheckpointWriter(folder / "own")
    (layer,) = open_checkpoint(folder).layers
    writer.write_layer(layer.name, *layer.experts())
    writer.finish()
    for path in folder.glob("*.*"):
        path.unlink()
    for path in list((folder / "own").iterdir()):
        path.rename(folder / path.name)
    (folder / "own").rmdir()


def write_gguf_experts(folder) -> None:
    tensors = {}
    for name, shape in (("gate", (E, I, H)), ("up", (E, I, H)), ("down", (E, H, I))):
        kind = gguf.GGMLQuantizationType.Q8_0
        blocks = gguf.quantize(numpy.ones(shape, numpy.float32), kind)
        tensors[f"blk.0.ffn_{name}_exps.weight"] = blocks, kind
    fields = {"tokenizer.ggml.tokens": ["a", "bc"], "numbers": [1, 2, 3]}
    write_gguf(folder / "model.gguf", tensors, fields)


def published(case: str):
    """Returns a writer for a case of test_published.py, with the quantization config in a separate file."""

    def write(folder) -> None:
        shutil.copyfile(PUBLISHED / f"{case}.safetensors", folder / "model.safetensors")
        (folder / "quantize_config.json").write_text(json.dumps(CASES[case]["quantization_config"]))

    return write


WRITERS = {
    "fp8 blocks": per_expert(SCHEMES["fp8 blocks"][0]),
    "pack-quantized": per_expert(SCHEMES["pack-quantized"][0]),
    "gptq": per_expert(gptq),
    "gptq of 8 bits": published("gptqmodel_w8_v2"),
    "pack-quantized of 8 bits": published("llmcompressor_w8"),
    "gptq of AutoRound": published("auto_round"),
    "gpt-oss": write_gpt_oss,
    "own": write_own,
    "gguf": write_gguf_experts,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of every writer, created once."""
    folders = {}
    for name, write in WRITERS.items():
        folders[name] = tmp_path_factory.mktemp("written")
        write(folders[name])
    return folders


def header_length(data: bytes) -> int:
    """Returns the bytes that describe the contents of the file."""
    if data[:4] == b"GGUF":
        return data.find(b"ffn_down_exps.weight") + 60
    return 8 + int.from_bytes(data[:8], "little")


def damage(draw, data: bytes) -> bytes:
    kind = draw(st.sampled_from(["truncate", "extend", "flip", "overwrite", "number"]))
    if kind == "truncate":
        return data[: draw(st.integers(0, len(data) - 1))]
    if kind == "extend":
        return data + bytes(draw(st.integers(1, 9)))
    length = header_length(data)
    changed = bytearray(data)
    if kind == "flip":
        for _ in range(draw(st.integers(1, 3))):
            changed[draw(st.integers(0, length - 1))] ^= 1 << draw(st.integers(0, 7))
    elif kind == "overwrite":
        position = draw(st.integers(0, length - 1))
        new = draw(st.binary(min_size=1, max_size=12))
        changed[position : position + len(new)] = new
    else:
        digits = [i for i in range(length) if data[i : i + 1].isdigit()]
        changed[draw(st.sampled_from(digits))] = ord(draw(st.sampled_from("0123456789")))
    return bytes(changed)


def expect_named_error_or_success(name: str, path) -> None:
    model = tiny_model(name)
    before = model.model.layers[0].mlp.experts
    try:
        load_experts(model, path, show_progress=False)
    except CheckpointError as error:
        assert str(path) in str(error)
        assert model.model.layers[0].mlp.experts is before
        return
    loaded = model.model.layers[0].mlp.experts
    for weight, shape in ((loaded.gate_up_proj, (E, 2 * I, H)), (loaded.down_proj, (E, H, I))):
        assert tuple(weight.shape) == shape
        assert all(t.view(torch.uint8).sum() >= 0 for t in weight.codes if t is not None)
    with torch.no_grad():  # kernels do not read past the codes, whatever their values
        loaded(torch.ones(2, H), torch.tensor([[0], [1]]), torch.ones(2, 1))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.filterwarnings("ignore:ktops. the GPTQ weights were quantized with reordered")
@pytest.mark.filterwarnings("ignore:ktops. nothing in")
@pytest.mark.filterwarnings("ignore:ktops. the zero points of")
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(data=st.data())
def test_damaged(written, tmp_path_factory, name, data):
    source = written[name]
    file = data.draw(
        st.sampled_from(sorted(path.name for path in source.iterdir() if path.name != "config.json"))
    )
    folder = tmp_path_factory.mktemp("damaged")
    try:
        for path in source.iterdir():
            shutil.copyfile(path, folder / path.name)
        original = (source / file).read_bytes()
        if file.endswith(".json"):
            position = data.draw(st.integers(0, len(original) - 1))
            changed = original[:position] + data.draw(st.binary(max_size=3)) + original[position + 1 :]
        else:
            changed = damage(data.draw, original)
        (folder / file).write_bytes(changed)
        expect_named_error_or_success(name, folder)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", WRITERS)
def test_undamaged(written, name):
    model = tiny_model(name)
    load_experts(model, written[name], show_progress=False)
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape == (E, 2 * I, H)


@pytest.mark.parametrize("end", [0, 7, 8, 100, -1])
@pytest.mark.parametrize("name", ["fp8 blocks", "gguf"])
def test_truncated(written, tmp_path, name, end):
    (source,) = [path for path in written[name].iterdir() if path.suffix in (".safetensors", ".gguf")]
    (tmp_path / source.name).write_bytes(source.read_bytes()[:end])
    with pytest.raises(CheckpointError, match=f"{source.name}.*(truncated|bytes)"):
        open_checkpoint(tmp_path)


def header(text: str, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + data


ENTRY = "model.layers.0.mlp.experts.down_proj"
HEADERS = {
    "not JSON": (header("{"), "header is not JSON"),
    "deep JSON": (header("[" * 100_000), "header is not JSON"),
    "a list": (header("[]"), "header is not an object"),
    "no shape": (header(json.dumps({ENTRY: {"dtype": "F32"}})), f"{ENTRY} in .*: the header entry has no"),
}
ENTRIES = {
    "negative": ("F32", [-1, -4], [0, 16], "are not sizes"),
    "huge": ("U8", [1 << 61, 1 << 61], [0, 16], "U8 of shape .* does not have 16 bytes"),
    "huge and empty": ("U8", [1 << 60, 0, 0], [0, 0], "down_proj in .*: it is empty"),
    "many dimensions": ("U8", [1] * 1000, [0, 1], "are not sizes"),
    "floats": ("F32", [2.0, 2], [0, 16], "are not sizes"),
    "unknown dtype": ("F7", [2, 2], [0, 16], "unknown dtype 'F7'"),
    "dtype no string": ([], [2, 2], [0, 16], r"unknown dtype \[\]"),
    "beyond the end": ("F32", [2, 4], [0, 32], "truncated: the tensor ends at byte"),
    "backwards": ("F32", [2, 2], [16, 0], "truncated"),
    "gap": ("F32", [2], [8, 16], "damaged header: the tensor begins at byte .* expected "),
    "more bytes": ("F32", [2], [0, 8], r"must have \d+ bytes according to its header, got \d+"),
}


@pytest.mark.parametrize("case", [*HEADERS, *ENTRIES])
def test_header(tmp_path, case):
    path = tmp_path / "model.safetensors"
    if case in HEADERS:
        content, message = HEADERS[case]
    else:
        kind, shape, offsets, message = ENTRIES[case]
        entry = {"dtype": kind, "shape": shape, "data_offsets": offsets}
        up = {"dtype": "U8", "shape": [1 << 60, 0, 0], "data_offsets": [0, 0]}
        entries = {ENTRY: entry}
        if case == "huge and empty":
            entries[ENTRY.replace("down", "gate_up")] = up
        content = header(json.dumps(entries), b"" if offsets == [0, 0] else bytes(16))
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(tmp_path).layers[0].down_proj  # noqa: B018
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"quantization_config": 3, "text_config": "a"}', "\0"])
def test_json(written, tmp_path, file, content):
    for path in written["fp8 blocks"].iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    (tmp_path / file).write_text(content)
    expect_named_error_or_success("fp8 blocks", tmp_path)
