"""Loads LLaMA-Factory's models with the experts of ``use_kt: true``, and puts its adapters on them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

from ktops.formats import ExpertWeight
from ktops.integrations.llamafactory.arguments import current
from ktops.integrations.llamafactory.places import is_fork, require
from ktops.integrations.lora_dropout import add_dropout
from ktops.integrations.lora_targets import lora_targets
from ktops.integrations.replacements import Replacements
from ktops.integrations.training import require_op
from ktops.integrations.transformers import NAME

_replaced = Replacements()

_adapted: ContextVar[tuple[nn.Module, object]] = ContextVar("adapted")
"""The model that ``init_adapter`` is called for, and its finetuning_args."""


def enable() -> None:
    """Replaces the functions that load a model and add adapters, but in KTransformers' fork.

    A second call does nothing.
    """
    from llamafactory.model import adapter, loader

    if _replaced or is_fork():
        return
    require(loader, "patch_config", "init_adapter")
    require(adapter, "LoraConfig", "patch_target_modules")
    _replaced.install(loader, patch_config=_patch_config, init_adapter=_init_adapter)
    _replaced.install(adapter, LoraConfig=_lora_config)


def disable() -> None:
    """Restores LLaMA-Factory's own functions."""
    _replaced.restore()


def _patch_config(config, tokenizer, model_args, init_kwargs: dict, is_trainable: bool) -> None:
    """``patch_config``, which also says how ktops loads the experts."""
    settings = current().settings
    if settings is None:
        _replaced.original["patch_config"](config, tokenizer, model_args, init_kwargs, is_trainable)
        return
    stored = config.__dict__.pop("quantization_config", None)  # which would need the quantizer's package
    _replaced.original["patch_config"](config, tokenizer, model_args, init_kwargs, is_trainable)
    if stored is not None:
        config.quantization_config = stored
    quantization = settings.quantization_config(stored)
    if quantization is not None and _merges(model_args, is_trainable):
        print("ktops: export writes dense weights, so kt_backend has no effect", file=sys.stderr)
        quantization = None if stored is None else quantization
    if quantization is not None:
        _require_free(model_args, init_kwargs)
        init_kwargs["quantization_config"] = quantization
    if current().torch_dtype is not None:
        config.dtype = current().torch_dtype
    if "device_map" in init_kwargs:
        init_kwargs["device_map"] = {"": "cpu"}
    config._experts_implementation = NAME


def _merges(model_args, is_trainable: bool) -> bool:
    return model_args.export_dir is not None and not is_trainable


def _require_free(model_args, init_kwargs: dict) -> None:
    if "quantization_config" in init_kwargs:
        raise ValueError(
            "quantization_bit must be absent with a kt_backend that quantizes: both quantize the model"
        )
    if model_args.train_from_scratch:
        raise ValueError("train_from_scratch must be absent or false with a kt_backend that quantizes")


def _init_adapter(config, model: nn.Module, model_args, finetuning_args, is_trainable: bool) -> nn.Module:
    """``init_adapter``, for models whose experts ktops runs."""
    if current().settings is None:
        return _replaced.original["init_adapter"](config, model, model_args, finetuning_args, is_trainable)
    require_op(model)
    token = _adapted.set((model, finetuning_args))
    try:
        with _unmerged(model, is_trainable):
            model = _replaced.original["init_adapter"](
                config, model, model_args, finetuning_args, is_trainable
            )
    finally:
        _adapted.reset(token)
    if is_trainable and finetuning_args.finetuning_type == "lora" and finetuning_args.lora_dropout:
        probability = finetuning_args.lora_dropout
        if add_dropout(model, probability):
            print(
                f"ktops: lora_dropout {probability} applies to the adapters of linear layers; those of "
                "parameters have none, in PEFT too",
                file=sys.stderr,
            )
    return model


@contextmanager
def _unmerged(model: nn.Module, is_trainable: bool) -> Iterator[None]:
    """Keeps LLaMA-Factory from merging adapters into experts in a weight format, as ``chat`` would."""
    if is_trainable or not any(isinstance(module, ExpertWeight) for module in model.modules()):
        yield
        return
    model.quantization_method = NAME  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.quantization_method


def _lora_config(**given):
    """``LoraConfig`` in ``llamafactory.model.adapter``, whose targets reach the experts."""
    settings = current().settings
    if settings is None or (adapted := _adapted.get(None)) is None:
        return _replaced.original["LoraConfig"](**given)
    from llamafactory.model.adapter import patch_target_modules

    model, finetuning_args = adapted
    targets = lora_targets(model, finetuning_args.lora_target)
    if not settings.trains_experts:
        targets = targets.outside_experts(model)
        if not any(targets):
            raise ValueError(
                f"lora_target {finetuning_args.lora_target} is only experts, which get no adapters with a "
                "kt_backend that ends in _SkipLoRA"
            )
    return _replaced.original["LoraConfig"](
        **given
        | {
            "target_modules": patch_target_modules(model, finetuning_args, targets.modules),
            "target_parameters": targets.parameters or None,
            "lora_dropout": 0.0 if targets.parameters else given["lora_dropout"],
        }
    )
