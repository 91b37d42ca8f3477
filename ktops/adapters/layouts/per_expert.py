"""The keys of single experts, which vLLM, SGLang and llama.cpp's converter read.

``base_model.model.{experts}.{e}.{gate_proj, up_proj, down_proj}.lora_A.weight`` [r, in], ``lora_B`` [out, r].
These programs read one rank and one alpha, and need all projections of all experts of a layer, so ranks are
padded with zeros, and other scalings are multiplied into B. For some models, vLLM reads the stacked
factors of PEFT instead.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ktops.adapters.adapter import Adapter
from ktops.adapters.base import PROJECTION_NAMES
from ktops.adapters.config import WEIGHTS
from ktops.adapters.errors import AdapterError
from ktops.adapters.factors import PROJECTIONS, Factors, zeros
from ktops.adapters.layouts import peft
from ktops.adapters.layouts.plan import (
    Named,
    Piece,
    Plan,
    Scale,
    config_for,
    factor_names,
    left_out,
    other_weights,
    parts_of_experts,
    projections,
)
from ktops.ops.activation import INTERLEAVED, UNGATED

STACKED_IN_VLLM = {
    "GptOssForCausalLM", "InternS1ProForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
}  # fmt: skip
"""The architectures for which vLLM reads stacked factors: its classes with ``is_3d_moe_weight``."""

_JOINED_IN_SGLANG = (
    ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"),
)  # fmt: skip

Names = Callable[[str], tuple[str, tuple[str, ...]]]
"""Returns the name of a layer's experts, and those of their gate, up and down projections."""


def for_vllm(adapter: Adapter) -> Plan:
    """Plans files for vLLM."""
    architectures = adapter.base.config.get("architectures") or []
    if adapter.experts and not STACKED_IN_VLLM.isdisjoint(architectures):
        return peft.plan_uniform(adapter, "vLLM")
    return _plan(adapter, "vLLM", adapter.base.published)


def for_sglang(adapter: Adapter) -> Plan:
    """Plans files for SGLang, which uses the same names for all models.

    SGLang joins the factors of some weights, and fails or skips them if some are missing.
    """
    updates = dict(adapter.weights)
    for name, part in adapter.weights.items():
        block, _, word = name.rpartition(".")
        for joined in _JOINED_IN_SGLANG:
            for other in joined if word in joined else ():
                sibling = f"{block}.{other}"
                if sibling in adapter.base.weights and sibling not in updates:
                    updates[sibling] = zeros(part.rank, *adapter.base.weights[sibling], like=part)
    adapter = replace(adapter, weights=updates)
    return _plan(adapter, "SGLang", lambda module: (module, PROJECTION_NAMES))


def for_llama_cpp(adapter: Adapter) -> Plan:
    """Plans files for convert_lora_to_gguf.py of llama.cpp.

    Raises:
        AdapterError: the converter cannot read factors of such experts.
    """
    for module in adapter.experts:
        if adapter.base.experts[module].gating == INTERLEAVED:
            raise AdapterError(
                f"{adapter.path}: llama.cpp's converter cannot read adapters of {module}, whose gate and "
                "up alternate. Merge the adapter into the model and convert that"
            )
    split = [name for name in adapter.weights if name.endswith(".kv_b_proj")]
    if split:
        raise AdapterError(
            f"{adapter.path}: llama.cpp's converter cannot read the adapter of {split[0]}, which it splits. "
            "Merge the adapter into the model and convert that"
        )
    return _plan(adapter, "llama.cpp", adapter.base.published)


def _plan(adapter: Adapter, program: str, names: Names) -> Plan:
    parts = [*adapter.weights.values(), *parts_of_experts(adapter)]
    scale = Scale.of(parts)
    pieces = list(other_weights(adapter, scale, published=program != "SGLang"))
    targets = {name.rpartition(".")[2] for name in adapter.weights}
    for module in adapter.experts:
        experts, words = names(module)
        gated = adapter.base.experts[module].gating != UNGATED
        used = dict(zip(PROJECTIONS, words, strict=True))
        if not gated:
            del used["gate"]
        targets.update(used.values())
        for projection, part in projections(adapter, module, used, scale.rank).items():
            pieces.append(_of_experts(experts, used[projection], part, scale))
    return Plan({WEIGHTS: pieces}, config_for(adapter, scale, targets), left_out(adapter, program))


def _of_experts(experts: str, word: str, part: Factors, scale: Scale) -> Piece:
    """Returns the tensors of a projection of all experts of a layer."""
    assert part.num_experts is not None
    names = [factor_names(f"{experts}.{expert}.{word}") for expert in range(part.num_experts)]
    dtypes = part.scaled_dtypes(scale.scaling)
    shapes = (scale.rank, part.in_features), (part.out_features, scale.rank)
    kinds = {
        name: (dtype, shape)
        for pair in names
        for name, dtype, shape in zip(pair, dtypes, shapes, strict=True)
    }
    return Piece(kinds, partial(_make, names, part, scale))


def _make(names: list[tuple[str, str]], part: Factors, scale: Scale) -> Named:
    a, b = (tensor.contiguous() for tensor in part.scaled(scale.rank, scale.scaling))
    for expert, (name_a, name_b) in enumerate(names):
        yield name_a, a[expert]
        yield name_b, b[expert]
