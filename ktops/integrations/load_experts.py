"""load_experts: loads a model's experts from a checkpoint, in its format or quantized while loading."""

from pathlib import Path

from torch import nn

from ktops.checkpoints.checkpoint import open_checkpoint
from ktops.checkpoints.match import match_layers
from ktops.integrations import peft
from ktops.integrations.loading import LoadReport, experts_modules, load_layers
from ktops.integrations.transformers.saving import enable_saving


def load_experts(
    model: nn.Module,
    path: str | Path,
    weight_format: str | None = None,
    *,
    group_size: int | None = None,
    method: str = "rtn",
    prefix: str | None = None,
    mmap: bool = False,
    show_progress: bool = True,
) -> LoadReport:
    """Loads a model's experts from a checkpoint.

    Each experts module becomes a :class:`ktops.nn.KTExperts`; a ModuleList of experts becomes a
    :class:`ktops.nn.KTExpertSequence`.

    All checks run before the model changes, and the new experts are installed last, so after an error the
    model is unchanged. Weights are memory-mapped where the bytes in the files can be used directly; otherwise
    they are read expert by expert, with less than two experts in memory in addition to the result. The
    model's existing experts stay in memory until the end, unless they are on the meta device.

    Args:
        model: a model with stacked experts or ModuleLists of MLPs, as :func:`ktops.swap_experts` supports
            them, on any device, without adapters or hooks on them.
        path: a directory or file, as for :func:`ktops.checkpoints.open_checkpoint`. Layers are matched by the
            names that transformers would load; in files without such names, such as GGUF, by number.
        weight_format: one of ``ktops.formats.names()``; None keeps the checkpoint's formats.
        group_size, method: as in :func:`ktops.quantize`; used only for weights that ktops quantizes.
        prefix: consider only experts whose names in the checkpoint start with this, such as "thinker.model.";
            required if several match.
        mmap: use experts where they lie in the files, as far as possible, even if their tensors are scattered
            over a file, as in most published checkpoints. Nothing is copied, processes share the page cache,
            and the model may be larger than memory, but weights that are not cached are read from the disk
            when they are used. Layers that cannot be mapped are read, with a warning.
        show_progress: show a bar in a terminal, or a line every ten seconds elsewhere.

    Returns:
        A :class:`LoadReport`: layers, formats, bytes.

    Raises:
        ktops.checkpoints.CheckpointError: a tensor is missing, has a wrong shape or dtype, or uses an
            unknown scheme, or a file is truncated; the message names the tensor and the file. Also if the
            experts of a layer are missing, or if several match; the message lists them.
        ValueError: the model has no experts, ktops cannot compute or load them, or the format cannot hold
            them.

    Example:
        >>> fp8 = FineGrainedFP8Config(dequantize=True)
        >>> model = AutoModelForCausalLM.from_pretrained("Qwen3-30B-A3B-FP8", quantization_config=fp8)
        >>> print(ktops.load_experts(model, "Qwen3-30B-A3B-FP8"))
        experts of 48 layers in fp8_e4m3: 27.0 GiB, of which 0.0 KiB mapped from the files (fp8 blocks)
    """
    modules = experts_modules(model)
    layers = match_layers(open_checkpoint(path), model, modules, prefix=prefix)
    options = {"weight_format": weight_format, "group_size": group_size, "method": method}
    report = load_layers(model, modules, layers, options, mmap=mmap, show_progress=show_progress)
    peft.enable_if_installed()
    enable_saving(model)
    return report
