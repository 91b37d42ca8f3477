"""Activations with a few channels much larger than the others, as in real models, rounded to int8."""

from functools import cache

import torch

import ktops
from ktops.reference.int8 import round_blocks
from ktops.testing.budgets import relative_error
from ktops.testing.inputs import densified, moe_inputs
from ktops.testing.weights import in_format

MASSIVE = [
    ("int8", 0), ("int4", 0), ("int4", 128), ("uint4", 64), ("uint4", 128), ("mxfp4", 32), ("q8_0", 0),
    ("q4_k", 0), ("q5_k", 0), ("q6_k", 0), ("iq4_xs", 0),
]  # fmt: skip
"""All kinds of groups: rows, one or several blocks of 32, scales next to the weight or in it, half blocks."""

ROUNDED_BLOCKS = 1.3
"""Allowed error relative to the least error of blocks of 32, that of ggml's Q8_0 in float64."""


@cache
def massive_channels(
    name: str, group_size: int, num_tokens: int, hidden: int = 1024, intermediate: int = 256
) -> tuple[dict, list]:
    """Returns one expert and, for every factor, hidden_states, the exact output and that with blocks of 32.

    A few channels of hidden_states are much larger than the others in every token, as in real models.
    """
    inputs = in_format(moe_inputs(T=num_tokens, H=hidden, I=intermediate, E=1, K=1), name, group_size)
    dense = densified(inputs)
    gate_up, down = dense["gate_up_proj"][0].double(), dense["down_proj"][0].double()

    def layer(x: torch.Tensor, rounded) -> torch.Tensor:
        gate, up = (rounded(x) @ gate_up.T).chunk(2, -1)
        return rounded(torch.nn.functional.silu(gate) * up) @ down.T

    cases = []
    for factor in (1, 30, 100, 300):
        x = inputs["hidden_states"].clone()
        x[:, [3, 70, 71, 640, 1001]] *= factor
        cases.append((factor, x, layer(x, torch.Tensor.double), layer(x, round_blocks)))
    return inputs, cases


def assert_as_good_as_blocks(inputs: dict, cases: list) -> None:
    for factor, x, exact, rounded in cases:
        output = ktops.moe_sft(**inputs | {"hidden_states": x}, compute="int8")
        error, allowed = relative_error(output, exact), ROUNDED_BLOCKS * relative_error(rounded, exact)
        assert error <= allowed, f"{error:.4f} where channels are {factor} times as large"
