"""Compares a training step of a model with its parts: kt ops, and matrix products at their best speed.

Example:
    python -m bench.models make --like deepseek-v2-lite --layers 4 MODEL
    python -m bench.models step MODEL --tokens 512 2048

Each step is one of `ktops finetune` on a sequence of T tokens, all with labels. The other matrix products
of forward and backward are counted by the model's configuration, so whatever computes them, the figure is the
same: linear layers, half of attention's [T, T], LoRA on attention, and the head for every token. Their lower
bound is the time that they take at the speed of one large product, measured after every step.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from bench.arguments import Parser, lora_rank, positive
from bench.models import finetune
from ktops._display import format_bytes

_PASSES = 2
"""Forward, and backward to the inputs; frozen weights have no gradient."""


def matrix_products(folder: Path, tokens: int, rank: int) -> dict[str, float]:
    """Returns the FLOPs of a step's matrix products outside routed experts, by kind."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    flops = dict.fromkeys(("linear", "head", "attention", "adapters"), 0.0)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            kind = "head" if module is model.get_output_embeddings() else "linear"
            flops[kind] += _PASSES * 2 * tokens * module.weight.numel()
            if "attn" in name:
                flops["adapters"] += 3 * 2 * tokens * rank * (module.in_features + module.out_features)
    if getattr(config, "kv_lora_rank", None):
        head_sizes = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    else:
        head_sizes = 2 * (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
    products = config.num_hidden_layers * config.num_attention_heads * tokens**2 * head_sizes
    flops["attention"] = 3 * products  # causal: half of 2 T^2 per column; four such products in backward
    return flops


def figures(run: finetune.Run, flops: dict[str, float]) -> dict[str, float]:
    """Returns the seconds of a step and of its parts, and their ratio."""
    step, speed = statistics.median(run.step_seconds), statistics.median(run.flops_per_second)
    products = {kind: count / speed for kind, count in flops.items()}
    bound = run.kt_seconds + sum(products.values())
    return {"step": step, "kt ops": run.kt_seconds, **products, "step / parts": step / bound}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("models step", __doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model's directory")
    parser.tokens(512, 2048)
    parser.add_argument("--rank", type=lora_rank, default=16, metavar="R", help="default: %(default)s")
    parser.add_argument("--steps", type=positive, default=6, help="of each run (default: %(default)s)")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="more, for ktops finetune")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    rows = []
    for tokens in args.tokens:
        flops = matrix_products(args.model, tokens, args.rank)
        with tempfile.TemporaryDirectory() as scratch:
            options = ("--lora-rank", str(args.rank), *args.options)
            run = finetune.run(args.model, tokens, args.steps, Path(scratch), *options)
        speed = statistics.median(run.flops_per_second)
        rows.append((tokens, figures(run, flops), speed, run.metrics))
    print(f"{args.model}, rank {args.rank}; seconds of a step and of its parts")
    print(f"{'tokens':>7}" + "".join(f"{name:>13}" for name in rows[0][1]) + f"{'GFLOP/s':>9}{'memory':>10}")
    for tokens, row, speed, metrics in rows:
        cells = "".join(f"{value:13.2f}" for value in row.values())
        print(f"{tokens:7}{cells}{speed / 1e9:9.0f}{format_bytes(metrics['peak_rss_bytes']):>10}")
    for tokens, _, _, metrics in rows:
        if times := metrics.get("step_time"):
            shares = ", ".join(f"{part} {time['share']:.0%}" for part, time in times.items())
            print(f"{tokens:7} tokens, by ktops finetune: {shares}")
    return 0
