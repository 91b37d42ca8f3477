"""load_experts: the experts of a model from a checkpoint, in its format or quantized on the way."""

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
    show_progress: bool = True,
) -> LoadReport:
    """Fills a model's experts from a checkpoint: each experts module becomes a :class:`ktops.nn.KTExperts`.

    Everything is checked before anything is changed, and the new experts take their places at the end: after
    an error the model is as it was. Weights are mapped where the bytes of the files can be used as they are,
    else read expert by expert: besides the result, less than two experts are in memory. Experts that the
    model has already stay until then; a model whose experts are on the meta device never has both.

    Args:
        model: with stacked experts or ModuleLists of gated MLPs, as :func:`ktops.swap_experts` takes them,
            on any device; before adapters are added.
        path: a directory or file, as :func:`ktops.checkpoints.open_checkpoint` takes it. Layers are matched
            by the names that transformers would load; in a file without such names, such as GGUF, by number.
        weight_format: one of ``ktops.formats.names()``; None keeps the format of the checkpoint.
        group_size, method: as of :func:`ktops.quantize`, where weights are quantized.
        prefix: consider only experts whose names in the checkpoint start with it, such as "thinker.model.";
            needed if several match.
        show_progress: a bar in a terminal, a line every ten seconds elsewhere.

    Returns:
        A :class:`LoadReport`: layers, formats, bytes.

    Raises:
        ktops.checkpoints.CheckpointError: a tensor is missing, has a wrong shape or dtype, or is of an
            unknown scheme, or a file is truncated; the message names the tensor and the file. Or the experts
            of a layer are missing, or several match; the message lists them.
        ValueError: the model has no experts, or ones that ktops cannot compute; the format cannot hold them.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("Qwen3-30B-A3B-FP8", dequantize=True)
        >>> print(ktops.load_experts(model, "Qwen3-30B-A3B-FP8"))
        experts of 48 layers in fp8_e4m3: 27.0 GiB, of which 0.0 KiB mapped from the files (fp8 blocks)
    """
    modules = experts_modules(model)
    layers = match_layers(open_checkpoint(path), model, modules, prefix=prefix)
    options = {"weight_format": weight_format, "group_size": group_size, "method": method}
    report = load_layers(model, modules, layers, options, show_progress=show_progress)
    peft.enable_if_installed()
    enable_saving(model)
    return report
