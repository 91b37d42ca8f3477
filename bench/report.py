"""Reports measurements as a table, as JSON lines and as a plot."""

import json
from pathlib import Path

from bench.peers import CONTESTANTS

_COLUMNS = (
    "shape", "T", "mode", "LoRA r", "isa", "ms", "min..max", "GFLOP/s", "limit ms", "bound", "fraction",
    "undisturbed", "n",
)  # fmt: skip


def mode(row: dict) -> str:
    """Returns the mode of a row with all non-default settings: "training full recompute float32 skewed"."""
    words = [row["mode"], "full" * row["full"], row["save"], row["dtype"], row["routing"], row["layout"]]
    usual = ("", "activations", "bfloat16", "random", "plain")
    return " ".join(word for word in words if word not in usual)


def _undisturbed(row: dict) -> str:
    calls = row.get("undisturbed_calls")
    return f"{row['undisturbed_fraction']:.3f} ({calls})" if calls else ""


def _cells(row: dict) -> tuple[str, ...]:
    head = (row["shape"], str(row["tokens"]), mode(row), str(row["lora_rank"]), row["isa"])
    samples = f"{row['samples']}-{row['dropped_samples']}" if row["dropped_samples"] else str(row["samples"])
    if row["status"] != "ok":
        word = "WRONG" if row["status"] == "wrong" else "busy"
        return (*head, word, *[""] * 6, samples)
    return (
        *head,
        f"{row['seconds'] * 1e3:.2f}",
        f"{row['seconds_min'] * 1e3:.2f}..{row['seconds_max'] * 1e3:.2f}",
        f"{row['flop_per_second'] / 1e9:.1f}",
        f"{row['limit_seconds'] * 1e3:.2f}",
        row["bound"],
        f"{row['fraction']:.3f}",
        _undisturbed(row),
        samples,
    )


def print_machine(machine: dict) -> None:
    """Prints CPU, versions, and the limits that the rows are compared with."""
    cache = machine["last_level_cache_bytes"] >> 20
    print(f"{machine['cpu']}, {cache} MiB last-level cache, {machine['threads']} threads")
    print(f"ktops {machine['ktops']}, torch {machine['torch']}")
    for row, peaks in machine["peak_flop_per_second"].items():
        cached = machine["l2_flop_per_second"][row]
        figures = (f"{v / 1e9:.1f} GFLOP/s on {n} ({cached[n] / 1e9:.1f} from L2)" for n, v in peaks.items())
        print(f"peak {row}: " + ", ".join(figures))
    print(
        "memory read: "
        + ", ".join(f"{v / 1e9:.1f} GB/s on {n}" for n, v in machine["read_bytes_per_second"].items())
    )


def print_columns(columns: tuple[str, ...], table: list[tuple[str, ...]]) -> None:
    """Prints a table, with rich if it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(line[i]) for line in [columns, *table]) for i in range(len(columns))]
        for line in [columns, *table]:
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
        return
    view = Table(*columns, pad_edge=False)
    for line in table:
        view.add_row(*line, style="bold red" if {"WRONG", "NO"} & set(line) else None)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(view)


def print_table(rows: list[dict]) -> None:
    """Prints one line per configuration."""
    print_columns(_COLUMNS, [_cells(row) for row in rows])


def contest_cases(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """Returns {(shape, mode, LoRA rank, tokens): {contestant: row}}, in the order of the rows."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        key = (row["shape"], row["mode"], row["lora_rank"], row["tokens"])
        cases.setdefault(key, {})[row["contestant"]] = row
    return cases


def best_peer(case: dict[str, dict]) -> dict | None:
    """Returns the fastest row of a case among the peers."""
    peers = [row for name, row in case.items() if name != "ktops" and row["status"] == "ok"]
    return min(peers, key=lambda row: row["seconds"], default=None)


def _figure(row: dict | None) -> str:
    if row is None:
        return "-"
    if row["status"] != "ok":
        return "WRONG" if row["status"] == "wrong" else row["status"]
    undisturbed = f"; {row['undisturbed_fraction']:.2f}" if row.get("undisturbed_calls") else ""
    return f"{row['seconds'] * 1e3:.3g} ({row['fraction']:.2f}{undisturbed})"


def contest_table(rows: list[dict]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns (columns, lines), a line per case: milliseconds (fraction of the roofline) per contestant."""
    cases = contest_cases(rows)
    order = [entry.name for entry in CONTESTANTS]
    names = sorted({row["contestant"] for row in rows} - set(order))
    names = [name for name in order if any(row["contestant"] == name for row in rows)] + names
    lines = []
    for (shape, mode, rank, tokens), case in cases.items():
        ours, best = case.get("ktops"), best_peer(case)
        ratio = "-"
        if best is not None and ours is not None and ours["status"] == "ok":
            ratio = f"{best['seconds'] / ours['seconds']:.2f}"
        limit = next((f"{r['limit_seconds'] * 1e3:.3g}" for r in case.values() if r["status"] == "ok"), "-")
        figures = [_figure(case.get(name)) for name in names]
        lines.append((shape, f"{mode} r={rank}" if rank else mode, str(tokens), limit, *figures, ratio))
    return ("shape", "mode", "T", "limit", *names, "best peer / ktops"), lines


def contest_tables(rows: list[dict]) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Prints a table per mode, because not every contestant trains."""
    modes = dict.fromkeys(row["mode"] for row in rows)
    return [contest_table([row for row in rows if row["mode"] == mode]) for mode in modes]


def print_contest(rows: list[dict]) -> None:
    """Prints milliseconds (fraction of the roofline), and how much faster ktops is."""
    for table in contest_tables(rows):
        print("milliseconds (fraction of the roofline)")
        print_columns(*table)


def print_regression(rows: list[dict], threshold: float) -> None:
    """Prints milliseconds of A and B and the ratio of B to A with its spread over rounds, a line per case."""
    lines: list[tuple[str, ...]] = []
    for row in rows:
        head = (row["shape"], row["mode"], str(row["tokens"]))
        if "ratio" in row:
            times = (f"{row['A'] * 1e3:.3f}", f"{row['B'] * 1e3:.3f}", f"{row['ratio']:.3f}")
            spread, word = f"{row['low']:.3f}..{row['high']:.3f}", row["status"].replace("slower", "SLOWER")
            lines.append((*head, *times, spread, word))
        else:
            lines.append((*head, "", "", "", "", row.get("message", row["status"])))
    print_columns(
        ("shape", "mode", "T", "A ms", "B ms", "B / A", "middle half", f"at most {threshold:g}"), lines
    )


def busy_core_table(rows: list[dict]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns (columns, lines): milliseconds alone and with one core kept busy, and their ratio."""
    lines: list[tuple[str, ...]] = [
        (
            row["shape"],
            row["mode"],
            str(row["tokens"]),
            row["isa"],
            f"{row['seconds'] * 1e3:.2f}",
            f"{row['seconds_busy'] * 1e3:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_min']:.2f}..{row['ratio_max']:.2f}",
        )
        for row in rows
    ]
    return ("shape", "mode", "T", "isa", "quiet ms", "busy ms", "ratio", "min..max"), lines


def print_busy_core(rows: list[dict]) -> None:
    """Prints one line per case."""
    print_columns(*busy_core_table(rows))


def speed(row: dict) -> str:
    """Returns the speed of a layout relative to the plain one, and the middle half of its rounds."""
    return f"{row['speed']:.2f} ({row['speed_low']:.2f}..{row['speed_high']:.2f})"


def layouts_table(rows: list[dict]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns (columns, lines), a column per T: the speed relative to the plain layout."""
    tokens = sorted({row["tokens"] for row in rows})
    lines: dict[tuple, dict[int, str]] = {}
    for row in rows:
        cell = speed(row) if row["status"] == "ok" else "WRONG"
        lines.setdefault((row["shape"], row["layout"], row["mode"]), {})[row["tokens"]] = cell
    columns = ("shape", "layout", "mode", *(f"T={t}" for t in tokens))
    return columns, [(*name, *(cells.get(t, "-") for t in tokens)) for name, cells in lines.items()]


def print_layouts(rows: list[dict]) -> None:
    """Prints one table per ISA."""
    for isa in dict.fromkeys(row["isa"] for row in rows):
        print(f"{isa}: speed relative to the plain layout (middle half)")
        print_columns(*layouts_table([row for row in rows if row["isa"] == isa]))


def check_table(rows: list[dict]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns (columns, lines), one line per check."""
    lines: list[tuple[str, ...]] = [
        (
            row["check"],
            f"{row['measured']:.3g} {row['unit']}".strip(),
            f"{row['bound']} {row['limit']:g} {row['unit']}".strip(),
            "yes" if row["held"] else "NO",
        )
        for row in rows
    ]
    return ("check", "measured", "limit", "held"), lines


def print_check(rows: list[dict]) -> None:
    """Prints one line per check."""
    print_columns(*check_table(rows))


def run_table(rows: list[dict]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns (columns, lines), a column per T: milliseconds (fraction of the roofline; undisturbed)."""
    tokens = sorted({row["tokens"] for row in rows})
    variants: dict[tuple, dict[int, dict]] = {}
    for row in rows:
        variants.setdefault((row["shape"], mode(row), str(row["lora_rank"])), {})[row["tokens"]] = row
    lines = [(*name, *(_figure(of.get(t)) for t in tokens)) for name, of in variants.items()]
    return ("shape", "mode", "LoRA r", *(f"T={t}" for t in tokens)), lines


def scaling_table(rows: list[dict]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns (columns, lines), a line per point, a column per mode: milliseconds (fraction of roofline)."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    points: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        points.setdefault((row["sweep"], str(row["value"])), {})[row["mode"]] = row
    return ("changed", "to", *modes), [
        (*name, *(_figure(of.get(m)) for m in modes)) for name, of in points.items()
    ]


def print_scaling(rows: list[dict]) -> None:
    """Prints one line per point."""
    print_columns(*scaling_table(rows))


def write_json(file: Path, machine: dict, rows: list[dict]) -> None:
    """Writes a JSON object per line: first the machine ("kind": "machine"), then the rows ("kind": "row")."""
    records = [{"kind": "machine", **machine}, *({"kind": "row", **row} for row in rows)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_plot(file: Path, machine: dict, rows: list[dict]) -> None:
    """Plots the fraction of the roofline of every row as bars, in two colors for memory and compute bound.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    rows = [row for row in rows if row["status"] == "ok"][::-1]
    colors = {"compute": "tab:blue", "memory": "tab:orange"}
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.28 * len(rows)), layout="constrained")
    labels = [f"{r['shape']}  T={r['tokens']}  {mode(r)}  r={r['lora_rank']}  {r['isa']}" for r in rows]
    places = range(len(rows))
    bars = axes.barh(places, [r["fraction"] for r in rows], color=[colors[r["bound"]] for r in rows])
    axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes.set_yticks(places, labels, fontsize=8)
    axes.set_xlim(0, max([1.0, *(r["fraction"] for r in rows)]) * 1.08)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("fraction of the roofline")
    axes.set_title(f"{machine['cpu']}, {machine['threads']} threads", fontsize=9)
    handles = [Patch(color=color, label=f"{bound} bound") for bound, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
