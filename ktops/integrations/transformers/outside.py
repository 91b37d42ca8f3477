"""Replacements of the modules of transformers that hold experts outside its experts interface.

Each takes the arguments of the module that it replaces, works out the routes that they mean, and runs the op
on the same Parameters under the same names.
"""

import inspect
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from ktops._huge_pages import in_huge_pages
from ktops._warn import warn_once
from ktops.formats import ExpertWeight
from ktops.integrations.transformers.architectures import (
    Unsupported,
    class_name,
    describe,
    operands,
    require_activation,
    require_weights,
)
from ktops.nn.expert_list import KTExpert, KTExpertList, differentiable, interception
from ktops.nn.experts import DTYPES, KTExperts, run_experts
from ktops.nn.layout import Layout
from ktops.nn.streaming import streaming_threshold
from ktops.ops.activation import ExpertFunction


def _require_arguments(module: nn.Module, replacement: Callable) -> None:
    """Raises Unsupported if a module's forward does not take the arguments of the method that replaces it."""
    theirs = list(inspect.signature(module.forward).parameters)
    ours = [name for name in inspect.signature(replacement).parameters if name not in ("self", "lora")]
    if theirs != ours:
        raise Unsupported(f"its forward takes ({', '.join(theirs)}), not ({', '.join(ours)})")


class Llama4Experts(KTExperts):
    """Llama-4's experts, which get every token once per expert, multiplied by its score.

    The rows of experts that the router did not choose are 0. Their output is 0 too, and the MoE block
    multiplies their gradient by the score, 0, so they are skipped.
    """

    @property
    def is_transposed(self) -> bool:
        """What gives PEFT's factors the shapes that they have with transformers' module.

        That module does not say that its weights are transposed, so PEFT takes A for the factor of size 2I.
        """
        return not self.transposed

    @staticmethod
    def describe(experts: nn.Module) -> Layout:
        """Returns what transformers' module computes, and how it stores its weights."""
        return Layout(ExpertFunction(require_activation(experts.act_fn)), transposed=True)

    def forward(self, hidden_states: Tensor, **lora) -> Tensor:  # type: ignore[override]  # transformers'
        """Runs the experts, [E·T, H] -> [E·T, H], with T rows per expert.

        Args:
            hidden_states: the rows of every expert, in the order of the experts.
            lora: as in :class:`ktops.nn.KTExperts`.
        """
        experts = torch.arange(self.num_experts, device=hidden_states.device)
        ids = experts.repeat_interleave(len(hidden_states) // self.num_experts)
        ids = torch.where(hidden_states.detach().any(-1), ids, self.num_experts)[:, None]
        return super().forward(hidden_states, ids, torch.ones(ids.shape, device=ids.device), **lora)


class _LeadingExperts(Layout):
    """A layout with more experts in gate_up_proj than in down_proj; the surplus has no function."""

    def weights(self, experts: nn.Module) -> tuple[Tensor | ExpertWeight, Tensor | ExpertWeight]:
        gate_up, down = super().weights(experts)
        return gate_up if isinstance(gate_up, ExpertWeight) else gate_up[: down.shape[0]], down


class LongcatExperts(KTExperts):
    """LongCat-Flash's experts. Ids from num_experts on choose experts that return their input."""

    @staticmethod
    def describe(experts: nn.Module) -> Layout:
        """Returns what transformers' module computes, and how it stores its weights."""
        return _LeadingExperts(ExpertFunction(require_activation(experts.act_fn)))

    @classmethod
    def from_parameters(cls, gate_up_proj, down_proj, *biases, **options) -> "KTExperts":
        """Returns a module that holds these Parameters; gate_up_proj may have more experts than down_proj."""
        if not isinstance(gate_up_proj, nn.Parameter):
            return super().from_parameters(gate_up_proj, down_proj, *biases, **options)
        leading = nn.Parameter(gate_up_proj.detach()[: len(down_proj)], requires_grad=False)
        experts = super().from_parameters(leading, down_proj, *biases, **options)
        experts.gate_up_proj = gate_up_proj
        return experts

    @property
    def layout(self) -> Layout:
        return _LeadingExperts(self.function)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **lora) -> Tensor:
        """Runs the experts, [T, H], [T, K], [T, K] -> [T, H]; see :class:`ktops.nn.KTExperts`."""
        factors = ("gate_up_lora_A", "gate_up_lora_B")
        lora = {name: x[: self.num_experts] if name in factors else x for name, x in lora.items()}
        output = super().forward(hidden_states, top_k_index, top_k_weights, **lora)
        scale = (top_k_weights * (top_k_index >= self.num_experts)).sum(-1, keepdim=True)
        return (output + scale * hidden_states).to(hidden_states.dtype)


class ExpertDict(KTExpertList):
    """A KTExpertList whose experts have the names of a ModuleDict.

    Args:
        experts: made of the modules of the ModuleDict.
        replaced: the ModuleDict.
    """

    def __init__(self, experts: list[KTExpert], replaced: nn.Module) -> None:
        _require_arguments(replaced, type(self).forward)
        super().__init__(experts)
        self._modules = dict(zip(expert_names(replaced), experts, strict=True))

    def __getitem__(self, name: str) -> KTExpert:  # type: ignore[override]  # as in a ModuleDict
        return cast(KTExpert, self._modules[name])


def expert_names(experts: nn.Module) -> list[str]:
    """Returns the names of the experts in a list; a ModuleDict may also hold a dropout."""
    names = list(experts._modules)
    return names if isinstance(experts, nn.ModuleList) else [n for n in names if n.startswith("expert_")]


class SwitchExperts(ExpertDict):
    """Switch Transformers' experts, one per token, given as a row that is 1 at the expert, or 0."""

    def forward(self, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:  # type: ignore[override]  # transformers'
        """Runs the experts, [T, H], [T, 1, E], [T, 1] -> [T, H]."""
        chosen, ids = selected_experts.max(-1)
        ids = torch.where(chosen > 0, ids, len(self))
        return self.run(hidden_states, ids, routing_weights)


class NllbExperts(ExpertDict):
    """NLLB-MoE's experts.

    transformers takes the values of the mask for the experts' ids, so its experts are 0 and 1. Only the two
    that the router chose have a weight.
    """

    def __init__(self, experts: list[KTExpert], replaced: nn.Module) -> None:
        super().__init__(experts, replaced)
        self.moe_token_dropout = cast(float, replaced.moe_token_dropout)

    def forward(self, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor) -> Tensor:  # type: ignore[override]  # transformers'
        """Runs the experts, [T, H], [T, E], [T, E] -> [T, H]."""
        weights, columns = router_probs.topk(min(2, len(self)))
        ids = router_mask.gather(1, columns)
        if self.training:
            return self.run(hidden_states, ids, weights, self.moe_token_dropout)
        return self.run(hidden_states, ids, weights * (1 - self.moe_token_dropout))


class ForwardReplacement(nn.Module):
    """A module that runs the op with the Parameters, children and attributes of the module it replaces.

    If a child that holds weights is no longer what it was (an adapter wraps it, or it has hooks), or if the
    op cannot read the weights, the forward of the replaced class runs.

    Args:
        replaced: the module.
        children: the names of the children that hold weights.
        activation: see :func:`ktops.moe_sft`.
        save: as in :class:`ktops.nn.KTExperts`.
    """

    gating = "concatenated"
    run: Callable[..., Tensor]
    """Takes the arguments of the replaced module's forward and runs the op."""

    def __init__(self, replaced: nn.Module, children: tuple[str, ...], activation: str, save: str) -> None:
        _require_arguments(replaced, type(self).run)
        super().__init__()
        for name, value in replaced.__dict__.items():
            if not name.startswith("_") or name in ("_parameters", "_buffers", "_modules"):
                self.__dict__[name] = value
        self.replaced_class = type(replaced)
        self.child_classes = {name: type(self.get_submodule(name)) for name in children}
        self.op_options = {**ExpertFunction(activation, gating=self.gating)._asdict(), "save": save}
        reason = self.obstacle()
        if reason is not None:
            raise Unsupported(reason)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Returns gate_up_proj [E, 2I, H] and down_proj [E, H, I], differentiable views of the Parameters."""
        raise NotImplementedError

    def release(self) -> None:
        """Gives the Parameters the layout that they had in the replaced module."""

    def obstacle(self) -> str | None:
        """Returns why the op cannot run, None if it can."""
        for name, known in self.child_classes.items():
            child = self.get_submodule(name)
            if type(child) is not known or interception(child) is not None:
                return f"{name} has adapters or hooks"
        children = [self.get_submodule(name) for name in self.child_classes]
        weights = [weight for child in children for weight in child.parameters(recurse=False)]
        kinds = {(weight.dtype, weight.device.type) for weight in weights}
        if len(kinds) == 1 and weights[0].dtype in DTYPES and weights[0].device.type == "cpu":
            return None
        return "its weights are " + ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        reason = None if torch.compiler.is_compiling() else self.obstacle()
        if reason is None:
            return self.run(*args, **kwargs)
        warn_once(f"ktops does not run {self.replaced_class.__qualname__}: {reason}. Its own forward runs.")
        return cast(Tensor, self.replaced_class.forward(self, *args, **kwargs))

    def extra_repr(self) -> str:
        return f"{self.replaced_class.__qualname__}, activation={self.op_options['activation']!r}"


class DbrxExperts(ForwardReplacement):
    """DBRX's experts, whose weights are three Parameters w1 (gate), v1 (up) and w2 (down), [E·I, H].

    The rows of w1 and v1 are moved into one tensor, where they alternate, so that the op reads interleaved
    gate and up. safetensors does not write such Parameters, so ``state_dict()`` holds contiguous copies.
    """

    gating = "interleaved"
    mlp: nn.Module
    num_experts: int
    hidden_size: int

    def __init__(self, replaced: nn.Module, save: str) -> None:
        activation = require_activation(replaced.get_submodule("mlp").activation_fn)
        super().__init__(replaced, ("mlp",), activation, save)
        self.register_state_dict_post_hook(_contiguous_copies)
        self.pack()

    @torch.no_grad()
    def pack(self) -> None:
        """Moves w1 and v1 into one tensor; does nothing if they are in one."""
        w1, v1, _ = self.parts()
        if not _alternate(w1, v1):
            both = w1.new_empty(len(w1), 2, *w1.shape[1:])
            w1.data, v1.data = torch.stack((w1, v1), dim=1, out=in_huge_pages(both)).unbind(1)

    def parts(self) -> list[nn.Parameter]:
        """Returns w1, v1 and w2; in ``torch.func.functional_call``, the tensors in their place."""
        return [getattr(self.mlp, name) for name in ("w1", "v1", "w2")]

    def weights(self) -> tuple[Tensor, Tensor]:
        w1, v1, w2 = self.parts()
        if not torch.compiler.is_compiling():
            self.pack()
        shape = self.num_experts, -1, self.hidden_size
        if w1.stride() == v1.stride() == (2 * self.hidden_size, 1):
            both = w1.detach().as_strided((2, *w1.shape), (self.hidden_size, 2 * self.hidden_size, 1))
            gate_up = differentiable(both, [w1, v1]).transpose(0, 1)
        else:  # compiled before they were moved
            gate_up = torch.stack((w1, v1), dim=1)
        return gate_up.reshape(shape), w2.view(shape).mT

    @torch.no_grad()
    def release(self) -> None:
        for weight in self.parts():
            weight.data = weight.contiguous()

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if self.obstacle() is None:
            self.pack()
        return self

    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Runs the experts, [B, S, H], [B·S, K], [B·S, K] -> [B, S, H]."""
        return run_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            *self.weights(),
            **self.op_options,
            stream_min_tokens=streaming_threshold(self, hidden_states),
        )


def _alternate(w1: Tensor, v1: Tensor) -> bool:
    """True if the rows of two matrices alternate in memory."""
    rows = w1.stride() == v1.stride() == (2 * w1.shape[1], 1)
    return rows and v1.data_ptr() == w1.data_ptr() + w1.shape[1] * w1.element_size()


def _contiguous_copies(_, state_dict: dict, prefix: str, *args) -> None:
    for key in (f"{prefix}mlp.w1", f"{prefix}mlp.v1"):
        weight = state_dict.get(key)
        if weight is not None and not isinstance(weight, nn.Parameter):  # a Parameter with keep_vars=True
            state_dict[key] = weight.contiguous()


class JetMoeBlock(ForwardReplacement):
    """JetMoE's MoE block, whose experts are two grouped linear layers that do not know the routes."""

    router: nn.Module
    input_linear: nn.Module
    output_linear: nn.Module
    bias: nn.Parameter

    def __init__(self, replaced: nn.Module, save: str) -> None:
        activation = require_activation(replaced.activation)
        super().__init__(replaced, ("input_linear", "output_linear"), activation, save)

    def weights(self) -> tuple[Tensor, Tensor]:
        return cast(Tensor, self.input_linear.weight), cast(Tensor, self.output_linear.weight)

    def run(self, layer_input: Tensor) -> Tensor:
        """Runs the block, [B, S, H] -> [B, S, H]."""
        rows = layer_input.reshape(-1, layer_input.shape[-1])
        route_of_position, _, gates, tokens_per_expert, _ = self.router(rows)
        position_of_route = route_of_position.argsort()
        experts = torch.arange(len(tokens_per_expert))
        ids = experts.repeat_interleave(torch.tensor(tokens_per_expert)).to(rows.device)[position_of_route]
        routes = len(rows), cast(int, self.router.top_k)
        ids, weights = ids.view(routes), gates[position_of_route].view(routes)
        threshold = streaming_threshold(self, layer_input)
        options = {**self.op_options, "stream_min_tokens": threshold}
        return run_experts(layer_input, ids, weights, *self.weights(), **options) + self.bias


STACKED: dict[str, type[Llama4Experts] | type[LongcatExperts]] = {
    "llama4.modeling_llama4.Llama4TextExperts": Llama4Experts,
    "longcat_flash.modeling_longcat_flash.LongcatFlashExperts": LongcatExperts,
}
"""Class of experts with stacked weights -> its replacement."""

DICTS: dict[str, type[ExpertDict]] = {
    "nllb_moe.modeling_nllb_moe.NllbMoeExperts": NllbExperts,
    "switch_transformers.modeling_switch_transformers.SwitchTransformersExperts": SwitchExperts,
}
"""Class of a ModuleDict of experts -> its replacement."""

OTHERS: dict[str, Callable[[nn.Module, str], ForwardReplacement]] = {
    "dbrx.modeling_dbrx.DbrxExperts": DbrxExperts,
    "jetmoe.modeling_jetmoe.JetMoeMoE": JetMoeBlock,
}
"""Class of any other module with experts -> its replacement."""


def describe_replacement(
    experts: nn.Module, *, check_weights: bool = False
) -> tuple[type[KTExperts], Layout]:
    """Returns the class that replaces experts with stacked weights, and what they compute.

    Args:
        check_weights: whether the op must be able to read the weights that they hold now.

    Raises:
        Unsupported: the op cannot compute them, or not with these weights.
    """
    if class_name(experts) in {*DICTS, *OTHERS}:
        raise Unsupported("its weights are not stacked, so only ktops.swap_experts replaces it")
    kind = STACKED.get(class_name(experts))
    if kind is None:
        return KTExperts, operands(experts)[0] if check_weights else describe(experts)
    _require_arguments(experts, kind.forward)
    layout = kind.describe(experts)
    if check_weights:
        require_weights(*layout.weights(experts), layout.function.gating)
    return kind, layout


def is_replacement(module: nn.Module) -> bool:
    """True if the module is what ``ktops.swap_experts`` puts in place of an experts module."""
    return isinstance(module, (KTExperts, KTExpertList, ForwardReplacement))
