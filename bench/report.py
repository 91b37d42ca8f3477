"""The measurements as a table, as JSON lines and as a plot."""

import json
from pathlib import Path

_COLUMNS = (
    "shape", "T", "mode", "LoRA r", "isa", "ms", "min..max", "GFLOP/s", "limit ms", "bound", "fraction", "n",
)  # fmt: skip


def _cells(row: dict) -> tuple[str, ...]:
    head = (row["shape"], str(row["tokens"]), row["mode"], str(row["lora_rank"]), row["isa"])
    samples = f"{row['samples']}-{row['dropped_samples']}" if row["dropped_samples"] else str(row["samples"])
    if row["status"] != "ok":
        word = "WRONG" if row["status"] == "wrong" else "busy"
        return (*head, word, "", "", "", "", "", samples)
    return (
        *head,
        f"{row['seconds'] * 1e3:.2f}",
        f"{row['seconds_min'] * 1e3:.2f}..{row['seconds_max'] * 1e3:.2f}",
        f"{row['flop_per_second'] / 1e9:.1f}",
        f"{row['limit_seconds'] * 1e3:.2f}",
        row["bound"],
        f"{row['fraction']:.3f}",
        samples,
    )


def print_machine(machine: dict) -> None:
    """CPU, versions, and the limits that the rows are measured against."""
    cache = machine["last_level_cache_bytes"] >> 20
    print(f"{machine['cpu']}, {cache} MiB last-level cache, {machine['threads']} threads")
    print(f"ktops {machine['ktops']}, torch {machine['torch']}")
    for row, peaks in machine["peak_flop_per_second"].items():
        print(f"peak {row}: " + ", ".join(f"{v / 1e9:.1f} GFLOP/s on {n}" for n, v in peaks.items()))
    print(
        "memory read: "
        + ", ".join(f"{v / 1e9:.1f} GB/s on {n}" for n, v in machine["read_bytes_per_second"].items())
    )


def print_table(rows: list[dict]) -> None:
    """One line a configuration; through rich if it is installed."""
    table = [_cells(row) for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(line[i]) for line in [_COLUMNS, *table]) for i in range(len(_COLUMNS))]
        for line in [_COLUMNS, *table]:
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
        return
    view = Table(*_COLUMNS, pad_edge=False)
    for line in table:
        view.add_row(*line, style="bold red" if "WRONG" in line else None)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(view)


def write_json(file: Path, machine: dict, rows: list[dict]) -> None:
    """One JSON object a line: first the machine ("kind": "machine"), then every row ("kind": "row")."""
    records = [{"kind": "machine", **machine}, *({"kind": "row", **row} for row in rows)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_plot(file: Path, machine: dict, rows: list[dict]) -> None:
    """Fraction of the roofline of every row as bars, memory-bound and compute-bound in two colours.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    rows = [row for row in rows if row["status"] == "ok"][::-1]
    colours = {"compute": "tab:blue", "memory": "tab:orange"}
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.28 * len(rows)), layout="constrained")
    labels = [f"{r['shape']}  T={r['tokens']}  {r['mode']}  r={r['lora_rank']}  {r['isa']}" for r in rows]
    places = range(len(rows))
    bars = axes.barh(places, [r["fraction"] for r in rows], color=[colours[r["bound"]] for r in rows])
    axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes.set_yticks(places, labels, fontsize=8)
    axes.set_xlim(0, max([1.0, *(r["fraction"] for r in rows)]) * 1.08)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("fraction of the roofline")
    axes.set_title(f"{machine['cpu']}, {machine['threads']} threads", fontsize=9)
    handles = [Patch(color=colour, label=f"{bound} bound") for bound, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
