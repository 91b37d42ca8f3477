"""Prints what KTransformers' usage document asks for in 5.4: throughput of a forward, and resident memory.

    python -m bench.usage
    python -m bench.usage --experts 16 --batch 1 --length 512

The model is a random Qwen3-MoE of one layer with the document's sizes (H 7168, I 2048), written to a
temporary directory and loaded by ``ktops.compat.load_kt_model``.
"""

import argparse
import sys
import tempfile
import time
from types import SimpleNamespace

import torch

from bench.arguments import Parser, positive
from bench.machine import cpu_model
from bench.memory import resident_bytes
from ktops import compat
from ktops.compat.wrapping import wrappers_of

GIB = 1 << 30


def write_model(folder: str, hidden: int, intermediate: int, experts: int) -> None:
    """Writes a random model of one layer in bfloat16, with 64 tokens in its vocabulary."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=hidden,
        moe_intermediate_size=intermediate,
        num_hidden_layers=1,
        num_experts=experts,
        num_experts_per_tok=min(8, experts),
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=64,
    )
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        row = torch.randn(tensor.shape[-1:]) / tensor.shape[-1] ** 0.5
        tensor.data.copy_(row.to(tensor.dtype).expand(tensor.shape))
    model.save_pretrained(folder)


def load(folder: str, rank: int) -> torch.nn.Module:
    """Loads the model as the document does, and freezes all but the adapters."""
    from transformers import AutoConfig

    model_args = SimpleNamespace(model_name_or_path=folder, kt_backend="BF16")
    finetuning_args = SimpleNamespace(lora_rank=rank, lora_alpha=2 * rank)
    model = compat.load_kt_model(AutoConfig.from_pretrained(folder), model_args, finetuning_args)
    adapters = {id(parameter) for parameter in compat.get_kt_lora_params(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in adapters)
    return model


def train(model: torch.nn.Module, steps: int, length: int) -> None:
    """Makes steps of AdamW on the adapters."""
    optimizer = torch.optim.AdamW(compat.get_kt_lora_params(model), lr=1e-4)
    ids = torch.arange(length).remainder(64)[None]
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        compat.update_kt_lora_pointers(model)


@torch.no_grad()
def throughput(layer: torch.nn.Module, batch: int, length: int, hidden: int, repeats: int) -> float:
    """Returns the tokens per second of a wrapped block, after one call to warm up."""
    hidden_states = torch.randn(batch, length, hidden, dtype=torch.bfloat16)
    layer(hidden_states)
    start = time.perf_counter()
    for _ in range(repeats):
        layer(hidden_states)
    return batch * length * repeats / (time.perf_counter() - start)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("usage", __doc__)
    for name, default in (
        ("hidden", 7168), ("intermediate", 2048), ("experts", 8), ("rank", 16), ("batch", 4),
        ("length", 2048), ("repeats", 3), ("steps", 10), ("train-length", 128),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=positive, default=default, metavar="N")
    parser.threads()
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    print(f"{cpu_model()}, {args.threads} threads; H {args.hidden}, I {args.intermediate}, E {args.experts}")
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, args.hidden, args.intermediate, args.experts)
        print(f"Initial memory: {resident_bytes() / GIB:.2f} GiB")
        model = load(folder, args.rank)
        print(f"After load: {resident_bytes() / GIB:.2f} GiB")
        train(model, args.steps, args.train_length)
        print(f"After train: {resident_bytes() / GIB:.2f} GiB")
    (layer,) = wrappers_of(model)
    speed = throughput(layer, args.batch, args.length, args.hidden, args.repeats)
    print(f"Forward throughput of [{args.batch}, {args.length}, {args.hidden}]: {speed:.2f} tokens/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
