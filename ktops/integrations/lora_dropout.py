"""Dropout on the adapters that can have one."""

from torch import nn


def add_dropout(model: nn.Module, probability: float) -> bool:
    """Adds dropout to LoRA adapters of linear layers, for models that also adapt parameters.

    PEFT refuses ``lora_dropout`` for target_parameters, in training and when it loads an adapter, so the
    ``LoraConfig`` of such a model must have none.

    Args:
        model: a model with LoRA adapters.
        probability: of setting an element of an adapter's input to zero, in training.

    Returns:
        Whether the model has adapters that stay without dropout, those of parameters.

    Example:
        >>> model = get_peft_model(model, LoraConfig(target_modules=..., target_parameters=...))
        >>> add_dropout(model, 0.05)
        True
    """
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        if not isinstance(layer, ParamWrapper):
            for name in layer.lora_dropout:
                layer.lora_dropout[name] = nn.Dropout(probability)
    return any(isinstance(layer, ParamWrapper) for layer in layers)
