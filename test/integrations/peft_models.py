"""Tiny models with PEFT adapters on their experts, their gradients, and a record of the operators run."""

import functools
import warnings

import torch
from model_runs import first_stable_seed
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import NUM_EXPERTS, tiny_batch, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from ktops.integrations.peft import expert_target_parameters
from ktops.testing.budgets import SAFETY, gradient_budget, relative_error

ROUTERS = (".gate.weight", ".router.weight")


def randomize(model: torch.nn.Module, seed: int = 1) -> None:
    """Sets every LoRA factor, including B, to values that depend on the seed and the order of the factors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def adapted(
    architecture: str,
    implementation: str = "ktops",
    *,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    seed: int = 0,
    train_routers: bool = False,
    lora: dict | None = None,
    **overrides,
) -> PeftModel:
    """Returns a tiny model with random LoRA, r = 4, on o_proj and the experts, determined by the arguments.

    Args:
        dtype: the dtype of the base weights. The adapters are float32, or float64 if compute_dtype is
            float64.
        seed: the seed of the base weights.
        compute_dtype: widens the base weights after they were rounded to dtype.
        lora: LoraConfig keys that replace the defaults.
        overrides: keys of the model's configuration.
    """
    model = tiny_model(
        architecture, dtype=dtype, seed=seed, experts_implementation=implementation, **overrides
    )
    model = model if compute_dtype is None else model.to(compute_dtype)
    keys = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["o_proj"],
        "target_parameters": expert_target_parameters(model),
    }
    with warnings.catch_warnings():
        # PEFT searches modules only for the names in rank_pattern, and misreports those of parameters.
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        model = get_peft_model(model, LoraConfig(**{**keys, **(lora or {})}))
    randomize(model)
    for name, parameter in model.named_parameters():
        if train_routers and name.endswith(ROUTERS):
            parameter.requires_grad_()
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Returns the logits for the default batch."""
    return model(**tiny_batch()).logits


def loss_and_gradients(model: torch.nn.Module, batch: dict | None = None) -> dict[str, torch.Tensor]:
    """Returns {"loss": ..., parameter name: its gradient} of one forward and backward, with grads reset."""
    model.zero_grad()
    loss = model(**(tiny_batch() if batch is None else batch)).loss
    loss.backward()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in named.values())
    return {"loss": loss.detach()} | {name: p.grad for name, p in named.items()}


@functools.cache
def stable_seed(architecture: str) -> int:
    """Returns the first seed with which bfloat16 and float64 route every token to the same experts."""
    return first_stable_seed(
        lambda seed: [
            adapted(architecture, implementation, dtype=torch.bfloat16, compute_dtype=wide, seed=seed)
            for implementation, wide in (("eager", None), ("grouped_mm", None), ("eager", torch.float64))
        ]
    )


def assert_as_close(actual: dict, plain: dict, exact: dict, dtype: torch.dtype) -> None:
    """Asserts that actual is as close to the float64 result as plain PEFT in the same dtype.

    A gradient's error is that of the whole model, so the limit is SAFETY times the error of plain PEFT, plus
    the budget of the op for gradients whose error happens to be small.
    """
    assert actual.keys() == plain.keys() == exact.keys()
    for name, reference in exact.items():
        budget = SAFETY * relative_error(plain[name], reference) + gradient_budget(dtype, inner_size=64)
        error = relative_error(actual[name], reference)
        assert error <= budget, f"{name}: relative error {error:.2e}, budget {budget:.2e}"
        if dtype == torch.float32:
            cosine = torch.nn.functional.cosine_similarity(
                actual[name].double().flatten(), reference.double().flatten(), dim=0
            )
            assert cosine > 0.999, f"{name}: cosine {cosine}"


class Recorder(TorchDispatchMode):
    """Counts calls of kt operators and records the shapes of floating-point tensors that operators create."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "kt":
            name = func.overloadpacket.__name__
            self.calls[name] = self.calls.get(name, 0) + 1
        if not func.is_view:
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    self.shapes.add(tuple(tensor.shape))
        return result

    def made_expert_stack(self, model: torch.nn.Module) -> bool:
        """Returns True if a tensor was created with the shape of an expert parameter, or its transpose."""
        stacks = {p.shape for p in model.parameters() if p.dim() == 3 and p.shape[0] == NUM_EXPERTS}
        assert stacks
        return any(shape in self.shapes or (shape[0], shape[2], shape[1]) in self.shapes for shape in stacks)


def compare(architecture: str, dtype: torch.dtype = torch.float32, change=None, **keys) -> None:
    """Compares loss and gradients of the ktops model with plain PEFT's in the same dtype and in float64."""
    results = []
    for implementation, compute_dtype in (("ktops", None), ("eager", None), ("eager", torch.float64)):
        model = adapted(architecture, implementation, dtype=dtype, compute_dtype=compute_dtype, **keys)
        if change is not None:
            change(model)
        with Recorder() as recorder:
            results.append(loss_and_gradients(model))
        assert ("moe_sft_fwd" in recorder.calls) == (implementation == "ktops")
        assert recorder.made_expert_stack(model) == (implementation != "ktops")
    assert_as_close(*results, dtype)
