"""Writes GGUF files of Qwen3-MoE: random experts, and all else as in a directory."""

import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy
import torch
from gguf import GGMLQuantizationType as Kind

import ktops
from ktops._display import progress
from ktops.checkpoints import open_checkpoint

_ARCHITECTURE = "qwen3moe"
_ROWS, _COLUMNS = 2048, 2048
"""Of the random matrix whose blocks, from different starts, are all experts."""

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}
"""The names of modules in transformers -> in llama.cpp."""


def _gguf_name(name: str) -> str:
    module = name.removesuffix(".weight")
    if module in NAMES:
        return f"{NAMES[module]}.weight"
    layer, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[rest]}.weight"


class _Tensor(NamedTuple):
    """A tensor of the file; ``read`` returns its data, in blocks as bytes."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    read: Callable[[], numpy.ndarray]


def _others(folder: Path, kind: Kind) -> Iterator[_Tensor]:
    """Yields the tensors in a directory; norms and routers are in float32."""
    for name, view in open_checkpoint(folder).tensors.items():
        shape = tuple(view.shape)
        to = Kind.F32 if len(shape) == 1 or name.endswith("mlp.gate.weight") else kind
        yield _Tensor(
            _gguf_name(name),
            shape,
            to,
            lambda view=view, to=to: gguf.quantize(view.read().float().numpy(), to),  # type: ignore[misc]
        )


class _Experts:
    """Random experts in a weight format of GGUF."""

    def __init__(self, config: dict, weight_format: str, seed: int) -> None:
        self.kind = Kind[weight_format.upper()]
        self.rng = numpy.random.default_rng(seed)
        torch.manual_seed(seed)
        dense = torch.randn(1, _ROWS, _COLUMNS) * config.get("initializer_range", 0.02)
        columns, self.block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        self.block_columns = columns
        self.blocks = ktops.quantize(dense, weight_format).weight.numpy().reshape(-1, self.block_bytes)

    def matrices(self, experts: int, rows: int, columns: int) -> numpy.ndarray:
        """Returns the bytes of [experts, rows, columns]."""
        blocks = columns // self.block_columns
        per_expert = rows * blocks
        repeated = numpy.resize(self.blocks, (2 * max(per_expert, len(self.blocks)), self.block_bytes))
        starts = self.rng.integers(0, len(self.blocks), experts)
        parts = numpy.stack([repeated[start : start + per_expert] for start in starts])
        return parts.reshape(experts, rows, blocks * self.block_bytes)


def _tensors(folder: Path, config: dict, weight_format: str, others: str, seed: int) -> Iterator[_Tensor]:
    yield from _others(folder, Kind[others.upper()])
    made = _Experts(config, weight_format, seed)
    experts, hidden, size = (config[key] for key in ("num_experts", "hidden_size", "moe_intermediate_size"))
    for layer in range(config["num_hidden_layers"]):
        for name, rows, columns in (("gate", size, hidden), ("up", size, hidden), ("down", hidden, size)):
            shape = experts, rows, columns
            read = functools.partial(made.matrices, *shape)
            yield _Tensor(f"blk.{layer}.ffn_{name}_exps.weight", shape, made.kind, read)


def _fields(writer: gguf.GGUFWriter, config: dict) -> None:
    """Writes the configuration; there is no tokenizer, because token ids are passed."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


def make_gguf(
    folder: Path, out: Path, weight_format: str = "q4_k", others: str = "bf16", seed: int = 0
) -> None:
    """Writes the file, one tensor in memory at a time. Until it is complete, its name ends in ``.partial``.

    Args:
        folder: a Qwen3-MoE model, from :func:`bench.models.make.make` without experts.
        out: the file.
        weight_format: of the experts.
        others: "bf16" or "q8_0", of the other matrices.
        seed: of the experts.
    """
    config = json.loads((folder / "config.json").read_text())
    partial = out.with_name(f"{out.name}.partial")
    writer = gguf.GGUFWriter(partial, _ARCHITECTURE)
    _fields(writer, config)
    tensors = list(_tensors(folder, config, weight_format, others, seed))
    for name, shape, kind, _ in tensors:
        size = math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
        writer.add_tensor_info(name, shape, numpy.dtype(numpy.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with progress(out.name, len(tensors)) as step:
        for tensor in tensors:
            writer.write_tensor_data(tensor.read())
            step(1)
    writer.close()
    partial.replace(out)
