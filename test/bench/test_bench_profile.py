"""``python -m bench.profile``: the FLOPs of the steps add up to those of the whole."""

import pytest
import torch

from bench import profile
from bench.layer import Layer, Variant
from bench.roofline import forward_work, training_work
from bench.shapes import Shape

SHAPE = Shape("small", 64, 48, 8, 2)


@pytest.mark.parametrize("mode, whole", [("forward", forward_work), ("training", training_work)])
@pytest.mark.parametrize("rank", [0, 4])
def test_steps_do_all_the_work(mode, whole, rank):
    layer = Layer(SHAPE, seed=0)
    steps, experts = profile.profile_calls(mode, layer, 40, rank, calls=2)
    work = profile.step_work(SHAPE, 40, experts, rank)
    known = [work[step.op, step.name] for step in steps if (step.op, step.name) in work]
    assert sum(w.flops for w in known) == whole(SHAPE, 40, experts, Variant(rank)).flops
    weights = 2 * experts * SHAPE.expert_elements * (2 if mode == "training" else 1)
    assert sum(w.bytes for w in known) >= weights
    assert all(step.wall > 0 for step in steps)


def test_table(capsys):
    threads = torch.get_num_threads()
    arguments = [
        "--shape",
        "64,48,8,2",
        "--tokens",
        "3",
        "40",
        "--rank",
        "4",
        "--isa",
        "scalar",
        "--calls",
        "1",
        "--threads",
    ]
    assert profile.main([*arguments, str(threads)]) == 0
    out = capsys.readouterr().out
    assert out.count("combine_x") == 2 and "T=40 scalar" in out
    (line,) = [line for line in out.splitlines()[:20] if " gate_up " in line]
    *_, fraction, path, blocks = line.split()
    assert float(fraction) > 0 and path == "dots" and int(blocks) > 0
