"""Command-line options shared by several benches."""

import argparse

import torch

import ktops
from bench import moe_fwd, moe_sft
from bench.shapes import SHAPES, TOKENS, Shape, parse_shape

OPS = {op.MODE: op for op in (moe_fwd, moe_sft)}
"""The values of --mode."""


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
    return value


def positive(text: str) -> int:
    """Parses an integer of at least 1."""
    return _at_least(1, text)


def lora_rank(text: str) -> int:
    """Parses a LoRA rank; 0 means no LoRA."""
    return _at_least(0, text)


def shape(text: str) -> Shape:
    """Parses a name in SHAPES, or H,I,E,K."""
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class _Isas(argparse.Action):
    """Returns the names of kernels that this machine can run; "all" selects every one."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        have = [name for name, available in ktops.cpu_capabilities().items() if available]
        names = values if self.nargs else [values]
        if self.nargs and "all" in names:
            names = have
        if missing := [name for name in names if name not in have]:
            words = f"{', '.join(missing)} cannot run here; this machine has {', '.join(have)}"
            raise argparse.ArgumentError(self, words)
        setattr(namespace, self.dest, names if self.nargs else values)


class Parser(argparse.ArgumentParser):
    """An argument parser with a method for each shared option, which adds it.

    Example:
        >>> parser = Parser("run", __doc__)
        >>> parser.shape(several=True)
        >>> parser.add_argument("--quick", action="store_true")
    """

    def __init__(self, bench: str, description: str) -> None:
        prog, formatter = f"python -m bench.{bench}", argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=formatter)

    def shape(self, default: str = "qwen3_30b", several: bool = False) -> None:
        """Adds --shape; default: a shape, or "all three"."""
        shapes = list(SHAPES.values()) if default == "all three" else [parse_shape(default)]
        self.add_argument(
            "--shape", type=shape, nargs="+" if several else None, default=shapes if several else shapes[0],
            metavar="NAME", help=f"{', '.join(SHAPES)} or H,I,E,K (default: {default})",
        )  # fmt: skip

    def tokens(self, *default: int) -> None:
        """Adds --tokens. If no default is given, the bench uses TOKENS, or QUICK_TOKENS with --quick."""
        words = " ".join(map(str, default or TOKENS))
        self.add_argument("--tokens", type=positive, nargs="+", metavar="T", default=default or None,
                          help=f"default: {words}")  # fmt: skip

    def mode(self) -> None:
        modes = list(OPS)
        self.add_argument("--mode", choices=modes, nargs="+", default=modes, help="default: both")

    def isa(self, several: bool = False) -> None:
        default, what = ktops.cpu_capability(), "kernels, or all" if several else "kernels"
        self.add_argument(
            "--isa", action=_Isas, nargs="+" if several else None, default=[default] if several else default,
            metavar="ISA", help=f"{what} (default: {default})",
        )  # fmt: skip

    def threads(self) -> None:
        threads = torch.get_num_threads()
        self.add_argument("--threads", type=positive, default=threads, help="default: %(default)s")

    def rounds(self, default: int, quick: int | None = None) -> None:
        """Adds --rounds; quick: the default with --quick, which the bench applies."""
        words = f"{default}, with --quick {quick}" if quick else str(default)
        self.add_argument("--rounds", type=positive, default=None if quick else default, metavar="N",
                          help=f"samples per configuration (default: {words})")  # fmt: skip

    def max_load(self) -> None:
        self.add_argument(
            "--max-load", type=float, default=0.15, metavar="CORES",
            help="drop samples during which other processes used more (default: %(default)s)",
        )  # fmt: skip

    def seed(self) -> None:
        self.add_argument("--seed", type=int, default=0)
