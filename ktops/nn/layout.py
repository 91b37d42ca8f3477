"""What an experts module computes, and how it stores its weights."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from ktops.formats import ExpertWeight
from ktops.ops.activation import CONCATENATED, INTERLEAVED, UNGATED, ExpertFunction


class Layout(NamedTuple):
    """What an experts module, of ktops or of transformers, computes and how it stores its weights.

    Attributes:
        function: the activation and the order of gate and up.
        transposed: whether the weights are stored as [E, in, out].
        post_expert_norm: whether a module of this name follows every expert.
    """

    function: ExpertFunction
    transposed: bool = False
    post_expert_norm: bool = False

    def weights(self, experts: Any) -> tuple[Tensor | ExpertWeight, Tensor | ExpertWeight]:
        """Returns the weights as [E, out, in], views if they are stored transposed."""
        first, down = getattr(experts, self.function.first_name), experts.down_proj
        return (first.mT, down.mT) if self.transposed else (first, down)

    def norm(self, experts: Any) -> nn.Module | None:
        """Returns the module that follows every expert, None without one."""
        return experts.post_expert_norm if self.post_expert_norm else None

    def biases(self, experts: Any) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        """Returns the biases of both projections; None without biases."""
        first = self.function.first_name
        return getattr(experts, f"{first}_bias", None), getattr(experts, "down_proj_bias", None)


def declared_gating(experts: Any) -> str:
    """Returns the gating that an experts module of transformers declares; see :func:`ktops.moe_sft`.

    GPT-OSS interleaves gate and up, but declares it only since transformers 5.7.
    """
    if not getattr(experts, "has_gate", True):
        return UNGATED
    interleaved = any(kind.__name__ == "GptOssExperts" for kind in type(experts).__mro__)
    return CONCATENATED if getattr(experts, "is_concatenated", not interleaved) else INTERLEAVED
