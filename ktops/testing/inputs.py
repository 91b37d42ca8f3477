"""Random, reproducible inputs for ktops.moe_sft, with edge cases on request."""

import torch
from torch import Tensor

from ktops.formats import ExpertWeight, get_format
from ktops.ops.activation import ExpertFunction
from ktops.ops.arguments import GRADIENTS, MoeArguments
from ktops.ops.moe_sft import moe_arguments

ROUTINGS = ("random", "skewed", "one_expert", "empty_experts", "repeated")


def route(num_tokens: int, num_experts: int, top_k: int, routing: str, generator: torch.Generator) -> Tensor:
    """Returns topk_ids [num_tokens, top_k], int64.

    ``routing``: "random" and "skewed" (probability ~ 1/(e+1)²) give each token distinct experts if top_k
    allows; "one_expert" sends every route to one expert; "empty_experts" uses only the odd experts;
    "repeated" draws with replacement and gives the first two slots of every token the same expert.
    """
    shape = (num_tokens, top_k)
    if routing == "one_expert":
        return torch.full(shape, num_experts // 2)
    if routing == "repeated" or top_k > num_experts:
        ids = torch.randint(num_experts, shape, generator=generator)
        ids[:, 1:2] = ids[:, :1]
        return ids
    if routing == "empty_experts":
        odd = max(num_experts // 2, 1)
        return (torch.randint(odd, shape, generator=generator) * 2 + 1).clamp(max=num_experts - 1)
    if routing not in ("random", "skewed"):
        raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, got {routing!r}")
    probability = torch.ones(num_experts)
    if routing == "skewed":
        probability = 1 / (torch.arange(num_experts) + 1.0) ** 2
    if num_tokens == 0:
        return torch.zeros(shape, dtype=torch.int64)
    return torch.multinomial(probability.expand(num_tokens, -1), top_k, generator=generator)


def spoil_ids(ids: Tensor, num_experts: int, generator: torch.Generator) -> Tensor:
    """Returns a copy of ids with every third id, and those of the second token, outside [0, num_experts).

    Some ids are 0 in their low 32 bits, so a truncating conversion would make them valid.
    """
    outside = [-1, num_experts, num_experts + 7, torch.iinfo(ids.dtype).min]
    if ids.dtype == torch.int64:
        outside += [1 << 32, -(1 << 32)]
    bad = torch.tensor(outside, dtype=ids.dtype)
    values = bad[torch.randint(len(bad), ids.shape, generator=generator)]
    mask = torch.arange(ids.numel()).view(ids.shape) % 3 == 1
    mask[1:2] = True
    return torch.where(mask, values, ids)


def moe_inputs(
    *,
    T: int,
    H: int,
    I: int,  # noqa: E741
    E: int,
    K: int,
    dtype: torch.dtype = torch.float32,
    lora_rank: int | tuple[int, int] = 0,
    lora_dtype: torch.dtype | None = None,
    bias: bool = False,
    ids_dtype: torch.dtype = torch.int64,
    weights_dtype: torch.dtype | None = None,
    invalid_ids: bool = False,
    routing: str = "random",
    seed: int = 0,
    scale: float = 1.0,
    gating: str = "concatenated",
) -> dict:
    """Returns keyword arguments for :func:`ktops.moe_sft`, reproducible from ``seed``.

    hidden_states are N(0, scale²), weights N(0, 1/fan_in), so gates are about N(0, scale²). The LoRA factors
    are all nonzero, and their product is as large as that of the base weights. The two scalings differ, so
    that swapping them is noticed.

    Args:
        T, H, I, E, K: num_tokens, hidden_size, intermediate_size, num_experts, top_k, named as in all shapes.
        dtype: the dtype of hidden_states, gate_up_proj and down_proj.
        lora_rank: r for both adapters or (gate_up's, down's); 0 leaves an adapter out.
        lora_dtype, weights_dtype: the dtype of LoRA tensors and biases, and that of topk_weights; default:
            ``dtype``.
        bias: whether to include gate_up_bias and down_bias.
        invalid_ids: whether to put every third id outside [0, E).
        routing: one of ROUTINGS, see :func:`route`.
        gating: as in :func:`ktops.moe_sft`; included in the result unless "concatenated".

    Example:
        >>> y = ktops.moe_sft(**moe_inputs(T=4, H=64, I=32, E=8, K=2, lora_rank=4))
    """
    gen = torch.Generator().manual_seed(seed)
    lora_dtype, weights_dtype = lora_dtype or dtype, weights_dtype or dtype
    ranks = (lora_rank, lora_rank) if isinstance(lora_rank, int) else lora_rank

    def normal(*shape: int, std: float, to: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=gen).mul_(std).to(to)

    def lora(prefix: str, rank: int, fan_in: int, fan_out: int) -> dict:
        if rank == 0:
            return {}
        return {
            f"{prefix}_lora_A": normal(E, rank, fan_in, std=fan_in**-0.5, to=lora_dtype),
            f"{prefix}_lora_B": normal(E, fan_out, rank, std=rank**-0.5, to=lora_dtype),
        }

    rows = ExpertFunction(gating=gating).rows(I)
    ids = route(T, E, K, routing, gen).to(ids_dtype)
    inputs: dict = {
        "hidden_states": normal(T, H, std=scale, to=dtype),
        "topk_ids": spoil_ids(ids, E, gen) if invalid_ids else ids,
        "topk_weights": torch.randn(T, K, generator=gen).softmax(-1).to(weights_dtype),
        "gate_up_proj": normal(E, rows, H, std=H**-0.5, to=dtype),
        "down_proj": normal(E, H, I, std=I**-0.5, to=dtype),
    }
    if bias:
        inputs["gate_up_bias"] = normal(E, rows, std=0.5, to=lora_dtype)
        inputs["down_bias"] = normal(E, H, std=0.5, to=lora_dtype)
    inputs |= lora("gate_up", ranks[0], H, rows)
    inputs |= lora("down", ranks[1], I, H)
    inputs |= {} if gating == "concatenated" else {"gating": gating}
    return inputs | {"gate_up_scaling": 0.75, "down_scaling": 1.25}


def upcast(inputs: dict, dtype: torch.dtype = torch.float64) -> dict:
    """Returns the inputs with every floating tensor replaced by a detached copy in ``dtype``."""
    return {
        name: value.detach().to(dtype, copy=True)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def densified(inputs: dict) -> dict:
    """Returns the inputs with every ExpertWeight decoded to float32 by the specification of its format."""
    return {
        name: get_format(value.format).dequantize(value.codes, value.shape[-1], value.group_size)
        if isinstance(value, ExpertWeight)
        else value
        for name, value in inputs.items()
    }


def floating(inputs: dict) -> tuple[str, ...]:
    """Returns the names of the differentiable tensors among the inputs, in the order of GRADIENTS."""
    return tuple(name for name in GRADIENTS if isinstance(inputs.get(name), Tensor))


def require_grad(inputs: dict, *names: str) -> dict:
    """Returns the inputs, sharing storage, with ``requires_grad`` on the named tensors (default: all)."""
    names = names or floating(inputs)
    missing = set(names) - set(floating(inputs))
    if missing:
        raise KeyError(f"no such tensor among the inputs: {', '.join(sorted(missing))}")
    return {
        name: value.detach().requires_grad_(name in names) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def op_arguments(inputs: dict, **options) -> MoeArguments:
    """Converts keyword arguments of ktops.moe_sft to the operators' arguments, with the same defaults.

    ``options`` replace the operators' arguments, such as "num_experts" or the codes of a format.

    Example:
        >>> torch.ops.kt.moe_sft_fwd(*op_arguments(inputs, activation="gelu"), "recompute")
    """
    return moe_arguments(**inputs)._replace(**options)
