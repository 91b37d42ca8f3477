"""The configurations of several processes that are tested, and what is trained in them."""

import itertools
from typing import Any, NamedTuple

STEPS = 5
RANK = 4

CONFIGURATIONS: dict[str, dict[str, Any] | None] = {
    "tp2": {"tp_size": 2},
    "ep2_all_reduce": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
    "ep2_all_to_all": {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
    "fsdp2": {"fsdp_size": 2},
    "ddp2": None,
    "tp4": {"tp_size": 4},
    "ep4_all_reduce": {"tp_size": 4, "ep_size": 4, "ep_implementation": "all_reduce"},
    "ep4_all_to_all": {"fsdp_size": 4, "ep_size": 4, "ep_implementation": "all_to_all"},
    "ep2_fsdp2": {"fsdp_size": 4, "ep_size": 2, "ep_implementation": "all_to_all"},
    "tp2_ep4": {"tp_size": 2, "fsdp_size": 2, "ep_size": 4, "ep_implementation": "all_to_all"},
    "fsdp4": {"fsdp_size": 4},
    "ddp4": None,
}
"""Name -> arguments of DistributedConfig; None for DistributedDataParallel."""

TRAINED = ("frozen", "lora", "full")
"""LoRA on attention beside frozen experts; LoRA on attention and experts; all weights."""

WEIGHTS = ("float32", "int4", "bfloat16")
"""Dtype of the model; "int4" has experts in that format and the rest in float32."""


class Cell(NamedTuple):
    """A run of STEPS steps of the Trainer.

    Attributes:
        configuration: of CONFIGURATIONS.
        trained: of TRAINED.
        weights: of WEIGHTS.
    """

    configuration: str
    trained: str
    weights: str

    @property
    def world_size(self) -> int:
        return data_parallel(self.configuration) * tensor_parallel(self.configuration)

    @property
    def name(self) -> str:
        return "-".join(self)


def tensor_parallel(configuration: str) -> int:
    """Returns how many ranks share a batch."""
    return (CONFIGURATIONS[configuration] or {}).get("tp_size", 1)


def data_parallel(configuration: str) -> int:
    """Returns how many ranks have batches of their own."""
    arguments = CONFIGURATIONS[configuration]
    return int(configuration[-1]) if arguments is None else arguments.get("fsdp_size", 1)


def cells(world_size: int) -> list[Cell]:
    """Returns the cells of a number of processes: all, but full fine-tuning only of dense experts."""
    every = (Cell(*cell) for cell in itertools.product(CONFIGURATIONS, TRAINED, WEIGHTS))
    return [
        cell
        for cell in every
        if cell.world_size == world_size and not (cell.trained == "full" and cell.weights == "int4")
    ]
