"""Adds LoRA adapters to the attention and the experts of a model."""

from torch import nn

from ktops.cli.errors import UserError
from ktops.cli.finetune.options import Options
from ktops.cli.finetune.report import Report
from ktops.integrations.lora_dropout import add_dropout
from ktops.integrations.lora_targets import PROJECTIONS, LoraTargets, lora_targets
from ktops.integrations.peft import expert_target_parameters

ATTENTION = (
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj",
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
    "in_proj_qkv", "in_proj_qkvz", "in_proj_z", "in_proj_ba", "in_proj_a", "in_proj_b", "out_proj",
)  # fmt: skip
"""Names of the linear layers of attention (full, latent and linear) in transformers models."""


def targets(model: nn.Module, target: str) -> tuple[LoraTargets, list[str]]:
    """Resolves ``--target`` for a model.

    Args:
        model: a transformers model without adapters.
        target: ``all``, ``all_attention``, or names separated by commas: ``attention``, ``experts``, or names
            of linear layers such as ``q_proj``; see :func:`ktops.integrations.lora_targets.lora_targets`. A
            list may have names that are usual in other models, if the model has one of the others.

    Returns:
        The targets, and the names that are only usual in other models.

    Raises:
        UserError: a name matches nothing in this model and is not usual.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linear = {name.rpartition(".")[2] for name in layers}
    experts = expert_target_parameters(model)
    names: list[str] = []
    absent: list[str] = []
    for name in filter(None, (part.strip() for part in target.split(","))):
        if name == "experts" and not experts:
            raise UserError(
                f"--target: {type(model).__name__} has no routed experts that LoRA can reach "
                "(stacked [num_experts, ...] parameters)"
            )
        if name == "attention":
            names += [layer for layer in ATTENTION if layer in linear]
        elif (
            target.strip() in ("all", "all_attention")
            or (name in PROJECTIONS and experts)
            or any(f".{layer}".endswith(f".{name}") for layer in layers)
        ):
            names.append(name)
        elif name in ATTENTION or name in PROJECTIONS:
            absent.append(name)
        else:
            raise UserError(
                f"--target: {type(model).__name__} has no linear layers named {name!r}. Use all, "
                f"all_attention, attention, experts, or any of {', '.join(sorted(linear))}"
            )
    if not names:
        raise UserError(f"--target: {target!r} matches nothing in {type(model).__name__}")
    try:
        return lora_targets(model, names), absent
    except ValueError as error:
        raise UserError(f"--target: {error}") from None


def add_adapters(model: nn.Module, options: Options, report: Report):
    """Returns a ``peft.PeftModel`` with new LoRA adapters (B = 0) on ``--target``; the rest is frozen.

    Raises:
        UserError: see :func:`targets`; or nothing is left to train without the experts.
    """
    from peft import LoraConfig, get_peft_model

    found, absent = targets(model, options.target)
    if absent:
        report.line(f"--target: {type(model).__name__} has no layers named {', '.join(absent)}")
    if options.freeze_experts:
        found = found.outside_experts(model)
        if not any(found):
            raise UserError(f"--freeze-experts: --target {options.target} is only experts")
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=0.0 if found.parameters else options.lora_dropout,
        use_rslora=options.use_rslora,
        target_modules=found.modules,
        target_parameters=found.parameters or None,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    if options.lora_dropout and found.parameters and add_dropout(model, options.lora_dropout):
        report.line(
            f"--lora-dropout {options.lora_dropout} is for the adapters of linear layers; those of experts "
            "have none"
        )
    return model
