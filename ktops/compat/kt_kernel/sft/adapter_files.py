"""The files of adapters that KTransformers trains: fused_expert_lora.safetensors and its manifest.

The adapters of a layer's experts have the keys ``layers.<layer_idx>.experts.gate_lora_a`` and so on, with the
shapes of :func:`ktops.compat.lora.shapes`.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ktops._warn import warn_once
from ktops.adapters import AdapterError, open_adapter
from ktops.adapters.base import BaseModel
from ktops.adapters.config import CONFIG as PEFT_CONFIG
from ktops.adapters.config import WEIGHTS
from ktops.adapters.export import write
from ktops.adapters.kt_files import FUSED as FUSED_EXPERT_LORA_NAME
from ktops.adapters.kt_files import MANIFEST as KT_ADAPTER_MANIFEST_NAME
from ktops.adapters.kt_files import check_manifest, factor_key, make_manifest
from ktops.adapters.layouts import LAYOUTS
from ktops.adapters.peft_files import FLOATS
from ktops.checkpoints import CheckpointError
from ktops.checkpoints.quantization_config import read_json
from ktops.checkpoints.safetensors_file import read_views
from ktops.checkpoints.stream import SafetensorsStream, write_json
from ktops.checkpoints.view import View
from ktops.compat.kt_kernel.sft.adaptation import adapters_of, find_wrappers, kt_adapt_peft_lora

PEFT_WEIGHTS = (WEIGHTS, "adapter_model.bin")
PEFT_FOLDER = "exported/peft"
"""Where the whole adapter is, as PEFT without KTransformers reads it."""


class KTArtifactError(RuntimeError):
    """A file of an adapter is missing, damaged, or of another model."""


@dataclass(frozen=True)
class KTAdapterManifest:
    """A manifest of an adapter that has been written, or read and checked.

    Attributes:
        path: of the file.
        payload: its contents.
        artifact_paths: of the files that it lists.
    """

    path: str
    payload: Mapping[str, Any]
    artifact_paths: tuple[str, ...]


def expert_adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the adapters of all experts by their keys in the file; empty if none are trained."""
    return {
        factor_key(wrapper.layer_idx, name): parameter
        for wrapper in find_wrappers(model)
        for name, parameter in adapters_of(wrapper).items()
    }


def save_kt_adapter_artifacts(model: nn.Module, output_dir: str | Path) -> KTAdapterManifest | None:
    """Writes the adapters of a model's experts next to those that PEFT has written.

    A file gets its name only when it is complete, and the manifest comes last.

    Args:
        model: with experts that run through ktops.
        output_dir: has PEFT's adapter_config.json and adapter_model.safetensors.

    Returns:
        The manifest; None if no adapters of experts are trained, and so nothing is written.

    Raises:
        KTArtifactError: PEFT's files are not there.
        ktops.compat.kt_kernel.sft.arch.KTAMXConfigError: no experts of the model run through ktops.

    Example:
        >>> model.save_pretrained("out")
        >>> save_kt_adapter_artifacts(model, "out").path
        'out/kt_adapter_manifest.json'
    """
    folder = Path(output_dir)
    manifest = folder / KT_ADAPTER_MANIFEST_NAME
    manifest.unlink(missing_ok=True)
    if not expert_adapters(model):
        return None
    by_peft = [name for name in (PEFT_CONFIG, *PEFT_WEIGHTS) if (folder / name).is_file()]
    if len(by_peft) != 2 or PEFT_CONFIG not in by_peft:
        raise KTArtifactError(
            f"{folder}: expected {PEFT_CONFIG} and {PEFT_WEIGHTS[0]} that PEFT wrote before, got "
            f"{', '.join(by_peft) or 'neither'}"
        )
    save_kt_moe_to_adapter(model, folder)
    _write_peft(model, folder)
    payload = _manifest_of(model, folder, by_peft)
    write_json(manifest, payload)
    return KTAdapterManifest(
        str(manifest), payload, tuple(str(folder / name) for name in payload["artifacts"])
    )


def save_kt_moe_to_adapter(model: nn.Module, output_dir: str | Path) -> None:
    """Writes fused_expert_lora.safetensors, in the dtype of the adapters, if adapters of experts are trained.

    Raises:
        ktops.compat.kt_kernel.sft.arch.KTAMXConfigError: no experts of the model run through ktops.
    """
    adapters = expert_adapters(model)
    if adapters:
        with SafetensorsStream(Path(output_dir) / FUSED_EXPERT_LORA_NAME, _kinds(adapters)) as stream:
            for key, parameter in adapters.items():
                stream.write(key, parameter.detach())


def load_kt_adapter_artifacts(model: nn.Module, adapter_path: str | Path) -> KTAdapterManifest | None:
    """Reads the adapters of a model's experts.

    A model without any, which is not going to be trained, gets some of the rank and alpha that the files say.

    Args:
        model: with experts that run through ktops.
        adapter_path: a folder with fused_expert_lora.safetensors, in any float dtype. If it has a manifest,
            the sizes and checksums of the files must be those in it.

    Returns:
        The manifest, if there is one.

    Raises:
        KTArtifactError: a file is missing, damaged, or does not fit the model; the message names it. The
            model's adapters are unchanged.
        ktops.compat.kt_kernel.sft.arch.KTAMXConfigError: no experts of the model run through ktops.
    """
    folder = Path(adapter_path)
    if not folder.is_dir():
        raise KTArtifactError(f"{folder}: no such directory")
    manifest = _checked_manifest(folder)
    rank, alpha = _rank_and_alpha(folder, manifest)
    for wrapper in find_wrappers(model):
        if not wrapper.is_adapted and rank and alpha:
            wrapper.set_rank(rank, alpha)
    kt_adapt_peft_lora(model)
    config = find_wrappers(model)[0].config
    expected = config.kt_lora_rank, config.kt_lora_alpha
    if manifest is not None and expert_adapters(model) and (rank, alpha) != expected:
        raise KTArtifactError(
            f"{manifest.path}: the adapter has rank {rank} and alpha {alpha}, but this run has rank "
            f"{expected[0]} and alpha {expected[1]}"
        )
    load_kt_moe_from_adapter(model, folder)
    return manifest


def load_kt_moe_from_adapter(model: nn.Module, adapter_path: str | Path) -> None:
    """Reads fused_expert_lora.safetensors into the adapters of a model's experts.

    Raises:
        KTArtifactError: as in :func:`load_kt_adapter_artifacts`; or the file is there, but the model trains
            no adapters of experts.
    """
    path = Path(adapter_path) / FUSED_EXPERT_LORA_NAME
    adapters = expert_adapters(model)
    if not adapters:
        if path.exists():
            raise KTArtifactError(
                f"{path}: has adapters of experts, which this model does not use: its kt_backend ends in "
                "_SkipLoRA, or its kt_train_mode is full"
            )
        return
    if not path.is_file():
        raise KTArtifactError(f"{path}: no such file. It has the adapters of the experts")
    try:
        views = read_views(path)
    except CheckpointError as error:
        raise KTArtifactError(str(error)) from None
    _require_fit(path, views, adapters)
    with torch.no_grad():
        for key, parameter in adapters.items():
            parameter.copy_(views[key].read())


def _require_fit(path: Path, views: Mapping[str, View], adapters: Mapping[str, nn.Parameter]) -> None:
    problems = [f"no {key}" for key in adapters if key not in views]
    problems += [f"unknown {key}" for key in sorted(views.keys() - adapters.keys())]
    for key in adapters.keys() & views.keys():
        view, shape = views[key], list(adapters[key].shape)
        if list(view.shape) != shape:
            problems.append(f"{key} must have shape {shape}, got {list(view.shape)}")
        elif view.dtype not in FLOATS:
            problems.append(f"{key} must be a float tensor, got {view.dtype}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise KTArtifactError(f"{path} does not fit the model: {'; '.join(problems[:3])}{more}")


def _manifest_of(model: nn.Module, folder: Path, by_peft: list[str]) -> dict[str, Any]:
    config = find_wrappers(model)[0].config
    return make_manifest(
        folder,
        by_peft,
        _kinds(expert_adapters(model)),
        weight_format=config.kt_expert_weight_format or config.settings().backend.format or "bf16",
        base=getattr(getattr(model, "config", None), "_name_or_path", None),
        rank=config.kt_lora_rank,
        alpha=config.kt_lora_alpha or 0,
    )


def _kinds(adapters: Mapping[str, nn.Parameter]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {key: (parameter.dtype, tuple(parameter.shape)) for key, parameter in adapters.items()}


def _checked_manifest(folder: Path) -> KTAdapterManifest | None:
    path = folder / KT_ADAPTER_MANIFEST_NAME
    if not path.exists():
        return None
    try:
        check_manifest(folder)
        payload = read_json(path)
    except ValueError as error:
        raise KTArtifactError(str(error)) from None
    return KTAdapterManifest(str(path), payload, tuple(str(folder / name) for name in payload["artifacts"]))


def _rank_and_alpha(folder: Path, manifest: KTAdapterManifest | None) -> tuple[int | None, float | None]:
    """Returns what the manifest says, or else PEFT's configuration; None if neither does."""
    saved = (manifest.payload.get("lora") if manifest is not None else None) or {}
    if not saved and (folder / PEFT_CONFIG).is_file():
        config = read_json(folder / PEFT_CONFIG)
        saved = {"rank": config.get("r"), "alpha": config.get("lora_alpha")}
    rank, alpha = saved.get("rank"), saved.get("alpha")
    return rank, None if alpha is None else float(alpha)


def _write_peft(model: nn.Module, folder: Path) -> None:
    """Writes the whole adapter for PEFT, in place of one that the folder may have."""
    partial, path = (folder / name for name in (f"{PEFT_FOLDER}.partial", PEFT_FOLDER))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        plan = LAYOUTS["peft"](open_adapter(folder, _base_model(model)))
        partial.mkdir(parents=True)
        write(plan, partial, show_progress=False)
    except AdapterError as error:
        warn_once(f"{folder} has the adapter for KTransformers, but not for PEFT: {error}")
    else:
        shutil.rmtree(path, ignore_errors=True)
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _base_model(model: nn.Module) -> BaseModel:
    from transformers import PretrainedConfig

    configs = (getattr(module, "config", None) for module in model.modules())
    config = next(config for config in configs if isinstance(config, PretrainedConfig))
    return BaseModel(config.to_dict(), Path(config.name_or_path or type(model).__name__))
