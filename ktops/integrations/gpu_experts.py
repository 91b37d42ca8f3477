"""Chooses the experts of which an accelerator gets copies."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ktops.integrations.swap import require_experts
from ktops.integrations.transformers.architectures import Unsupported, operands

CAPABILITY = (8, 0)
"""The compute capability that grouped_mm needs."""


@contextmanager
def count_routes(model: nn.Module) -> Iterator[Tensor]:
    """Counts how often the tokens of a sample choose each expert.

    Args:
        model: a model with experts modules that take the routes of all tokens, as those of the experts
            interface of transformers and :class:`ktops.nn.KTExperts` do.

    Yields:
        int64 [L, E] on the CPU, one row per experts module in the order of
        :attr:`OffloadReport.layers`; forwards inside the ``with`` block add to it.

    Raises:
        ValueError: the model has no such experts, or layers with different numbers of them.

    Example:
        >>> with ktops.count_routes(model) as counts:
        ...     model(**sample)
        >>> mask = ktops.compat.generate_gpu_experts_masks(counts, 8 * len(counts))
        >>> ktops.offload_experts(model, "cuda", gpu_experts_mask=mask)
    """
    found = require_experts(model, "count_routes")
    sizes = {name: _num_experts(module) for name, module in found.items()}
    num_experts, *others = set(sizes.values())
    if num_experts is None or others:
        raise ValueError(f"count_routes: all layers must have as many experts that take routes, got {sizes}")
    counts = torch.zeros(len(sizes), num_experts, dtype=torch.int64, device="cpu")

    def count(row: Tensor, args: tuple, kwargs: dict) -> None:
        ids = args[1] if len(args) > 1 else kwargs["top_k_index"]
        ids = ids.detach().flatten().cpu()
        row += ids[(ids >= 0) & (ids < len(row))].bincount(minlength=len(row))

    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, row=row: count(row, args, kwargs), with_kwargs=True
        )
        for module, row in zip(found.values(), counts, strict=True)
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def require_grouped_mm(device: torch.device) -> None:
    """Raises ValueError if torch has no grouped_mm for a device."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        raise ValueError(
            f"offload_experts: num_gpu_experts must be 0 on {torch.cuda.get_device_name(device)}, because "
            f"torch's grouped_mm needs compute capability {'.'.join(map(str, CAPABILITY))}"
        )


def choose(
    model: nn.Module, names: Sequence[str], number: int, masks: Tensor | Sequence[Tensor] | None
) -> dict[str, Tensor]:
    """Returns which experts are copied, as bool [E] on the CPU by the names of experts modules.

    Modules whose experts cannot be split between CPU and device are left out.

    Raises:
        ValueError: as in :func:`ktops.offload_experts`.
    """
    sizes = {name: _num_experts(model.get_submodule(name)) for name in names}
    whole = [name for name, size in sizes.items() if size is None]
    if whole and (number or masks is not None):
        kind = type(model.get_submodule(whole[0])).__name__
        raise ValueError(
            f"offload_experts: num_gpu_experts must be 0, because ktops cannot split {whole[0]}, a {kind}"
        )
    known = {name: size for name, size in sizes.items() if size is not None}
    if masks is not None:
        return _checked(known, number, masks)
    most = min(known.values(), default=0)
    if number not in range(most + 1):
        raise ValueError(
            f"offload_experts: num_gpu_experts must be from 0 to {most}, the experts of a layer, got {number}"
        )
    return {name: torch.arange(size, device="cpu") < number for name, size in known.items()}


def _checked(sizes: dict[str, int], number: int, masks: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    if number:
        raise ValueError(f"offload_experts: num_gpu_experts must be 0 with gpu_experts_mask, got {number}")
    masks = [torch.as_tensor(mask, device="cpu") for mask in masks]
    if len(masks) != len(sizes):
        raise ValueError(
            f"offload_experts: gpu_experts_mask must have a row for each of {len(sizes)} layers with "
            f"experts, got {len(masks)}"
        )
    for (name, size), mask in zip(sizes.items(), masks, strict=True):
        if mask.dtype != torch.bool or list(mask.shape) != [size]:
            raise ValueError(
                f"offload_experts: gpu_experts_mask must be bool [{size}] for {name}, got {mask.dtype} "
                f"{list(mask.shape)}"
            )
    return dict(zip(sizes, masks, strict=True))


def bytes_of_copies(experts: nn.Module, chosen: Tensor) -> int:
    """Returns the bytes of dense copies of the chosen experts, bool [E]."""
    layout, *weights = operands(experts)
    biases = (bias for bias in layout.biases(experts) if bias is not None)
    tensors = [(tensor.shape[1:].numel(), tensor.dtype.itemsize) for tensor in (*weights, *biases)]
    return int(chosen.sum()) * sum(numel * size for numel, size in tensors)


def _num_experts(experts: nn.Module) -> int | None:
    """Returns E, None for experts that do not take the routes of all tokens."""
    try:
        return operands(experts)[2].shape[0]
    except Unsupported:
        return None
