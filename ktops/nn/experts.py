"""KTExperts: the routed experts of a Mixture-of-Experts layer as a module built on kt::moe_sft."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ktops._huge_pages import in_huge_pages
from ktops.devices.pending import moe_sft_pending
from ktops.formats import ExpertWeight
from ktops.nn.frozen_lora import lora_arguments
from ktops.nn.host_memory import ON_DEVICE
from ktops.nn.layout import Layout
from ktops.nn.prepared import PREPARED, forward_prepared
from ktops.nn.streaming import streaming_threshold
from ktops.ops import moe_sft
from ktops.ops.activation import (
    ACTIVATIONS,
    GATINGS,
    ExpertFunction,
    activation_arguments,
)
from ktops.ops.moe_fwd_streamed import check_min_tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Supported dtypes of the experts' weights."""

SAVE = ("activations", "recompute")
COMPUTE = ("auto", "bf16", "int8")


def run_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor | ExpertWeight,
    down_proj: Tensor | ExpertWeight,
    *,
    post_expert_norm: nn.Module | None = None,
    on_device: Any = None,
    **options,
) -> Tensor:
    """Runs ``ktops.moe_sft`` in the dtype of the weights; returns a result in the dtype of hidden_states.

    The casts support autocast, under which hidden_states may have lower precision than the weights.
    hidden_states may have leading dimensions, [..., H], and so may the routes, [..., K]. Some routers of
    transformers 5.0 give a weight for every expert, [..., E]; the op takes those of the chosen ones.

    The result may be a :class:`ktops.devices.pending.PendingTensor` for tokens on a device.

    Args:
        post_expert_norm: applied to the output [T, K, H] of every route, before its routing weight.
        on_device: a DeviceExperts, which computes some of the experts.
        options: those of ``ktops.moe_sft``.
    """
    if top_k_weights.dtype not in DTYPES:
        top_k_weights = top_k_weights.to(gate_up_proj.dtype)
    rows = hidden_states.reshape(-1, hidden_states.shape[-1]).to(gate_up_proj.dtype)
    ids = top_k_index.reshape(-1, top_k_index.shape[-1])
    weights = top_k_weights.reshape(-1, top_k_weights.shape[-1])
    if weights.shape[1] == gate_up_proj.shape[0] != ids.shape[1]:
        weights = weights.gather(1, ids)
    every = ids
    if on_device is not None:
        on_device.require_frozen(gate_up_proj, down_proj, options)
        ids = on_device.others(every)
    if post_expert_norm is None:
        run = moe_sft if rows.is_cpu else moe_sft_pending
        output = run(rows, ids, weights, gate_up_proj, down_proj, **options)
    else:
        routes = moe_sft(rows, ids, None, gate_up_proj, down_proj, reduce=False, **options)
        outside = (ids < 0) | (ids >= gate_up_proj.shape[0])  # whose norm need not be 0
        output = (weights.masked_fill(outside, 0)[..., None] * post_expert_norm(routes)).sum(1)
    if on_device is not None:
        output = output + on_device(rows, every, weights, post_expert_norm=post_expert_norm, **options)
    return output.to(hidden_states.dtype).reshape(hidden_states.shape)


class KTExperts(nn.Module):
    """The routed experts of one layer, ``out[t] = sum_j w[t, j] * down(act(gate(x[t])) * up(x[t]))``.

    Parameters and state-dict keys match the experts modules in transformers. With E = num_experts,
    H = hidden_size, I = intermediate_size:

    * ``gate_up_proj`` [E, 2I, H], its rows in the order of ``gating``;
    * ``down_proj`` [E, H, I];
    * ``gate_up_proj_bias`` [E, 2I] and ``down_proj_bias`` [E, H] with ``bias=True``.

    With ``gating="none"``, the first are ``up_proj`` [E, I, H] and ``up_proj_bias`` [E, I]. With
    ``transposed=True``, Parameters are [E, H, 2I] and [E, I, H]; weights in a format are not transposed.

    Args:
        num_experts, hidden_size, intermediate_size: E, H, I.
        bias: whether the projections have a bias.
        activation, activation_args, gating: see :func:`ktops.moe_sft`.
        transposed: whether Parameters are stored as [E, in, out].
        post_expert_norm: a module applied to every expert's output, before the routing weight (Muse Spark).
        save: what forward saves for backward, "activations" or "recompute"; see :func:`ktops.moe_sft`.
        compute: "auto", "bf16" or "int8", for weights in a weight format; see :func:`ktops.moe_sft`. In
            training mode, "auto" means "bf16" even where no gradient is needed, as in a checkpointed forward.
        stream_min_tokens: the number of tokens on an accelerator from which the experts are computed there;
            see :func:`ktops.moe_sft`. Without effect in training mode.
        device, dtype: of the parameters; dtype must be float32, bfloat16, float16 or float64.

    Raises:
        ValueError: a size or stream_min_tokens is not positive, or activation, gating, save or compute is
            unknown, or activation_args are not those of the activation.
        TypeError: dtype is not supported; forward raises it if the module was later cast to such a dtype.

    Example:
        >>> experts = ktops.nn.KTExperts(8, hidden_size=64, intermediate_size=32)
        >>> weights, ids = torch.randn(5, 8).softmax(-1).topk(2)
        >>> experts(torch.randn(5, 64), ids, weights).shape
        torch.Size([5, 64])
    """

    down_proj: nn.Parameter | ExpertWeight
    down_proj_bias: nn.Parameter | None
    stream_min_tokens: int | None = None  # also of modules that were pickled without it

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        activation: str = "silu",
        activation_args: Sequence[float] | Mapping[str, float] = (),
        gating: str = "concatenated",
        transposed: bool = False,
        post_expert_norm: nn.Module | None = None,
        save: str = "activations",
        compute: str = "auto",
        stream_min_tokens: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "num_experts": num_experts,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"KTExperts: {name} must be positive, got {size}")
        check_name("KTExperts", "activation", activation, ACTIVATIONS)
        check_name("KTExperts", "gating", gating, GATINGS)
        check_name("KTExperts", "save", save, SAVE)
        check_name("KTExperts", "compute", compute, COMPUTE)
        check_min_tokens("KTExperts", "stream_min_tokens", stream_min_tokens)
        _check_dtype("dtype", dtype or torch.get_default_dtype())
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.function = _expert_function(activation, activation_args, gating)
        self.save = save
        self.compute = compute
        self.stream_min_tokens = stream_min_tokens
        self.transposed = transposed
        self.post_expert_norm = post_expert_norm

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(in_huge_pages(torch.empty(num_experts, *shape, device=device, dtype=dtype)))

        def weight(rows: int, columns: int) -> nn.Parameter:
            return parameter(columns, rows) if transposed else parameter(rows, columns)

        first, rows = self.function.first_name, self.function.rows(intermediate_size)
        self.register_parameter(first, weight(rows, hidden_size))
        self.register_parameter("down_proj", weight(hidden_size, intermediate_size))
        self.register_parameter(f"{first}_bias", parameter(rows) if bias else None)
        self.register_parameter("down_proj_bias", parameter(hidden_size) if bias else None)
        self.reset_parameters()

    @classmethod
    def from_parameters(
        cls,
        gate_up_proj: nn.Parameter | ExpertWeight,
        down_proj: nn.Parameter | ExpertWeight,
        gate_up_proj_bias: nn.Parameter | None = None,
        down_proj_bias: nn.Parameter | None = None,
        *,
        gating: str = "concatenated",
        transposed: bool = False,
        **options,
    ) -> "KTExperts":
        """Returns a module that holds these Parameters, or weights in a format, without copying them.

        Args:
            gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias: with the shapes of the class.
            gating, transposed, options: as in the constructor. Weights in a format are never transposed.

        Raises:
            ValueError: the shapes are not those of the class, or activation, gating, save or compute is
                unknown.
            TypeError: a dtype is not supported, or gate_up_proj and down_proj differ in dtype.

        Example:
            >>> experts = ktops.nn.KTExperts.from_parameters(mlp.experts.gate_up_proj, mlp.experts.down_proj)
        """
        check_name("KTExperts", "gating", gating, GATINGS)
        in_format = [isinstance(weight, ExpertWeight) for weight in (gate_up_proj, down_proj)]
        if transposed and any(in_format):
            if not all(in_format):
                raise ValueError("KTExperts: transposed must be False if one of the weights is in a format")
            transposed = False

        def shape(rows: int, columns: int) -> list[int]:
            return [num_experts, columns, rows] if transposed else [num_experts, rows, columns]

        if down_proj.dim() != 3:
            expected = "[E, I, H]" if transposed else "[E, H, I]"
            raise ValueError(f"KTExperts: down_proj must have shape {expected}, got {list(down_proj.shape)}")
        num_experts, hidden_size, intermediate_size = down_proj.shape
        if transposed:
            hidden_size, intermediate_size = intermediate_size, hidden_size
        function = ExpertFunction(gating=gating)
        first, rows = function.first_name, function.rows(intermediate_size)
        given = {
            first: (gate_up_proj, shape(rows, hidden_size)),
            "down_proj": (down_proj, shape(hidden_size, intermediate_size)),
            f"{first}_bias": (gate_up_proj_bias, [num_experts, rows]),
            "down_proj_bias": (down_proj_bias, [num_experts, hidden_size]),
        }
        for name, (tensor, sizes) in given.items():
            if tensor is None:
                continue
            if list(tensor.shape) != sizes:
                raise ValueError(f"KTExperts: {name} must have shape {sizes}, got {list(tensor.shape)}")
            _check_dtype(name, tensor.dtype)
        if gate_up_proj.dtype != down_proj.dtype:
            raise TypeError(
                f"KTExperts: down_proj must have the dtype of {first}={gate_up_proj.dtype}, "
                f"got {down_proj.dtype}"
            )
        experts = cls(
            num_experts,
            hidden_size,
            intermediate_size,
            gating=gating,
            transposed=transposed,
            device="meta",
            dtype=down_proj.dtype,
            **options,
        )
        for name, (tensor, _) in given.items():
            if isinstance(tensor, ExpertWeight):
                del experts._parameters[name]
            setattr(experts, name, tensor)
        return experts

    @property
    def is_transposed(self) -> bool:
        """The name by which PEFT asks for ``transposed``."""
        return self.transposed

    @property
    def options(self) -> dict:
        """The keyword arguments of :meth:`from_parameters` for experts that compute the same."""
        return {
            **self.function._asdict(),
            "transposed": self.transposed,
            "post_expert_norm": self.post_expert_norm,
            "save": self.save,
            "compute": self.compute,
            "stream_min_tokens": self.stream_min_tokens,
        }

    @property
    def layout(self) -> Layout:
        """What the experts compute, and how Parameters are stored."""
        return Layout(self.function, self.transposed, self.post_expert_norm is not None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initializes each projection uniformly in ±1/√fan_in, as ``nn.Linear`` does.

        Raises:
            TypeError: the weights are in a format. They are left unchanged.
        """
        names = self.function.first_name, "down_proj"
        for name in names:
            if isinstance(getattr(self, name), ExpertWeight):
                raise TypeError(f"KTExperts: {name} must be a Parameter to be reset, got an ExpertWeight")
        for name, fan_in in zip(names, (self.hidden_size, self.intermediate_size), strict=True):
            for parameter in (getattr(self, name), getattr(self, f"{name}_bias")):
                if parameter is not None:
                    bound = 1 / math.sqrt(fan_in)
                    nn.init.uniform_(parameter, -bound, bound)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **lora) -> Tensor:
        """Runs the experts.

        Args:
            hidden_states: [T, H] or with more leading dimensions; any floating dtype, cast to the weights'.
                May be on an accelerator, and the routes with it.
            top_k_index: [T, K], int32 or int64; ids outside [0, E) contribute nothing.
            top_k_weights: [T, K].
            lora: the LoRA arguments of :func:`ktops.moe_sft`: gate_up_lora_A, gate_up_scaling, ...

        Returns:
            A tensor with the shape, dtype and device of hidden_states. On CUDA, without gradients, it is
            pending: its first use collects the result, in stream order; see ``docs/devices.md``.

        Raises:
            RuntimeError: a wrong shape, dtype or device, as in :func:`ktops.moe_sft`.
        """
        lora = lora_arguments(self, lora)
        output = forward_prepared(self, hidden_states, top_k_index, top_k_weights, lora)
        if output is not None:
            return output
        layout = self.layout
        gate_up_proj, down_proj = layout.weights(self)
        gate_up_bias, down_bias = layout.biases(self)
        _check_dtype(self.function.first_name, gate_up_proj.dtype)
        return run_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            gate_up_proj,
            down_proj,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            **self.function._asdict(),
            post_expert_norm=self.post_expert_norm,
            save=self.save,
            compute="bf16" if self.training and self.compute == "auto" else self.compute,
            stream_min_tokens=streaming_threshold(self, hidden_states),
            on_device=self._modules.get(ON_DEVICE),
            **lora,
        )

    def _apply(self, fn, recurse: bool = True):
        self.__dict__.pop(PREPARED, None)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        text = (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, bias={self.down_proj_bias is not None}, "
            f"activation={self.function.activation!r}"
        )
        defaults = {
            "activation_args": (self.function.activation_args, ()),
            "gating": (self.function.gating, "concatenated"),
            "transposed": (self.transposed, False),
            "save": (self.save, "activations"),
            "compute": (self.compute, "auto"),
            "stream_min_tokens": (self.stream_min_tokens, None),
        }
        others = [f"{name}={value!r}" for name, (value, default) in defaults.items() if value != default]
        return ", ".join([text, *others])


@torch.no_grad()
def _expert_function(
    activation: str, args: Sequence[float] | Mapping[str, float], gating: str
) -> ExpertFunction:
    """Returns what the experts compute; raises ValueError if the operator does not accept it."""
    rows = torch.empty(0, 1, dtype=torch.float32, device="cpu")
    ids = torch.empty(0, 1, dtype=torch.int64, device="cpu")
    weight = torch.empty(1, 1, 1, dtype=torch.float32, device="cpu")
    try:
        function = ExpertFunction(activation, tuple(activation_arguments(activation, args)), gating)
        first = weight.expand(1, function.rows(1), 1)
        moe_sft(rows, ids, rows, first, weight, **function._asdict())
    except RuntimeError as error:
        reason = re.sub(r"^\S+: ", "", str(error))
        raise ValueError(f"KTExperts: {reason}") from None
    return function


def check_name(caller: str, argument: str, name: str, known) -> None:
    """Raises ValueError, with the caller and the argument, unless ``name`` is one of ``known``."""
    if name not in known:
        raise ValueError(f"{caller}: {argument} must be one of {', '.join(known)}, got {name!r}")


def _check_dtype(argument: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        names = ", ".join(str(known) for known in DTYPES)
        raise TypeError(f"KTExperts: {argument} must have one of the dtypes {names}, got {dtype}")
