"""Every scheme is read bit for bit as its formula specifies."""

import numpy
import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import NAMES, E, H, I, decode, expect_checkpoint, expect_equal, write_per_expert
from tiny_schemes import SCHEMES, gptq, mxfp4_gpt_oss, plain

from ktops import moe_sft, quantize
from ktops._warn import warn_once
from ktops.checkpoints import CheckpointWriter, experts, open_checkpoint


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.filterwarnings("ignore:ktops. the GPTQ weights were quantized with reordered")
def test_scheme(tmp_path, scheme):
    make, name = SCHEMES[scheme]
    checkpoint_weights = write_per_expert(tmp_path, make)
    checkpoint = open_checkpoint(tmp_path)
    expect_checkpoint(checkpoint, checkpoint_weights)
    layer = checkpoint.layers[1]
    assert layer.formats == (name, name)
    assert (layer.num_experts, layer.hidden_size, layer.intermediate_size) == (E, H, I)
    assert scheme.startswith(layer.scheme) or layer.scheme == "gptq"
    assert sorted(checkpoint.other_tensors()) == ["other.0.weight", "other.1.weight"]


@pytest.mark.parametrize("scheme", ["pack-quantized", "gptq", "awq"])
@pytest.mark.parametrize("hidden,intermediate", [(64, 32), (32, 64)])
def test_rows_of_one_group_in_one_projection(tmp_path, scheme, hidden, intermediate):
    """One projection has one scale per row, the other has groups."""
    dense = write_per_expert(tmp_path, SCHEMES[scheme][0], hidden=hidden, intermediate=intermediate)
    (layer, _) = open_checkpoint(tmp_path).layers
    weights = layer.read()
    assert {weights.gate_up_proj.group_size, weights.down_proj.group_size} == {0, 32}
    for weight, expected in zip(weights[:2], dense[0], strict=True):
        assert torch.equal(decode(weight), expected)
    output = moe_sft(torch.ones(1, hidden), torch.tensor([[0]]), torch.ones(1, 1), *weights[:2])
    assert output.shape == (1, hidden)


def test_groups_of_two_sizes(tmp_path):
    tensors = {}
    for name, shape, size in (("gate_up_proj", (2, 128, 64), 64), ("down_proj", (2, 64, 64), 32)):
        weight = quantize(torch.randn(shape), "int4", group_size=size)
        tensors |= {f"model.layers.0.mlp.experts.{name}.{k}": t for k, t in weight.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (layer,) = open_checkpoint(tmp_path).layers
    assert [part.group_size for part in layer.experts()] == [64, 32]
    for name, weight in layer.read()._asdict().items():
        for kind, tensor in () if weight is None else weight.codes._asdict().items():
            assert tensor is None or torch.equal(tensor, tensors[f"model.layers.0.mlp.experts.{name}.{kind}"])
    assert {part.group_size for part in layer.experts("int8")} == {0}


@pytest.mark.parametrize("names", NAMES)
def test_names(tmp_path, names):
    dense = write_per_expert(tmp_path, plain(torch.bfloat16), names=names)
    checkpoint = open_checkpoint(tmp_path)
    expect_checkpoint(checkpoint, dense)
    assert checkpoint.layers[1].name == NAMES[names][0].format(1)


@pytest.mark.parametrize("intermediate", [128, 256])
def test_fp8_blocks_that_meet_at_the_seam_stay_blocks(tmp_path, intermediate):
    make, _ = SCHEMES["fp8 blocks"]
    dense = write_per_expert(tmp_path, make, intermediate=intermediate, hidden=192, layers=1)
    (layer,) = open_checkpoint(tmp_path).layers
    expect_equal(layer, *dense[0])
    assert layer.read().gate_up_proj.scale.shape == (E, 2 * intermediate // 128, 2)


def test_gptq_of_the_second_version_has_zero_points_as_they_are(tmp_path):
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}}

    def make(rng, rows, columns):
        return gptq(rng, rows, columns, offset=0)

    dense = write_per_expert(tmp_path, make, config=config)
    checkpoint = open_checkpoint(tmp_path)
    expect_checkpoint(checkpoint, dense)
    assert checkpoint.layers[0].formats == ("int4", "int4")


def test_gptq_zero_points_of_up_alone(tmp_path):
    """gate is symmetric, up is not: both are read as uint4."""
    calls = iter(range(1000))

    def make(rng, rows, columns):
        return gptq(rng, rows, columns, symmetric=next(calls) % 3 != 1)

    dense = write_per_expert(tmp_path, make)
    checkpoint = open_checkpoint(tmp_path)
    expect_checkpoint(checkpoint, dense)
    assert checkpoint.layers[0].formats == ("uint4", "int4")


def test_act_order_warns_once_what_it_costs(tmp_path):
    warn_once.cache_clear()
    make, _ = SCHEMES["gptq act-order"]
    write_per_expert(tmp_path, make, config={"quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.warns(UserWarning, match="fp16, 16 bits per weight") as warned:
        for layer in open_checkpoint(tmp_path).layers:
            layer.read()
    assert len(warned) == 1


def fused(folder, gate_up, down, **more):
    prefix = "model.layers.0.mlp.experts"
    tensors = {"gate_up_proj": gate_up, "down_proj": down, **more}
    save_file({f"{prefix}.{name}": t.contiguous() for name, t in tensors.items()}, folder / "m.safetensors")
    (layer,) = open_checkpoint(folder).layers
    return layer


def test_fused_is_mapped(tmp_path):
    gate_up, down = torch.randn(E, 2 * I, H).bfloat16(), torch.randn(E, H, I).bfloat16()
    layer = fused(tmp_path, gate_up, down)
    expect_equal(layer, gate_up.float(), down.float())
    weights = layer.read()
    again = layer.read()
    assert weights.gate_up_proj.weight.data_ptr() == again.gate_up_proj.weight.data_ptr()
    assert weights.down_proj.weight.data_ptr() == again.down_proj.weight.data_ptr()


def test_writing_to_mapped_weights_leaves_the_file_as_it_is(tmp_path):
    layer = fused(tmp_path, torch.ones(E, 2 * I, H), torch.ones(E, H, I))
    layer.read().down_proj.weight.zero_()
    expect_equal(open_checkpoint(tmp_path).layers[0], torch.ones(E, 2 * I, H), torch.ones(E, H, I))


def gate_first(rows: torch.Tensor) -> torch.Tensor:
    """Returns alternating rows [E, 2I, ...] of gate and up as those of gate, then those of up."""
    return torch.cat([rows[:, 0::2], rows[:, 1::2]], 1)


@pytest.mark.parametrize("scheme", ["bf16", "fp8 blocks", "mxfp8", "gptq zero points"])
@pytest.mark.filterwarnings("ignore:ktops. nothing in")
def test_alternating_rows_from_two_tensors(tmp_path, scheme):
    """A checkpoint with gate and up in tensors of their own fills a model in which their rows alternate."""
    dense = write_per_expert(tmp_path, SCHEMES[scheme][0], layers=1, intermediate=128)
    layer = open_checkpoint(tmp_path).layers[0].ordered("interleaved")
    gate_up, down = dense[0]
    alternating = gate_up.unflatten(1, (2, 128)).transpose(1, 2).flatten(1, 2)
    expect_equal(layer, alternating, down)
    assert layer.gate_up_proj.nbytes == layer.read().gate_up_proj.nbytes
    writer = CheckpointWriter(tmp_path / "written")
    writer.write_layer(layer.name, *layer.experts())
    (again,) = open_checkpoint(writer.finish()).layers
    assert again.gating == "interleaved" and again.gate_up_proj.mapped
    expect_equal(again, alternating, down)
    expect_equal(again.ordered("concatenated"), gate_up, down)


@pytest.mark.parametrize("biased", [False, True])
def test_fused_transposed(tmp_path, biased):
    """Weights are [E, H, 2I] and [E, I, H]; with biases, gate and up columns alternate as in gpt-oss."""
    gate_up, down = torch.randn(E, 2 * I, H), torch.randn(E, H, I)
    bias, down_bias = torch.randn(E, 2 * I), torch.randn(E, H)
    more = {"gate_up_proj_bias": bias, "down_proj_bias": down_bias} if biased else {}
    layer = fused(tmp_path, gate_up.mT, down.mT, **more)
    assert layer.gating == ("interleaved" if biased else "concatenated")
    expect_equal(layer, gate_up, down)
    expect_equal(layer.ordered("concatenated"), gate_first(gate_up) if biased else gate_up, down)
    read = layer.read(dtype=torch.float32)
    if biased:
        assert torch.equal(read.gate_up_proj_bias, bias) and torch.equal(read.down_proj_bias, down_bias)
        ordered = layer.ordered("concatenated").bias("gate_up_proj", torch.float32)
        assert torch.equal(ordered, gate_first(bias))
    else:
        assert read.gate_up_proj_bias is None and read.down_proj_bias is None


def test_fused_fp8_blocks(tmp_path):
    """The layout is that of fp8 experts in transformers' memory."""
    rng = numpy.random.default_rng(0)
    make, _ = SCHEMES["fp8 blocks"]
    gate_up, down = ([make(rng, *shape) for _ in range(E)] for shape in ((2 * I, H), (H, I)))
    stacks = {}
    for name, made in (("gate_up_proj", gate_up), ("down_proj", down)):
        stacks[name] = torch.stack([tensors["weight"] for tensors, _ in made])
        stacks[f"{name}_scale_inv"] = torch.stack([tensors["weight_scale_inv"] for tensors, _ in made])
    layer = fused(tmp_path, stacks.pop("gate_up_proj"), stacks.pop("down_proj"), **stacks)
    expect_equal(layer, *(torch.stack([dense for _, dense in made]) for made in (gate_up, down)))


def test_gpt_oss(tmp_path):
    """Every row has blocks and is not transposed; gate and up rows alternate; there are biases."""
    rng = numpy.random.default_rng(0)
    stacks, dense = {}, {}
    for name, shape in (("gate_up_proj", (2 * I, H)), ("down_proj", (H, I))):
        made = [mxfp4_gpt_oss(rng, *shape) for _ in range(E)]
        for kind in ("blocks", "scales"):
            stacks[f"model.layers.0.mlp.experts.{name}_{kind}"] = torch.stack([t[kind] for t, _ in made])
        bias = torch.randn(E, shape[0]).bfloat16()
        stacks[f"model.layers.0.mlp.experts.{name}_bias"] = bias
        dense[name] = torch.stack([weights for _, weights in made]), bias
    save_file(stacks, tmp_path / "model.safetensors")
    (layer,) = open_checkpoint(tmp_path).layers
    gate_up, bias = dense["gate_up_proj"]
    expect_equal(layer, gate_up, dense["down_proj"][0])
    assert layer.gate_up_proj.mapped == layer.gate_up_proj.nbytes
    read = layer.read(dtype=torch.float32)
    assert torch.equal(read.gate_up_proj_bias, bias.float())
    assert torch.equal(read.down_proj_bias, dense["down_proj"][1].float())
    ordered = layer.ordered("concatenated")
    expect_equal(ordered, gate_first(gate_up), dense["down_proj"][0])
    assert torch.equal(ordered.bias("gate_up_proj", torch.float32), gate_first(bias).float())
    assert layer.formats == ("mxfp4", "mxfp4")


def test_biases_of_every_expert(tmp_path):
    def make(rng, rows, columns):
        tensors, dense = plain(torch.float32)(rng, rows, columns)
        return {**tensors, "bias": torch.arange(rows) + 0.5}, dense

    dense = write_per_expert(tmp_path, make)
    checkpoint = open_checkpoint(tmp_path)
    expect_checkpoint(checkpoint, dense)
    read = checkpoint.layers[0].read(dtype=torch.float32)
    expected = (torch.arange(I) + 0.5).repeat(2).expand(E, 2 * I)
    assert torch.equal(read.gate_up_proj_bias, expected)
    assert torch.equal(read.down_proj_bias, (torch.arange(H) + 0.5).expand(E, H))


def test_columns_that_do_not_fill_a_word(tmp_path):
    """compressed-tensors pads rows to whole words; weight_shape has the number of columns."""

    def make(rng, rows, columns):
        padded = -(-columns // 8) * 8
        tensors, dense = SCHEMES["pack-quantized"][0](rng, rows, padded, padded)
        tensors["weight_shape"] = torch.tensor([rows, columns])
        return tensors, dense[:, :columns]

    dense = write_per_expert(tmp_path, make, hidden=68, intermediate=92)
    expect_checkpoint(open_checkpoint(tmp_path), dense)


def test_one_file_without_index_and_config(tmp_path):
    dense = write_per_expert(tmp_path, plain(torch.float32), layers=1)
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / name).unlink()
    expect_checkpoint(open_checkpoint(tmp_path), dense)
    expect_checkpoint(open_checkpoint(tmp_path / "model-00001-of-00001.safetensors"), dense)


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize(
    "options", [{"weight_format": "int4", "group_size": 32, "method": "mse"}, {"weight_format": "fp8_e4m3"}]
)
def test_quantized_on_the_way(tmp_path, monkeypatch, chunk, options):
    """The weights are stored in another format; chunks of 128 rows make no difference."""
    monkeypatch.setattr(experts, "CHUNK_WEIGHTS", chunk)
    dense = write_per_expert(tmp_path, plain(torch.bfloat16), layers=1)
    read = open_checkpoint(tmp_path).layers[0].read(**options)
    for weight, reference in zip(read[:2], dense[0], strict=True):
        name = options["weight_format"]
        expected = quantize(reference, name, **{k: v for k, v in options.items() if k != "weight_format"})
        assert (weight.format, weight.shape) == (name, reference.shape)
        assert torch.equal(weight.weight.view(torch.uint8), expected.weight.view(torch.uint8))
        assert torch.equal(weight.scale, expected.scale)


@pytest.mark.parametrize("scheme", ["fp8 blocks", "mxfp4"])
def test_quantized_on_the_way_from_groups(tmp_path, monkeypatch, scheme):
    monkeypatch.setattr(experts, "CHUNK_WEIGHTS", 1)
    make, _ = SCHEMES[scheme]
    dense = write_per_expert(tmp_path, make, layers=1, intermediate=256, hidden=128)
    read = open_checkpoint(tmp_path).layers[0].read("int8")
    for weight, reference in zip(read[:2], dense[0], strict=True):
        expected = quantize(reference, "int8")
        assert torch.equal(weight.weight, expected.weight) and torch.equal(weight.scale, expected.scale)
