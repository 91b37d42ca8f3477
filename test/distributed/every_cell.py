"""Two and four processes train as one does, for several architectures: every cell of the table."""

import pytest
from cells import Cell, cells, check, run_cells

ARCHITECTURES = ("qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss")

CELLS = [
    pytest.param(architecture, cell, id=f"{architecture}-{cell.name}")
    for architecture in ARCHITECTURES
    for world_size in (2, 4)
    for cell in cells(world_size)
]


@pytest.fixture(scope="module")
def results(saved_model, shared_folder):
    """``of(architecture, world size)`` runs all its cells once."""
    made: dict = {}

    def of(architecture: str, world_size: int):
        key = architecture, world_size
        if key not in made:
            output = shared_folder / f"cells-{architecture}-{world_size}"
            made[key] = run_cells(saved_model(architecture), output, cells(world_size))
        return made[key]

    return of


@pytest.mark.parametrize(("architecture", "cell"), CELLS)
def test_as_in_one_process(results, architecture: str, cell: Cell):
    together, alone = results(architecture, cell.world_size)
    check(cell, together[cell], alone)
