"""Measures the error of rounding activations to int8 if a few channels are massive.

    python -m bench.rounding [--isa ISA ...] [--save]

Runs an expert in each format on normal tokens in which a few channels are 30, 100 or 300 times as large, as
in real models. The error is the norm of the difference from float64 on the same decoded weights, divided by
the norm of the output. "blocks of 32" (ggml's Q8_0) and "one scale a row" are computed in float64. Few and
many tokens use different kernels; the larger error counts. --isa amx_bf16 restarts the program under the
emulator if there are no tiles.

Exit status: 0, or 1 if an error exceeds 1.3 times that of blocks of 32.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import ktops
from bench import results
from bench.arguments import Parser
from ktops.reference.int8 import round_blocks, round_rows
from ktops.testing import amx_emulator
from ktops.testing.budgets import relative_error
from ktops.testing.inputs import densified, moe_inputs
from ktops.testing.weights import in_format

PAGE = results.ROOT / "docs" / "formats.md"
FORMATS = (("int8", 0), ("int4", 0), ("int4", 128), ("int4", 32), ("q8_0", 0), ("q4_k", 0), ("q6_k", 0))
FACTORS = (1, 30, 100, 300)
SHAPE = {"H": 2048, "I": 768}
"""H and I of the expert."""

TOKENS = (4, 32)
CHANNELS = (7, 200, 201, 950, 1400, 2001)
ROWS, BLOCKS = "one scale a row", "blocks of 32"
ALLOWED = 1.3
"""Largest error relative to that of blocks of 32."""


def layer(inputs: dict, x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Computes the output of one expert in float64, with rows of activations rounded."""
    gate_up, down = (inputs[name][0].double() for name in ("gate_up_proj", "down_proj"))
    gate, up = (rounded(x) @ gate_up.T).chunk(2, -1)
    return rounded(torch.nn.functional.silu(gate) * up) @ down.T


def cases(name: str, group_size: int) -> Iterator[tuple[int, dict]]:
    """Yields (factor, inputs of ktops.moe_sft) for few and for many tokens."""
    for tokens in TOKENS:
        inputs = in_format(moe_inputs(T=tokens, H=SHAPE["H"], I=SHAPE["I"], E=1, K=1), name, group_size)
        for factor in FACTORS:
            x = inputs["hidden_states"].clone()
            x[:, [channel % SHAPE["H"] for channel in CHANNELS]] *= factor
            yield factor, inputs | {"hidden_states": x}


def measure(isas: list[str]) -> Iterator[dict]:
    """Returns a row per format and kind of rounding: {"format", "group_size", "kernels", "errors"}."""
    for name, group_size in FORMATS:
        errors = {kind: dict.fromkeys(FACTORS, 0.0) for kind in (ROWS, BLOCKS, *isas)}
        for factor, inputs in cases(name, group_size):
            x, dense = inputs["hidden_states"], densified(inputs)
            exact = layer(dense, x, Tensor.double)
            outputs = {
                ROWS: layer(dense, x, round_rows),
                BLOCKS: layer(dense, x, round_blocks),
            }
            for isa in isas:
                with ktops.use_isa(isa):
                    outputs[isa] = ktops.moe_sft(**inputs, compute="int8")
            for kind, output in outputs.items():
                errors[kind][factor] = max(errors[kind][factor], relative_error(output, exact))
        for kind, found in errors.items():
            yield {"format": name, "group_size": group_size, "kernels": kind, "errors": list(found.values())}


def label(row: dict) -> str:
    return f"{row['format']}:{row['group_size']}" if row["group_size"] else row["format"]


def table(rows: list[dict], factors: list[int]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns (head, lines): errors in percent, a line per format and kind; equal kernels share a line."""
    head = ("format", "activations", *(f"{factor} times" for factor in factors))
    lines: dict[tuple, list[str]] = {}
    for row in rows:
        errors = tuple(f"{100 * error:.3g}" for error in row["errors"])
        rounded = row["kernels"] in (ROWS, BLOCKS)
        lines.setdefault((label(row), rounded, errors), []).append(row["kernels"])
    return head, [(name, ", ".join(kernels), *errors) for (name, _, errors), kernels in lines.items()]


def too_large(rows: list[dict]) -> list[str]:
    """Returns the formats and kernels whose error exceeds the limit."""
    blocks = {label(row): row["errors"] for row in rows if row["kernels"] == BLOCKS}
    return [
        f"{label(row)} on {row['kernels']}"
        for row in rows
        if row["kernels"] not in (ROWS, BLOCKS)
        and any(
            error > ALLOWED * least for error, least in zip(row["errors"], blocks[label(row)], strict=True)
        )
    ]


def save(rows: list[dict]) -> Path:
    """Saves the rows; rows of other kernels in the file stay."""
    file = results.RESULTS / "rounding.json"
    rows = [{**row, "revision": results.revision()} for row in rows]
    new = {(label(row), row["kernels"]) for row in rows}
    old = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = [row for row in old if (label(row), row["kernels"]) not in new] + rows
    formats = [label({"format": name, "group_size": size}) for name, size in FORMATS]
    kinds = [ROWS, BLOCKS, *ktops.cpu_capabilities()]
    rows.sort(key=lambda row: (formats.index(label(row)), kinds.index(row["kernels"])))
    results.write(file, {"bench": "rounding", "torch": torch.__version__, "factors": list(FACTORS)}, rows)
    return file


def section(file: Path | None = None) -> str:
    """Returns the block of docs/formats.md."""
    from bench.plots import markdown

    record = json.loads((file or results.RESULTS / "rounding.json").read_text())
    revisions = ", ".join(sorted({row["revision"] for row in record["rows"]}))
    origin = f"Revision {revisions}, torch {record['torch']}.\n\n"
    return origin + markdown(*table(record["rows"], record["factors"]))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("rounding", __doc__)
    parser.add_argument("--isa", nargs="+", metavar="ISA", help="default: all that run here")
    parser.add_argument("--save", action="store_true", help="write to bench/results and docs/formats.md")
    parser.threads()
    return parser.parse_args(argv)


def has_tiles() -> bool:
    """Returns whether the ``amx_bf16`` kernels can run, on this CPU or under the emulator."""
    try:
        amx_emulator.counts()
    except RuntimeError:
        return ktops.cpu_capabilities()["amx_bf16"]
    return True


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    isas = args.isa or [isa for isa, runs in ktops.cpu_capabilities().items() if runs]
    if "amx_bf16" in isas and not has_tiles():
        arguments = sys.argv[1:] if argv is None else argv
        command = [sys.executable, "-m", "bench.rounding", *arguments]
        env = amx_emulator.row_environment(path=[Path(__file__).parents[1]])
        return subprocess.run(command, env=env).returncode
    torch.set_num_threads(args.threads)
    rows = []
    for row in measure(isas):
        rows.append(row)
        errors = "  ".join(f"{100 * error:7.3f} %" for error in row["errors"])
        print(f"{label(row):9} {row['kernels']:16} {errors}", flush=True)
    wrong = too_large(rows)
    for what in wrong:
        print(f"{what}: more than {ALLOWED} times the error of blocks of 32")
    if args.save:
        from bench.plots import fill

        print(f"saved {save(rows)}")
        PAGE.write_text(fill(PAGE.read_text(), "rounding", section()))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
