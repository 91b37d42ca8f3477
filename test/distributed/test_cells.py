"""Two processes train as one does, with every way of transformers to divide the work among them.

``pytest test/distributed/every_cell.py`` runs the same with other architectures and with four processes.
"""

import pytest
from cells import Cell, cells, check, run_cells

CELLS = cells(world_size=2)


@pytest.fixture(scope="module")
def results(saved_model, shared_folder):
    return run_cells(saved_model("qwen3_moe"), shared_folder / "cells", CELLS)


@pytest.mark.long
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_as_in_one_process(results, cell: Cell):
    together, alone = results
    check(cell, together[cell], alone)
