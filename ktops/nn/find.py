"""Finds the experts modules of a model."""

from torch import nn

from ktops.nn.expert_list import KTExpertList
from ktops.nn.expert_sequence import KTExpertSequence
from ktops.nn.experts import KTExperts


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the outermost experts modules by name, without any nested inside them.

    A block that holds its experts as grouped linear layers around an activation (JetMoE) counts as their
    module. Grouped linear layers without one (its attention) are no experts.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if name and any(name.startswith(f"{outer}.") for outer in found):
            continue
        if isinstance(module, KTExpertSequence):  # its stacked experts are found instead
            continue
        if _has_grouped_linears(module):
            if "activation" in module._modules:
                found[name] = module
            continue
        is_named_so = name.rpartition(".")[2] == "experts" and not hasattr(module, "base_layer")
        if is_named_so or isinstance(module, (KTExperts, KTExpertList)) or has_stacks(module):
            found[name] = module
    return found


def has_stacks(module: nn.Module) -> bool:
    """True if the module holds the weights of all experts in stacked parameters."""
    stacks = {
        name
        for name in ("gate_up_proj", "up_proj", "down_proj")
        if (parameter := module._parameters.get(name)) is not None and parameter.dim() == 3
    }
    return "down_proj" in stacks and len(stacks) == 2 and "gate_proj" not in module._parameters


def _has_grouped_linears(module: nn.Module) -> bool:
    layers = (module._modules.get(name) for name in ("input_linear", "output_linear"))
    weights = [layer._parameters.get("weight") for layer in layers if layer is not None]
    return len(weights) == 2 and all(weight is not None and weight.dim() == 3 for weight in weights)


def without_base_layer(name: str) -> str:
    """Returns the name that a tensor or module has without PEFT's adapters."""
    return name.replace(".base_layer", "")
