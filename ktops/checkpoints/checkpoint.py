"""open_checkpoint: opens safetensors or GGUF files and finds the experts in them."""

import re
from collections import defaultdict
from functools import cached_property
from pathlib import Path

from ktops.checkpoints import gguf_file, safetensors_file
from ktops.checkpoints.errors import CheckpointError
from ktops.checkpoints.layer import Layer
from ktops.checkpoints.model_names import ModelNames, config_names
from ktops.checkpoints.names import Key, parse, summary
from ktops.checkpoints.quantization_config import (
    CONFIG,
    QuantizationConfig,
    read_json,
    read_quantization_config,
)
from ktops.checkpoints.view import View

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "ktops.json"
"""Lists the files with experts written by ktops, and their sizes."""

PROGRESS = "progress.json"
"""Marks a directory that is still being written."""

VERSION = 1

PACKED_NAME = re.compile(r"blk\.\d+\.ffn_(gate|up|down)_exps\.\d+\.numa\.\d+\.(weight|scale)")
"""Names of tensors that kt-kernel's convert_cpu_weights.py has packed."""

PACKED = (
    "kt-kernel has packed these experts for its own tiles and NUMA nodes, which ktops does not read. Use the "
    "original checkpoint, or what `ktops convert ORIGINAL OUT --weight-format int8` (or int4) makes of it"
)


class Checkpoint:
    """The tensors of a checkpoint and, in order, the layers that have experts.

    Attributes:
        path: the path that was opened.
        config: the contents of config.json, for a file the one in its directory; empty if there is none.
        tensors: all tensors by name.
        quantization: what the quantization config says about packed weights.
    """

    def __init__(
        self,
        path: Path,
        config: dict,
        tensors: dict[str, View],
        quantization: QuantizationConfig | None = None,
        names: ModelNames | None = None,
    ) -> None:
        self.path, self.config, self.tensors = path, config, tensors
        self.quantization = quantization or QuantizationConfig(config)
        if names is not None:
            self.names = names

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self.layers)} layers with experts)"

    @cached_property
    def names(self) -> ModelNames | None:
        """How transformers maps the names to the model in config.json; None if it does not know the model."""
        return config_names(self.config)

    @cached_property
    def layers(self) -> list[Layer]:
        """The layers with experts, found by :attr:`names`, or by the usual names if that is None."""
        keyed: dict[tuple, dict[Key, View]] = defaultdict(dict)
        for name, key in self.keys.items():
            if key is not None:
                keyed[key.experts, key.module][key] = self.tensors[name]
        layers = [
            Layer(name, next(iter(keys)).layer, keys, self.quantization) for (name, _), keys in keyed.items()
        ]
        return sorted(layers, key=lambda layer: (layer.index, layer.name))

    def named_by(self, names: ModelNames) -> "Checkpoint":
        """Returns the same tensors with names mapped to another model."""
        return Checkpoint(self.path, self.config, self.tensors, self.quantization, names)

    def other_tensors(self) -> dict[str, View]:
        """Returns the tensors that do not belong to experts, by name."""
        return {name: view for name, view in self.tensors.items() if self.keys[name] is None}

    @cached_property
    def keys(self) -> dict[str, Key | None]:
        """The parts of every tensor's name; None for tensors that do not belong to experts."""
        read = parse if self.names is None else self.names.key
        return {name: read(name) for name in self.tensors}

    def require_layers(self) -> None:
        """Raises CheckpointError, which lists the tensor names, if there are no experts."""
        if not self.layers:
            if any(map(PACKED_NAME.fullmatch, self.tensors)):
                raise CheckpointError(f"{self.path}: {PACKED}")
            raise CheckpointError(
                f"{self.path}: ktops does not recognize any tensor name as an expert's. The names are "
                f"{summary(self.tensors)}"
            )


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a checkpoint, reading only headers and no weights.

    Args:
        path: a directory with safetensors files (from transformers, a quantizer or ktops) or GGUF files, or a
            single file, which may be any part of a split GGUF. Files without experts, such as a vision
            projector, are ignored if other files have experts.

    Returns:
        A :class:`Checkpoint`; its ``layers`` read the experts.

    Raises:
        CheckpointError: path is not a checkpoint, or a file is missing, truncated or damaged. The message
            names the file and the tensor.

    Example:
        >>> checkpoint = ktops.checkpoints.open_checkpoint("Qwen3-30B-A3B-FP8")
        >>> checkpoint.layers[0]
        Layer('model.layers.0.mlp.experts', fp8 blocks, 128 experts)
        >>> weights = checkpoint.layers[0].read("int4", group_size=128)
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    if path.is_file() and path.suffix == ".gguf":
        return Checkpoint(path, {}, _views(_files(path)))
    folder = path if path.is_dir() else path.parent
    config = _config(folder)
    return Checkpoint(path, config, _views(_files(path)), read_quantization_config(folder, config))


def _views(files: list[Path]) -> dict[str, View]:
    tensors: dict[str, View] = {}
    for file in files:
        read = gguf_file.read_views if file.suffix == ".gguf" else safetensors_file.read_views
        for name, view in read(file).items():
            if name in tensors:
                raise CheckpointError(f"{view}: the tensor is also in {tensors[name].file.path}")
            tensors[name] = view
    return tensors


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return gguf_file.split_files(path) if path.suffix == ".gguf" else [path]
    if (path / PROGRESS).exists():
        raise CheckpointError(f"{path}: still being written, or writing was interrupted. Finish that first")
    files: list[Path] = []
    if (path / INDEX).exists():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
            raise CheckpointError(f"{path / INDEX}: weight_map must map tensors to files")
        files = [path / name for name in sorted(set(weight_map.values()))]
        if (path / WEIGHTS).exists():  # as in transformers; the index is left over from an earlier save
            return [path / WEIGHTS]
        if any(name.endswith("._extra_state") for name in weight_map):
            return files
    if (path / MANIFEST).exists():
        mine = _manifest_files(path / MANIFEST)
        others = files or sorted(set(path.glob("*.safetensors")) - set(mine))
        files = [*others, *(file for file in mine if file not in others)]
    files = files or _unlisted_files(path)
    if not files:
        if any(path.glob("_layer_*/_numa_*/*.kt")):
            raise CheckpointError(f"{path}: {PACKED}")
        raise CheckpointError(f"{path}: the directory has no safetensors or GGUF files")
    return files


def _unlisted_files(path: Path) -> list[Path]:
    """Returns the files of a directory without an index, preferring the kind with experts."""
    whole = path / WEIGHTS
    safetensors = [whole] if whole.exists() else sorted(path.glob("*.safetensors"))
    gguf = sorted(path.glob("*.gguf"))
    if len(gguf) + bool(safetensors) < 2:
        return safetensors or gguf
    gguf = [file for file in gguf if any(map(parse, gguf_file.read_views(file)))] or gguf
    safetensors_only = Checkpoint(path, _config(path), _views(safetensors))
    return safetensors if safetensors_only.layers else gguf


def _config(folder: Path) -> dict:
    return read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}


def _manifest_files(path: Path) -> list[Path]:
    manifest = read_json(path)
    files = manifest.get("files")
    if manifest.get("version") != VERSION or not isinstance(files, dict):
        raise CheckpointError(
            f"{path}: must have version {VERSION} and a table of files, got version "
            f"{manifest.get('version')!r}"
        )
    for name, size in files.items():
        file = path.parent / name
        if not file.exists():
            raise CheckpointError(f"{file}: the file is missing, but {path.name} lists it")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{file}: truncated or damaged: {file.stat().st_size} bytes, {path.name} says {size}"
            )
    return [path.parent / name for name in files]
