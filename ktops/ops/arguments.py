"""Arguments shared by the Mixture-of-Experts operators: names, types and shapes, in schema order."""

from operator import itemgetter
from typing import NamedTuple

from torch import Tensor

from ktops.ops.activation import ExpertFunction


class MoeArguments(NamedTuple):
    """The arguments of kt::moe_fwd, which kt::moe_sft_fwd and kt::moe_sft_bwd take as well.

    T tokens, K = top_k, E experts, H hidden_size, I intermediate_size, r LoRA rank, G groups per row.
    ``docs/ops.md`` describes them. The C++ counterpart of this list is ``ktops_csrc/ops/moe_arguments.def``.

    Example:
        >>> output, *saved = torch.ops.kt.moe_sft_fwd(*arguments, "activations")
    """

    hidden_states: Tensor  # [T, H]
    topk_ids: Tensor  # [T, K]
    topk_weights: Tensor  # [T, K]
    gate_up_proj: Tensor  # [E, 2I, H], or the codes of a format; without a gate, I in place of 2I
    down_proj: Tensor  # [E, H, I], or the codes of a format
    gate_up_scale: Tensor | None  # [E, 2I, G]
    gate_up_zero: Tensor | None  # [E, 2I, G]
    down_scale: Tensor | None  # [E, H, G]
    down_zero: Tensor | None  # [E, H, G]
    gate_up_bias: Tensor | None  # [E, 2I]
    down_bias: Tensor | None  # [E, H]
    gate_up_lora_A: Tensor | None  # [E, r, H]
    gate_up_lora_B: Tensor | None  # [E, 2I, r]
    down_lora_A: Tensor | None  # [E, r, I]
    down_lora_B: Tensor | None  # [E, H, r]
    num_experts: int
    intermediate_size: int
    gate_up_format: str
    gate_up_group_size: int
    down_format: str
    down_group_size: int
    compute: str
    gate_up_scaling: float
    down_scaling: float
    activation: str
    activation_args: list[float]
    gating: str
    reduce: bool

    @property
    def gate_up_rows(self) -> int:
        """2I, or I without a gate: the rows of gate_up_proj, and the columns of its product."""
        return ExpertFunction(gating=self.gating).rows(self.intermediate_size)


FORWARD = (*MoeArguments._fields, "save")
"""The arguments of kt::moe_sft_fwd."""

_TENSOR_TYPES = (Tensor, Tensor | None)
TENSORS = tuple(name for name, type_ in MoeArguments.__annotations__.items() if type_ in _TENSOR_TYPES)
ATTRIBUTES = tuple(name for name in FORWARD if name not in TENSORS)

GRADIENTS = (
    "hidden_states", "topk_weights", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias",
    "gate_up_lora_A", "gate_up_lora_B", "down_lora_A", "down_lora_B",
)  # fmt: skip
"""The arguments that kt::moe_sft_bwd can differentiate; bit i of grad_mask requests that of GRADIENTS[i]."""


def pick(*names: str) -> itemgetter:
    """Returns a function that selects the named arguments from a tuple of kt::moe_sft_fwd's arguments.

    Example:
        >>> pick("topk_ids", "topk_weights")(arguments)
    """
    return itemgetter(*(FORWARD.index(name) for name in names))
