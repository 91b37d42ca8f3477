"""A small MoE layer for KTMoEWrapper, and its results in float64 with separate adapters."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ktops.compat import KTMoEWrapper
from ktops.compat.lora import NAMES, shapes
from ktops.formats import ExpertWeight, get_format
from ktops.testing.budgets import SAFETY, relative_error, rms

SIZES = {"num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 64, "moe_intermediate_size": 96}
TOKENS, RANK, ALPHA = 7, 4, 6.0


def make(method: str, /, *, load: bool = True, **options):
    """Returns a wrapper of SIZES, unless overridden, with the weights of :func:`weights`."""
    mode = "sft" if "_SFT" in method else "inference"
    options = {
        "layer_idx": 0,
        **SIZES,
        "gpu_experts_mask": None,
        "cpuinfer_threads": torch.get_num_threads(),
        "threadpool_count": 1,
        "weight_path": None,
        "chunked_prefill_size": 512,
        "method": method,
        "mode": mode,
        **({"lora_rank": RANK, "lora_alpha": ALPHA} if mode == "sft" else {}),
        "group_size": 32,
    } | options
    wrapper = KTMoEWrapper(**options)
    if load:
        wrapper.load_weights_from_tensors(*weights(wrapper))
    return wrapper


def weights(like) -> tuple[Tensor, Tensor, Tensor]:
    """Returns gate [E, I, H], up [E, I, H] and down [E, H, I] in bfloat16 for the sizes of a wrapper."""
    generator = torch.Generator().manual_seed(like.hidden_size)
    up = like.num_experts, like.moe_intermediate_size, like.hidden_size
    down = like.num_experts, like.hidden_size, like.moe_intermediate_size
    return tuple(
        (torch.randn(shape, generator=generator) / shape[2] ** 0.5).bfloat16() for shape in (up, up, down)
    )


def inputs(like, tokens: int = TOKENS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Returns hidden_states [T, H] bfloat16, topk_ids [T, K] and topk_weights [T, K] float32."""
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(tokens, like.hidden_size, generator=generator).bfloat16()
    scores = torch.rand(tokens, like.num_experts, generator=generator).softmax(-1)
    topk_weights, topk_ids = scores.topk(like.num_experts_per_tok)
    return hidden_states, topk_ids, topk_weights


def adapters(like, dtype: torch.dtype = torch.bfloat16, seed: int = 3) -> dict[str, Tensor]:
    """Returns the six adapter tensors; each product is as large as that of the base weights."""
    generator = torch.Generator().manual_seed(seed)
    sizes = like.num_experts, like.hidden_size, like.moe_intermediate_size, like.lora_rank
    return {
        name: (torch.randn(shape, generator=generator) / shape[2] ** 0.5).to(dtype)
        for name, shape in shapes(*sizes).items()
    }


def dense(weight: Tensor | ExpertWeight) -> Tensor:
    """Returns the decoded weights in float64, by the specification of the format."""
    if isinstance(weight, ExpertWeight):
        weight = get_format(weight.format).dequantize(weight.codes, weight.shape[-1], weight.group_size)
    return weight.double()


def layer(
    wrapper, hidden_states, topk_ids, topk_weights, adapters: dict[str, Tensor] | None = None
) -> Tensor:
    """Runs every expert on every token and selects the routes; for autograd in float64."""
    gate, up = dense(wrapper.gate_up_proj).chunk(2, dim=1)

    def project(name: str, weight: Tensor, x: Tensor) -> Tensor:
        y = x @ weight.mT
        if adapters:
            xa = x @ adapters[f"{name}_lora_a"].mT
            y = y + ALPHA / RANK * xa @ adapters[f"{name}_lora_b"].mT
        return y

    hidden = F.silu(project("gate", gate, hidden_states)) * project("up", up, hidden_states)
    outputs = project("down", dense(wrapper.down_proj), hidden)
    routes = torch.zeros(len(hidden_states), wrapper.num_experts + 1, dtype=topk_weights.dtype)
    known = (topk_ids >= 0) & (topk_ids < wrapper.num_experts)
    routes = routes.scatter_add(1, topk_ids.where(known, wrapper.num_experts), topk_weights)
    return torch.einsum("etn,te->tn", outputs, routes[:, :-1])


def reference(wrapper, hidden_states, topk_ids, topk_weights) -> Tensor:
    """Returns the output of an inference forward."""
    return layer(wrapper, hidden_states.double(), topk_ids, topk_weights.double())


def reference_gradients(wrapper, routed, adapters: dict[str, Tensor] | None, grad_output: Tensor) -> dict:
    """Returns {"output", "grad_input", "grad_weights", and the gradients of the adapters by name}."""
    hidden_states, topk_ids, topk_weights = routed
    leaves = {"grad_input": hidden_states, "grad_weights": topk_weights, **(adapters or {})}
    leaves = {name: value.double().requires_grad_() for name, value in leaves.items()}
    factors = {name: leaves[name] for name in NAMES} if adapters else None
    output = layer(wrapper, leaves["grad_input"], topk_ids, leaves["grad_weights"], factors)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output.double())
    return {"output": output.detach()} | dict(zip(leaves, gradients, strict=True))


ROUNDED_WEIGHTS = SAFETY * rms(torch.bfloat16) * 3**0.5
"""Added to a budget for decoding to bfloat16: one rounding each of the weights of gate, up and down."""


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], budget: float) -> None:
    """Asserts that each result is within the budget for bfloat16 weights and their decoding."""
    assert actual.keys() == expected.keys()
    for name, exact in expected.items():
        error = relative_error(actual[name], exact)
        assert error < math.hypot(budget, ROUNDED_WEIGHTS), f"{name}: {error:.2e}"


def train(wrapper, routed, adapters: dict[str, Tensor] | None, grad_output: Tensor) -> dict[str, Tensor]:
    """Returns what :func:`reference_gradients` returns, computed by the wrapper."""
    output = wrapper.forward(*routed)
    grad_input, grad_weights = wrapper.backward(grad_output)
    gradients = {name: getattr(wrapper, f"grad_{name}") for name in adapters or {}}
    return {"output": output, "grad_input": grad_input, "grad_weights": grad_weights, **gradients}
