"""The functions of LLaMA-Factory that ktops replaces."""

import inspect
from importlib import metadata
from types import ModuleType

PARAMETERS = {
    "read_args": ["args"],
    "patch_config": ["config", "tokenizer", "model_args", "init_kwargs", "is_trainable"],
    "init_adapter": ["config", "model", "model_args", "finetuning_args", "is_trainable"],
    "patch_target_modules": ["model", "finetuning_args", "target_modules"],
    "LoraConfig": None,
}
"""Name -> its parameters; None for a class of another library."""


def is_fork() -> bool:
    """Returns whether LLaMA-Factory is KTransformers' fork, which calls kt_kernel itself."""
    return any(metadata.distributions(name="llamafactory-kt"))


def require(module: ModuleType, *names: str) -> None:
    """Raises RuntimeError unless a module of LLaMA-Factory has the functions that ktops relies on."""
    for name in names:
        found = getattr(module, name, None)
        wanted = PARAMETERS[name]
        if found is None or (wanted is not None and list(inspect.signature(found).parameters) != wanted):
            raise RuntimeError(
                f"ktops: {module.__name__}.{name} of LLaMA-Factory {metadata.version('llamafactory')} is "
                f"{'missing' if found is None else 'not what ktops expects'}. ktops is tested with 0.9.5: "
                "pip install llamafactory==0.9.5"
            )
