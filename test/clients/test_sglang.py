"""SGLang's own wrapper of kt_kernel, which computes on the CPU the experts that its GPU does not hold.

SGLang needs a GPU. Here its module ``kt_ep_wrapper`` runs beside stand-ins for the rest and for the GPU.
"""

import importlib.metadata
import importlib.util
import re
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from compare import example
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ktops import compat

LAYERS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, TOKENS = 2, 6, 2, 64, 96, 9
ON_GPU = 2
NAMES = ("gate_proj", "up_proj", "down_proj")

TopK = namedtuple("TopK", "topk_weights topk_ids router_logits")
Dispatched = namedtuple("Dispatched", "hidden_states topk_output")


def weights(layer: int) -> dict[str, Tensor]:
    """Returns the experts of a layer: gate_proj and up_proj [E, I, H], down_proj [E, H, I]."""
    generator = torch.Generator().manual_seed(layer)
    shapes = (INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    return {
        name: (torch.randn(EXPERTS, *shape, generator=generator) / shape[1] ** 0.5).bfloat16()
        for name, shape in zip(NAMES, shapes, strict=True)
    }


def experts(layer: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """Returns the output of a layer's experts; routes to -1 contribute nothing."""
    gate, up, down = (weights(layer)[name].double() for name in NAMES)
    x = hidden_states.double()
    every = (F.silu(x @ gate.mT) * (x @ up.mT)) @ down.mT
    routes = torch.zeros(len(x), EXPERTS + 1, dtype=torch.float64)
    routes.scatter_add_(1, topk_ids.long() % (EXPERTS + 1), topk_weights.double())
    return torch.einsum("eth,te->th", every, routes[:, :-1])


class OnGpu:
    """A method of SGLang's for the experts that the GPU holds."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def create_weights(self, num_experts: int, **_) -> None:
        assert num_experts == ON_GPU

    def create_moe_runner(self, layer, config) -> None:
        assert config.num_local_experts == ON_GPU

    def apply(self, layer, dispatched: Dispatched):
        topk = dispatched.topk_output
        assert topk.topk_ids.max() < ON_GPU
        output = experts(self.layer, dispatched.hidden_states, topk.topk_ids, topk.topk_weights)
        return SimpleNamespace(hidden_states=output.to(dispatched.hidden_states.dtype))


@pytest.fixture
def options(tmp_path):
    """The documented options of the server, with a checkpoint of the experts."""
    tensors = {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight": stack[expert].contiguous()
        for layer in range(LAYERS)
        for name, stack in weights(layer).items()
        for expert in range(EXPERTS)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    tiny = {"kt_weight_path": str(tmp_path), "kt_num_gpu_experts": ON_GPU, "kt_cpuinfer": 2}
    documented = dict(re.findall(r"--(kt-[\w-]+) (\S+)", example("sglang", {})))
    given = {name.replace("-", "_"): value for name, value in documented.items()}
    known = re.findall(r"^    (kt_\w+): ", source("arg_groups.fields.exec_").read_text(), re.MULTILINE)
    assert tiny.keys() <= given.keys() <= set(known)
    return SimpleNamespace(kt_threadpool_count=2, kt_max_deferred_experts_per_token=None, **{**given, **tiny})


def source(name: str) -> Path:
    """Returns a file of the wheel."""
    path = f"sglang/srt/{name.replace('.', '/')}.py"
    return Path(str(importlib.metadata.distribution("sglang").locate_file(path)))


@pytest.fixture
def sglang(options, monkeypatch):
    """SGLang's module, as it is in the wheel."""

    def stand_in(name: str, **attributes) -> None:
        module = ModuleType(name)
        module.__dict__.update(attributes, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)

    for name in (
        "sglang", "sglang.srt", "sglang.srt.arg_groups", "sglang.srt.eplb", "sglang.srt.layers",
        "sglang.srt.layers.moe", "sglang.srt.layers.quantization",
    ):  # fmt: skip
        stand_in(name)
    config = SimpleNamespace(hf_config=SimpleNamespace(num_hidden_layers=LAYERS))
    places = SimpleNamespace(physical_to_logical_map_cpu=torch.arange(EXPERTS).repeat(LAYERS, 1))
    stand_in("sglang.srt.arg_groups.overrides", model_config_of=lambda _: config)
    stand_in("sglang.srt.layers.quantization.base_config", FusedMoEMethodBase=object)
    stand_in("sglang.srt.utils", get_compiler_backend=lambda: "eager")
    stand_in("sglang.srt.layers.moe.token_dispatcher", StandardCombineInput=SimpleNamespace)
    bypassed = SimpleNamespace(format_is_bypassed=lambda _: False)
    stand_in("sglang.srt.layers.moe.topk", TopKOutputChecker=bypassed)
    stand_in("sglang.srt.eplb.expert_location_dispatch", get_global_expert_location_metadata=lambda: places)
    stand_in(
        "sglang.srt.runtime_context",
        get_exec=lambda: SimpleNamespace(moe=options),
        get_parallel=lambda: SimpleNamespace(tp_rank=0),
        get_schedule=lambda: SimpleNamespace(chunked_prefill_size=512),
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    name = "sglang.srt.layers.moe.kt_ep_wrapper"
    spec = importlib.util.spec_from_file_location(name, source("layers.moe.kt_ep_wrapper"))
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    compat.install()
    spec.loader.exec_module(module)
    yield module
    compat.uninstall()


@pytest.mark.parametrize("deferred", [0, 1])
def test_computes_the_experts_that_the_gpu_does_not_hold(sglang, options, deferred):
    assert sglang.KTRANSFORMERS_AVAILABLE
    options.kt_max_deferred_experts_per_token = deferred
    generator = torch.Generator().manual_seed(7)
    hidden_states = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    scores = torch.rand(TOKENS, EXPERTS, generator=generator).softmax(-1)
    topk_weights, topk_ids = scores.topk(TOP_K)
    actual, expected = 0, 0
    layer = SimpleNamespace(top_k=TOP_K, intermediate_size_per_partition=INTERMEDIATE, moe_tp_size=1)
    made = []
    for index in range(LAYERS):
        method = sglang.KTEPWrapperMethod(OnGpu(index), sglang.create_kt_config_from_server_args(None, index))
        method.create_weights(layer, EXPERTS, HIDDEN, INTERMEDIATE, torch.bfloat16)
        method.process_weights_after_loading(layer)
        method.create_moe_runner(layer, SimpleNamespace(activation="silu", num_local_experts=EXPERTS))
        made.append(method)
    for index, method in enumerate(made):
        dispatched = Dispatched(hidden_states, TopK(topk_weights, topk_ids.int(), None))
        actual = actual + method.apply(layer, dispatched).hidden_states.double()
        expected = expected + experts(index, hidden_states, topk_ids, topk_weights)
    assert (actual - expected).norm() < 0.01 * expected.norm()
