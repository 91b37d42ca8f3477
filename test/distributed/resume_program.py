"""Trains with AdamW to a checkpoint and on, and again from the checkpoint; saves both results.

    torchrun --nproc-per-node 2 resume_program.py MODEL OUTPUT ep2_all_to_all-lora-float32

With a checkpoint as the last argument, resumes only that.
"""

import sys
from pathlib import Path

import torch
from cells import STEPS, Cell
from peft import PeftModel
from training_program import ROWS, examples, join, leave, load, rank, whole
from transformers import Trainer, TrainingArguments

import ktops

SAVED = 3
"""The step after which a checkpoint is written."""


def run(path: str, cell: Cell, output: Path, *, parallel: bool, resume: Path | None) -> dict:
    """Trains STEPS steps, or from a checkpoint on."""
    model = PeftModel.from_pretrained(load(path, cell, parallel=parallel), f"{path}/lora", is_trainable=True)
    arguments = TrainingArguments(
        output_dir=str(output if resume is None else resume.parent),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        save_steps=SAVED,
        save_only_model=True,
        per_device_train_batch_size=ROWS // (cell.size["data"] if parallel else 1),
        train_sampling_strategy="sequential",
        learning_rate=1e-2,
        max_steps=STEPS,
    )
    dataset = examples(model.config.vocab_size)
    trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[ktops.TrainingState()])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "parameters": {name: whole(p) for name, p in model.named_parameters() if p.requires_grad},
    }


def main(path: str, directory: str, name: str, checkpoint: str | None = None) -> None:
    parallel = join()
    output, cell = Path(directory), Cell(*name.split("-"))
    results = {}
    if checkpoint is None:
        checkpoint = str(output / f"checkpoint-{SAVED}")
        results["straight"] = run(path, cell, output, parallel=parallel, resume=None)
    results["resumed"] = run(path, cell, output, parallel=parallel, resume=Path(checkpoint))
    if rank() == 0:
        torch.save(results, output / "result.pt")
    if parallel:
        leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
