"""Tiny checkpoints, written with the libraries that people use to write them."""

import json

import gguf
import numpy
import torch
from safetensors.torch import save_file
from torch import nn

from ktops.checkpoints import Checkpoint, Layer
from ktops.formats import ExpertWeight, get_format
from ktops.nn import KTExperts

E, H, I, LAYERS = 4, 64, 160, 2  # noqa: E741

NAMES = {
    "qwen": ("model.layers.{}.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("model.layers.{}.block_sparse_moe.experts", ("w1", "w3", "w2")),
    "deepseek_v4": ("layers.{}.ffn.experts", ("w1", "w3", "w2")),
    "language_model": ("language_model.model.layers.{}.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "thinker": ("thinker.model.layers.{}.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "vision": ("model.language_model.layers.{}.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}


def write_per_expert(
    folder, make, *, names="qwen", num_experts=E, hidden=H, intermediate=I, layers=LAYERS, config=None, seed=0
):
    """Writes one file per layer, an index and another tensor; returns gate_up and down of each layer."""
    rng = numpy.random.default_rng(seed)
    prefix, projections = NAMES[names]
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    weight_map, dense = {}, []
    for layer in range(layers):
        tensors = {f"other.{layer}.weight": torch.randn(3, 5)}
        experts = []
        for expert in range(num_experts):
            made = [make(rng, *shape) for shape in shapes]
            for projection, (parts, _) in zip(projections, made, strict=True):
                for name, part in parts.items():
                    tensors[f"{prefix.format(layer)}.{expert}.{projection}.{name}"] = part
            gate, up, down = (weight for _, weight in made)
            experts.append((torch.cat([gate, up]), down))
        dense.append(tuple(torch.stack(weights) for weights in zip(*experts, strict=True)))
        file = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "test"}))
    return dense


def write_gguf(path, tensors: dict, fields: dict | None = None) -> None:
    """Writes tensors by name (arrays or (blocks, ggml type)) and metadata fields (integers or lists)."""
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for key, value in (fields or {}).items():
        (writer.add_array if isinstance(value, list) else writer.add_uint32)(key, value)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class OneLayer(nn.Module):
    """Returns a model with only the experts of layer 0, on the meta device, named as in transformers."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int, **options) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.Module()])
        self.model.layers[0].mlp = nn.Module()
        self.model.layers[0].mlp.experts = KTExperts(
            num_experts, hidden_size, intermediate_size, device="meta", **options
        )


def decode(weight: ExpertWeight) -> torch.Tensor:
    """Returns float32 [E, N, K], decoded by the specification of the format."""
    return get_format(weight.format).dequantize(weight.codes, weight.shape[-1], weight.group_size)


def expect_equal(layer: Layer, gate_up: torch.Tensor, down: torch.Tensor) -> None:
    """Asserts that reading the layer, at once and expert by expert, gives these weights bit for bit."""
    layer.check()
    read = layer.read()
    for experts, weight, dense in (
        (layer.gate_up_proj, read.gate_up_proj, gate_up),
        (layer.down_proj, read.down_proj, down),
    ):
        torch.testing.assert_close(decode(weight), dense, rtol=0, atol=0, equal_nan=True)
        for whole, codes in zip(weight.codes, zip(*experts, strict=True), strict=True):
            if whole is None:
                assert codes[0] is None
            else:
                assert torch.equal(whole.view(torch.uint8), torch.stack(codes).view(torch.uint8))


def expect_checkpoint(checkpoint: Checkpoint, dense: list) -> None:
    assert [layer.index for layer in checkpoint.layers] == list(range(len(dense)))
    for layer, weights in zip(checkpoint.layers, dense, strict=True):
        expect_equal(layer, *weights)
