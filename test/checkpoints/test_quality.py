"""The errors of a sample are those of the rows and neurons it names, computed from whole dense weights."""

import pytest
import torch
from safetensors.torch import save_file

import ktops
from ktops._workers import Workers
from ktops.checkpoints import CheckpointWriter, open_checkpoint
from ktops.checkpoints.quality import MOST_ROWS, TOKENS, compare, most, sample
from ktops.ops.activation import ExpertFunction

E, H, I = 3, 640, 768  # noqa: E741
NAME = "model.layers.0.mlp.experts"

GATINGS = {
    "concatenated": (2 * I, "silu", lambda x: torch.nn.functional.silu(x[:, :I]) * x[:, I:]),
    "interleaved": (2 * I, "silu", lambda x: torch.nn.functional.silu(x[:, 0::2]) * x[:, 1::2]),
    "none": (I, "relu2", lambda x: x.relu().square()),
}
"""Maps the order of gate and up to rows of gate_up_proj, the activation, and h of x Wgu^T."""


@pytest.fixture(params=GATINGS)
def layers(request, tmp_path):
    """Returns (gating, source, converted to int8, biases), with the source written by ktops in float32."""
    gating, generator = request.param, torch.Generator().manual_seed(1)
    rows = GATINGS[gating][0]

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    biases = random(E, rows), random(E, H)
    for kind in ("fp32", "int4"):
        writer = CheckpointWriter(tmp_path / kind)
        generator.manual_seed(2)
        both = (ktops.quantize(random(E, *shape), kind) for shape in ((rows, H), (H, I)))
        writer.write_layer(NAME, *both, *biases, gating=gating)
        writer.finish()
    source, converted = (open_checkpoint(tmp_path / kind).layers[0] for kind in ("fp32", "int4"))
    return gating, source, converted, biases


def relative(actual, expected) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def dense(layer, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up, down = (ktops.dequantize(weight, torch.float32)[index] for weight in layer.read()[:2])
    return gate_up, down


def test_a_sample(layers):
    gating, source, converted, biases = layers
    _, activation, h_of = GATINGS[gating]
    extent = sample(source)
    assert len(extent.experts) == 1 and extent == sample(converted)
    assert len(extent.neurons) == len(extent.rows) == MOST_ROWS
    with Workers(1) as workers:
        made = compare(NAME, source, converted, ExpertFunction(activation, gating=gating), extent, workers)
    (expert,) = extent.experts
    stride, offsets = {"concatenated": (1, (0, I)), "interleaved": (2, (0, 1)), "none": (1, (0,))}[gating]
    of_gate_up = [stride * neuron + offset for offset in offsets for neuron in extent.neurons]
    neurons, of_down = list(extent.neurons), list(extent.rows)
    tokens = torch.randn(TOKENS, H, generator=torch.Generator().manual_seed(0))
    outputs, weights = [], []
    for layer in (converted, source):
        gate_up, down = dense(layer, expert)
        weights.append((gate_up[of_gate_up], down[of_down]))
        h = h_of(tokens @ gate_up.T + biases[0][expert])[:, neurons]
        outputs.append((h @ down[:, neurons].T + biases[1][expert])[:, of_down])
    assert made.gate_up_error == pytest.approx(relative(weights[0][0], weights[1][0]), rel=1e-5)
    assert made.down_error == pytest.approx(relative(weights[0][1], weights[1][1]), rel=1e-5)
    assert made.output_error == pytest.approx(relative(*outputs), rel=1e-4)
    assert made.measured_weights == len(of_gate_up) * H + len(of_down) * I
    assert (made.measured_experts, made.num_experts) == (1, E)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_all_of_it(layers, num_threads):
    gating, source, converted, biases = layers
    _, activation, h_of = GATINGS[gating]
    with Workers(num_threads) as workers:
        function = ExpertFunction(activation, gating=gating)
        made = compare(NAME, source, converted, function, most(source), workers)
    tokens = torch.randn(TOKENS, H, generator=torch.Generator().manual_seed(0))
    outputs, weights = [], []
    for layer in (converted, source):
        experts = [dense(layer, expert) for expert in range(E)]
        weights.append([torch.stack(part) for part in zip(*experts, strict=True)])
        h = [h_of(tokens @ up.T + bias) for (up, _), bias in zip(experts, biases[0], strict=True)]
        made_by = zip(h, experts, biases[1], strict=True)
        outputs.append(torch.stack([x @ down.T + bias for x, (_, down), bias in made_by]))
    assert made.gate_up_error == pytest.approx(relative(weights[0][0], weights[1][0]), rel=1e-5)
    assert made.down_error == pytest.approx(relative(weights[0][1], weights[1][1]), rel=1e-5)
    assert made.output_error == pytest.approx(relative(*outputs), rel=1e-4)
    assert made.measured_weights == made.bytes_bf16 / 2


def test_samples_differ_between_layers_but_not_between_runs(tmp_path):
    """Of 24 layers with 64 experts each; sizes that are no multiple of 128 are compared whole."""
    tensors = {
        f"model.layers.{layer}.mlp.experts.{name}": torch.zeros(64, *shape, dtype=torch.bfloat16)
        for layer in range(24)
        for name, shape in (("gate_up_proj", (2 * 544, 8)), ("down_proj", (8, 544)))
    }
    save_file(tensors, tmp_path / "model.safetensors")
    extents = [[sample(layer) for layer in open_checkpoint(tmp_path).layers] for _ in range(2)]
    assert extents[0] == extents[1]
    assert len({extent.experts[0] for extent in extents[0]}) > 12
    assert all((extent.neurons, extent.rows) == (range(544), range(8)) for extent in extents[0])
