"""KTExperts with other parts of PyTorch: loss scaling, DDP, threads, checkpointing, weights used twice."""

import copy
import threading
import time

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import ktops
from ktops.nn import KTExperts
from ktops.testing.budgets import gradient_budget, relative_error

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 16, 12, 4, 2, 6


class Block(nn.Module):
    """A router and its experts, with a residual."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
            self.experts = KTExperts(EXPERTS, HIDDEN, INTERMEDIATE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K)
        return x + self.experts(x, ids, weights)


def batch(seed: int = 0) -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def step(model: nn.Module, seed: int = 0) -> list[torch.Tensor]:
    return gradients(model, model(batch(seed)).square().mean())


def assert_bitwise(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def assert_close(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) <= gradient_budget(torch.float32, inner_size=HIDDEN)


def test_one_module_used_twice_in_a_forward():
    tied = Block()
    first, second = Block(), Block()
    actual = step(nn.Sequential(tied, tied))
    expected = step(nn.Sequential(first, second))
    half = len(expected) // 2
    assert_close(actual, [a + b for a, b in zip(expected[:half], expected[half:], strict=True)])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_sequential(use_reentrant):
    model = nn.Sequential(Block(0), Block(1), Block(2))
    x = batch().requires_grad_()
    model(x).square().mean().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    checkpoint_sequential(model, 2, x, use_reentrant=use_reentrant).square().mean().backward()
    assert_bitwise([p.grad for p in model.parameters()], expected)


def test_nested_checkpoints():
    model = nn.Sequential(Block(0), Block(1))

    def inner(x):
        return checkpoint(model[1], x, use_reentrant=False)

    def outer(x):
        return inner(model[0](x))

    x = batch().requires_grad_()
    loss = checkpoint(outer, x, use_reentrant=False).square().mean()
    assert_bitwise(gradients(model, loss), step(model))


def test_checkpoint_of_what_saves_nothing():
    block, other = Block(), Block()
    other.experts.save = "recompute"
    x = batch().requires_grad_()
    loss = checkpoint(other, x, use_reentrant=False, context_fn=ktops.checkpoint_context_fn).square().mean()
    assert_close(gradients(other, loss), step(block))


def test_grad_scaler():
    block = Block()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    expected = [p.detach() - 0.1 * g for p, g in zip(block.parameters(), step(block), strict=True)]
    scaler.scale(block(batch()).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_close([p.detach() for p in block.parameters()], expected)


def test_distributed_data_parallel(tmp_path):
    block = Block()
    expected = step(block)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(block))
        with model.no_sync():
            model(batch()).square().mean().backward()
        model(batch()).square().mean().backward()
        assert_close([p.grad for p in model.parameters()], [2 * g for g in expected])
    finally:
        # destroy_process_group waits for a thread, with the GIL, which that needs to free the last reduction.
        time.sleep(0.1)
        torch.distributed.destroy_process_group()


def test_threads_train_their_own_models():
    models = [Block(seed) for seed in range(3)]
    expected = [step(model, seed) for seed, model in enumerate(models)]
    results: dict[int, list[torch.Tensor]] = {}

    def work(seed: int) -> None:
        for _ in range(5):
            results[seed] = step(models[seed], seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, value in enumerate(expected):
        assert_bitwise(results[seed], value)


def test_backward_in_another_thread():
    block = Block()
    loss = block(batch()).square().mean()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert_bitwise([p.grad for p in block.parameters()], step(block))


def test_deepcopy_between_forward_and_backward():
    block = Block()
    loss = block(batch()).square().mean()
    duplicate = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.zero_()
    assert_bitwise(gradients(block, loss), step(block))
    assert all(
        p.data_ptr() != q.data_ptr() for p, q in zip(block.parameters(), duplicate.parameters(), strict=True)
    )


def test_an_optimizer_step_between_forward_and_backward_is_noticed():
    block = Block()
    loss = block(batch()).square().mean()
    with torch.no_grad():
        block.experts.down_proj.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_training_lowers_the_loss():
    model = nn.Sequential(Block(0), Block(1))
    target = batch(9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (model(batch()) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
