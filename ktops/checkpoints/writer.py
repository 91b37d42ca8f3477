"""CheckpointWriter: writes a directory that ktops can map, one expert in memory at a time.

The directory holds ``experts-00000.safetensors`` and so on, one file for every layer, with the keys that
:class:`ktops.nn.KTExperts` has in a state dict: ``{experts}.gate_up_proj.weight``, ``.scale``, ``.zero`` and
``._extra_state``, the format as JSON. ``ktops.json`` lists these files with their sizes. The other tensors of
the model are in ``model-*.safetensors``; transformers' index lists both. All bytes are in the order that
``docs/formats.md`` gives: they do not depend on CPU, NUMA nodes or threads.
"""

import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
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

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items() if name not in ("F8_E8M0", "F4")}

ALIGNMENT = 64


def extra_state(experts: Experts) -> Tensor:
    """The extra state of an :class:`ktops.ExpertWeight` of these experts."""
    layout = {"format": experts.format, "shape": list(experts.shape), "group_size": experts.group_size}
    return torch.frombuffer(bytearray(json.dumps(layout).encode()), dtype=torch.uint8)


class SafetensorsStream:
    """A safetensors file whose tensors are written in any order, in parts.

    The file has its name once it is complete; until then the name ends in ``.tmp``.

    Args:
        path: of the file.
        tensors: dtype and shape of each, by name.
        metadata: strings, for the header.
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
    """Writes a ktops directory. Until :meth:`finish` it is called ``{path}.partial`` and does not load.

    A writer that was interrupted goes on where it was, if it is made again with the same settings: skip what
    :meth:`has` knows. With other settings it begins anew.

    Args:
        path: of the directory to be.
        settings: what the result depends on, as JSON: source, format, group size.
        overwrite: replace a directory that is there.

    Raises:
        CheckpointError: path exists.

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
            raise CheckpointError(f"{self.path}: exists already: give another path, or overwrite=True")
        self.partial = self.partial_path(self.path)
        self.settings = json.loads(json.dumps({"version": VERSION, **(settings or {})}))
        self._progress = self._resume() or {"settings": self.settings, "layers": {}, "tensors": {}}
        self.partial.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def partial_path(path: Path) -> Path:
        """What a directory is called until it is finished."""
        return path.with_name(path.name + ".partial")

    def _resume(self) -> dict | None:
        """What an interrupted writer has done; None, and its files are gone, if it was of other settings."""
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
            shutil.rmtree(self.partial)
        return None

    @property
    def finished_layers(self) -> list[str]:
        """The names of the layers that are written."""
        return list(self._progress["layers"])

    def has(self, name: str) -> bool:
        """Whether the experts of this name are written."""
        return name in self._progress["layers"]

    def layer_file(self, name: str) -> Path:
        """The file with the experts of this name, which is complete."""
        return self.partial / self._progress["layers"][name]["file"]

    def write_layer(
        self,
        name: str,
        gate_up_proj: Experts | ExpertWeight,
        down_proj: Experts | ExpertWeight,
        gate_up_proj_bias: Tensor | None = None,
        down_proj_bias: Tensor | None = None,
        *,
        step: Step = no_step,
    ) -> int:
        """Writes the experts of a layer.

        Args:
            name: of the experts module, "model.layers.3.mlp.experts".
            gate_up_proj, down_proj: [E, 2I, H] and [E, H, I]; an :class:`Experts` is read expert by expert.
            gate_up_proj_bias, down_proj_bias: [E, 2I] and [E, H].
            step: called with the number of experts of a projection written.

        Returns:
            Bytes written.
        """
        both = {"gate_up_proj": _experts(gate_up_proj), "down_proj": _experts(down_proj)}
        biases = {"gate_up_proj_bias": gate_up_proj_bias, "down_proj_bias": down_proj_bias}
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
        with SafetensorsStream(path, tensors, {"ktops": __version__}) as stream:
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
        self, tensors: Mapping[str, View | Tensor], *, max_bytes: int = 4 << 30, step: Step = no_step
    ) -> None:
        """Writes the tensors of the model that are not experts', one in memory at a time.

        Args:
            tensors: by name, in memory or in files.
            max_bytes: of a file.
            step: called with 1 for every tensor.
        """
        files: list[dict[str, View | Tensor]] = [{}]
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
                    stream.write(name, tensor.read() if isinstance(tensor, View) else tensor)
                    step(1)
            self._done("tensors", path.name, path, list(part))

    def copy(self, files: Iterable[Path]) -> None:
        """Copies small files as they are: configuration, tokenizer, license. Not the index of the source."""
        for file in files:
            if file.name not in (INDEX, MANIFEST, PROGRESS):
                shutil.copyfile(file, self.partial / file.name)

    def write_config(self, config: dict) -> None:
        """Writes config.json; see :func:`ktops.checkpoints.converted_config`."""
        _write_json(self.partial / CONFIG, config)

    def finish(self) -> Path:
        """Makes the directory a checkpoint: writes the lists of files and gives it its name.

        Returns:
            The path.
        """
        layers, tensors = self._progress["layers"].values(), self._progress["tensors"].values()
        if tensors:
            files = [*tensors, *layers]
            weight_map = {name: file["file"] for file in files for name in file["names"]}
            total = sum(file["bytes"] for file in files)
            _write_json(self.partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        manifest = {
            "version": VERSION,
            "ktops": __version__,
            "settings": self.settings,
            "files": {file["file"]: file["bytes"] for file in layers},
        }
        _write_json(self.partial / MANIFEST, manifest)
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
        _write_json(self.partial / PROGRESS, self._progress)
        return size


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def _experts(experts: Experts | ExpertWeight) -> Experts:
    return Held(experts) if isinstance(experts, ExpertWeight) else experts


def _write_json(path: Path, value: dict) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)
