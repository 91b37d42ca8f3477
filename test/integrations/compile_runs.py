"""Inspects compiled models: graphs, the kt operators in them, the names of parameters."""

import torch
from torch._dynamo.utils import counters


def kt_ops(graphs: list[torch.fx.GraphModule]) -> list[str]:
    """Returns the names of the kt operators in the graphs, in order: ``["moe_sft_fwd", ...]``."""
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    targets = [target for target in targets if getattr(target, "namespace", None) == "kt"]
    return [target._schema.name.removeprefix("kt::") for target in targets]


def assert_graphs(number: int = 1) -> None:
    """Asserts that this many graphs were compiled since the start of the test, without graph breaks."""
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == number


def uncompiled(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the names that a compiled module's parameters have in the original module."""
    return {name.removeprefix("_orig_mod."): value for name, value in named.items()}
