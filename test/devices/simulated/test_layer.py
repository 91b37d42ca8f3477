"""KTExperts behind a layer on a device: autocast, scaled losses, dtypes of tokens."""

import torch
from simulated.conftest import TOKENS, inputs
from torch import nn

import ktops


def trained(device: torch.device | str) -> list[torch.Tensor]:
    """Returns the parameters of a layer on the device and of experts on the CPU after two steps."""
    torch.manual_seed(0)
    router, experts = nn.Linear(64, 64).to(device), ktops.nn.KTExperts(4, 64, 32)
    x, ids, weights = (inputs()[name].to(device) for name in TOKENS)
    kind = torch.device(device).type
    parameters = [*router.parameters(), *experts.parameters()]
    optimizer, scaler = torch.optim.SGD(parameters, lr=0.1), torch.amp.GradScaler(kind, init_scale=2.0**10)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast(kind, dtype=torch.bfloat16):
            tokens = router(x)
            output = experts(tokens, ids, weights)
            assert tokens.dtype == output.dtype == torch.bfloat16 and output.device.type == kind
        scaler.scale(output.float().pow(2).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(p.grad is not None and p.grad.device == p.device for p in parameters)
    return [p.detach().cpu() for p in parameters]


def test_autocast_and_scaled_losses(device):
    for expected, actual in zip(trained("cpu"), trained(device), strict=True):
        assert torch.equal(actual, expected)


def test_an_overflow_of_the_scaled_loss_skips_the_step(device):
    experts = ktops.nn.KTExperts(4, 64, 32)
    before = [parameter.detach().clone() for parameter in experts.parameters()]
    optimizer, scaler = torch.optim.SGD(experts.parameters(), lr=0.1), torch.amp.GradScaler(device.type)
    output = experts(*(inputs()[name].to(device) for name in TOKENS))
    scaler.scale(output.sum() * float("inf")).backward()
    scaler.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, experts.parameters(), strict=True))


def test_tokens_in_another_dtype_than_the_experts(device):
    experts = ktops.nn.KTExperts(4, 64, 32)
    x, ids, weights = (inputs(dtype=torch.bfloat16)[name] for name in TOKENS)
    expected = experts(x, ids, weights)
    actual = experts(x.to(device), ids.to(device), weights.to(device))
    assert actual.device == device and actual.dtype == torch.bfloat16
    assert torch.equal(actual.cpu(), expected)
