"""Adds LoRA adapters to the attention and the experts of a model."""

from torch import nn

from ktops.cli.errors import UserError

ATTENTION = (
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj",
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
    "in_proj_qkv", "in_proj_qkvz", "in_proj_z", "in_proj_ba", "in_proj_a", "in_proj_b", "out_proj",
)  # fmt: skip
"""Names of the linear layers of attention (full, latent and linear) in transformers models."""


def targets(model: nn.Module, target: str) -> tuple[list[str], list[str]]:
    """Resolves ``--target`` for a model.

    Args:
        model: a transformers model without adapters.
        target: names separated by commas: ``attention``, ``experts``, or names of linear layers such as
            ``q_proj``.

    Returns:
        (target_modules, target_parameters) for ``peft.LoraConfig``.

    Raises:
        UserError: a name matches nothing in this model.
    """
    from ktops.integrations.peft import expert_target_parameters

    linear = {
        name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    modules: list[str] = []
    parameters: list[str] = []
    for name in filter(None, (part.strip() for part in target.split(","))):
        if name == "experts":
            parameters = expert_target_parameters(model)
            if not parameters:
                raise UserError(
                    f"--target: {type(model).__name__} has no routed experts that LoRA can reach "
                    "(stacked [num_experts, ...] parameters)"
                )
        elif name == "attention":
            modules += [layer for layer in ATTENTION if layer in linear]
        elif name in linear:
            modules.append(name)
        else:
            raise UserError(
                f"--target: {type(model).__name__} has no linear layers named {name!r}. Use attention, "
                f"experts, or any of {', '.join(sorted(linear))}"
            )
    if not modules and not parameters:
        raise UserError(f"--target: {target!r} matches nothing in {type(model).__name__}")
    return modules, parameters


def add_adapters(model: nn.Module, target: str, rank: int, alpha: float):
    """Returns a ``peft.PeftModel`` with new LoRA adapters (B = 0) on ``--target``; the rest is frozen."""
    from peft import LoraConfig, get_peft_model

    modules, parameters = targets(model, target)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=modules or [],
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)
