"""KTExpertSequence: stacked experts for a MoE block that iterates a ModuleList."""

import re
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from ktops.nn.experts import KTExperts


class KTExpertSequence(nn.Module):
    """The experts of one layer with stacked weights, in place of a ModuleList.

    ``sequence[i](rows)`` runs the op with all rows routed to expert i. Calling the sequence itself, with the
    routes of all tokens, runs one op for all experts. Adapters go on ``stacked``. The state-dict keys are
    those of ``stacked``, without the prefix "stacked.".

    Args:
        stacked: the experts. Their weights may be in a weight format, which has no separate Parameters to
            build a :class:`ktops.nn.KTExpertList` from.

    Example:
        >>> weights = (ktops.quantize(torch.randn(8, *size), "int8") for size in ((64, 32), (32, 32)))
        >>> experts = KTExpertSequence(KTExperts.from_parameters(*weights))
        >>> experts[3](torch.randn(5, 32)).shape
        torch.Size([5, 32])
    """

    def __init__(self, stacked: KTExperts) -> None:
        super().__init__()
        self.num_experts = stacked.num_experts
        self.stacked = stacked
        self.training = stacked.training
        self.register_state_dict_post_hook(partial(_rename, old="stacked.", new=""))
        self.register_load_state_dict_pre_hook(partial(_rename, old="", new="stacked."))

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, index: int) -> Callable[[Tensor], Tensor]:
        return partial(self._one, range(len(self))[index])

    def __iter__(self) -> Iterator[Callable[[Tensor], Tensor]]:
        return (self[index] for index in range(len(self)))

    def _one(self, index: int, hidden_states: Tensor) -> Tensor:
        routes = *hidden_states.shape[:-1], 1
        device = hidden_states.device
        ids = torch.full(routes, index, dtype=torch.int64, device=device)
        return self.stacked(hidden_states, ids, torch.ones(routes, device=device))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Runs all experts, [T, H], [T, K], [T, K] -> [T, H]; see :class:`ktops.nn.KTExperts`."""
        return self.stacked(hidden_states, top_k_index, top_k_weights)

    @torch.no_grad()
    def moe_infer(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> Tensor:
        """Runs all experts; MoE blocks of the DeepSeek family call this in evaluation mode."""
        return self(x, topk_ids, topk_weight)


def _rename(_, state_dict: dict, prefix: str, *args, old: str, new: str) -> None:
    """Replaces ``old`` with ``new`` after the prefix in the keys of the experts' weights and biases."""
    pattern = re.compile(re.escape(prefix + old) + r"((?:gate_up|up|down)_proj(?:_bias|\.[a-z_]+)?)")
    for key in list(state_dict):
        match = pattern.fullmatch(key)
        if match:
            state_dict[f"{prefix}{new}{match[1]}"] = state_dict.pop(key)
