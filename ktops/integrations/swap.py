"""swap_experts: replaces experts modules to run the op in models without transformers' experts interface."""

import inspect
import warnings
from collections import defaultdict
from typing import cast

import torch
from torch import nn

from ktops.integrations import data_parallel, peft
from ktops.integrations.probe import disagreement_of_expert, disagreement_of_experts
from ktops.integrations.sharded_experts import why_sharded
from ktops.integrations.transformers import outside
from ktops.integrations.transformers.architectures import (
    Unsupported,
    activation_name,
    class_name,
    in_interface,
    require_activation,
    require_weights,
)
from ktops.integrations.transformers.coverage import experts_outside_op
from ktops.nn.expert_list import (
    ACTIVATION_NAMES,
    PROJECTION_NAMES,
    KTExpert,
    KTExpertList,
    gating_of,
    interception,
    is_plain_linear,
)
from ktops.nn.expert_sequence import KTExpertSequence
from ktops.nn.experts import SAVE, KTExperts, check_name
from ktops.nn.find import find_experts, has_stacks
from ktops.nn.frozen_lora import FROZEN_LORA
from ktops.nn.host_memory import is_kept, keep_in_host_memory


def swap_experts(model: nn.Module, *, save: str = "activations") -> list[str]:
    """Replaces every experts module of a model with one that runs the op, in place.

    * Experts with stacked parameters ``gate_up_proj`` (or ``up_proj``) and ``down_proj`` become a
      :class:`ktops.nn.KTExperts` that holds the same Parameters.
    * A ModuleList of experts (gate_proj, up_proj, down_proj or w1, w3, w2, or two linear layers without a
      gate) becomes a :class:`ktops.nn.KTExpertList` of the same modules. The Parameters stay the same
      objects; their storage moves, expert by expert, into stacked tensors. The MoE block still iterates the
      list and runs one op per expert. Blocks with DeepSeek's ``moe_infer(x, topk_ids, topk_weight)`` run one
      op per layer in evaluation mode.
    * The experts of Llama-4, LongCat-Flash, DBRX, Switch Transformers and NLLB-MoE, and the MoE block of
      JetMoE, become modules that take their arguments.

    Routers, other MoE blocks, state-dict keys and Parameters stay the same. If a module does not declare its
    layout, a test on random rows first checks that it computes what the op computes. Experts modules that
    the op does not support are left unchanged, and one warning names them and the reasons. PEFT's LoRA on
    stacked parameters also runs through the op, as after :func:`ktops.enable`.

    Args:
        model: on the CPU, in float32, bfloat16, float16 or float64. May have PEFT adapters.
        save: what forward saves for backward, "activations" or "recompute"; see :func:`ktops.moe_sft`.

    Returns:
        The names of the modules that this call swapped.

    Raises:
        ValueError: the model has no experts; unknown ``save``.

    Example:
        >>> ktops.swap_experts(model)
        ['model.layers.0.mlp.experts', 'model.layers.1.mlp.experts']
    """
    check_name("swap_experts", "save", save, SAVE)
    found = require_experts(model, "swap_experts")
    swapped, refused = [], defaultdict(list)
    for name, module in found.items():
        if outside.is_replacement(module):
            continue
        try:
            replacement = _replacement(module, save)
        except Unsupported as reason:
            refused[class_name(module), str(reason)].append(name)
            continue
        _replace(model, module, replacement)
        swapped.append(name)
    if refused:
        _warn_refused(model, refused)
    if swapped:
        peft.enable_if_installed()
    return swapped


def unswap_experts(model: nn.Module) -> list[str]:
    """Restores the modules that :func:`swap_experts` replaced, with the current Parameters.

    Returns:
        The names of the restored modules.

    Example:
        >>> ktops.swap_experts(model)
        >>> trainer.train()
        >>> ktops.unswap_experts(model)
    """
    names = []
    for name, module in list(model.named_modules()):
        replaced = module.__dict__.get("_replaced")
        if replaced is None:
            continue
        (original,) = replaced
        if isinstance(module, KTExpertList):
            for name_in_list, child in module._modules.items():
                original._modules[name_in_list]._modules.update(child._modules)
        elif isinstance(module, outside.ForwardReplacement):
            module.release()
        else:
            original._parameters.update(module._parameters)
        original.train(module.training)
        exchange(model, module, original)
        names.append(name)
    return names


def require_experts(model: nn.Module, function: str) -> dict[str, nn.Module]:
    """Returns what :func:`ktops.nn.find.find_experts` finds.

    Raises:
        ValueError: it finds nothing; the message begins with the name of the calling function.
    """
    found = find_experts(model)
    if not found:
        raise ValueError(
            f"{function}: model must have Mixture-of-Experts layers, got {type(model).__name__} without "
            "modules named `experts` and without stacked `gate_up_proj` and `down_proj` parameters. "
            "docs/models.md lists the models that ktops supports."
        )
    return found


def experts_in_op(model: nn.Module, function: str) -> tuple[list[str], dict[str, str]]:
    """Returns the names of the experts modules that the op runs, and name -> reason of the others.

    Raises:
        ValueError: it runs none; the message begins with the name of the calling function.
    """
    found = require_experts(model, function)
    _, outside_op = experts_outside_op(model)
    names = [name for name in found if name not in outside_op]
    if not names:
        raise ValueError(
            f"{function}: ktops runs none of the experts of {type(model).__name__}: "
            f"{'; '.join(sorted(set(outside_op.values())))}. docs/models.md lists the models that it supports"
        )
    return names, outside_op


def _replacement(module: nn.Module, save: str) -> nn.Module:
    name = class_name(module)
    if name in outside.OTHERS:
        require_plain(module)
        return outside.OTHERS[name](module, save)
    if isinstance(module, nn.ModuleList) or name in outside.DICTS:
        return _expert_list(module, save)
    return stacked_experts(module, save)


def require_plain(module: nn.Module) -> None:
    """Raises Unsupported if the module has hooks, a replaced forward or a frozen adapter, which a replacement
    would lose."""
    if FROZEN_LORA in module._modules:
        raise Unsupported("they have a frozen adapter")
    reason = why_sharded(module) or interception(module)
    if reason is not None:
        raise Unsupported(reason)


def stacked_experts(module: nn.Module, save: str) -> KTExperts:
    """Returns a KTExperts with the Parameters of an experts module with stacked weights, which is unchanged.

    Raises:
        Unsupported: the op does not compute what the module computes, or the module has hooks.
    """
    require_plain(module)
    if not has_stacks(module):
        raise Unsupported(
            "its weights are neither stacked, gate_up_proj (or up_proj) and down_proj, nor a ModuleList of "
            "MLPs"
        )
    kind, layout = outside.describe_replacement(module, check_weights=True)
    first, norm = layout.function.first_name, layout.norm(module)
    known = {first, "down_proj", f"{first}_bias", "down_proj_bias"}
    known |= (
        {f"post_expert_norm.{name}" for name, _ in norm.named_parameters()} if norm is not None else set()
    )
    others = set(dict(module.named_parameters())) - known
    if others:
        raise Unsupported(f"it has other parameters: {', '.join(sorted(others))}")
    experts = kind.from_parameters(
        module.get_parameter(first),
        module.get_parameter("down_proj"),
        *layout.biases(module),
        **layout.function._asdict(),
        transposed=layout.transposed,
        post_expert_norm=norm,
        save=save,
    )
    if not in_interface(module) and kind is KTExperts:
        difference = disagreement_of_experts(module, experts)
        if difference:
            raise Unsupported(difference)
    return experts.train(module.training)


def _expert_list(experts: nn.Module, save: str) -> KTExpertList:
    listed = listed_experts(experts, save)
    kind = outside.DICTS.get(class_name(experts))
    made = KTExpertList(listed) if kind is None else kind(listed, experts)
    made.training = experts.training
    return made


def listed_experts(
    experts: nn.Module, save: str = "activations", *, any_device: bool = False
) -> list[KTExpert]:
    """Returns the experts of a list as KTExpert that share their child modules; moves no weights.

    Args:
        experts: a ModuleList, or a ModuleDict of a class in ``outside.DICTS``.
        save: as in :func:`swap_experts`.
        any_device: whether their weights, which will be replaced, may be on a device other than the CPU.

    Raises:
        Unsupported: the op does not compute what they compute, or they have hooks.
    """
    require_plain(experts)
    if isinstance(experts, outside.ExpertDict):
        raise Unsupported("its MoE block calls it with routes of its own kind")
    if isinstance(experts, KTExpertList):
        listed = list(experts)
        if not all(is_plain_linear(projection) for expert in listed for projection in expert.projections()):
            raise Unsupported("its projections are not plain nn.Linear: they have adapters or hooks")
        return listed
    modules = [cast(nn.Module, experts._modules[name]) for name in outside.expert_names(experts)]
    names, attribute, activation = _check_experts(modules, any_device)
    made = [KTExpert(expert, names, attribute, activation, save) for expert in modules]
    difference = disagreement_of_expert(modules[0], made[0])
    if difference:
        raise Unsupported(difference)
    return made


def _check_experts(experts: list[nn.Module], any_device: bool) -> tuple[tuple[str, ...], str, str]:
    """Returns the projections' names and the activation's attribute and name, common to all experts."""
    if not experts or any(expert is None or type(expert) is not type(experts[0]) for expert in experts):
        raise Unsupported("its experts are not all modules of one class")
    first = type(experts[0]).__qualname__
    names = next(
        (names for names in PROJECTION_NAMES if all(hasattr(experts[0], name) for name in names)), None
    )
    if names is None:
        raise Unsupported(
            f"its experts, {first}, have no {' or '.join('/'.join(p) for p in PROJECTION_NAMES)}"
        )
    attribute = next((name for name in ACTIVATION_NAMES if hasattr(experts[0], name)), None)
    if attribute is None:
        raise Unsupported(f"its experts, {first}, have no {' or '.join(ACTIVATION_NAMES)}")
    described = {_describe(expert, names, attribute) for expert in experts}
    if len(described) != 1:
        raise Unsupported(f"its experts, {first}, differ in shape, dtype, bias or activation")
    _, plain, biased, _ = described.pop()
    activation = require_activation(getattr(experts[0], attribute))
    if not plain:
        raise Unsupported(f"its experts, {first}, are more than {len(names)} nn.Linear without hooks")
    if len(set(biased)) != 1:
        raise Unsupported(f"only some projections of its experts, {first}, have a bias")
    *first_weights, down = (getattr(experts[0], name).weight for name in names)
    if any(weight.shape != down.shape[::-1] for weight in first_weights):
        raise Unsupported(f"the projections of its experts, {first}, do not fit together")
    gate = first_weights[0]
    one = torch.empty(1, 1, 1, dtype=gate.dtype, device="cpu" if any_device else gate.device)
    require_weights(
        one.expand(1, len(first_weights) * gate.shape[0], gate.shape[1]),
        one.to(down.dtype).expand(1, *down.shape),
        gating_of(names),
    )
    return names, attribute, activation


def _describe(expert: nn.Module, names: tuple[str, ...], attribute: str) -> tuple:
    """Returns what all experts of a list must share: activation, plainness, biases, shapes and dtypes."""
    projections = [getattr(expert, name) for name in names]
    parameters = dict(expert.named_parameters())
    own = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    plain = (
        all(map(is_plain_linear, projections)) and parameters.keys() <= own and interception(expert) is None
    )
    biased = tuple(getattr(projection, "bias", None) is not None for projection in projections)
    layout = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in parameters.items())
    return activation_name(getattr(expert, attribute)), plain, biased, layout


def _replace(model: nn.Module, module: nn.Module, replacement: nn.Module) -> None:
    replacement.__dict__["_replaced"] = (module,)
    exchange(model, module, replacement)


def exchange(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replaces ``old`` with ``new`` wherever it is a child, and the ``moe_infer`` of blocks that have one."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not old:
                continue
            setattr(parent, name, new)
            if is_kept(old):
                keep_in_host_memory(new)
            if isinstance(new, (KTExpertList, KTExpertSequence)) and _has_moe_infer(parent):
                parent.__dict__["moe_infer"] = new.moe_infer
            elif isinstance(old, KTExpertList):
                parent.__dict__.pop("moe_infer", None)


def exchange_stacked(model: nn.Module, old: nn.Module, new: KTExperts) -> None:
    """Replaces ``old`` with stacked experts, in a KTExpertSequence if they replace a ModuleList.

    Their weights are in formats, which never leave CPU memory, so their biases and adapters stay, too.
    """
    keep_in_host_memory(new)
    data_parallel.enable()
    is_list = isinstance(old, nn.ModuleList) or getattr(old, "is_list", False)
    exchange(model, old, KTExpertSequence(new) if is_list else new)


def _has_moe_infer(block: nn.Module) -> bool:
    method = getattr(type(block), "moe_infer", None)
    return method is not None and list(inspect.signature(method).parameters) == [
        "self",
        "x",
        "topk_ids",
        "topk_weight",
    ]


def _warn_refused(model: nn.Module, refused: dict[tuple[str, str], list[str]]) -> None:
    lines = [
        f"{kind} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}): {reason}"
        for (kind, reason), names in refused.items()
    ]
    warnings.warn(
        f"ktops.swap_experts leaves experts of {type(model).__name__} unchanged: {'; '.join(lines)}. "
        "docs/models.md lists the models that ktops supports.",
        stacklevel=3,
    )
