"""``bench.rounding``: what it measures, what it rejects, and the table generated from it."""

import pytest

import ktops
from bench import results, rounding
from bench.plots import fill


@pytest.fixture
def small(tmp_path, monkeypatch, single_thread):
    monkeypatch.setattr(rounding, "SHAPE", {"H": 256, "I": 128})
    monkeypatch.setattr(rounding, "FORMATS", (("int8", 0), ("int4", 32)))
    monkeypatch.setattr(rounding, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    (tmp_path / "page.md").write_text("<!-- begin rounding -->\n<!-- end rounding -->\n")
    return tmp_path


def test_errors_of_the_kernels_are_those_of_blocks(small):
    isa = ktops.cpu_capability()
    rows = {(row["format"], row["kernels"]): row["errors"] for row in rounding.measure([isa])}
    assert set(rows) == {(f, k) for f in ("int8", "int4") for k in (rounding.ROWS, rounding.BLOCKS, isa)}
    for name in ("int8", "int4"):
        for of_row, of_blocks, of_kernel in zip(
            *(rows[name, kind] for kind in (rounding.ROWS, rounding.BLOCKS, isa)), strict=True
        ):
            assert of_row > 1.3 * of_blocks
            assert of_kernel == pytest.approx(of_blocks, rel=0.3)


def test_a_page_of_its_results(small, capsys):
    assert rounding.main(["--isa", "scalar", "--threads", "1", "--save"]) == 0
    assert rounding.main(["--isa", ktops.cpu_capability(), "--threads", "1", "--save"]) == 0
    page = (small / "page.md").read_text()
    assert "| format | activations | 1 times | 30 times | 100 times | 300 times |" in page
    assert "| int4:32 | one scale a row |" in page and "scalar" in page


def test_too_large_an_error_is_a_failure(small, monkeypatch, capsys):
    monkeypatch.setattr(rounding, "ALLOWED", 0.5)
    assert rounding.main(["--isa", "scalar", "--threads", "1"]) == 1
    assert "int8 on scalar: more than 0.5 times the error of blocks of 32" in capsys.readouterr().out


def test_the_page_of_the_tree_is_made_from_its_results():
    page = rounding.PAGE.read_text()
    assert fill(page, "rounding", rounding.section()) == page
