"""KTExpertList: experts as separate modules that share one stacked copy of their weights.

The Parameters keep their identity and their names. Their storage becomes slices of two stacked tensors, so
the op reads all experts of the layer, and gate and up of each expert, as one tensor.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ktops._huge_pages import in_huge_pages, stack_in_huge_pages
from ktops._warn import warn_once
from ktops.nn.experts import DTYPES, KTExperts, run_experts
from ktops.nn.streaming import streaming_threshold
from ktops.ops.activation import CONCATENATED, UNGATED, ExpertFunction

PROJECTION_NAMES = (
    ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"),
    ("up_proj", "down_proj"), ("w1", "w2"), ("fc1", "fc2"), ("wi", "wo"),
)  # fmt: skip
"""Accepted names of the projections of an expert module: gate, up and down, or up and down."""

ACTIVATION_NAMES = ("act_fn", "activation_fn", "act")
"""Accepted names of the activation of an expert module."""

Packed = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""gate_up_proj [E, 2I, H], down_proj [E, H, I], gate_up_bias [E, 2I], down_bias [E, H]; without a gate, I in
place of 2I."""


def gating_of(names: Sequence[str]) -> str:
    """Returns the gating of an expert module with these projections, a row of PROJECTION_NAMES."""
    return UNGATED if len(names) == 2 else CONCATENATED


def is_plain_linear(module: nn.Module) -> bool:
    """True if the module is exactly an ``nn.Linear``, without parametrization, hooks or replaced forward."""
    return type(module) is nn.Linear and interception(module) is None


def interception(module: nn.Module) -> str | None:
    """Returns why calling a module runs more than the forward of its class; None if it does not."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "it has hooks"
    if "forward" in module.__dict__:
        return "its forward was replaced, by accelerate or another library"
    return None


class KTExpert(nn.Module):
    """One expert of a :class:`KTExpertList`: runs the op on the child modules of the expert it replaces.

    If a projection is no longer a plain ``nn.Linear`` (an adapter wraps it, or it has hooks), if the weights
    have left the CPU, or if a child ``dropout`` is active, the projections are called one by one instead.

    Args:
        expert: the module to replace; its children are shared.
        names: the names of its projections: gate, up and down, or up and down.
        activation_attribute: the attribute that holds its activation.
        activation, save: as in :class:`ktops.nn.KTExperts`.
    """

    packed: Packed | None
    """This expert's slices [1, ...] of the list's stacked tensors."""

    dropout: nn.Module

    def __init__(
        self,
        expert: nn.Module,
        names: tuple[str, ...],
        activation_attribute: str,
        activation: str,
        save: str,
    ) -> None:
        super().__init__()
        for name, child in expert.named_children():
            self.add_module(name, child)
        if not hasattr(self, activation_attribute):
            setattr(self, activation_attribute, getattr(expert, activation_attribute))
        self.names = names
        self.activation_attribute = activation_attribute
        self.function = ExpertFunction(activation, gating=gating_of(names))
        self.save = save
        self.training = expert.training
        self.packed = None

    def projections(self) -> tuple[nn.Linear, ...]:
        """Returns gate, up and down, or up and down, or the adapters that wrap them."""
        return tuple(getattr(self, name) for name in self.names)

    def drops(self) -> bool:
        """True if the expert has a dropout before its down projection that is active."""
        dropout = self._modules.get("dropout")
        return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0

    def runs_op(self) -> bool:
        """True if the op can compute this expert: packed, without dropout, its projections not wrapped.

        Copies any parameter whose storage was replaced back into its slice.
        """
        if self.packed is None or self.drops() or not all(map(is_plain_linear, self.projections())):
            return False
        if torch.compiler.is_compiling() or self.is_packed():
            return True
        own = all(isinstance(part, nn.Parameter) for part, _ in self.places(self.packed))
        return own and self.put(self.packed)  # not own: torch.func.functional_call lends tensors

    def is_packed(self) -> bool:
        """True if the storage of the parameters is the slices."""
        return self.packed is not None and all(
            part.data_ptr() == place.data_ptr() and part.dtype == place.dtype
            for part, place in self.places(self.packed)
        )

    @torch.no_grad()
    def put(self, packed: Packed) -> bool:
        """Moves the parameters into these slices, keeping their values; False if dtype or device differ."""
        places = self.places(packed)
        if any(part.dtype != place.dtype or part.device != place.device for part, place in places):
            return False
        for part, place in places:
            place.data.copy_(part)  # .data: other slices of the stack may be saved for a backward already
            part.data = place
        self.packed = packed
        return True

    def places(self, packed: Packed) -> list[tuple[nn.Parameter, Tensor]]:
        """Returns every parameter with its slice."""
        *first, down = self.projections()
        found: list[tuple[nn.Parameter, Tensor]] = []
        for kind, gate_up, single in (("weight", *packed[:2]), ("bias", *packed[2:])):
            if gate_up is not None and single is not None:
                parts = [getattr(projection, kind) for projection in (*first, down)]
                found += zip(parts, (*gate_up[0].chunk(len(first)), single[0]), strict=True)
        return found

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Runs the expert, [..., H] -> [..., H]."""
        packed = self.packed
        if packed is None or not self.runs_op():
            if packed is not None and not torch.compiler.is_compiling():
                kind = type(self.projections()[0]).__name__
                _warn_of(
                    "have an active dropout between them"
                    if self.drops()
                    else f"are {kind} with hooks or adapters"
                )
            return self.call_projections(hidden_states)
        num_tokens = hidden_states.numel() // hidden_states.shape[-1]
        ids = torch.zeros(num_tokens, 1, dtype=torch.int64, device=hidden_states.device)
        weights = torch.ones(num_tokens, 1, device=hidden_states.device)
        return _run(hidden_states, ids, weights, packed, [self])

    def call_projections(self, hidden_states: Tensor) -> Tensor:
        """Runs the expert without the op, where its weights are; returns the result where the rows were."""
        *first, down = self.projections()
        rows = hidden_states.to(next(self.parameters()).device)
        hidden = getattr(self, self.activation_attribute)(first[0](rows))
        if len(first) == 2:
            hidden = hidden * first[1](rows)
        return down(self.dropout(hidden) if self.drops() else hidden).to(hidden_states.device)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "packed": None}

    def extra_repr(self) -> str:
        return f"activation={self.function.activation!r}"


class KTExpertList(nn.ModuleList):
    """The experts of one layer as a ModuleList of :class:`KTExpert`, for models whose MoE block iterates it.

    A block that calls ``experts[i](rows)`` runs one op per expert. Calling the list itself, with the routes
    of all tokens, runs one op for all experts.

    Constructing the list moves the weights, expert by expert, into the stacked tensors, so only one copy
    ever exists. The Parameters remain the same objects, each now a slice. ``.to()``, deepcopy, pickling and
    load_state_dict preserve this.
    """

    packed: Packed | None

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[KTExpert]: ...

    def __init__(self, experts: list[KTExpert]) -> None:
        super().__init__(experts)
        self.register_load_state_dict_post_hook(_pack_after_loading)
        self.pack()

    @torch.no_grad()
    def pack(self) -> None:
        """Makes every parameter a slice of the stacked tensors again; does nothing if all already are."""
        if all(expert.is_packed() for expert in self):
            return
        self.packed = None
        for expert in self:
            expert.packed = None
        rows = [expert.projections() for expert in self]
        weights = [projection.weight for row in rows for projection in row]
        kinds = {(weight.dtype, weight.device.type) for weight in weights}
        if len(kinds) > 1 or weights[0].dtype not in DTYPES or weights[0].device.type != "cpu":
            _warn_of("are " + ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds)))
            return
        *first, down = rows[0]

        def empty(*shape: int) -> Tensor:
            return in_huge_pages(torch.empty(len(self), *shape, dtype=down.weight.dtype, device="cpu"))

        width = sum(projection.out_features for projection in first)
        biased = down.bias is not None
        self.packed = packed = (
            empty(width, down.out_features),
            empty(down.out_features, down.in_features),
            empty(width) if biased else None,
            empty(down.out_features) if biased else None,
        )
        for index, expert in enumerate(self):
            own = slice(index, index + 1)
            gate_up_bias, down_bias = (bias if bias is None else bias[own] for bias in packed[2:])
            expert.put((packed[0][own], packed[1][own], gate_up_bias, down_bias))

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        post_expert_norm: nn.Module | None = None,
    ) -> Tensor:
        """Runs all experts, [T, H], [T, K], [T, K] -> [T, H]; see :class:`ktops.nn.KTExperts`.

        Raises:
            RuntimeError: the op cannot run, because the experts have adapters, hooks or an active dropout.
        """
        experts, packed = list(self), self.packed
        if packed is None or not all(expert.runs_op() for expert in experts):
            kinds = sorted({type(p).__name__ for expert in experts for p in expert.projections()})
            raise RuntimeError(
                "KTExpertList: the projections of the experts must be plain nn.Linear on the CPU, without "
                f"active dropout, got {kinds}"
            )
        min_tokens = streaming_threshold(self, hidden_states)
        return _run(hidden_states, top_k_index, top_k_weights, packed, experts, post_expert_norm, min_tokens)

    @torch.no_grad()
    def moe_infer(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> Tensor:
        """Runs all experts; MoE blocks of the DeepSeek family call this in evaluation mode."""
        return self.run(x, topk_ids, topk_weight)

    def run(self, x: Tensor, ids: Tensor, weights: Tensor, route_dropout: float = 0.0) -> Tensor:
        """Runs all experts, one by one if the op cannot run.

        Args:
            x, ids, weights: [T, H], [T, K], [T, K].
            route_dropout: the probability of a dropout of every expert's output.
        """
        if all(expert.runs_op() for expert in self):
            dropout = nn.Dropout(route_dropout) if route_dropout else None
            return KTExpertList.forward(self, x, ids, weights, dropout)
        output = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        for index, expert in enumerate(self):
            token, slot = torch.where(ids == index)
            rows = F.dropout(expert(x[token]) * weights[token, slot, None], route_dropout)
            output.index_add_(0, token, rows.to(output.dtype))
        return output.to(x.dtype)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.pack()
        return self

    def __getstate__(self) -> dict:
        return {**self.__dict__, "packed": None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.pack()


@torch.no_grad()
def stacked_copy(experts: list[KTExpert]) -> KTExperts:
    """Returns a KTExperts with copies of the experts' weights; all projections must be plain nn.Linear."""
    rows = [expert.projections() for expert in experts]

    def stack(kind: str, parts: Sequence[tuple[nn.Linear, ...]]) -> nn.Parameter:
        tensors = [[getattr(projection, kind) for projection in part] for part in parts]
        return nn.Parameter(stack_in_huge_pages(tensors), False)

    gate_up, down = [row[:-1] for row in rows], [row[-1:] for row in rows]
    biased = rows[0][0].bias is not None
    made = KTExperts.from_parameters(
        stack("weight", gate_up),
        stack("weight", down),
        stack("bias", gate_up) if biased else None,
        stack("bias", down) if biased else None,
        **experts[0].function._asdict(),
        save=experts[0].save,
    )
    return made.train(experts[0].training)


def _pack_after_loading(experts: KTExpertList, _) -> None:
    experts.pack()


def _warn_of(what: str) -> None:
    warn_once(
        f"ktops does not run experts whose projections {what}; the projections are called one by one instead."
    )


class _Stacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stacked: Tensor, *parts: Tensor) -> Tensor:
        ctx.parts_per_expert = len(parts) // stacked.shape[0]
        return stacked.view_as(stacked)

    @staticmethod
    def backward(ctx, grad: Tensor):
        parts = [part for expert in grad for part in expert.chunk(ctx.parts_per_expert)]
        needed = ctx.needs_input_grad[1:]
        return None, *(part if need else None for part, need in zip(parts, needed, strict=True))


def differentiable(stacked: Tensor, parts: list[Tensor]) -> Tensor:
    """Returns a stacked tensor [E, R, ...] as a function of the parameters stored in it, some per expert."""
    if not (torch.is_grad_enabled() and any(part.requires_grad for part in parts)):
        return stacked
    return _Stacked.apply(stacked, *parts)


def _run(
    hidden_states: Tensor,
    ids: Tensor,
    weights: Tensor,
    packed: Packed,
    experts: list[KTExpert],
    post_expert_norm: nn.Module | None = None,
    stream_min_tokens: int | None = None,
) -> Tensor:
    rows = [expert.projections() for expert in experts]
    gate_up = [projection for row in rows for projection in row[:-1]]
    down = [row[-1] for row in rows]
    weight, down_weight, bias, down_bias = packed
    return run_experts(
        hidden_states,
        ids,
        weights,
        differentiable(weight, [projection.weight for projection in gate_up]),
        differentiable(down_weight, [projection.weight for projection in down]),
        gate_up_bias=None if bias is None else differentiable(bias, [each.bias for each in gate_up]),
        down_bias=None if down_bias is None else differentiable(down_bias, [each.bias for each in down]),
        **experts[0].function._asdict(),
        post_expert_norm=post_expert_norm,
        save=experts[0].save,
        stream_min_tokens=stream_min_tokens,
    )
