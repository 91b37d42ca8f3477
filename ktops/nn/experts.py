"""KTExperts: the routed experts of a Mixture-of-Experts layer as a module built on kt::moe_sft."""

import math

import torch
from torch import Tensor, nn

from ktops.formats import ExpertWeight
from ktops.ops import moe_sft
from ktops.ops.activation import ACTIVATIONS

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
    **options,
) -> Tensor:
    """Runs ``ktops.moe_sft`` in the dtype of the weights; returns a result in the dtype of hidden_states.

    The casts support autocast, under which hidden_states may have lower precision than the weights.
    hidden_states may have leading dimensions, [..., H], and so may the routes, [..., K].
    """
    if top_k_weights.dtype not in DTYPES:
        top_k_weights = top_k_weights.to(gate_up_proj.dtype)
    output = moe_sft(
        hidden_states.reshape(-1, hidden_states.shape[-1]).to(gate_up_proj.dtype),
        top_k_index.reshape(-1, top_k_index.shape[-1]),
        top_k_weights.reshape(-1, top_k_weights.shape[-1]),
        gate_up_proj,
        down_proj,
        **options,
    )
    return output.to(hidden_states.dtype).reshape(hidden_states.shape)


class KTExperts(nn.Module):
    """The routed experts of one layer, ``out[t] = sum_j w[t, j] * down(act(gate(x[t])) * up(x[t]))``.

    Parameters and state-dict keys match the experts modules in transformers. With E = num_experts,
    H = hidden_size, I = intermediate_size:

    * ``gate_up_proj`` [E, 2I, H]: the first I rows of each expert are the gate;
    * ``down_proj`` [E, H, I];
    * ``gate_up_proj_bias`` [E, 2I] and ``down_proj_bias`` [E, H] with ``bias=True``.

    Args:
        num_experts, hidden_size, intermediate_size: E, H, I.
        bias: whether the projections have a bias.
        activation: the name of act; see :func:`ktops.moe_sft`.
        save: what forward saves for backward, "activations" or "recompute"; see :func:`ktops.moe_sft`.
        compute: "auto", "bf16" or "int8", for weights in a weight format; see :func:`ktops.moe_sft`. In
            training mode, "auto" means "bf16" even where no gradient is needed, as in a checkpointed forward.
        device, dtype: of the parameters; dtype must be float32, bfloat16, float16 or float64.

    Raises:
        ValueError: a size is not positive, or activation, save or compute is unknown.
        TypeError: dtype is not supported; forward raises it if the module was later cast to such a dtype.

    Example:
        >>> experts = ktops.nn.KTExperts(8, hidden_size=64, intermediate_size=32)
        >>> weights, ids = torch.randn(5, 8).softmax(-1).topk(2)
        >>> experts(torch.randn(5, 64), ids, weights).shape
        torch.Size([5, 64])
    """

    gate_up_proj: nn.Parameter | ExpertWeight
    down_proj: nn.Parameter | ExpertWeight

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        activation: str = "silu",
        save: str = "activations",
        compute: str = "auto",
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
        check_name("KTExperts", "save", save, SAVE)
        check_name("KTExperts", "compute", compute, COMPUTE)
        _check_dtype("dtype", dtype or torch.get_default_dtype())
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.activation = activation
        self.save = save
        self.compute = compute

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self.gate_up_proj = parameter(2 * intermediate_size, hidden_size)
        self.down_proj = parameter(hidden_size, intermediate_size)
        self.gate_up_proj_bias = parameter(2 * intermediate_size) if bias else None
        self.down_proj_bias = parameter(hidden_size) if bias else None
        self.reset_parameters()

    @classmethod
    def from_parameters(
        cls,
        gate_up_proj: nn.Parameter | ExpertWeight,
        down_proj: nn.Parameter | ExpertWeight,
        gate_up_proj_bias: nn.Parameter | None = None,
        down_proj_bias: nn.Parameter | None = None,
        *,
        activation: str = "silu",
        save: str = "activations",
        compute: str = "auto",
    ) -> "KTExperts":
        """Returns a module that holds these Parameters, or weights in a format, without copying them.

        Raises:
            ValueError: the shapes are not [E, 2I, H], [E, H, I], [E, 2I], [E, H], or activation, save or
                compute is unknown.
            TypeError: a dtype is not supported, or gate_up_proj and down_proj differ in dtype.

        Example:
            >>> experts = ktops.nn.KTExperts.from_parameters(mlp.experts.gate_up_proj, mlp.experts.down_proj)
        """
        if down_proj.dim() != 3:
            raise ValueError(f"KTExperts: down_proj must have shape [E, H, I], got {list(down_proj.shape)}")
        num_experts, hidden_size, intermediate_size = down_proj.shape
        given = {
            "gate_up_proj": (gate_up_proj, [num_experts, 2 * intermediate_size, hidden_size]),
            "down_proj": (down_proj, [num_experts, hidden_size, intermediate_size]),
            "gate_up_proj_bias": (gate_up_proj_bias, [num_experts, 2 * intermediate_size]),
            "down_proj_bias": (down_proj_bias, [num_experts, hidden_size]),
        }
        for name, (tensor, shape) in given.items():
            if tensor is None:
                continue
            if list(tensor.shape) != shape:
                raise ValueError(f"KTExperts: {name} must have shape {shape}, got {list(tensor.shape)}")
            _check_dtype(name, tensor.dtype)
        if gate_up_proj.dtype != down_proj.dtype:
            raise TypeError(
                f"KTExperts: down_proj must have the dtype of gate_up_proj={gate_up_proj.dtype}, "
                f"got {down_proj.dtype}"
            )
        experts = cls(
            num_experts,
            hidden_size,
            intermediate_size,
            activation=activation,
            save=save,
            compute=compute,
            device="meta",
            dtype=down_proj.dtype,
        )
        for name, (tensor, _) in given.items():
            if isinstance(tensor, ExpertWeight):
                del experts._parameters[name]
            setattr(experts, name, tensor)
        return experts

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initializes each projection uniformly in ±1/√fan_in, as ``nn.Linear`` does.

        Raises:
            TypeError: the weights are in a format. They are left unchanged.
        """
        for name in ("gate_up_proj", "down_proj"):
            if isinstance(getattr(self, name), ExpertWeight):
                raise TypeError(f"KTExperts: {name} must be a Parameter to be reset, got an ExpertWeight")
        for parameter, fan_in in (
            (self.gate_up_proj, self.hidden_size),
            (self.gate_up_proj_bias, self.hidden_size),
            (self.down_proj, self.intermediate_size),
            (self.down_proj_bias, self.intermediate_size),
        ):
            if isinstance(parameter, Tensor):
                bound = 1 / math.sqrt(fan_in)
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **lora) -> Tensor:
        """Runs the experts.

        Args:
            hidden_states: [T, H] or with more leading dimensions; any floating dtype, cast to the weights'.
            top_k_index: [T, K], int32 or int64; ids outside [0, E) contribute nothing.
            top_k_weights: [T, K].
            lora: the LoRA arguments of :func:`ktops.moe_sft`: gate_up_lora_A, gate_up_scaling, ...

        Returns:
            A tensor with the shape and dtype of hidden_states.
        """
        _check_dtype("gate_up_proj", self.gate_up_proj.dtype)
        return run_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.gate_up_proj,
            self.down_proj,
            gate_up_bias=self.gate_up_proj_bias,
            down_bias=self.down_proj_bias,
            activation=self.activation,
            save=self.save,
            compute="bf16" if self.training and self.compute == "auto" else self.compute,
            **lora,
        )

    def extra_repr(self) -> str:
        text = (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, bias={self.gate_up_proj_bias is not None}, "
            f"activation={self.activation!r}"
        )
        text = text if self.save == "activations" else f"{text}, save={self.save!r}"
        return text if self.compute == "auto" else f"{text}, compute={self.compute!r}"


def check_name(caller: str, argument: str, name: str, known) -> None:
    """Raises ValueError, with the caller and the argument, unless ``name`` is one of ``known``."""
    if name not in known:
        raise ValueError(f"{caller}: {argument} must be one of {', '.join(known)}, got {name!r}")


def _check_dtype(argument: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        names = ", ".join(str(known) for known in DTYPES)
        raise TypeError(f"KTExperts: {argument} must have one of the dtypes {names}, got {dtype}")
