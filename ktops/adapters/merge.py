"""merge_adapter: adds an adapter to the weights of a checkpoint, one expert in memory at a time."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from ktops._display import progress
from ktops.adapters.adapter import Adapter, adapter_paths, open_sum
from ktops.adapters.directory import new_directory
from ktops.adapters.errors import AdapterError
from ktops.adapters.merged import merged_experts, merged_tensors
from ktops.adapters.published import Published
from ktops.checkpoints.checkpoint import CONFIG, INDEX, WEIGHTS, Checkpoint, open_checkpoint
from ktops.checkpoints.config import converted_config
from ktops.checkpoints.experts import Requantized
from ktops.checkpoints.layer import PROJECTIONS
from ktops.checkpoints.quantization_config import without_quantization
from ktops.checkpoints.writer import CheckpointWriter, small_files


def merge_adapter(
    base: str | Path,
    adapters: str | Path | Sequence[str | Path],
    path: str | Path,
    *,
    weights: Sequence[float] | None = None,
    weight_format: str | None = None,
    group_size: int | None = None,
    method: str | None = None,
    show_progress: bool = False,
) -> None:
    """Writes a model with an adapter, or the sum of several, added to its weights.

    Holds one expert in memory at a time, and the factors of one layer. The sums are computed in float32 and
    rounded once. The directory appears when it is complete.

    Args:
        base: directory of the model, with safetensors files.
        adapters: directories of adapters, as in :func:`export_adapter`.
        path: the directory to create.
        weights: a factor for every adapter; default 1.
        weight_format: the format of the experts, written as by ``ktops convert``. Default: the layout and the
            names of base, with quantized weights decoded to bfloat16.
        group_size, method: as in :func:`ktops.quantize`.
        show_progress: whether to show a progress bar, or lines if the output is no terminal.

    Raises:
        AdapterError: an adapter does not fit the model or is not plain LoRA; or path exists.
        CheckpointError: a file is missing or damaged, or ktops cannot read the weights.
        ValueError: the format cannot hold the weights.
        OSError: the files cannot be written. The directory then does not exist.

    Example:
        >>> ktops.merge_adapter("Qwen3-30B-A3B", "adapter", "merged")
        >>> ktops.merge_adapter("Qwen3-30B-A3B", "adapter", "merged-int4", weight_format="int4")
    """
    base, path = Path(base), Path(path)
    paths = adapter_paths(adapters)
    checkpoint = open_checkpoint(base)
    if not base.is_dir():
        raise AdapterError(f"base={str(base)!r}: expected a model directory with {CONFIG}, got a file")
    adapter = open_sum(paths, base, weights)
    _require_layers(checkpoint, adapter)
    with new_directory(path, base, *paths) as folder:
        if weight_format is None:
            _write_published(checkpoint, adapter, folder, show_progress=show_progress)
        else:
            settings = {"format": weight_format, "group_size": group_size, "method": method or "rtn"}
            writer = CheckpointWriter(
                folder / "model", {"source": base.name, "adapter": paths[0].name, **settings}
            )
            _write_in_format(writer, checkpoint, adapter, settings, show_progress=show_progress)
            _move_up(writer.finish(), folder)


def _require_layers(checkpoint: Checkpoint, adapter: Adapter) -> None:
    modules = {layer.module for layer in checkpoint.layers}
    for module in adapter.experts:
        if module not in modules:
            raise AdapterError(f"{checkpoint.path}: has no experts for {module}, which the adapter changes")


def _write_published(checkpoint: Checkpoint, adapter: Adapter, folder: Path, *, show_progress: bool) -> None:
    """Writes files with the names and tensors of the checkpoint's, quantized weights in bfloat16."""
    output = Published(checkpoint, adapter)
    with progress("merging", output.steps, show=show_progress) as step:
        output.write(folder, step)
    if list(output.files) != [WEIGHTS]:
        index = {
            "metadata": {"total_size": output.nbytes},
            "weight_map": {name: file for file, kinds in output.files.items() for name in kinds},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for file in small_files(checkpoint.path):
        shutil.copyfile(file, folder / file.name)
    config = without_quantization(checkpoint.config) if output.is_decoded else checkpoint.config
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _write_in_format(
    writer: CheckpointWriter, checkpoint: Checkpoint, adapter: Adapter, settings: dict, *, show_progress: bool
) -> None:
    others = merged_tensors(checkpoint, adapter, decode=False)
    parts = []
    for layer in checkpoint.layers:
        gate_up, down = (Requantized(part, **settings) for part in merged_experts(layer, adapter))
        parts.append((layer, gate_up, down))
    total = 2 * sum(layer.num_experts for layer, *_ in parts) + len(others)
    with progress("merging", total, show=show_progress) as step:
        for layer, gate_up, down in parts:
            gate_up_bias, down_bias = (layer.bias(name, torch.float32) for name in PROJECTIONS)
            writer.write_layer(layer.written_name, gate_up, down, gate_up_bias, down_bias, step=step)
        writer.write_tensors(others, step=step)
    writer.copy(small_files(checkpoint.path))
    writer.write_config(converted_config(checkpoint.config, checkpoint.other_tensors()))


def _move_up(inner: Path, folder: Path) -> None:
    for file in inner.iterdir():
        file.replace(folder / file.name)
    inner.rmdir()
