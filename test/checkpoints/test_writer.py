"""CheckpointWriter: files are read back byte for byte; after an interruption it continues or starts over."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_checkpoints import E, H, I, expect_checkpoint, write_per_expert
from tiny_schemes import SCHEMES, plain

from ktops import quantize
from ktops._workers import Workers
from ktops.checkpoints import CheckpointError, CheckpointWriter, new_file, open_checkpoint, stream
from ktops.checkpoints.experts import Held, Requantized
from ktops.checkpoints.new_file import NewLayer
from ktops.checkpoints.safetensors_file import read_views
from ktops.formats import get_format, names

BIASES = torch.randn(E, 2 * I), torch.randn(E, H)


def convert(source, path, settings=None, layers=None, **options):
    writer = CheckpointWriter(path, settings)
    for layer in open_checkpoint(source).layers[:layers]:
        if not writer.has(layer.name):
            writer.write_layer(layer.name, *layer.experts(**options))
    return writer


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "source").mkdir()
    return tmp_path / "source", tmp_path / "target"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.filterwarnings("ignore:ktops. the GPTQ weights were quantized with reordered")
def test_round_trip(folders, scheme):
    source, target = folders
    make, name = SCHEMES[scheme]
    dense = write_per_expert(source, make, config={"model_type": "of the source"})
    writer = convert(source, target)
    writer.write_tensors(open_checkpoint(source).other_tensors(), max_bytes=70)
    writer.copy(source.glob("*.json"))
    assert writer.finish() == target
    checkpoint = open_checkpoint(target)
    expect_checkpoint(checkpoint, dense)
    assert checkpoint.config == {"model_type": "of the source"}
    assert {layer.formats for layer in checkpoint.layers} == {(name, name)}
    assert sorted(path.name for path in target.glob("model-*")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    others = open_checkpoint(source).other_tensors()
    assert checkpoint.other_tensors().keys() == others.keys()
    for key, view in checkpoint.other_tensors().items():
        assert torch.equal(view.read(), others[key].read())
    for weight in checkpoint.layers[0].read()[:2]:
        for tensor in weight.codes:
            assert tensor is None or isinstance(tensor, torch.Tensor)


def test_what_is_written_is_mapped_and_other_libraries_read_it(folders):
    source, target = folders
    dense = write_per_expert(source, plain(torch.bfloat16), layers=1)
    convert(source, target, weight_format="uint4", group_size=32).finish()
    (layer,) = open_checkpoint(target).layers
    read = layer.read()
    assert read.gate_up_proj.weight.data_ptr() == layer.read().gate_up_proj.weight.data_ptr()
    assert read.gate_up_proj.scale.data_ptr() == layer.read().gate_up_proj.scale.data_ptr()
    expected = quantize(dense[0][0], "uint4", group_size=32)
    tensors = load_file(target / "experts-00000.safetensors")
    prefix = f"{layer.name}.gate_up_proj"
    for name, tensor in expected.codes._asdict().items():
        assert torch.equal(tensors[f"{prefix}.{name}"], tensor)
    state = {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if prefix in name}
    read.gate_up_proj.load_state_dict(state)
    with safe_open(target / "experts-00000.safetensors", "pt") as file:
        assert file.metadata().keys() == {"format", "ktops", "gating"}


def test_biases_and_expert_weights(tmp_path):
    gate_up, down = (quantize(torch.randn(E, *shape), "int8") for shape in ((2 * I, H), (H, I)))
    writer = CheckpointWriter(tmp_path / "target")
    writer.write_layer("model.layers.7.mlp.experts", gate_up, down, *BIASES)
    writer.finish()
    (layer,) = open_checkpoint(tmp_path / "target").layers
    read = layer.read(dtype=torch.float32)
    assert layer.index == 7 and layer.scheme == "ktops"
    assert torch.equal(read.gate_up_proj.weight, gate_up.weight)
    assert torch.equal(read.down_proj.scale, down.scale)
    assert torch.equal(read.gate_up_proj_bias, BIASES[0]) and torch.equal(read.down_proj_bias, BIASES[1])


@pytest.mark.parametrize("weight_format", [None, "int4"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.filterwarnings("ignore:ktops. the GPTQ weights were quantized with reordered")
def test_the_same_bytes_with_several_threads(folders, scheme, weight_format):
    source, target = folders
    write_per_expert(source, SCHEMES[scheme][0])
    checkpoint = open_checkpoint(source)
    results = []
    for num_threads in (1, 3):
        with Workers(num_threads) as workers:
            writer = CheckpointWriter(target.with_name(f"by-{num_threads}"), workers=workers)
            layers = (NewLayer(layer.name, *layer.experts(weight_format)) for layer in checkpoint.layers)
            writer.write_layers(layers)
            writer.write_tensors(checkpoint.other_tensors(), max_bytes=70)
            path = writer.finish()
        results.append({file.name: file.read_bytes() for file in path.iterdir()})
    assert results[0] == results[1] and len(results[0]) == 6


@pytest.mark.parametrize("num_threads", [1, 2])
def test_large_tensors_are_copied_in_parts(folders, monkeypatch, num_threads):
    monkeypatch.setattr(stream, "COPIED_BYTES", 100)
    monkeypatch.setattr(new_file, "COPIED_BYTES", 200)
    source, target = folders
    tensors = {"a": torch.randn(9, 50), "b": torch.randn(7).bfloat16(), "empty": torch.empty(0, 3)}
    save_file(tensors, source / "model.safetensors")
    steps = []
    with Workers(num_threads) as workers:
        writer = CheckpointWriter(target, workers=workers)
        writer.write_tensors(read_views(source / "model.safetensors"), step=steps.append)
        writer.finish()
    written = load_file(target / "model-00001-of-00001.safetensors")
    assert written.keys() == tensors.keys() and sum(steps) == 3
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


WRITTEN = [
    (name, group_size, method)
    for name in names(written=True)
    for method in get_format(name).methods
    for group_size in sorted({get_format(name).default_group_size, 0})
    if get_format(name).has_group_size(group_size)
]


@pytest.mark.parametrize(("name", "group_size", "method"), WRITTEN)
def test_dtypes_and_shapes_are_known_before_converting(name, group_size, method):
    source = Held(quantize(torch.randn(2, 160, 256), "bf16"))
    experts = Requantized(source, name, group_size, method)
    codes, expected = experts.expert(1), experts.stand_in
    for tensor, stand_in in zip(codes, expected, strict=True):
        assert (tensor is None) == (stand_in is None)
        assert tensor is None or (tensor.dtype, tensor.shape) == (stand_in.dtype, stand_in.shape)
    assert experts.nbytes == 2 * sum(tensor.nbytes for tensor in codes if tensor is not None)


def test_nothing_is_there_until_it_is_finished(folders):
    source, target = folders
    write_per_expert(source, plain(torch.float32))
    writer = convert(source, target)
    assert not target.exists()
    writer.finish()
    assert target.exists() and not writer.partial.exists()
    with pytest.raises(CheckpointError, match=r"target: already exists"):
        CheckpointWriter(target)


def test_goes_on_where_it_was(folders, monkeypatch):
    source, target = folders
    dense = write_per_expert(source, plain(torch.float32), layers=3)
    settings = {"format": "fp32"}
    convert(source, target, settings, layers=2)
    written = []
    write = CheckpointWriter.write_layer
    monkeypatch.setattr(
        CheckpointWriter,
        "write_layer",
        lambda self, name, *rest: (written.append(name), write(self, name, *rest)),
    )
    writer = convert(source, target, settings)
    assert written == ["model.layers.2.mlp.experts"]
    writer.finish()
    expect_checkpoint(open_checkpoint(target), dense)
    assert sorted(path.name for path in target.iterdir()) == [
        "experts-00000.safetensors",
        "experts-00001.safetensors",
        "experts-00002.safetensors",
        "ktops.json",
    ]


@pytest.mark.parametrize("change", ["settings", "damaged progress", "truncated file", "killed in a file"])
def test_begins_anew_if_it_must(folders, change):
    source, target = folders
    dense = write_per_expert(source, plain(torch.float32))
    partial = convert(source, target, {"format": "int8"}, layers=1, weight_format="int8").partial
    settings = {"format": "int8"}
    if change == "settings":
        settings = {"format": "fp32"}
    elif change == "damaged progress":
        (partial / "progress.json").write_text("{")
    elif change == "truncated file":
        file = partial / "experts-00000.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    else:
        (partial / "experts-00001.safetensors.tmp").write_bytes(b"half")
    writer = CheckpointWriter(target, settings)
    assert writer.finished_layers == (["model.layers.0.mlp.experts"] if change == "killed in a file" else [])
    if change == "settings":
        convert(source, target, settings).finish()
        expect_checkpoint(open_checkpoint(target), dense)


def test_an_error_while_writing_leaves_no_file(folders):
    source, target = folders
    write_per_expert(source, plain(torch.float32))
    writer = CheckpointWriter(target)
    layer = open_checkpoint(source).layers[0]
    gate_up, down = layer.experts("int8")
    down.expert = lambda index: {}[index] if index == 2 else type(down).expert(down, index)
    with pytest.raises(KeyError):
        writer.write_layer(layer.name, gate_up, down)
    assert [file.name for file in writer.partial.iterdir()] == ["progress.json"]
    assert not writer.finished_layers


def test_an_error_in_a_thread_leaves_no_file(folders):
    """The other threads are still writing when the first expert of the second layer fails."""
    source, target = folders
    write_per_expert(source, plain(torch.float32), layers=3)
    with Workers(3) as workers, pytest.raises(KeyError):
        writer = CheckpointWriter(target, workers=workers)
        layers = [NewLayer(layer.name, *layer.experts("int8")) for layer in open_checkpoint(source).layers]
        layers[1].down_proj.expert = lambda index: {}[index]
        writer.write_layers(layers)
    names = sorted(file.name for file in writer.partial.iterdir())
    assert names == ["experts-00000.safetensors", "progress.json"]
    assert writer.finished_layers == ["model.layers.0.mlp.experts"]


def test_a_directory_in_the_way_is_kept(folders):
    source, target = folders
    write_per_expert(source, plain(torch.float32))
    other = source.rename(CheckpointWriter.partial_path(target))
    before = sorted(other.iterdir())
    with pytest.raises(CheckpointError, match=r"partial: has contents, and .* is written there first"):
        CheckpointWriter(target)
    assert sorted(other.iterdir()) == before


def test_overwrite(folders):
    source, target = folders
    write_per_expert(source, plain(torch.float32))
    convert(source, target, weight_format="int8").finish()
    writer = CheckpointWriter(target, {"format": "int4"}, overwrite=True)
    for layer in open_checkpoint(source).layers:
        writer.write_layer(layer.name, *layer.experts("int4", group_size=32))
    writer.finish()
    assert {layer.formats for layer in open_checkpoint(target).layers} == {("int4", "int4")}
    assert {path.name for path in target.parent.iterdir()} == {"source", "target"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_only_the_last_renaming_is_left(folders, monkeypatch, overwrite):
    """The writer is killed between the two renamings that replace a directory, or before the only one."""
    source, target = folders
    write_per_expert(source, plain(torch.float32))
    if overwrite:
        convert(source, target, weight_format="int8").finish()
    settings = {"format": "fp32"}
    writer = CheckpointWriter(target, settings, overwrite=overwrite)
    for layer in open_checkpoint(source).layers:
        writer.write_layer(layer.name, *layer.experts())
    replace = Path.replace

    def killed(self, other):
        if self == writer.partial:
            raise KeyboardInterrupt
        return replace(self, other)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        writer.finish()
    assert not target.exists()
    again = CheckpointWriter(target, settings, overwrite=overwrite)
    assert again.is_complete and again.has("model.layers.0.mlp.experts")
    again.finish()
    assert {layer.formats for layer in open_checkpoint(target).layers} == {("fp32", "fp32")}
    assert {path.name for path in target.parent.iterdir()} == {"source", "target"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(version=99), "must have version 1"),
        (lambda manifest: manifest["files"].update({"experts-00001.safetensors": 5}), "truncated or damaged"),
        (
            lambda manifest: manifest["files"].update({"x.safetensors": 5}),
            r"x.safetensors: the file is missing",
        ),
    ],
)
def test_manifest(folders, change, message):
    source, target = folders
    write_per_expert(source, plain(torch.float32))
    convert(source, target).finish()
    manifest = json.loads((target / "ktops.json").read_text())
    change(manifest)
    (target / "ktops.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(target)
