"""Measures the accuracy of every writable weight format, group size and method.

    python -m bench.quality [--model DIR] [--save]

Two cases. `gaussian`: experts of normal numbers divided by the square root of their fan-in, normal tokens,
the best two of four experts. `trained`: the experts of the small model that `ktops finetune` pretrains, all
layers, with the tokens and routes that they get on its stories. DIR is that model (e.g. ktops-finetune/base);
without it one is made, which takes minutes.

Weights: ||dequantized - w|| / ||w||. Output: the same for the sums over experts, computed in float32 by
ktops.moe_sft. Bits: memory per weight, including scales. --save writes bench/results/quality.json and its
table in docs/formats.md.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import ktops
from bench import results
from bench.arguments import Parser
from ktops import formats
from ktops.formats.error import RelativeError, decode

PAGE = results.ROOT / "docs" / "formats.md"
SHAPE = (4, 512, 256)
"""E, H, I of the Gaussian experts."""

TOKENS = 256
CASES = ("gaussian", "trained")
GROUP_SIZES = (0, 32, 64, 128)
"""For formats that support any group size."""


class Layer(NamedTuple):
    """A layer of experts in float32, tokens, and their routes."""

    gate_up_proj: Tensor
    down_proj: Tensor
    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor

    def run(self, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
        return ktops.moe_sft(self.hidden_states, self.topk_ids, self.topk_weights, gate_up_proj, down_proj)


def variants(columns: tuple[int, ...]) -> Iterator[tuple[str, int, str]]:
    """Returns (format, group size, method) for all that can be written and hold rows of these lengths."""
    for name in formats.names():
        known = formats.get_format(name)
        sizes = GROUP_SIZES if -1 in known.group_sizes else known.group_sizes
        for group_size in sizes:
            for method in known.methods:
                try:
                    for length in columns:
                        ktops.quantize(torch.zeros(1, 1, length), name, group_size=group_size, method=method)
                except ValueError:
                    continue
                yield name, group_size, method


def gaussian_layers(seed: int = 0) -> list[Layer]:
    num_experts, hidden, intermediate = SHAPE
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights, ids = normal(TOKENS, num_experts).softmax(-1).topk(2)
    gate_up = normal(num_experts, 2 * intermediate, hidden) / hidden**0.5
    down = normal(num_experts, hidden, intermediate) / intermediate**0.5
    return [Layer(gate_up, down, normal(TOKENS, hidden), ids, weights)]


@torch.no_grad()
def trained_layers(directory: Path) -> list[Layer]:
    """Returns the layers of a `ktops finetune` model, with the inputs of their experts for some stories."""
    from ktops.cli.finetune import corpus
    from ktops.cli.models import load_model, load_tokenizer
    from ktops.nn import KTExperts

    model = load_model(str(directory), torch.float32, "ktops")
    ktops.swap_experts(model)
    tokens = load_tokenizer(str(directory))("\n".join(corpus.stories(20)))["input_ids"][:TOKENS]
    layers = []

    def record(experts: KTExperts, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        x, ids, weights = inputs
        gate_up, down = (experts.get_parameter(name) for name in ("gate_up_proj", "down_proj"))
        layers.append(Layer(gate_up, down, x, ids, weights))

    for module in model.modules():
        if isinstance(module, KTExperts):
            module.register_forward_pre_hook(record)
    model(input_ids=torch.tensor([tokens]))
    return [Layer(*(tensor.detach() for tensor in layer)) for layer in layers]


@torch.no_grad()
def measure(case: str, layers: list[Layer]) -> Iterator[dict]:
    """Returns a row for every variant."""
    expected = [layer.run(layer.gate_up_proj, layer.down_proj) for layer in layers]
    columns = (layers[0].gate_up_proj.shape[-1], layers[0].down_proj.shape[-1])
    for name, group_size, method in variants(columns):
        weight_error, output_error, memory, numel = RelativeError(), RelativeError(), 0, 0
        for layer, output in zip(layers, expected, strict=True):
            decoded = []
            for dense in layer[:2]:
                weight = ktops.quantize(dense, name, group_size=group_size, method=method)
                decoded.append(torch.stack([decode(weight, expert) for expert in range(len(dense))]))
                weight_error.add(decoded[-1], dense)
                memory, numel = memory + weight.nbytes, numel + dense.numel()
            output_error.add(layer.run(*decoded), output)
        yield {
            "case": case,
            "format": name,
            "group_size": group_size,
            "method": method,
            "bits": 8 * memory / numel,
            "weight_error": weight_error.value,
            "output_error": output_error.value,
        }


def cells(row: dict) -> tuple[str, ...]:
    """Returns (format, group, method, bits) and the two errors in percent."""
    errors = (f"{100 * row[name]:.3g}" for name in ("weight_error", "output_error"))
    return row["format"], str(row["group_size"] or "-"), row["method"], f"{row['bits']:.3g}", *errors


def table(rows: list[dict]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns (head, lines), a line per variant with the errors of both cases."""
    head = ("format", "group", "method", "bits", *(f"{case}: {what} %" for case in CASES
                                                   for what in ("weights", "output")))  # fmt: skip
    lines: dict[tuple, list[str]] = {}
    for case in CASES:
        for row in rows:
            if row["case"] == case:
                variant, errors = cells(row)[:3], cells(row)[4:]
                lines.setdefault(variant, [f"{row['bits']:.3g}", *["-"] * 4])
                at = 1 + 2 * CASES.index(case)
                lines[variant][at : at + 2] = errors
    return head, [(*variant, *line) for variant, line in lines.items()]


def section(file: Path | None = None) -> str:
    """Returns the block of docs/formats.md."""
    from bench.plots import markdown

    record = json.loads((file or results.RESULTS / "quality.json").read_text())
    origin = f"Revision {record['revision']}, torch {record['torch']}, {record['tokens']} tokens.\n\n"
    return origin + markdown(*table(record["rows"]))


def save(rows: list[dict]) -> Path:
    record = {
        "bench": "quality",
        "revision": results.revision(),
        "torch": torch.__version__,
        "tokens": TOKENS,
    }
    file = results.RESULTS / "quality.json"
    results.write(file, record, rows)
    return file


def _pretrained(folder: Path) -> Path:
    from rich.console import Console

    from ktops.cli.finetune import pretrain
    from ktops.cli.finetune.options import Options, complete
    from ktops.cli.finetune.report import Report

    return Path(pretrain.base_model(complete(Options()), folder, Report(Console()), "")[0])


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("quality", __doc__)
    parser.add_argument("--case", choices=CASES, nargs="+", default=CASES, help="default: both")
    parser.add_argument("--model", type=Path, metavar="DIR", help="the model of the case trained")
    parser.add_argument("--save", action="store_true", help="needs both cases")
    parser.threads()
    args = parser.parse_args(argv)
    if args.save and set(args.case) != set(CASES):
        parser.error("--save needs both cases")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in args.case:
            trained = case == "trained"
            layers = (
                trained_layers(args.model or _pretrained(Path(scratch))) if trained else gaussian_layers()
            )
            print(f"{case}: {len(layers)} layers, gate_up_proj {list(layers[0].gate_up_proj.shape)}")
            for row in measure(case, layers):
                rows.append(row)
                print("{:9} {:>4} {:4} {:>5} bits   weights {:>6} %   output {:>6} %".format(*cells(row)))
    if args.save:
        print(f"saved {save(rows)}")
        from bench.plots import fill

        PAGE.write_text(fill(PAGE.read_text(), "quality", section()))
        print(f"written: {PAGE.relative_to(results.ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
