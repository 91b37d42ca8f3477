"""Compares the work model with PyTorch's own FLOP counter and with sums written out by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.layer import Variant
from bench.roofline import Limits, Work, forward_work, training_work
from bench.shapes import SHAPES, Shape, parse_shape

TOKENS = 5


def count_flops(hidden_size: int, intermediate_size: int, rank: int, training: bool, full=False) -> int:
    """Counts the FLOPs of one expert in plain PyTorch, with frozen base weights or, if full, all trained."""
    x = torch.randn(TOKENS, hidden_size, requires_grad=training)
    sizes = (2 * intermediate_size, hidden_size), (hidden_size, intermediate_size)
    base = [torch.randn(size, requires_grad=full) for size in sizes]
    lora = [
        torch.randn(size, requires_grad=training)
        for size in (
            (rank, hidden_size),
            (2 * intermediate_size, rank),
            (rank, intermediate_size),
            (hidden_size, rank),
        )
    ]

    def linear(x, weight, a, b):
        return x @ weight.T + (x @ a.T) @ b.T if rank else x @ weight.T

    with FlopCounterMode(display=False) as counter:
        g, u = linear(x, base[0], *lora[:2]).split(intermediate_size, dim=1)
        y = linear(torch.nn.functional.silu(g) * u, base[1], *lora[2:])
        if training:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("rank", [0, 1, 7])
@pytest.mark.parametrize(("training", "work"), [(False, forward_work), (True, training_work)])
def test_flops_match_the_counter_of_pytorch(training, work, rank):
    shape = Shape("one expert", 24, 10, 1, 1)
    assert work(shape, TOKENS, 1, Variant(rank)).flops == count_flops(24, 10, rank, training)


@pytest.mark.parametrize("rank", [0, 7])
def test_full_fine_tuning_adds_the_gradients_of_the_weights(rank):
    shape = Shape("one expert", 24, 10, 1, 1)
    work = training_work(shape, TOKENS, 1, Variant(rank, full=True))
    assert work.flops == count_flops(24, 10, rank, training=True, full=True)
    assert work.bytes - training_work(shape, TOKENS, 1, Variant(rank)).bytes == 2 * 3 * 24 * 10


def test_recompute_adds_the_product_with_gate_up():
    shape = Shape("small", 10, 4, 8, 2)
    recompute, activations = (training_work(shape, 7, 5, Variant(3, save)) for save in ("recompute", ""))
    assert recompute.flops - activations.flops == 2 * 14 * 8 * 10
    assert recompute.bytes - activations.bytes == 2 * 5 * 8 * 10


def test_flops_of_the_base_weights():
    for shape in SHAPES.values():
        thi = 128 * shape.top_k * shape.hidden_size * shape.intermediate_size
        assert forward_work(shape, 128, 1, Variant()).flops == 6 * thi
        assert training_work(shape, 128, 1, Variant()).flops == 12 * thi


def test_bytes_count_every_routed_expert_once():
    shape = Shape("small", 10, 4, 8, 2)
    weights, lora = 3 * 10 * 4, 3 * (10 + 8) + 3 * (4 + 10)
    assert forward_work(shape, 7, 5, Variant(), itemsize=4).bytes == 4 * (5 * weights + 2 * 7 * 10)
    assert forward_work(shape, 7, 5, Variant(3)).bytes == 2 * (5 * (weights + lora) + 2 * 7 * 10)


def test_training_reads_the_weights_twice_and_writes_the_adapter_gradients():
    shape = Shape("small", 10, 4, 8, 2)
    weights, lora = 3 * 10 * 4, 3 * (10 + 8) + 3 * (4 + 10)
    assert training_work(shape, 7, 5, Variant(3)).bytes == 2 * (5 * (2 * weights + 3 * lora) + 5 * 7 * 10)


def test_roofline_is_the_longer_of_the_two():
    limits = Limits(peak=100.0, bandwidth=10.0)
    assert Work(flops=200, bytes=10).seconds(limits) == 2.0
    assert Work(flops=200, bytes=10).bound(limits) == "compute"
    assert Work(flops=200, bytes=50).seconds(limits) == 5.0
    assert Work(flops=200, bytes=50).bound(limits) == "memory"


def test_parse_shape():
    assert parse_shape("dsv2_lite") == Shape("dsv2_lite", 2048, 1408, 64, 6)
    assert parse_shape("64,32,8,2") == Shape("64,32,8,2", 64, 32, 8, 2)


@pytest.mark.parametrize("text", ["qwen", "1,2,3", "64,32,0,1", "64,32,2,3", "a,b,c,d"])
def test_parse_shape_names_what_is_wrong(text):
    with pytest.raises(ValueError, match="shape must"):
        parse_shape(text)
