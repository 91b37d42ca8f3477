"""kt-kernel's fused_expert_lora.safetensors, and its manifest.

The keys are ``layers.{L}.experts.{gate, up, down}_lora_{a, b}``: gate_lora_a and up_lora_a [E, r, H],
gate_lora_b and up_lora_b [E, I, r], down_lora_a [E, r, I], down_lora_b [E, H, r]. The other modules are
in adapter_model.safetensors, as PEFT writes them. The scaling of all is lora_alpha / r of
adapter_config.json.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ktops.adapters.base import BaseModel
from ktops.adapters.config import LoraSettings
from ktops.adapters.errors import AdapterError
from ktops.adapters.factors import PROJECTIONS, Factors
from ktops.adapters.tensors import stacked_factors
from ktops.checkpoints.quantization_config import read_json
from ktops.checkpoints.stream import DTYPE_NAMES
from ktops.checkpoints.view import View

FUSED = "fused_expert_lora.safetensors"
MANIFEST = "kt_adapter_manifest.json"
VERSION = 1
NAMES = tuple(f"{projection}_lora_{factor}" for projection in PROJECTIONS for factor in "ab")

_KEY = re.compile(rf"layers\.(\d+)\.experts\.({'|'.join(NAMES)})")


def factor_key(layer: int, name: str) -> str:
    """Returns the key of a factor, by its name in NAMES."""
    return f"layers.{layer}.experts.{name}"


def read(views: Mapping[str, View], settings: LoraSettings, base: BaseModel) -> dict[str, dict[str, Factors]]:
    """Returns the updates of the experts, by module and projection.

    Raises:
        AdapterError: a key is unknown or missing, or a tensor does not fit the model.
    """
    layers: dict[int, dict[str, View]] = defaultdict(dict)
    for name, view in views.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise AdapterError(
                f"{view}: unknown key, expected layers.L.experts. and one of {', '.join(NAMES)}"
            )
        layers[int(match[1])][match[2]] = view
    found: dict[str, dict[str, Factors]] = {}
    for layer, tensors in sorted(layers.items()):
        missing = [name for name in NAMES if name not in tensors]
        some = next(iter(tensors.values()))
        if missing:
            raise AdapterError(f"{some}: layer {layer} has no {', '.join(missing)}")
        modules = base.by_layer.get(layer, [])
        if len(modules) != 1:
            what = " and ".join(modules) if modules else "no layer with experts"
            raise AdapterError(f"{some}: layer {layer} of {base.where} is {what}. Is it for another model?")
        (module,) = modules
        found[module] = {
            projection: stacked_factors(
                tensors[f"{projection}_lora_a"], tensors[f"{projection}_lora_b"],
                f"{module}.{projection}_proj", projection, settings, base.experts[module],
            )
            for projection in PROJECTIONS
        }  # fmt: skip
    return found


def check_manifest(folder: Path) -> None:
    """Compares the files with sizes and SHA-256 in the manifest, if there is one.

    Raises:
        AdapterError: a file is missing or has changed, or the manifest is not complete.
    """
    path = folder / MANIFEST
    if not path.exists():
        return
    manifest = read_json(path)
    artifacts = manifest.get("artifacts")
    if manifest.get("status") != "ready" or not isinstance(artifacts, dict) or FUSED not in artifacts:
        raise AdapterError(f"{path}: must have status ready and list {FUSED}; saving was interrupted?")
    for name, expected in artifacts.items():
        file = folder / Path(name).name
        if not file.is_file():
            raise AdapterError(f"{file}: the file is missing, but {MANIFEST} lists it")
        for what, actual in record(file).items():
            if not isinstance(expected, dict) or expected.get(what) != actual:
                raise AdapterError(f"{file}: damaged or changed: its {what} is not that of {MANIFEST}")


def make_manifest(
    folder: Path,
    names: Iterable[str],
    kinds: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    *,
    weight_format: str,
    base: str | None,
    rank: int | None,
    alpha: float,
) -> dict[str, Any]:
    """Returns the manifest of a directory.

    Args:
        names: of PEFT's files in it.
        kinds: dtype and shape of the tensors in FUSED, by key.
        weight_format: of the experts that the adapter was trained on, as ``ktops.formats`` names it.
        base: the model that adapter_config.json names.
        rank, alpha: of the adapters of experts.
    """
    tensors = {
        name: {"shape": list(shape), "dtype": DTYPE_NAMES[dtype]}
        for name, (dtype, shape) in sorted(kinds.items())
    }
    fused = record(folder / FUSED) | {"tensor_count": len(tensors), "tensors": tensors}
    return {
        "version": VERSION,
        "status": "ready",
        "expert_weight_format": weight_format,
        "base": {"model_name_or_path": base},
        "lora": {"rank": rank, "alpha": float(alpha)},
        "artifacts": {name: record(folder / name) for name in names} | {FUSED: fused},
    }


def record(file: Path) -> dict[str, Any]:
    """Returns size and SHA-256 of a file, as the manifest lists them."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return {"size": file.stat().st_size, "sha256": digest.hexdigest()}
