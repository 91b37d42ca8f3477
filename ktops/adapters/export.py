"""export_adapter: writes an adapter in the layout of another program."""

import json
from collections.abc import Sequence
from pathlib import Path

from ktops._display import progress
from ktops.adapters.adapter import adapter_paths, open_sum
from ktops.adapters.config import CONFIG
from ktops.adapters.directory import new_directory
from ktops.adapters.errors import AdapterError
from ktops.adapters.layouts import LAYOUTS, Plan
from ktops.checkpoints.stream import SafetensorsStream


def export_adapter(
    adapters: str | Path | Sequence[str | Path],
    path: str | Path,
    layout: str,
    *,
    base: str | Path | None = None,
    weights: Sequence[float] | None = None,
    show_progress: bool = False,
) -> list[str]:
    """Writes an adapter, or the sum of several, for another program.

    Reads the factors of one layer at a time. The directory appears when it is complete.

    Args:
        adapters: directories of adapters of one model: from PEFT with stacked experts, from PEFT, vLLM or
            SGLang with single experts, or from kt-kernel.
        path: the directory to create.
        layout: "peft", "vllm", "sglang", "llama.cpp" (the directory for its convert_lora_to_gguf.py) or "kt".
        base: directory of the model, or its config.json. Default: the model that the first adapter's
            adapter_config.json names, if it is on this machine.
        weights: a factor for every adapter; default 1. The ranks add up, and the sum is exact.
        show_progress: whether to show a progress bar, or lines if the output is no terminal.

    Returns:
        What is lost, in sentences; usually nothing.

    Raises:
        AdapterError: an adapter does not fit the model, is not plain LoRA, or cannot be expressed in the
            layout; or path exists.
        CheckpointError: a file is missing or damaged; the message names it.
        OSError: the files cannot be written. The directory then does not exist.

    Example:
        >>> ktops.export_adapter("outputs/checkpoint-200", "served", "vllm", base="Qwen3-30B-A3B")
        []
    """
    if layout not in LAYOUTS:
        raise AdapterError(f"layout={layout!r}: expected one of {', '.join(LAYOUTS)}")
    paths = adapter_paths(adapters)
    plan = LAYOUTS[layout](open_sum(paths, base, weights))
    with new_directory(Path(path), *paths) as folder:
        write(plan, folder, show_progress=show_progress)
    return plan.notes


def write(plan: Plan, folder: Path, *, show_progress: bool) -> None:
    """Writes what is planned to an empty folder, the factors of one layer at a time."""
    total = sum(len(pieces) for pieces in plan.files.values())
    with progress("exporting", total, show=show_progress) as step:
        for name, pieces in plan.files.items():
            kinds = {tensor: kind for piece in pieces for tensor, kind in piece.kinds.items()}
            with SafetensorsStream(folder / name, kinds) as stream:
                for piece in pieces:
                    for tensor, value in piece.make():
                        stream.write(tensor, value)
                    step(1)
    (folder / CONFIG).write_text(json.dumps(plan.config, indent=2, sort_keys=True) + "\n")
    if plan.finish is not None:
        plan.finish(folder, plan.files)
