"""Loads the user's model directory, with errors that explain what is wrong with it."""

import json
from pathlib import Path
from typing import Protocol

from ktops.cli.errors import UserError
from ktops.cli.trained import require_no_adapter
from ktops.cli.weight_format import experts_in_format, open_source
from ktops.formats.plain import PLAIN
from ktops.integrations.settings import Backend, Settings


def find_model(name: str) -> str:
    """Returns the absolute path of a model directory, or of a model in the cache of the Hugging Face Hub.

    A name that is neither comes back as an absolute path; see :func:`check_directory`.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if not Path(name).exists():
        try:
            return snapshot_download(name, local_files_only=True)
        except (HFValidationError, LocalEntryNotFoundError):
            pass
    return str(Path(name).resolve())


def check_directory(directory: str) -> None:
    """Raises UserError unless the directory holds all files of a causal language model that transformers
    knows."""
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    path = Path(directory)
    if not path.is_dir():
        raise UserError(
            f"--model: no such directory: {path}. Pass the directory of a downloaded Hugging Face model, or "
            "the name of one in its cache (hf download NAME)"
        )
    require_no_adapter(path, "--model")
    if not (path / "config.json").is_file():
        raise UserError(f"--model: {path} has no config.json, so it is not a Hugging Face model directory")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        architecture, has_code = _own_code(path)
        if has_code:
            raise UserError(
                f"--model: unsupported architecture {architecture!r} in {path}: transformers "
                f"{transformers.__version__} does not have it, and code from model directories is not run"
            ) from None
        raise UserError(
            f"--model: unsupported architecture or broken config.json in {path}: {error}"
        ) from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"--model: unsupported architecture {config.model_type!r} in {path}: not a causal language model"
        )
    if not list(path.glob("*.safetensors")):
        raise UserError(f"--model: {path} has no *.safetensors file")
    if not (path / "tokenizer.json").is_file() and not (path / "tokenizer_config.json").is_file():
        raise UserError(f"--model: {path} has no tokenizer.json")


def _own_code(directory: Path) -> tuple[str | None, bool]:
    """Returns the architecture of a model directory, and whether config.json names code in the directory."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return config.get("model_type"), "auto_map" in config
    except (ValueError, AttributeError):
        return None, False


def load_tokenizer(directory: str):
    """Loads the tokenizer of a model directory.

    Raises:
        UserError: its files cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"--model: the tokenizer in {directory} cannot be loaded: {error}") from None


class ExpertsOptions(Protocol):
    """Those of :class:`ktops.cli.finetune.options.Options` that say how a model is loaded and placed."""

    @property
    def device(self) -> str: ...
    @property
    def num_gpu_experts(self) -> int: ...
    @property
    def experts_implementation(self) -> str: ...
    @property
    def experts_path(self) -> str | None: ...
    @property
    def mmap(self) -> bool: ...
    @property
    def linear_format(self) -> str | None: ...
    @property
    def weight_format(self) -> str | None: ...
    @property
    def group_size(self) -> int | None: ...
    @property
    def quantize_method(self) -> str | None: ...


def load_base(directory: str, dtype, options: ExpertsOptions, show_progress: bool = False):
    """Loads the causal language model in a directory, with its experts as the options say.

    Experts that ktops quantizes are read from the files one by one, so the dense ones are never all in
    memory, except in models whose experts only :func:`ktops.swap_experts` replaces.

    Returns:
        The model, and the QuantizationReport of its experts if ktops has quantized them.

    Raises:
        UserError: the files do not fit the options, or see :func:`load_model` and :func:`quantize_experts`.
    """
    weight_format = options.weight_format
    quantize_loaded = weight_format is not None and not reads_experts(directory, options)
    experts = None if quantize_loaded else experts_settings(options)
    model = load_model(
        directory,
        dtype,
        options.experts_implementation,
        keep_format=not quantize_loaded,
        experts=experts,
    )
    if quantize_loaded:
        assert weight_format is not None
        return model, quantize_experts(
            model, weight_format, options.group_size, options.quantize_method, show_progress
        )
    report = getattr(getattr(model, "hf_quantizer", None), "report", None)
    return model, None if report is None else report.quantization


def experts_settings(options: ExpertsOptions) -> Settings | None:
    """Returns where to load the experts from, and in which format; None for the model's own, as they are."""
    path = options.experts_path
    if path is None and options.weight_format is None and not options.mmap:
        return None
    return Settings(
        Backend(options.weight_format, options.group_size),
        weight_path=None if path is None else Path(path),
        method=options.quantize_method or "rtn",
        mmap=options.mmap,
    )


def reads_experts(directory: str, options: ExpertsOptions) -> bool:
    """True if ktops reads the experts into the weight format; False if it must quantize them once loaded.

    Raises:
        UserError: see :func:`ktops.cli.weight_format.experts_in_format`.
    """
    from ktops.integrations.loading import functions_of
    from ktops.integrations.transformers.architectures import Unsupported

    assert options.weight_format is not None
    checkpoint = open_source(options.experts_path or directory)
    if options.experts_path is None:
        try:
            functions_of({} if checkpoint.names is None else checkpoint.names.modules)
        except Unsupported:
            return False
    experts_in_format(checkpoint, options.weight_format, options.group_size, options.quantize_method)
    return True


def load_model(
    directory: str,
    dtype,
    experts_implementation: str,
    *,
    keep_format: bool = True,
    experts: Settings | None = None,
):
    """Loads the causal language model in a directory, with the given implementation of its experts.

    Args:
        directory: a Hugging Face model directory.
        dtype: torch.bfloat16 or torch.float32, of the weights in memory.
        experts_implementation: "ktops", or one of transformers' own ("eager", "grouped_mm", "batched_mm").
        keep_format: whether "ktops" keeps the format of experts that another library quantized, or decodes
            them.
        experts: where to load the experts from instead, and in which format.

    Raises:
        UserError: transformers cannot load the model, does not know the implementation for this architecture,
            or does not find all weights in the files.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    import ktops
    from ktops.checkpoints.config import is_ktops, quantization_of
    from ktops.integrations.transformers.attention import use_attention
    from ktops.integrations.transformers.loaded import require_loaded

    ktops.enable()
    try:
        quantized = quantization_of(AutoConfig.from_pretrained(directory, local_files_only=True).to_dict())
        loader = {}  # a quantization_config of None would hide the one in config.json
        if experts is not None:
            loader = {"quantization_config": experts.quantization_config(quantized)}
        elif experts_implementation == "ktops" and quantized:
            decoded = None if keep_format or is_ktops(quantized) else PLAIN[dtype]
            loader = {"quantization_config": ktops.KTConfig(decoded)}
        elif is_ktops(quantized):
            raise UserError(
                f"--experts-implementation {experts_implementation}: the experts in {directory} are in a "
                "format that only ktops runs. Use --experts-implementation ktops"
            )
        elif quantized:
            _require_whole_blocks(directory, quantized.get("weight_block_size"), experts_implementation)
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            experts_implementation=experts_implementation,
            local_files_only=True,
            output_loading_info=True,
            **loader,
        )
        require_loaded(model, info["missing_keys"], info["unexpected_keys"], heads=True)
        use_attention(model)
    except (ValueError, KeyError, OSError, RuntimeError, ImportError) as error:
        raise UserError(f"--model: {directory} cannot be loaded: {error}") from None
    return model


def _require_whole_blocks(directory: str, block: list[int] | None, experts_implementation: str) -> None:
    """Raises UserError for FP8 with partial blocks at the edge of a weight, because transformers then assumes
    smaller blocks. ktops' loader does not."""
    from ktops.checkpoints import open_checkpoint

    if block is None:
        return
    tensors = open_checkpoint(directory).tensors
    for name, scale in tensors.items():
        weight = tensors.get(name.removesuffix("_scale_inv"))
        if weight is scale or weight is None or len(weight.shape) != 2:
            continue
        if any(size > step and size % step for size, step in zip(weight.shape, block, strict=True)):
            raise UserError(
                f"--experts-implementation {experts_implementation}: transformers would decode {weight} "
                f"wrongly: {list(weight.shape)} in blocks of {block}"
            )


def require_device(device: str) -> None:
    """Raises UserError unless ``--device`` is cpu, or the name of this machine's accelerator."""
    from ktops.devices.accelerator import find_accelerator

    if device == "cpu":
        return
    try:
        found = find_accelerator(device, "--device")
    except ValueError as error:
        raise UserError(str(error)) from None
    if device != found.type:
        raise UserError(
            f"--device must be cpu or {found.type}, got {device!r}. Of several devices, "
            "CUDA_VISIBLE_DEVICES (for Intel's, ZE_AFFINITY_MASK) chooses one"
        )


def place(model, options: ExpertsOptions):
    """Moves a model to ``--device``, without the experts that ktops runs.

    Returns:
        The ktops.integrations.offload.OffloadReport, or None.

    Raises:
        UserError: the device has no room for it, or a layer does not have --num-gpu-experts.
    """
    import torch

    import ktops

    if options.device == "cpu":
        return None
    try:
        if options.experts_implementation == "ktops":
            return ktops.offload_experts(model, options.device, options.num_gpu_experts)
        model.to(options.device)
    except (ValueError, torch.OutOfMemoryError) as error:
        raise UserError(f"--device {options.device}: {error}") from None
    return None


def quantize_linear(model, linear_format: str):
    """Converts the linear layers outside the experts of a model.

    Returns:
        The ktops.integrations.linear_format.LinearReport.

    Raises:
        UserError: the format cannot hold them.
    """
    import ktops

    try:
        return ktops.quantize_linear(model, linear_format)
    except ValueError as error:
        raise UserError(f"--linear-format {linear_format}: {error}") from None


def quantize_experts(
    model,
    weight_format: str,
    group_size: int | None = None,
    method: str | None = None,
    show_progress: bool = False,
):
    """Converts the experts of a model to a weight format.

    Returns:
        The ktops.integrations.quantize_experts.QuantizationReport.

    Raises:
        UserError: the format cannot hold these experts.
    """
    import ktops

    try:
        return ktops.quantize_experts(
            model,
            weight_format,
            group_size=group_size,
            method=method or "rtn",
            show_progress=show_progress,
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"--weight-format {weight_format}: {error}") from None
