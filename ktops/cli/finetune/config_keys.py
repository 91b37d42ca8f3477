"""The keys of LLaMA-Factory's YAML files, as `ktops finetune` takes them.

KEYS has one function per key. It takes the value and returns the options that the key sets.
"""

from collections.abc import Callable
from typing import Any

LAUNCH = "ktops launch llamafactory-cli train"
"""The command that trains the same file in LLaMA-Factory itself."""

Kind = Callable[[Any], Any]
"""Checks a value and returns it as an option has it. Raises ValueError with what was expected."""

Setter = Callable[[Any], dict[str, Any]]


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
        raise ValueError("expected a whole number")
    return int(value)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("expected a number")
    return float(value)


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("expected text")
    return value


def _names(value: object) -> str:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("expected names, separated by commas")
    return ",".join(names)


def _sets(option: str, kind: Kind) -> Setter:
    return lambda value: {option: kind(value)}


def no_effect(value: object) -> dict[str, Any]:
    """The setter of keys that say where or how LLaMA-Factory computes, or ask for what ktops always does."""
    return {}


def _only(*allowed: object, hint: str = f"{LAUNCH} does") -> Setter:
    """Returns the setter of a key for which other values ask for what `ktops finetune` does not do."""

    def check(value: object) -> dict[str, Any]:
        if not any(value == other and type(value) is type(other) for other in allowed):
            raise ValueError(f"ktops finetune does not do that; {hint}")
        return {}

    return check


def _steps(value: object) -> dict[str, Any]:
    steps = _whole(value)
    return {"max_steps": steps} if steps > 0 else {}


def _warmup_steps(value: object) -> dict[str, Any]:
    """A number below 1 is a fraction of the steps, as in transformers 5."""
    steps = _number(value)
    if 0 < steps < 1:
        return {"warmup_ratio": steps}
    return {"warmup_steps": _whole(value)} if steps else {}


def _val_size(value: object) -> dict[str, Any]:
    size = _number(value)
    return {"eval_fraction": size} if size < 1 else {"eval_examples": _whole(value)}


_DTYPES = {
    "bfloat16": "bf16", "torch.bfloat16": "bf16", "bf16": "bf16",
    "float32": "f32", "torch.float32": "f32", "fp32": "f32",
}  # fmt: skip


def _dtype(value: object) -> dict[str, Any]:
    if value == "auto":
        return {}
    if value not in _DTYPES:
        raise ValueError("expected auto, bfloat16 or float32")
    return {"dtype": _DTYPES[str(value)]}


def _resume(value: object) -> dict[str, Any]:
    if not isinstance(value, bool | str):
        raise ValueError("expected true, false or the directory of a checkpoint")
    return {"resume": value} if value else {}


def _report_to(value: object) -> dict[str, Any]:
    if value not in ("none", ["none"], [], False):
        raise ValueError(
            f"ktops finetune reports to metrics.json and loss.png only; {LAUNCH} reports to others"
        )
    return {}


_OFF = _only(False)
_TRAINS = _only(False, hint="it only trains")
_SFT = f"for other stages and methods: {LAUNCH}"
_F32 = "it trains in bf16 or f32, with adapters in f32: bf16: true"

KEYS: dict[str, Setter] = {
    # model
    "model_name_or_path": _sets("model", _text),
    "trust_remote_code": no_effect,
    "torch_dtype": _dtype,
    "dtype": _dtype,
    "bf16": lambda value: {"dtype": "bf16" if _switch(value) else "f32"},
    "fp16": _only(False, hint=_F32),
    "pure_bf16": _only(False, hint=_F32),
    "adapter_name_or_path": _only(hint=f"to continue an adapter: --resume, or {LAUNCH}"),
    "quantization_bit": _only(hint="the experts can be quantized by kt_backend or --weight-format"),
    "gradient_checkpointing": _sets("gradient_checkpointing", _switch),
    "disable_gradient_checkpointing": lambda value: {"gradient_checkpointing": not _switch(value)},
    "flash_attn": no_effect,
    "low_cpu_mem_usage": no_effect,
    "use_fast_tokenizer": no_effect,
    "cache_dir": no_effect,
    "model_revision": _only("main"),
    "use_cache": no_effect,
    "tf32": no_effect,
    "torch_compile": _OFF,
    "upcast_layernorm": _OFF,
    "gradient_checkpointing_kwargs": no_effect,
    "use_unsloth_gc": no_effect,
    "rope_scaling": _only(),
    "mixture_of_depths": _only(),
    "shift_attn": _OFF,
    "moe_aux_loss_coef": _only(),
    "resize_vocab": _OFF,
    "add_tokens": _only(),
    "add_special_tokens": _only(),
    "train_from_scratch": _OFF,
    "enable_liger_kernel": no_effect,
    "use_reentrant_gc": no_effect,
    "use_unsloth": _OFF,
    # method
    "stage": _only("sft", hint=_SFT),
    "do_train": _only(True, hint="it only trains"),
    "do_eval": no_effect,
    "do_predict": _TRAINS,
    "predict_with_generate": _TRAINS,
    "finetuning_type": _only("lora", hint=_SFT),
    "lora_rank": _sets("lora_rank", _whole),
    "lora_alpha": _sets("lora_alpha", _number),
    "lora_dropout": _sets("lora_dropout", _number),
    "lora_target": _sets("target", _names),
    "use_rslora": _sets("use_rslora", _switch),
    "use_dora": _OFF,
    "pissa_init": _OFF,
    "loraplus_lr_ratio": _only(),
    "additional_target": _only(),
    "create_new_adapter": _OFF,
    "use_llama_pro": _OFF,
    "use_galore": _OFF,
    "use_apollo": _OFF,
    "use_badam": _OFF,
    "use_adam_mini": _OFF,
    "use_muon": _OFF,
    "use_dft_loss": _OFF,
    "use_asft_loss": _OFF,
    "use_eaft_loss": _OFF,
    "freeze_vision_tower": no_effect,
    "freeze_multi_modal_projector": no_effect,
    "freeze_language_model": _OFF,
    # data
    "dataset": _sets("data", _names),
    "eval_dataset": _sets("eval_data", _names),
    "dataset_dir": _sets("dataset_dir", _text),
    "template": no_effect,
    "cutoff_len": _sets("max_length", _whole),
    "max_samples": _sets("max_samples", _whole),
    "val_size": _val_size,
    "mix_strategy": _only("concat"),
    "interleave_probs": _only(),
    "media_dir": no_effect,
    "preserve_thinking": _OFF,
    "remove_unused_columns": no_effect,
    "train_on_prompt": _OFF,
    "mask_history": _OFF,
    "packing": _OFF,
    "neat_packing": _OFF,
    "streaming": _OFF,
    "disable_shuffling": _OFF,
    "default_system": _only(),
    "tool_format": no_effect,
    "enable_thinking": _only(True, hint="records may have chat_template_kwargs: {enable_thinking: false}"),
    "ignore_pad_token_for_loss": _only(True),
    "tokenized_path": _only(),
    "overwrite_cache": no_effect,
    "preprocessing_num_workers": no_effect,
    "preprocessing_batch_size": no_effect,
    "dataloader_num_workers": no_effect,
    "dataloader_pin_memory": no_effect,
    "dataloader_prefetch_factor": no_effect,
    "dataloader_persistent_workers": no_effect,
    "dataloader_drop_last": _OFF,
    "group_by_length": no_effect,
    # training
    "per_device_train_batch_size": _sets("batch_size", _whole),
    "per_device_eval_batch_size": _sets("eval_batch_size", _whole),
    "gradient_accumulation_steps": _sets("gradient_accumulation_steps", _whole),
    "learning_rate": _sets("learning_rate", _number),
    "num_train_epochs": _sets("epochs", _number),
    "max_steps": _steps,
    "lr_scheduler_type": _sets("lr_scheduler", _text),
    "lr_scheduler_kwargs": _only(),
    "warmup_ratio": _sets("warmup_ratio", _number),
    "warmup_steps": _warmup_steps,
    "optim": _sets("optimizer", _text),
    "optim_args": _only(),
    "adam_beta1": _sets("adam_beta1", _number),
    "adam_beta2": _sets("adam_beta2", _number),
    "adam_epsilon": _sets("adam_epsilon", _number),
    "weight_decay": _sets("weight_decay", _number),
    "max_grad_norm": _sets("max_grad_norm", _number),
    "neftune_noise_alpha": _only(),
    "auto_find_batch_size": _OFF,
    "full_determinism": no_effect,
    "seed": _sets("seed", _whole),
    "data_seed": _only(hint="seed also decides the order of the data"),
    "deepspeed": _only(),
    "fsdp": _only(),
    "fp8": _OFF,
    "use_cpu": no_effect,
    "ddp_timeout": no_effect,
    "ddp_find_unused_parameters": no_effect,
    "label_smoothing_factor": _only(0, 0.0),
    # output
    "output_dir": _sets("output_dir", _text),
    "overwrite_output_dir": _sets("overwrite", _switch),
    "resume_from_checkpoint": _resume,
    "logging_steps": _sets("logging_steps", _whole),
    "logging_dir": no_effect,
    "logging_strategy": _only("steps"),
    "logging_first_step": no_effect,
    "save_steps": _sets("save_steps", _whole),
    "save_strategy": _only("steps", hint="it saves every save_steps and at the end"),
    "save_total_limit": _sets("save_total_limit", _whole),
    "save_only_model": no_effect,
    "eval_strategy": _only("steps", "no", False, hint="use steps and eval_steps, or no"),
    "evaluation_strategy": _only("steps", "no", False, hint="use steps and eval_steps, or no"),
    "eval_steps": _sets("eval_steps", _whole),
    "eval_on_start": no_effect,
    "load_best_model_at_end": _OFF,
    "metric_for_best_model": no_effect,
    "greater_is_better": no_effect,
    "early_stopping_steps": _only(),
    "compute_accuracy": no_effect,
    "plot_loss": no_effect,
    "disable_tqdm": no_effect,
    "log_level": no_effect,
    "report_to": _report_to,
    "run_name": no_effect,
    "use_swanlab": _OFF,
    "push_to_hub": _OFF,
    "include_num_input_tokens_seen": no_effect,
    "include_effective_tokens_per_second": no_effect,
    # ktops' own
    "ignore_keys": _sets("ignore_keys", _names),
    "device": _sets("device", _text),
    "num_gpu_experts": _sets("num_gpu_experts", _whole),
    "experts_implementation": _sets("experts_implementation", _text),
    "weight_format": _sets("weight_format", _text),
    "group_size": _sets("group_size", _whole),
    "quantize_method": _sets("quantize_method", _text),
    "linear_format": _sets("linear_format", _text),
}
"""Key -> its setter. ``use_kt`` and ``kt_*`` are in :mod:`ktops.integrations.settings`."""

DEFAULTS: dict[str, Any] = {
    "target": "all",
    "lora_rank": 8,
    "max_length": 2048,
    "eval_fraction": 0.0,
    "batch_size": 8,
    "learning_rate": 5e-5,
    "epochs": 3.0,
    "lr_scheduler": "linear",
    "warmup_ratio": 0.0,
    "save_steps": 500,
    "save_total_limit": None,
    "seed": 42,
}
"""What LLaMA-Factory takes if a file leaves a key out, where the default of `ktops finetune` differs."""
