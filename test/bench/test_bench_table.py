"""The table of real models in docs/models.md is what the code computes from their configs."""

import pytest

from bench.models.table import BEGIN, END, FORMATS, HEADER, PAGE, disk, names, planner, rows

TRACED = "gpt-oss-20b"
"""The model whose memory is computed again; it has the fewest layers."""


def written() -> list[str]:
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].splitlines()


def test_the_table_has_every_model_in_every_format():
    lines = written()
    assert "\n".join(lines[:2]) == HEADER
    for name in names():
        formats = [line.split(" | ")[2] for line in lines if line.startswith(f"| {name} |")]
        assert set(FORMATS) <= set(formats), name


@pytest.mark.parametrize("name", names())
def test_bytes_on_disk(name):
    plan = planner(name)
    (first, *_) = [line.split(" | ") for line in written() if line.startswith(f"| {name} |")]
    assert first[2] == plan.weights.experts_format
    assert first[3] == disk(plan, plan.options)
    assert first[1].startswith(f"{sum(plan.weights.parameters.values()) / 1e9:.1f} B, ")


def test_memory():
    assert rows(TRACED) == [line for line in written() if line.startswith(f"| {TRACED} |")]
