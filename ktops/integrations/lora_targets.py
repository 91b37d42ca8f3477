"""LLaMA-Factory's ``lora_target`` in PEFT's terms: which modules and parameters of a model get adapters."""

from typing import NamedTuple

from torch import nn

from ktops.integrations.peft import expert_target_parameters

_HEADS = {"lm_head", "output_layer", "embed_out", "score"}
_ROUTERS = {"gate", "router", "shared_expert_gate"}
_MLPS = {"mlp", "ffn", "feed_forward", "block_sparse_moe"}

PROJECTIONS = {
    "gate_proj": ("gate_up_proj", "gate_proj"),
    "up_proj": ("gate_up_proj", "up_proj"),
    "gate_up_proj": ("gate_up_proj", "up_proj"),
    "down_proj": ("down_proj",),
    "w1": ("gate_up_proj", "gate_proj"),
    "w3": ("gate_up_proj", "up_proj"),
    "w2": ("down_proj",),
    "experts": ("gate_up_proj", "gate_proj", "up_proj", "down_proj"),
}
"""Name in a lora_target -> the stacked parameters of routed experts that it means."""


class LoraTargets(NamedTuple):
    """``target_modules``, as full names, and ``target_parameters`` for ``peft.LoraConfig``.

    ``target_parameters`` also holds the weights of linear layers that PEFT would not find by their names; see
    :func:`lora_targets`.
    """

    modules: list[str]
    parameters: list[str]

    def outside_experts(self, model: nn.Module) -> "LoraTargets":
        """Returns the targets without the routed experts of a model."""
        experts = expert_target_parameters(model)
        return LoraTargets(self.modules, [name for name in self.parameters if name not in experts])


def lora_targets(model: nn.Module, target: str | list[str]) -> LoraTargets:
    """Resolves a ``lora_target`` for a model.

    PEFT takes target_modules that end in down_proj, and similar names, for experts of transformers 4, and
    converts them, in architectures that had such experts. Dense layers and shared experts would then get no
    adapters, and routed experts adapters of twice the rank. So the weights of such layers are given as
    target_parameters. Their adapters have the same shapes and names in files.

    Args:
        model: a transformers model without adapters.
        target: "all": every linear layer but heads and routers, and the routed experts. "all_attention": the
            linear layers outside MLPs and experts. Otherwise a list of names of linear layers, or one string
            with commas between them; gate_proj, up_proj, down_proj, w1, w2, w3 and experts also mean the
            routed experts. Names that the model does not have are ignored if another one matches.

    Raises:
        ValueError: nothing matches; the message lists the names of the model's linear layers.

    Example:
        >>> lora_targets(model, "q_proj,down_proj")
        LoraTargets(modules=['model.layers.0.self_attn.q_proj'], parameters=['mlp.experts.down_proj'])
    """
    names = [part.strip() for part in target.split(",")] if isinstance(target, str) else list(target)
    layers = _linear_layers(model)
    parameters = expert_target_parameters(model)
    if names == ["all"]:
        found = LoraTargets(layers, parameters)
    elif names == ["all_attention"]:
        found = LoraTargets([name for name in layers if _outside_mlps(name)], [])
    else:
        stacked = {parameter for name in names for parameter in PROJECTIONS.get(name, ())}
        found = LoraTargets(
            [layer for layer in layers if any(_matches(layer, name) for name in names)],
            [name for name in parameters if name.rpartition(".")[2] in stacked],
        )
    if not found.modules and not found.parameters:
        known = sorted({name.rpartition(".")[2] for name in layers})
        raise ValueError(
            f"lora_target {','.join(names)} matches nothing in {type(model).__name__}. Use all, "
            f"all_attention, {'experts, ' * bool(parameters)}or any of {', '.join(known)}"
        )
    converted = [name for name in found.modules if name.rpartition(".")[2] in _converted(model)]
    return LoraTargets(
        [name for name in found.modules if name not in converted],
        found.parameters + [f"{name}.weight" for name in converted],
    )


def _converted(model: nn.Module) -> set[str]:
    """Returns the names of modules that PEFT converts for this model; none before PEFT 0.19."""
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        return set()
    config = LoraConfig(target_modules=list(PROJECTIONS))
    convert_peft_config_for_transformers(config, model, conversions=None)
    return PROJECTIONS.keys() - set(config.target_modules)


def _linear_layers(model: nn.Module) -> list[str]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        name
        for name, module in model.named_modules()
        if hasattr(module, "in_features")
        and hasattr(module, "out_features")
        and module is not head
        and name.rpartition(".")[2] not in _HEADS | _ROUTERS
    ]


def _outside_mlps(name: str) -> bool:
    *path, leaf = name.split(".")
    return leaf not in PROJECTIONS and not any("expert" in part or part in _MLPS for part in path)


def _matches(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")
