"""open_checkpoint: a directory of safetensors files, or GGUF files, and the experts in them."""

import json
from collections import defaultdict
from pathlib import Path

from ktops.checkpoints import gguf_file, safetensors_file
from ktops.checkpoints.errors import CheckpointError
from ktops.checkpoints.layer import Layer
from ktops.checkpoints.names import Key, parse
from ktops.checkpoints.packed import Packing
from ktops.checkpoints.view import View

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "ktops.json"
"""Says which files hold experts that ktops has written, and their sizes."""

PROGRESS = "progress.json"
"""In a directory that is being written."""

VERSION = 1


class Checkpoint:
    """The tensors of a checkpoint and, in order, the layers that have experts.

    Attributes:
        path: what was opened.
        config: of config.json; empty if there is none.
        tensors: every tensor by name.
        layers: the layers with experts.
    """

    def __init__(self, path: Path, config: dict, tensors: dict[str, View]) -> None:
        self.path, self.config, self.tensors = path, config, tensors
        keyed: dict[str, dict[Key, View]] = defaultdict(dict)
        for name, view in tensors.items():
            key = parse(name)
            if key is not None:
                keyed[key.experts][key] = view
        packing = _packing(config)
        layers = [Layer(name, next(iter(keys)).layer, keys, packing) for name, keys in keyed.items()]
        self.layers = sorted(layers, key=lambda layer: (layer.index, layer.name))

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self.layers)} layers with experts)"

    def other_tensors(self) -> dict[str, View]:
        """The tensors that are not experts', by name."""
        return {name: view for name, view in self.tensors.items() if parse(name) is None}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a checkpoint: headers only, no weight is read.

    Args:
        path: a directory with safetensors files (of transformers, of a quantiser, or of ktops) or GGUF files,
            or one file. Of a split GGUF any part.

    Returns:
        A :class:`Checkpoint`; its ``layers`` read the experts.

    Raises:
        CheckpointError: there is no checkpoint, or a file is missing, truncated or damaged; the message names
            the file and the tensor.

    Example:
        >>> checkpoint = ktops.checkpoints.open_checkpoint("Qwen3-30B-A3B-FP8")
        >>> checkpoint.layers[0]
        Layer('model.layers.0.mlp.experts', fp8 blocks, 128 experts)
        >>> weights = checkpoint.layers[0].read("int4", group_size=128)
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or directory")
    config = _json(path / CONFIG) if (path / CONFIG).exists() else {}
    tensors: dict[str, View] = {}
    for file in _files(path):
        read = gguf_file.read_views if file.suffix == ".gguf" else safetensors_file.read_views
        for name, view in read(file).items():
            if name in tensors:
                raise CheckpointError(f"{view}: the tensor is in {tensors[name].file.path} too")
            tensors[name] = view
    return Checkpoint(path, config, tensors)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return gguf_file.split_files(path) if path.suffix == ".gguf" else [path]
    if (path / PROGRESS).exists():
        raise CheckpointError(f"{path}: it is being written, or its writing was interrupted: go on with that")
    files: list[Path] = []
    if (path / INDEX).exists():
        weight_map = _json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
            raise CheckpointError(f"{path / INDEX}: weight_map must map tensors to files")
        files = [path / name for name in sorted(set(weight_map.values()))]
        if (path / WEIGHTS).exists():  # what transformers reads; the index is of an earlier saving
            return [path / WEIGHTS]
        if any(name.endswith("._extra_state") for name in weight_map):
            return files
    if (path / MANIFEST).exists():
        mine = _manifest_files(path / MANIFEST)
        others = files or sorted(set(path.glob("*.safetensors")) - set(mine))
        files = [*others, *(file for file in mine if file not in others)]
    files = files or sorted(path.glob("*.safetensors")) or sorted(path.glob("*.gguf"))
    if not files:
        raise CheckpointError(f"{path}: there are no safetensors or GGUF files in the directory")
    return files


def _manifest_files(path: Path) -> list[Path]:
    manifest = _json(path)
    files = manifest.get("files")
    if manifest.get("version") != VERSION or not isinstance(files, dict):
        raise CheckpointError(
            f"{path}: must be of version {VERSION} with a table of files, got version "
            f"{manifest.get('version')!r}"
        )
    for name, size in files.items():
        file = path.parent / name
        if not file.exists():
            raise CheckpointError(f"{file}: the file is missing, {path.name} lists it")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{file}: truncated or damaged: {file.stat().st_size} bytes, {path.name} says {size}"
            )
    return [path.parent / name for name in files]


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must be a JSON object")
    return value


def _packing(config: dict) -> Packing:
    """Bits, group size and kind of zero point of packed weights, by the config of GPTQ or AWQ."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    found = (part["quantization_config"] for part in parts if part.get("quantization_config"))
    quantization = next(found, None)
    if not isinstance(quantization, dict):
        return Packing()
    bits, group_size = (quantization.get(key) for key in ("bits", "group_size"))
    offset = 0 if quantization.get("checkpoint_format") == "gptq_v2" else 1
    sizes = (value if type(value) is int else None for value in (bits, group_size))
    return Packing(*sizes, zero_offset=offset)
