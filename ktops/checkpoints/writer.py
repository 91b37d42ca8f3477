"""CheckpointWriter: writes a directory that ktops can map, one expert in memory at a time.

The directory holds ``experts-00000.safetensors`` and so on, one file per layer, with the keys that
:class:`ktops.nn.KTExperts` has in a state dict: ``{experts}.gate_up_proj.weight``, ``.scale``, ``.zero`` and
``._extra_state``, the format as JSON. ``ktops.json`` lists these files with their sizes. The other tensors of
the model are in ``model-*.safetensors``; transformers' index lists both. All bytes are in the order defined
in ``docs/formats.md``, and do not depend on CPU, NUMA nodes or threads.
"""

import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ktops._display import Step, no_step
from ktops._version import __version__
from ktops.checkpoints.checkpoint import CONFIG, INDEX, MANIFEST, PROGRESS, VERSION
from ktops.checkpoints.errors import CheckpointError
from ktops.checkpoints.experts import Experts, Held
from ktops.checkpoints.safetensors_file import DTYPES
from ktops.checkpoints.view import View
from ktops.formats import Codes, ExpertWeight
from ktops.ops.activation import CONCATENATED, ExpertFunction

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items() if name not in ("F8_E8M0", "F4")}

ALIGNMENT = 64

WEIGHTS = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".onnx", ".h5", ".msgpack"}
"""Suffixes of files with weights."""


def extra_state(experts: Experts) -> Tensor:
    """Returns the extra state of an :class:`ktops.ExpertWeight` for these experts."""
    layout = {"format": experts.format, "shape": list(experts.shape), "group_size": experts.group_size}
    return torch.frombuffer(bytearray(json.dumps(layout).encode()), dtype=torch.uint8)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsStream:
    """Writes a safetensors file whose tensors may come in any order and in parts.

    Until the file is complete, its name ends in ``.tmp``.

    Args:
        path: path of the file.
        tensors: dtype and shape of each tensor, by name.
        metadata: strings for the header.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.temporary = path, path.with_name(path.name + ".tmp")
        header: dict = {"__metadata__": {"format": "pt", **(metadata or {})}}
        offsets, position = {}, 0
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
            end = position + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [position, end],
            }
            offsets[name], position = position, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        start = 8 + len(text)
        self._offsets = {name: start + offset for name, offset in offsets.items()}
        self._file = open(self.temporary, "wb", buffering=0)  # noqa: SIM115
        self._write(len(text).to_bytes(8, "little") + text, 0)
        self._file.truncate(start + position)

    def write(self, name: str, tensor: Tensor, index: int = 0) -> None:
        """Writes a tensor, or the slice at an index of its first dimension."""
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        self._write(memoryview(data), self._offsets[name] + index * data.nbytes)

    def _write(self, data, offset: int) -> None:
        data = memoryview(data)
        while data:
            count = os.pwrite(self._file.fileno(), data, offset)
            data, offset = data[count:], offset + count

    def __enter__(self) -> "SafetensorsStream":
        return self

    def __exit__(self, error_type, *_) -> None:
        if error_type is None:
            os.fsync(self._file.fileno())
        self._file.close()
        if error_type is None:
            self.temporary.replace(self.path)
        else:
            self.temporary.unlink(missing_ok=True)


class CheckpointWriter:
    """Writes a ktops directory. Until :meth:`finish`, its name is ``{path}.partial`` and it does not load.

    A new writer with the same settings continues an interrupted one; skip the layers that :meth:`has`
    reports. A writer with other settings starts over.

    Args:
        path: the directory to create.
        settings: everything the result depends on, as JSON: source, format, group size.
        overwrite: replace an existing directory.

    Raises:
        CheckpointError: path exists and overwrite is False; or the directory has other contents.

    Example:
        >>> source = open_checkpoint("Qwen3-30B-A3B")
        >>> writer = CheckpointWriter("Qwen3-30B-A3B-int4", {"source": "Qwen3-30B-A3B", "format": "int4"})
        >>> for layer in source.layers:
        ...     if not writer.has(layer.name):
        ...         writer.write_layer(layer.name, *layer.experts("int4"))
        >>> writer.write_tensors(source.other_tensors())
        >>> writer.copy(source.path.glob("*.json"))
        >>> writer.write_config(converted_config(source.config, source.other_tensors()))
        >>> writer.finish()
    """

    def __init__(self, path: str | Path, settings: dict | None = None, *, overwrite: bool = False) -> None:
        self.path, self.overwrite = Path(path), overwrite
        if self.path.exists() and not overwrite:
            raise CheckpointError(f"{self.path}: already exists. Pass another path, or overwrite=True")
        self.partial = self.partial_path(self.path)
        self.settings = json.loads(json.dumps({"version": VERSION, **(settings or {})}))
        self._progress = self._resume() or {"settings": self.settings, "layers": {}, "tensors": {}}
        self.partial.mkdir(parents=True, exist_ok=True)
        write_json(self.partial / PROGRESS, self._progress)

    @staticmethod
    def partial_path(path: Path) -> Path:
        """Returns the path of a directory until it is finished."""
        return path.with_name(path.name + ".partial")

    def _resume(self) -> dict | None:
        """Returns an interrupted writer's progress. If it does not match, deletes the files."""
        try:
            progress = json.loads((self.partial / PROGRESS).read_text())
            files = [*progress["layers"].values(), *progress["tensors"].values()]
            if progress["settings"] == self.settings and all(
                checksum(self.partial / file["file"]) == file["checksum"] for file in files
            ):
                return progress
        except (OSError, ValueError, KeyError, TypeError):
            pass
        if self.partial.exists():
            if not (self.partial / PROGRESS).exists() and any(self.partial.iterdir()):
                raise CheckpointError(
                    f"{self.partial}: has contents, and {self.path} is written there first. Pass another "
                    "path, or delete it"
                )
            shutil.rmtree(self.partial)
        return None

    @property
    def finished_layers(self) -> list[str]:
        """The names of the layers written so far."""
        return list(self._progress["layers"])

    def has(self, name: str) -> bool:
        """True if the experts with this name have been written."""
        return name in self._progress["layers"]

    def layer_file(self, name: str) -> Path:
        """Returns the complete file with the experts of this name."""
        return self.partial / self._progress["layers"][name]["file"]

    def write_layer(
        self,
        name: str,
        gate_up_proj: Experts | ExpertWeight,
        down_proj: Experts | ExpertWeight,
        gate_up_proj_bias: Tensor | None = None,
        down_proj_bias: Tensor | None = None,
        *,
        gating: str | None = None,
        step: Step = no_step,
    ) -> int:
        """Writes the experts of a layer.

        Args:
            name: name of the experts module, such as "model.layers.3.mlp.experts".
            gate_up_proj, down_proj: [E, 2I, H] and [E, H, I]; an :class:`Experts` is read expert by expert.
                Without a gate, the first is up_proj [E, I, H].
            gate_up_proj_bias, down_proj_bias: [E, 2I] or [E, I], and [E, H].
            gating: the order of gate and up, as in :func:`ktops.moe_sft`. Default: that of an
                :class:`Experts` which knows it, otherwise "concatenated".
            step: called with the number of newly written experts, counted once per projection.

        Returns:
            The number of bytes written.
        """
        gate_up = _experts(gate_up_proj)
        gating = gating or gate_up.gating or CONCATENATED
        first_name = ExpertFunction(gating=gating).first_name
        both = {first_name: gate_up, "down_proj": _experts(down_proj)}
        biases = {f"{first_name}_bias": gate_up_proj_bias, "down_proj_bias": down_proj_bias}
        whole = {f"{name}.{key}": bias for key, bias in biases.items() if bias is not None}
        tensors, firsts = {}, {}
        for key, experts in both.items():
            whole[f"{name}.{key}._extra_state"] = extra_state(experts)
            firsts[key] = experts.expert(0)
            for kind, tensor in firsts[key]._asdict().items():
                if tensor is not None:
                    tensors[f"{name}.{key}.{kind}"] = tensor.dtype, (len(experts), *tensor.shape)
        tensors |= {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in whole.items()}
        path = self.partial / f"experts-{len(self._progress['layers']):05}.safetensors"
        with SafetensorsStream(path, tensors, {"ktops": __version__, "gating": gating}) as stream:
            for key, tensor in whole.items():
                stream.write(key, tensor)
            for key, experts in both.items():
                first: Codes | None = firsts.pop(key)
                for index in range(len(experts)):
                    codes = experts.expert(index) if first is None else first
                    first = None
                    self._write_expert(stream, f"{name}.{key}", index, codes, step)
        return self._done("layers", name, path, list(tensors))

    @staticmethod
    def _write_expert(stream: SafetensorsStream, name: str, index: int, codes: Codes, step: Step) -> None:
        for kind, tensor in codes._asdict().items():
            if tensor is not None:
                stream.write(f"{name}.{kind}", tensor, index)
        step(1)

    def write_tensors(
        self,
        tensors: Mapping[str, "View | Tensor | LazyTensor"],
        *,
        max_bytes: int = 4 << 30,
        step: Step = no_step,
    ) -> None:
        """Writes the tensors of the model that do not belong to experts, one in memory at a time.

        Args:
            tensors: tensors by name: in memory, in files, or made when they are read.
            max_bytes: maximum size of a file.
            step: called with 1 for every tensor.
        """
        files: list[dict[str, View | Tensor | LazyTensor]] = [{}]
        size = 0
        for name, tensor in tensors.items():
            if files[-1] and size + tensor.nbytes > max_bytes:
                files.append({})
                size = 0
            files[-1][name] = tensor
            size += tensor.nbytes
        for number, part in enumerate(files):
            path = self.partial / f"model-{number + 1:05}-of-{len(files):05}.safetensors"
            if path.name in self._progress["tensors"]:
                continue
            kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in part.items()}
            with SafetensorsStream(path, kinds) as stream:
                for name, tensor in part.items():
                    stream.write(name, tensor if isinstance(tensor, Tensor) else tensor.read())
                    step(1)
            self._done("tensors", path.name, path, list(part))

    def copy(self, files: Iterable[Path]) -> None:
        """Copies small files unchanged: configuration, tokenizer, license, but not the source's index."""
        for file in files:
            if file.name not in (INDEX, MANIFEST, PROGRESS):
                shutil.copyfile(file, self.partial / file.name)

    def write_config(self, config: dict) -> None:
        """Writes config.json; see :func:`ktops.checkpoints.converted_config`."""
        write_json(self.partial / CONFIG, config)

    def finish(self) -> Path:
        """Completes the checkpoint: writes the lists of files and renames the directory.

        Returns:
            The path of the directory.
        """
        layers, tensors = self._progress["layers"].values(), self._progress["tensors"].values()
        if tensors:
            files = [*tensors, *layers]
            weight_map = {name: file["file"] for file in files for name in file["names"]}
            total = sum(file["bytes"] for file in files)
            write_json(self.partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        manifest = {
            "version": VERSION,
            "ktops": __version__,
            "settings": self.settings,
            "files": {file["file"]: file["bytes"] for file in layers},
        }
        write_json(self.partial / MANIFEST, manifest)
        (self.partial / PROGRESS).unlink(missing_ok=True)
        if self.overwrite and self.path.exists():
            old = self.path.with_name(self.path.name + ".old")
            self.path.replace(old)
            self.partial.replace(self.path)
            shutil.rmtree(old)
        else:
            self.partial.replace(self.path)
        return self.path

    def _done(self, kind: str, name: str, path: Path, names: list[str]) -> int:
        size = path.stat().st_size
        self._progress[kind][name] = {
            "file": path.name,
            "bytes": size,
            "checksum": checksum(path),
            "names": names,
        }
        write_json(self.partial / PROGRESS, self._progress)
        return size


def small_files(folder: Path) -> list[Path]:
    """Returns the files of a model directory that are no weights: configuration, tokenizer, license."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.suffix not in WEIGHTS
        and not path.name.endswith(".index.json")
        and not path.name.startswith(".")
        and path.name not in (MANIFEST, PROGRESS)
    ]


def checksum(path: Path) -> int:
    """Returns the CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _experts(experts: Experts | ExpertWeight) -> Experts:
    return Held(experts) if isinstance(experts, ExpertWeight) else experts


def write_json(path: Path, value: dict) -> None:
    """Writes a file that gets its name when it is complete; after an error, there is none."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
