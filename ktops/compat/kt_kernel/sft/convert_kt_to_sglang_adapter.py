"""The names of KTransformers' module ``kt_kernel.sft.convert_kt_to_sglang_adapter``."""

import shutil
from pathlib import Path
from typing import Any

from ktops.adapters import export_adapter
from ktops.adapters.config import CONFIG, WEIGHTS
from ktops.checkpoints.quantization_config import read_json
from ktops.checkpoints.safetensors_file import read_views


def convert_kt_to_sglang_adapter(
    input_dir: str | Path,
    output_dir: str | Path,
    *,
    base_model_name_or_path: str | Path,
    lora_alpha: float | None = None,
    overwrite: bool = False,
    expert_output_dir: str | Path | None = None,
    nonexpert_output_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Writes an adapter that KTransformers has trained for SGLang; see ``ktops export``.

    Args:
        input_dir: with fused_expert_lora.safetensors and adapter_config.json.
        output_dir: the directory to create.
        base_model_name_or_path: the model's directory.
        lora_alpha: must be None; it is in adapter_config.json.
        overwrite: whether to replace output_dir if it exists.
        expert_output_dir, nonexpert_output_dir: must be None.

    Returns:
        The tensor_count, rank and target_modules of what was written.

    Raises:
        ktops.adapters.AdapterError, ktops.checkpoints.CheckpointError: as ``ktops export``.
        NotImplementedError: an argument that must be None is given.
    """
    for name, given in (
        ("lora_alpha", lora_alpha),
        ("expert_output_dir", expert_output_dir),
        ("nonexpert_output_dir", nonexpert_output_dir),
    ):
        if given is not None:
            raise NotImplementedError(f"convert_kt_to_sglang_adapter: {name} must be None, got {given!r}")
    output = Path(output_dir)
    target = output.with_name(f"{output.name}.new") if overwrite and output.exists() else output
    export_adapter(input_dir, target, "sglang", base=base_model_name_or_path)
    if target != output:
        shutil.rmtree(output)
        target.replace(output)
    config = read_json(output / CONFIG)
    return {
        "tensor_count": len(read_views(output / WEIGHTS)),
        "rank": config["r"],
        "target_modules": config["target_modules"],
        "split_outputs": {},
    }
