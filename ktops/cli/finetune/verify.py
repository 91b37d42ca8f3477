"""Loads a base model and a saved adapter in a separate process and compares the logits with recorded ones.

    python -m ktops.cli.finetune.verify RECORD.json

The record specifies what to load and how. The logits are in a safetensors file in the same directory.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ktops.cli.errors import UserError


@dataclass(frozen=True)
class Record:
    """Where a model is stored, how it was loaded, and the file with its ``input_ids`` [1, T] and ``logits``
    [1, T, V]."""

    base: str
    adapter: str
    tensors: str
    dtype: str
    experts_implementation: str
    num_threads: int
    device: str = "cpu"
    num_gpu_experts: int = 0
    weight_format: str | None = None
    group_size: int | None = None
    quantize_method: str | None = None
    experts_path: str | None = None
    mmap: bool = False
    linear_format: str | None = None


@torch.no_grad()
def logits(model, input_ids: Tensor) -> Tensor:
    """Returns logits [1, T, V] in float32 on the CPU, with the model in evaluation mode."""
    model.eval()
    return model(input_ids=input_ids.to(model.device)).logits.float().cpu()


def tolerance(dtype: torch.dtype, num_layers: int) -> float:
    """Returns the largest accepted ||a - b|| / ||b|| between logits of the same model in two processes.

    The same kernels on the same machine give the same bits, unless a library picks another kernel for a
    buffer that happens to be aligned differently. That reorders sums, which can flip the last rounding of a
    result. Each of the ~8 tensors that a layer rounds may get a relative error of eps. These errors are
    independent, so they add up as the square root of their number.
    """
    return torch.finfo(dtype).eps * (8 * num_layers) ** 0.5


def write(record: Record, input_ids: Tensor, values: Tensor, path: Path) -> None:
    """Writes the record and its tensors."""
    from safetensors.torch import save_file

    save_file({"input_ids": input_ids, "logits": values.contiguous()}, record.tensors)
    path.write_text(json.dumps(asdict(record)), encoding="utf-8")


def run(path: Path) -> dict[str, float]:
    """Runs :func:`check` in a fresh Python process.

    It runs in the directory of the record, because Python looks for modules in the working directory first,
    and the user's may contain a ktops that is not the installed one.

    Returns:
        The result of check.

    Raises:
        UserError: the process failed; the message contains the end of its stderr.
    """
    result = subprocess.run(
        [sys.executable, "-m", "ktops.cli.finetune.verify", str(path.resolve())],
        cwd=path.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise UserError(
            f"the saved adapter could not be loaded in a fresh process:\n{result.stderr.strip()[-2000:]}"
        )
    return json.loads(result.stdout.splitlines()[-1])


def check(record: Record) -> dict[str, float]:
    """Loads base and adapter from disk and compares their logits with the recorded ones.

    Returns:
        ``max_abs_difference`` and ``relative_difference`` from the recorded logits, the ``tolerance`` of the
        latter, and ``adapter_effect``, the relative difference with the adapter disabled. Without an effect,
        passing the check would mean little.
    """
    from safetensors.torch import load_file

    tensors = load_file(record.tensors)
    from peft import PeftModel

    from ktops.cli.models import load_base, place, quantize_linear

    torch.set_num_threads(record.num_threads)
    base, _ = load_base(record.base, getattr(torch, record.dtype), record)
    if record.linear_format is not None:
        quantize_linear(base, record.linear_format)
    model = PeftModel.from_pretrained(base, record.adapter)
    place(model, record)
    expected = tensors["logits"]
    difference = logits(model, tensors["input_ids"]) - expected
    with model.disable_adapter():
        without = logits(model, tensors["input_ids"]) - expected
    return {
        "max_abs_difference": float(difference.abs().max()),
        "relative_difference": float(difference.norm() / expected.norm()),
        "tolerance": tolerance(
            getattr(torch, record.dtype), model.config.get_text_config().num_hidden_layers
        ),
        "adapter_effect": float(without.norm() / expected.norm()),
    }


def require(result: dict[str, float]) -> None:
    """Raises UserError unless a result of :func:`check` shows that the reloaded model is the trained one."""
    if not result["relative_difference"] <= result["tolerance"]:
        raise UserError(
            "the reloaded adapter gives different logits: relative difference "
            f"{result['relative_difference']:.2e}, accepted {result['tolerance']:.2e}"
        )
    if result["adapter_effect"] == 0:
        raise UserError("the adapter does not change the model at all; training did not update it")


if __name__ == "__main__":
    print(json.dumps(check(Record(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))))
