"""Checks of adapters that PEFT is about to merge, before it changes any layer."""

from typing import TYPE_CHECKING

from ktops.formats import ExpertWeight
from ktops.integrations.sharded_experts import sharding_of
from ktops.nn.int8_linear import Int8Linear

if TYPE_CHECKING:
    from peft.tuners.lora.layer import ParamWrapper


def require_mergeable(tuner, adapter_names: list[str] | None) -> None:
    """Raises NotImplementedError unless all adapters of a model can be merged; None for the active ones."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    names = set(tuner.active_adapters if adapter_names is None else adapter_names)
    for path, module in tuner.model.named_modules():
        if not isinstance(module, LoraLayer) or not names.intersection(module.lora_A):
            continue
        if isinstance(module.get_base_layer(), Int8Linear):
            raise NotImplementedError(
                f"ktops: LoRA on {path.rpartition('.')[2]} in int8 cannot be merged. To do that, load the "
                "adapter into a model without --linear-format"
            )
        if isinstance(module, ParamWrapper):
            require_dense(module, "merged")
            require_undivided(module, "merged")


def require_undivided(wrapper: "ParamWrapper", what: str) -> None:
    """Raises if other processes have parts of the adapted weights."""
    if sharding_of(wrapper.get_base_layer()) is not None:
        raise NotImplementedError(
            f"ktops: LoRA on {wrapper.parameter_name} cannot be {what} while the experts are divided among "
            "processes. To do that, load the adapter into a model in one process"
        )


def require_dense(wrapper: "ParamWrapper", what: str) -> None:
    """Raises if the adapted weights are in a format."""
    weight = getattr(wrapper.get_base_layer(), wrapper.parameter_name)
    if isinstance(weight, ExpertWeight):
        raise NotImplementedError(
            f"ktops: LoRA on {wrapper.parameter_name} in format {weight.format!r} cannot be {what}. To do "
            "that, load the adapter into a model with bfloat16 experts"
        )
