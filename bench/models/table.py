"""Writes the table of real models in docs/models.md: what each needs on disk and in memory.

    python -m bench.models table            print it
    python -m bench.models table --write    put it into docs/models.md
    python -m bench.models table gpt-oss-20b qwen3-30b-a3b

Computed as by `ktops plan`, from the configs next to this file. Disk: of the directory that ktops convert
writes, other weights in bfloat16. Memory: mapped files included, Python and its libraries not.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from ktops.cli.finetune.options import Options, complete
from ktops.cli.plan.needs import LIBRARIES, Planner

CONFIGS = Path(__file__).parent / "configs"
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- sizes -->\n", "<!-- end of sizes -->"

BATCH, LENGTH, RANK, CONTEXT = 4, 512, 16, 4096
FORMATS = ("bf16", "fp8_e4m3", "int8", "int4")
HEADER = "| model | parameters | experts in | disk | finetune | chat |\n|---|---|---|---|---|---|"


def names() -> list[str]:
    """Returns the names of the models, in alphabetical order."""
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def planner(name: str) -> Planner:
    """Returns the plan of a model with the settings of the table."""
    path = str(CONFIGS / f"{name}.json")
    options = complete(Options(model=path, data="", batch_size=BATCH, max_length=LENGTH, lora_rank=RANK))
    return Planner(options, context=CONTEXT)


def rows(name: str) -> list[str]:
    """Returns the rows of a model, one for each format, with its own first if that is another."""
    plan = planner(name)
    counts = plan.weights.parameters
    size = f"{sum(counts.values()) / 1e9:.1f} B, {plan.active_parameters / 1e9:.1f} B active"
    native = plan.weights.experts_format
    made = []
    for weight_format in (native, *(name for name in FORMATS if name != native)):
        options = plan.options
        if weight_format != native:
            options = replace(options, weight_format=weight_format)
        memory = (needs(options) for needs in (plan.finetune, plan.chat))
        cells = [name, size, weight_format, disk(plan, options)]
        cells += [_gib(needs.total - needs.parts[LIBRARIES]) for needs in memory]
        made.append(f"| {' | '.join(cells)} |")
    return made


def disk(plan: Planner, options: Options) -> str:
    return _gib(plan.weights_with(options).disk)


def table(chosen: list[str]) -> str:
    return "\n".join([HEADER, *(row for name in chosen for row in rows(name))])


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.1f} GiB"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.models table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="*", metavar="NAME", help=f"{', '.join(names())} (default: all)")
    parser.add_argument("--write", action="store_true", help="change docs/models.md")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.name) - set(names()):
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    text = table(arguments.name or names())
    if arguments.write:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}{text}\n{END}{after}", encoding="utf-8")
    else:
        print(text)
    return 0
