"""Writes the block of docs/scale.md that bench.scale computes."""

from bench import results
from bench.plots import fill, markdown
from bench.scale import check, machines, model, predict
from bench.scale.measured import Measured, kernels_table, summary
from bench.shapes import SHAPES

PAGE = results.ROOT / "docs" / "scale.md"
BLOCK = "scale"
SHAPE = "qwen3_30b"


def records() -> list[dict]:
    """Returns the saved measurements."""
    return results.load("scale")


def of_record(record: dict) -> Measured:
    """Returns the parts of a saved measurement."""
    rows = [row for row in record["rows"] if row["shape"] == SHAPE]
    return Measured(SHAPES[SHAPE], rows, record["machine"], record["isa"])


def saved() -> Measured:
    """Returns the saved parts from which servers are predicted.

    Raises:
        FileNotFoundError: there are none.
    """
    for record in records():
        return of_record(record)
    raise FileNotFoundError("nothing is saved yet: run python -m bench.scale measure --save first")


def sources() -> list[tuple[str, ...]]:
    """Returns the lines of the table of published figures."""
    lines: list[tuple[str, ...]] = []
    for socket in dict.fromkeys(setup.socket for setup in machines.SETUPS):
        lines.append((socket.name, f"{socket.cores} cores, {socket.bandwidth / 1e9:.0f} GB/s", socket.source))
    for link in machines.LINKS.values():
        speed = f"{link.bandwidth / 1e9:.3g} GB/s each way, {1e6 * link.latency:.2g} µs"
        lines.append((link.name, speed, link.source))
    return lines


def imbalances() -> list[tuple[str, ...]]:
    """Returns the lines of the table of loads of the busiest rank, for the first model."""
    shape = next(iter(predict.MODELS.values()))
    return [
        (str(ranks), f"{skew:g}",
         *(f"{predict.imbalance(shape, tokens, ranks, skew):.2f}" for tokens in (1, 16, 2048)))
        for ranks in (2, 4, 8) for skew in predict.SKEWS
    ]  # fmt: skip


def pcie() -> list[tuple[str, ...]]:
    """Returns the lines of the table of hidden states that cross PCIe, of 2048 tokens, there and back."""
    names = ("PCIe 4.0 x16", "PCIe 5.0 x16")
    lines = []
    for name, shape in predict.MODELS.items():
        nbytes = 2 * 2048 * shape.hidden_size * model.ITEMSIZE
        speeds = (machines.LINKS[link].bandwidth * machines.LINK_FRACTION for link in names)
        lines.append((name, *(f"{1e3 * nbytes / speed:.2f}" for speed in speeds)))
    return lines


def block() -> str:
    """Returns the block: what was measured and checked, what is assumed, and the tables of predictions."""
    measured = saved()
    machine = measured.machine
    text = (
        f"### Measured\n\n{machine['cpu']}, {machine['threads']} threads, {measured.isa} kernels, {SHAPE}, "
    )
    text += f"{machine['date']}.\n\n" + markdown(*kernels_table(measured)) + "\n"
    text += "".join(f"* {line}.\n" for line in summary(measured))
    checked = [row for row in measured.rows if row["kind"] == "check"]
    if checked:
        text += "\n### Checked\n\nMilliseconds measured / predicted (predicted / measured).\n\n"
        text += markdown(*check.table(checked))
    text += "\n### Published\n\n" + markdown(("what", "speed", "source"), sources())
    lines = predict.table(measured)
    text += (
        "\n### Predicted\n\nMilliseconds of one layer; for ranks, with gloo / at the speed of the links.\n"
    )
    for name in predict.MODELS:
        rows = [line[1:] for line in lines if line[0] == name]
        text += f"\n**{name}**\n\n{markdown(predict.COLUMNS[1:], rows)}"
    text += (
        "\n### With a GPU for each rank\n\nHidden states of 2048 tokens cross PCIe to the experts and back. "
    )
    text += "Milliseconds of forward; backward takes as long.\n\n"
    text += markdown(("model", "PCIe 4.0 x16", "PCIe 5.0 x16"), pcie())
    text += "\n### The busiest rank\n\nIts load divided by the mean, for the layer of "
    text += f"{next(iter(predict.MODELS))}.\n\n"
    return text + markdown(("ranks", "skew", "T=1", "T=16", "T=2048"), imbalances())


def write() -> None:
    """Replaces the block of the page."""
    PAGE.write_text(fill(PAGE.read_text(), BLOCK, block()))
