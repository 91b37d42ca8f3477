"""Trains the given cells in this process, or under torchrun in all of them, and saves what happened.

    torchrun --nproc-per-node 2 training_program.py MODEL OUTPUT tp2-lora-float32 ...

The global batch of a step is the same for any number of processes.
"""

import os
import shutil
import sys
import traceback
from pathlib import Path

import torch
from cells import CONFIGURATIONS, STEPS, Cell
from peft import PeftModel
from tiny_models import NUM_EXPERTS
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

import ktops

LEARNING_RATE, MAX_NORM = 0.05, 0.5

ROWS = 4
"""Sequences of a step, in all processes together."""


def examples(vocab_size: int) -> list[dict]:
    """Returns sequences that count up by one or two, of different lengths, padded to the longest."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in torch.randint(5, 13, (STEPS * ROWS,), generator=generator).tolist():
        start, step = torch.randint(3, vocab_size - 26, (1,), generator=generator), 1 + length % 2
        ids = torch.zeros(12, dtype=torch.int64)
        ids[:length] = start + step * torch.arange(length)
        labels = torch.full((12,), -100)
        labels[:length] = ids[:length]
        made.append({"input_ids": ids, "labels": labels, "attention_mask": (labels >= 0).long()})
    return made


def load(path: str, cell: Cell, *, parallel: bool):
    """Returns the model of a cell, without adapters; one process in float32 runs without ktops."""
    arguments = CONFIGURATIONS[cell.configuration] if parallel else None
    options: dict = {}
    if arguments is not None:
        options["distributed_config"] = DistributedConfig(**arguments)
    if cell.weights == "int4":
        options["quantization_config"] = ktops.KTConfig(weight_format="int4")
    dtype = torch.bfloat16 if cell.weights == "bfloat16" else torch.float32
    if cell.weights in ("bfloat16", "all_experts"):
        options |= {"num_experts_per_tok": NUM_EXPERTS}
        if "deepseek" in AutoConfig.from_pretrained(path).model_type:
            options |= {"n_group": 1}
    own = not parallel and cell.weights in ("float32", "all_experts")
    implementation = "eager" if own else "ktops"
    return AutoModelForCausalLM.from_pretrained(
        path, experts_implementation=implementation, dtype=dtype, **options
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy of a tensor of all processes."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


class Gradients(TrainerCallback):
    """Keeps the clipped gradients of the first step."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
            self.gradients = {name: whole(gradient) for name, gradient in named}


def train_in_loop(model, dataset: list[dict], kept: Gradients) -> list[dict]:
    """Does what :func:`train` does, without accelerate, which knows tensor parallelism only on devices."""
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], LEARNING_RATE, foreach=False
    )
    model.train()
    history = []
    for first in range(0, STEPS * ROWS, ROWS):
        rows = dataset[first : first + ROWS]
        loss = model(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}).loss
        loss.backward()
        norm = Trainer._mixed_mesh_grad_norm(None, model, MAX_NORM)
        kept.on_pre_optimizer_step(None, None, None, model)
        optimizer.step()
        optimizer.zero_grad()
        history.append({"loss": loss.item(), "grad_norm": norm.item()})
    return history


def train(model, dataset: list[dict], kept: Gradients, ranks: int, output: Path) -> list[dict]:
    """Trains with the Trainer and returns its log."""
    arguments = TrainingArguments(
        output_dir=str(output / "trainer"),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        per_device_train_batch_size=ROWS // ranks,
        train_sampling_strategy="sequential",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=MAX_NORM,
        max_steps=STEPS,
    )
    trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[kept])
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def run(path: str, cell: Cell, output: Path, *, parallel: bool) -> dict:
    """Trains a cell and returns its losses, norms, first gradients and final parameters."""
    model = load(path, cell, parallel=parallel)
    if cell.trained != "full":
        model = PeftModel.from_pretrained(model, f"{path}/{cell.trained}", is_trainable=True)
    kept = Gradients()
    dataset = examples(model.config.vocab_size)
    with ktops.profile() as profile:
        if parallel and cell.size["tensor"] > 1:
            history = train_in_loop(model, dataset, kept)
        else:
            history = train(model, dataset, kept, cell.size["data"] if parallel else 1, output)
    if cell.trained != "full":
        model.save_pretrained(output / "adapter", is_main_process=rank() == 0)
    return {
        "operators": {step.op for step in profile.steps},
        "losses": [entry["loss"] for entry in history],
        "norms": [entry["grad_norm"] for entry in history],
        "gradients": kept.gradients,
        "parameters": {name: whole(p) for name, p in model.named_parameters() if p.requires_grad},
    }


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def join() -> bool:
    """Prepares this process, and connects it with the others; returns whether there are any."""
    torch.set_num_threads(1)
    ktops.enable()
    parallel = distributed.is_torchelastic_launched()
    if parallel:
        distributed.init_process_group("gloo")
    return parallel


def leave() -> None:
    """Ends this process once all have come here.

    Without ``destroy_process_group``, because threads of gloo that still free the last exchange can abort it.
    """
    distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


def main(path: str, directory: str, *names: str) -> None:
    """Trains cells one after another; saves the result of each, or its error."""
    parallel = join()
    for name in names:
        output = Path(directory) / name
        if rank() == 0:
            shutil.rmtree(output, ignore_errors=True)
            output.mkdir(parents=True)
        if parallel:
            distributed.barrier()
        try:
            result = run(path, Cell(*name.split("-")), output, parallel=parallel)
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        if rank() == 0:
            torch.save(result, output / "result.pt")
    if parallel:
        leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
