"""CheckpointWriter: writes a directory that ktops can map, one expert per thread in memory at a time.

The directory holds ``experts-00000.safetensors`` and so on, one file per layer, with the keys that
:class:`ktops.nn.KTExperts` has in a state dict: ``{experts}.gate_up_proj.weight``, ``.scale``, ``.zero`` and
``._extra_state``, the format as JSON. ``ktops.json`` lists these files with their sizes. The other tensors of
the model are in ``model-*.safetensors``; transformers' index lists both. All bytes are in the order defined
in ``docs/formats.md``, and do not depend on CPU, NUMA nodes or threads.
"""

import json
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from torch import Tensor

from ktops._display import Step, no_step
from ktops._version import __version__
from ktops._workers import Workers
from ktops.checkpoints.checkpoint import CONFIG, INDEX, MANIFEST, PROGRESS, VERSION
from ktops.checkpoints.errors import CheckpointError
from ktops.checkpoints.experts import Experts, give_back_freed_memory
from ktops.checkpoints.new_file import LazyTensor, NewFile, NewLayer, Task, layer_file, tensor_file
from ktops.checkpoints.stream import sync, temporary_path, write_json
from ktops.checkpoints.view import View
from ktops.formats import ExpertWeight

WEIGHTS = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".onnx", ".h5", ".msgpack"}
"""Suffixes of files with weights."""


class CheckpointWriter:
    """Writes a ktops directory. Until :meth:`finish`, its name is ``{path}.partial`` and it does not load.

    A new writer with the same settings continues an interrupted one; skip the layers that :meth:`has`
    reports. A writer with other settings starts over.

    Args:
        path: the directory to create.
        settings: everything the result depends on, as JSON: source, format, group size.
        overwrite: replace an existing directory.
        workers: what converts and writes. Default: as many threads as PyTorch has. The bytes that are written
            do not depend on it.

    Attributes:
        is_resumed: it continues an interrupted writer with these settings.
        is_complete: an interrupted writer with these settings had written everything; only :meth:`finish`
            remains to be called.

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

    def __init__(
        self,
        path: str | Path,
        settings: dict | None = None,
        *,
        overwrite: bool = False,
        workers: Workers | None = None,
    ) -> None:
        self.path, self.overwrite, self._given = Path(path), overwrite, workers
        if self.path.exists() and not overwrite:
            raise CheckpointError(f"{self.path}: already exists. Pass another path, or overwrite=True")
        self.partial = self.partial_path(self.path)
        self.settings = json.loads(json.dumps({"version": VERSION, **(settings or {})}))
        self.is_complete = self.is_resumed = self._is_complete()
        if self.is_complete:
            return
        resumed = self._resume()
        self.is_resumed = resumed is not None
        self._progress = resumed or {"settings": self.settings, "layers": {}, "tensors": {}}
        self.partial.mkdir(parents=True, exist_ok=True)
        write_json(self.partial / PROGRESS, self._progress)

    @staticmethod
    def partial_path(path: Path) -> Path:
        """Returns the path of a directory until it is finished."""
        return path.with_name(path.name + ".partial")

    def _workers(self) -> AbstractContextManager[Workers]:
        return Workers() if self._given is None else nullcontext(self._given)

    def _is_complete(self) -> bool:
        """True if an interrupted writer with these settings had only the renaming left to do."""
        if (self.partial / PROGRESS).exists() or not (self.partial / MANIFEST).is_file():
            return False
        try:
            return json.loads((self.partial / MANIFEST).read_text())["settings"] == self.settings
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _resume(self) -> dict | None:
        """Returns an interrupted writer's progress. If it does not match, deletes the files."""
        try:
            progress = json.loads((self.partial / PROGRESS).read_text())
            files = [*progress["layers"].values(), *progress["tensors"].values()]
            if progress["settings"] == self.settings and self._are_undamaged(files):
                for leftover in self.partial.glob("*.tmp"):
                    leftover.unlink()
                return progress
        except (OSError, ValueError, KeyError, TypeError):
            pass
        if self.partial.exists():
            if not any((self.partial / name).exists() for name in (PROGRESS, MANIFEST)) and any(
                file != temporary_path(self.partial / PROGRESS) for file in self.partial.iterdir()
            ):
                raise CheckpointError(
                    f"{self.partial}: has contents, and {self.path} is written there first. Pass another "
                    "path, or delete it"
                )
            _delete(self.partial, last=PROGRESS)
        return None

    def _are_undamaged(self, files: list[dict]) -> bool:
        with self._workers() as workers:
            checksums = workers.in_order(partial(checksum, self.partial / file["file"]) for file in files)
            return [file["checksum"] for file in files] == list(checksums)

    @property
    def nbytes(self) -> int:
        """Size of the files with weights that are finished, in bytes."""
        files = [*self._progress["layers"].values(), *self._progress["tensors"].values()]
        return sum(file["bytes"] for file in files)

    @property
    def finished_layers(self) -> list[str]:
        """The names of the layers written so far."""
        return list(self._progress["layers"])

    def has(self, name: str) -> bool:
        """True if the experts with this name have been written."""
        return self.is_complete or name in self._progress["layers"]

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
        layer = NewLayer(name, gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias, gating)
        self.write_layers([layer], step=step)
        return self._progress["layers"][name]["bytes"]

    def write_layers(
        self,
        layers: Iterable[NewLayer],
        *,
        step: Step = no_step,
        written: Callable[[str], None] | None = None,
    ) -> None:
        """Writes the experts of several layers, some experts at a time.

        Args:
            layers: taken from the iterable when their turn comes.
            step: as in :meth:`write_layer`.
            written: called with the name of each layer after it has been written, while later ones are being
                converted.
        """
        self._write(self._layer_files(layers), step, written)

    def _layer_files(self, layers: Iterable[NewLayer]) -> Iterator[NewFile]:
        for number, layer in enumerate(layers, len(self._progress["layers"])):
            yield layer_file(self.partial / f"experts-{number:05}.safetensors", layer)

    def write_tensors(
        self,
        tensors: Mapping[str, View | Tensor | LazyTensor],
        *,
        max_bytes: int = 4 << 30,
        step: Step = no_step,
    ) -> None:
        """Writes the tensors of the model that do not belong to experts.

        Args:
            tensors: tensors by name: in memory, in files, or made when they are written, one per thread.
            max_bytes: maximum size of a file.
            step: called with 1 for every tensor.
        """
        if not tensors:
            return
        files: list[dict[str, View | Tensor | LazyTensor]] = [{}]
        size = 0
        for name, tensor in tensors.items():
            if files[-1] and size + tensor.nbytes > max_bytes:
                files.append({})
                size = 0
            files[-1][name] = tensor
            size += tensor.nbytes
        names = (f"model-{number:05}-of-{len(files):05}" for number in range(1, len(files) + 1))
        paths = [self.partial / f"{name}.safetensors" for name in names]
        new = (
            tensor_file(path, part)
            for path, part in zip(paths, files, strict=True)
            if path.name not in self._progress["tensors"]
        )
        self._write(new, step)

    def _write(
        self, files: Iterable[NewFile], step: Step, written: Callable[[str], None] | None = None
    ) -> None:
        """Writes files, several at a time, and records them in their order."""
        unfinished: deque[NewFile] = deque()

        def tasks() -> Iterator[Task]:
            for file in files:
                unfinished.append(file)
                yield from file.tasks

        done = 0
        with self._workers() as workers:
            try:
                for steps in workers.in_order(tasks()):
                    step(steps)
                    done += 1
                    file = unfinished[0]
                    if done == len(file.tasks):
                        file.stream.finish()
                        self._record(file)
                        unfinished.popleft()
                        done = 0
                        if written is not None:
                            written(file.name)
                        give_back_freed_memory()
            except BaseException:
                workers.stop()
                for file in unfinished:
                    file.stream.discard()
                raise

    def copy(self, files: Iterable[Path]) -> None:
        """Copies small files unchanged: configuration, tokenizer, license, but not the source's index."""
        for file in files:
            if file.name not in (INDEX, MANIFEST, PROGRESS):
                shutil.copyfile(file, self.partial / file.name)
                sync(self.partial / file.name)

    def write_config(self, config: dict) -> None:
        """Writes config.json; see :func:`ktops.checkpoints.converted_config`."""
        write_json(self.partial / CONFIG, config)

    def finish(self) -> Path:
        """Completes the checkpoint: writes the lists of files and renames the directory.

        Returns:
            The path of the directory.
        """
        if not self.is_complete:
            self._write_lists()
            (self.partial / PROGRESS).unlink()
            sync(self.partial)
        old = self.path.with_name(self.path.name + ".old")
        if self.overwrite and self.path.exists():
            if old.exists():
                _delete(old, last=MANIFEST)
            self.path.replace(old)
        self.partial.replace(self.path)
        sync(self.path.parent)
        if (old / MANIFEST).exists():
            _delete(old, last=MANIFEST)
        return self.path

    def _write_lists(self) -> None:
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

    def _record(self, file: NewFile) -> None:
        path = file.stream.path
        self._progress[file.kind][file.name] = {
            "file": path.name,
            "bytes": file.stream.nbytes,
            "checksum": checksum(path),
            "names": file.tensors,
        }
        write_json(self.partial / PROGRESS, self._progress)


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


def _delete(directory: Path, *, last: str) -> None:
    """Deletes a directory that ktops wrote; the file that identifies it last."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != last:
            path.unlink()
    shutil.rmtree(directory)
