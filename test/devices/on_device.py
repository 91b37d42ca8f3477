"""A pytest plugin that runs the tests of ``ktops.moe_sft`` with tokens and routes on the simulated device.

Each call copies them there and copies its result back, so that tests need not know. Only the kernels that
ktops chooses by itself run.
"""

import ktops
from ktops.testing import isa, simulated_device

simulated_device.register()
isa.available_isas = lambda: [ktops.cpu_capability()]

_moe_sft = ktops.moe_sft


def moe_sft(hidden_states, topk_ids, topk_weights, *args, **options):
    device = simulated_device.device()
    weights = None if topk_weights is None else topk_weights.to(device)
    output = _moe_sft(hidden_states.to(device), topk_ids.to(device), weights, *args, **options)
    assert output.device == device
    return output.cpu()


ktops.moe_sft = moe_sft
