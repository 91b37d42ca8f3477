"""Small experts in bfloat16 or a weight format, and their tokens."""

import torch

import ktops
from ktops.nn import KTExperts

E, H, I, K, T = 4, 64, 32, 2, 5  # noqa: E741


def make(weight_format: str | None = None, **options) -> KTExperts:
    torch.manual_seed(0)
    experts = KTExperts(E, H, I, dtype=torch.bfloat16, **options).eval()
    if weight_format is None:
        return experts
    first, down, *biases = experts.parameters()
    weights = (ktops.quantize(weight.detach(), weight_format, group_size=32) for weight in (first, down))
    options.pop("bias", None)
    return KTExperts.from_parameters(*weights, *biases, **options).eval()


def tokens(number: int = T):
    generator = torch.Generator().manual_seed(1)
    weights, ids = torch.rand(number, E, generator=generator).topk(K)
    return torch.randn(number, H, generator=generator).bfloat16(), ids, weights
