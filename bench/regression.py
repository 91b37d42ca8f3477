"""Builds two git revisions and compares their times, taking turns on the same inputs in one run.

    python -m bench.regression HEAD~1 HEAD
    python -m bench.regression v0.1.0 HEAD --shape dsv2_lite --tokens 1 128 --threshold 1.03

The ratio of a case is time of B / time of A, the median over rounds. The spread is that of the middle half of
the rounds. Results of both are compared with the reference of this tree. B is slower if the ratio exceeds
--threshold and even the lower end of the spread exceeds 1, and if new processes confirm it, because the
physical memory that a process gets can cost a few percent. Revisions are built in temporary worktrees. Built
extension modules are kept under build/regression, keyed by the contents of their sources.

Exit status: 0, or 1 if B is slower in some case or a result was wrong, or 3 if a case never had a quiet
sample.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench import report, results
from bench.arguments import OPS, Parser, positive
from bench.contest import Entrant, Turns, Worker, contest, inputs_around, say
from bench.layer import Layer, Variant

ROOT = Path(__file__).parent.parent
MODULE = Path("ktops/_C.abi3.so")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("regression", __doc__)
    add = parser.add_argument
    add("revisions", nargs=2, metavar="REV", help="A, the old revision, and B, the new one")
    parser.shape(several=True)
    parser.tokens(1, 16, 128, 512)
    parser.mode()
    add("--rank", type=positive, default=16, metavar="R", help="LoRA rank of training (default: %(default)s)")
    parser.isa()
    add("--threshold", type=float, default=1.05, help="largest ratio that passes (default: %(default)s)")
    parser.threads()
    parser.rounds(7)
    add("--seconds", type=float, default=0.3, help="seconds per sample (default: %(default)s)")
    parser.max_load()
    parser.seed()
    return parser.parse_args(argv)


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def source_key(revision: str) -> str:
    """Returns a key that changes with the C++ sources or the build of a revision, and with torch."""
    trees = [_git("rev-parse", f"{revision}:{path}")[:12] for path in ("ktops_csrc", "setup.py")]
    return "-".join([*trees, torch.__version__])


def build(revision: str, tree: Path) -> None:
    """Builds the extension module of a revision in its checked-out tree, or copies it from an earlier build.

    Raises:
        subprocess.CalledProcessError: the build failed; its output has been printed.
    """
    kept = ROOT / "build" / "regression" / source_key(revision) / MODULE.name
    if not kept.exists():
        say(f"{revision}: building")
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        try:
            subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            say(error.stdout + error.stderr)
            raise
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tree / MODULE, kept)
    else:
        say(f"{revision}: built before, {kept.relative_to(ROOT)}")
        shutil.copy(kept, tree / MODULE)


class Checkouts:
    """Builds two revisions in temporary worktrees, which are removed at the end of the ``with`` block."""

    def __init__(self, revisions: list[str], folder: Path) -> None:
        self.trees = {name: folder / name for name in ("A", "B")}
        self.commits = [_git("rev-parse", "--verify", f"{revision}^{{commit}}") for revision in revisions]

    def __enter__(self) -> dict[str, Path]:
        for (name, tree), commit in zip(self.trees.items(), self.commits, strict=True):
            _git("worktree", "add", "--detach", str(tree), commit)
            say(f"{name}: {_git('log', '-1', '--format=%h %s', commit)}")
            build(commit, tree)
        return self.trees

    def __exit__(self, *_) -> None:
        for tree in self.trees.values():
            if tree.exists():
                _git("worktree", "remove", "--force", str(tree))


def ratios(a: Entrant, b: Entrant) -> list[float]:
    """Returns time of B / time of A for every round in which both have a sample."""
    rounds = sorted(a.samples.keys() & b.samples.keys())
    return [statistics.median(b.samples[n]) / statistics.median(a.samples[n]) for n in rounds]


def judge(values: list[float], threshold: float) -> dict:
    """Returns {"ratio", "low", "high", "slower"} of the ratios of the rounds."""
    ratio = statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [ratio] * 3
    return {"ratio": ratio, "low": low, "high": high, "slower": ratio > threshold and low > 1.0}


def _workers(trees: dict[str, Path], layer: Layer, args, scratch: Path) -> dict[str, Worker]:
    file = scratch / "layer.pt"
    layer.write(file, args.rank)
    environment = {"OMP_NUM_THREADS": str(args.threads), "KTOPS_ISA": args.isa}
    workers = {
        name: Worker(sys.executable, environment, scratch / f"{name}.log", tree)
        for name, tree in trees.items()
    }
    for name, worker in workers.items():
        modules = {name: {"module": "ktops_op", "options": {}}}
        worker.ask("load", file=str(file), rank=args.rank, threads=args.threads, contestants=modules)
    return workers


def _case(layer: Layer, mode: str, tokens: int, workers: dict[str, Worker], args, scratch: Path) -> dict:
    rank = args.rank if mode == "training" else 0
    say(f"{layer.shape.name} T={tokens} {mode}")

    def check(entrant: Entrant, inputs, result) -> float:
        return OPS[mode].check(layer, Variant(rank), inputs, result)

    entrants = {name: Entrant(name, worker) for name, worker in workers.items()}
    turns = Turns(args.rounds, args.seconds, args.max_load, 3 * args.rounds)
    contest(list(entrants.values()), mode, inputs_around(layer, tokens), check, turns, scratch)
    row = {"shape": layer.shape.name, "mode": mode, "tokens": tokens, "lora_rank": rank}
    failures = [f"{entrant.name}: {entrant.failure}" for entrant in entrants.values() if entrant.failure]
    if failures:
        return row | {"status": "wrong", "message": "; ".join(failures)}
    values = ratios(entrants["A"], entrants["B"])
    if not values:
        return row | {"status": "busy"}
    row |= {name: entrant.seconds for name, entrant in entrants.items()} | judge(values, args.threshold)
    return row | {"status": "slower" if row["slower"] else "ok", "samples": len(values)}


def _cases(layer: Layer, cases: list[tuple[str, int]], trees: dict, args, scratch: Path) -> list[dict]:
    """Returns the rows of some (mode, tokens), measured in new processes."""
    workers = _workers(trees, layer, args, scratch)
    try:
        return [_case(layer, mode, tokens, workers, args, scratch) for mode, tokens in cases]
    finally:
        for worker in workers.values():
            worker.close()


def compare(layer: Layer, trees: dict[str, Path], args: argparse.Namespace, scratch: Path) -> list[dict]:
    """Returns the rows of a layer; those that look slower are measured twice."""
    rows = _cases(
        layer, [(mode, tokens) for mode in args.mode for tokens in args.tokens], trees, args, scratch
    )
    again = {(row["mode"], row["tokens"]): i for i, row in enumerate(rows) if row["status"] == "slower"}
    if again:
        say(f"{len(again)} of {len(rows)} cases look slower: again, with new processes")
        for row in _cases(layer, list(again), dict(reversed(trees.items())), args, scratch):
            rows[again[row["mode"], row["tokens"]]] = row
    return rows


def measure(args: argparse.Namespace) -> list[dict]:
    """Returns a row for every case that the arguments select."""
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        with Checkouts(args.revisions, scratch) as trees:
            for size in args.shape:
                rows += compare(Layer(size, args.seed), trees, args, scratch)
    return rows


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    rows = measure(args)
    report.print_regression(rows, args.threshold)
    return results.exit_status(rows)


if __name__ == "__main__":
    sys.exit(main())
