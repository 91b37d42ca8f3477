"""Draws the results of bench/results to docs/figures and writes their tables into docs/performance.md.

    python -m bench.plots

Replaces the blocks between <!-- begin NAME --> and <!-- end NAME -->; the rest of the page is written by
hand. Needs matplotlib.
"""

import argparse
import re
import sys
from pathlib import Path

from bench import report, results

ROOT = Path(__file__).parent.parent
PAGE, FIGURES = ROOT / "docs" / "performance.md", ROOT / "docs" / "figures"


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ktops", "font.size": 8})
    from matplotlib import pyplot

    return pyplot


def _save(figure, file: Path) -> None:
    """Saves and closes the figure. SVG files get no date, so that the same figure gives the same file."""
    figure.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)
    _pyplot().close(figure)


def title(result: dict) -> str:
    """Returns the processor, threads and kernels of a result, in one line."""
    machine = result["machine"]
    return f"{machine['cpu']}, {machine['threads']} threads, {result['isa']} kernels"


def _ok(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["status"] == "ok"]


def _token_axis(axes, tokens: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(t) for t in tokens])
    axes.minorticks_off()
    axes.set_ylim(0, max(1.05, axes.get_ylim()[1]))
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.grid(alpha=0.3)


def _group(rows: list[dict], key) -> dict:
    groups: dict = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def write_run(file: Path, result: dict) -> None:
    """Plots the fraction of the roofline over tokens, a panel per mode, a line per shape and variant."""
    panels = _group(_ok(result["rows"]), lambda row: row["mode"])
    figure, axes = _pyplot().subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.2), layout="constrained", squeeze=False, sharey=True
    )
    for panel, (mode, rows) in zip(axes[0], panels.items(), strict=True):
        lines = _group(rows, lambda row: f"{row['shape']} {report.mode(row)} r={row['lora_rank']}")
        for label, line in lines.items():
            line = sorted(line, key=lambda row: row["tokens"])
            xs = [row["tokens"] for row in line]
            panel.plot(xs, [row["fraction"] for row in line], marker="o", label=label.replace(f" {mode}", ""))
        _token_axis(panel, sorted({row["tokens"] for row in rows}))
        panel.set(title=mode, xlabel="tokens")
        panel.legend(fontsize=6, frameon=False)
    axes[0, 0].set_ylabel("fraction of the roofline")
    figure.suptitle(title(result))
    _save(figure, file)


def write_peers(file: Path, result: dict) -> None:
    """Plots the fraction of the roofline over tokens, a panel per shape and mode, a line per contestant."""
    rows = _ok(result["rows"])
    shapes, modes = (list(dict.fromkeys(row[name] for row in rows)) for name in ("shape", "mode"))
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    size = (3.6 * len(shapes) + 1.5, 2.6 * len(modes))
    figure, axes = _pyplot().subplots(
        len(modes), len(shapes), figsize=size, layout="constrained", squeeze=False, sharey=True
    )
    for (mode, shape), case in _group(rows, lambda row: (row["mode"], row["shape"])).items():
        panel = axes[modes.index(mode), shapes.index(shape)]
        for name, line in _group(case, lambda row: row["contestant"]).items():
            line = sorted(line, key=lambda row: row["tokens"])
            xs, ys = [row["tokens"] for row in line], [row["fraction"] for row in line]
            width = 2.5 if name == "ktops" else 1.0
            panel.plot(xs, ys, marker="o", color=f"C{names.index(name)}", label=name, linewidth=width)
        _token_axis(panel, sorted({row["tokens"] for row in case}))
        panel.set(title=f"{shape}, {mode}", xlabel="tokens")
    for row in axes:
        row[0].set_ylabel("fraction of the roofline")
    handles = {h.get_label(): h for panel in axes.flat for h in panel.get_lines() if h.get_label() in names}
    figure.legend(handles=[handles[name] for name in names], loc="outside right upper", frameon=False)
    figure.suptitle(title(result))
    _save(figure, file)


def write_scaling(file: Path, result: dict) -> None:
    """Plots milliseconds and the roofline over each size, both axes logarithmic, a panel per sweep."""
    sweeps = _group(_ok(result["rows"]), lambda row: row["sweep"])
    figure, axes = _pyplot().subplots(
        1, len(sweeps), figsize=(3.0 * len(sweeps), 3.0), layout="constrained", squeeze=False
    )
    for panel, (sweep, rows) in zip(axes[0], sweeps.items(), strict=True):
        for number, (mode, line) in enumerate(_group(rows, lambda row: row["mode"]).items()):
            line = sorted(line, key=lambda row: row["value"])
            xs = [row["value"] for row in line]
            panel.plot(xs, [row["seconds"] * 1e3 for row in line], "o-", color=f"C{number}", label=mode)
            limits = [row["limit_seconds"] * 1e3 for row in line]
            panel.plot(xs, limits, "--", color=f"C{number}", linewidth=0.8, label=f"{mode}, roofline")
        panel.set(xscale="log", yscale="log", xlabel=sweep.replace("_", " "))
        ticks = sorted({row["value"] for row in rows})
        panel.set_xticks(ticks, [str(tick) for tick in ticks], rotation=60)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    axes[0, 0].set_ylabel("milliseconds")
    axes[0, 0].legend(fontsize=6, frameon=False)
    figure.suptitle(f"{result['rows'][0]['shape']}; {title(result)}")
    _save(figure, file)


def markdown(columns: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """Returns a table in Markdown."""
    return "".join(f"| {' | '.join(line)} |\n" for line in [columns, ("---",) * len(columns), *lines])


def _provenance(result: dict) -> str:
    machine, isa = result["machine"], result["isa"]

    def peak(name: str) -> float:
        return machine.get(name, {}).get(f"{isa} bfloat16", {}).get(str(machine["threads"]), 0) / 1e9

    cached = peak("l2_flop_per_second")
    from_l2 = f" ({cached:.0f} with operands from L2)" if cached else ""
    bandwidth = machine["read_bytes_per_second"][str(machine["threads"])]
    revisions = sorted({row["revision"] or "unknown" for row in result["rows"]})
    text = (
        f"{machine['date']}, revision {', '.join(revisions)}, torch {machine['torch']}; measured "
        f"{peak('peak_flop_per_second'):.0f} GFLOP/s in bfloat16{from_l2} and {bandwidth / 1e9:.1f} GB/s."
    )
    parity = machine.get("parity")
    return f"{text} {parity[0].upper()}{parity[1:]}." if parity else text


SECTIONS = {
    "run": (write_run, lambda rows: [report.run_table(rows)]),
    "peers": (write_peers, report.contest_tables),
    "scaling": (write_scaling, lambda rows: [report.scaling_table(rows)]),
    "busy_core": (None, lambda rows: [report.busy_core_table(rows)]),
    "layouts": (None, lambda rows: [report.layouts_table(rows)]),
    "check": (None, lambda rows: [report.check_table(rows)]),
}
"""Maps each bench to its figure and its tables."""


def section(bench: str, figures: Path, folder: Path | None = None) -> str:
    """Returns the block of a bench: for each result file a heading, its origin, figure and table."""
    draw, tables = SECTIONS[bench]
    parts = []
    for result in results.load(bench, folder):
        file = results.result_file(bench, result["machine"], result["isa"])
        part = f"### {title(result)}\n\n{_provenance(result)}\n\n"
        if draw:
            figure = figures / f"{file.stem}.svg"
            draw(figure, result)
            part += f"![{bench}: {title(result)}](figures/{figure.name})\n\n"
        parts.append(part + "\n".join(markdown(*t) for t in tables(result["rows"])))
    return "\n".join(parts) or f"Not measured yet: `python -m bench.{bench} --save`.\n"


def fill(page: str, name: str, block: str) -> str:
    """Returns the page with the text between <!-- begin name --> and <!-- end name --> replaced.

    Raises:
        ValueError: the page has no such block.
    """
    pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"the page must have a block <!-- begin {name} --> ... <!-- end {name} -->")
    return pattern.sub(lambda match: f"{match[1]}\n{block.strip()}\n\n{match[2]}", page)


def render(page: str, figures: Path, folder: Path | None = None) -> str:
    """Returns the page with every block regenerated; writes the figures."""
    figures.mkdir(parents=True, exist_ok=True)
    for name in SECTIONS:
        page = fill(page, name, section(name, figures, folder))
    return page


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(
        prog="python -m bench.plots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(argv)
    PAGE.write_text(render(PAGE.read_text(), FIGURES))
    print(f"written: {PAGE.relative_to(ROOT)}, {FIGURES.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
