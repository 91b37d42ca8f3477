"""Every activation with every gating, and inputs for those that have kinks."""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ktops.ops.activation import ACTIVATIONS, GATINGS

LIMIT = 2.0
_PARAMETERS = {"limit": LIMIT, "alpha": 1.702, "offset": 1.0, "gate_softcap": 2.0, "up_softcap": 3.0}


class ActivationCase(NamedTuple):
    """An activation with values for its parameters, and a gating."""

    activation: str
    gating: str

    @property
    def options(self) -> dict:
        """The keyword arguments of ktops.moe_sft."""
        args = [_PARAMETERS[name] for name in ACTIVATIONS[self.activation].parameters]
        return {"activation": self.activation, "activation_args": args, "gating": self.gating}

    def __str__(self) -> str:
        return f"{self.activation}-{self.gating}"


ACTIVATION_CASES = [
    ActivationCase(name, gating)
    for name, gating in product(ACTIVATIONS, GATINGS)
    if ACTIVATIONS[name].of_gate or gating != "none"
]

SMOOTH = [
    case for case in ACTIVATION_CASES if case.activation not in ("relu", "swiglu_clamped", "swiglu_step")
]
"""Those with a continuous derivative, so that rounding moves results only slightly, whatever the inputs."""


def away_from_kinks(inputs: dict) -> dict:
    """Returns inputs whose gates and ups lie on all sides of 0 and ±LIMIT, where derivatives jump, not near.

    Each is ±LIMIT/2 or ±3/2 LIMIT, from gate_up_bias, plus a product with a standard deviation of about
    LIMIT/10.
    """
    shape, generator = inputs["gate_up_bias"].shape, torch.Generator().manual_seed(0)
    levels = LIMIT / 2 * torch.tensor([-3.0, -1.0, 1.0, 3.0])

    def small(x: Tensor) -> Tensor:
        return (x * (LIMIT / 20)).to(x.dtype)

    return inputs | {
        "hidden_states": small(inputs["hidden_states"]),
        "gate_up_bias": levels[torch.randint(4, shape, generator=generator)].to(inputs["gate_up_bias"].dtype),
    }
