"""Pretrains the small model, so that fine-tuning has something to adapt."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from ktops.checkpoints.stream import write_json
from ktops.cli import processes
from ktops.cli.errors import UserError
from ktops.cli.finetune import demo_model, metrics, run_directory, training
from ktops.cli.finetune.measure import peak_rss_bytes
from ktops.cli.finetune.options import Options
from ktops.cli.finetune.progress import ProgressCallback
from ktops.cli.finetune.report import Report
from ktops.cli.models import place

LEARNING_RATE = 3e-3
WARM_UP = 0.05
"""Fraction of the steps over which the learning rate rises to its peak. It then follows a cosine decay."""
LOG = "pretraining.json"
BATCH_SIZE = 8
"""Sequences of a step, of all processes together."""
DTYPE = torch.float32
"""Dtype of pretraining. AdamW on bfloat16 weights loses most updates to rounding."""


def require_equal_batches(directory: Path, world_size: int) -> None:
    """Raises UserError if processes cannot share the batches of pretraining equally, and it is to be done."""
    is_pretrained = (directory / run_directory.BASE / LOG).is_file()
    if BATCH_SIZE % world_size and not is_pretrained:
        raise UserError(
            f"without --model, a small model is pretrained in batches of {BATCH_SIZE}, which {world_size} "
            "processes cannot share equally. Start 1, 2, 4 or 8"
        )


def base_model(options: Options, directory: Path, report: Report, resume_command: str) -> tuple[str, dict]:
    """Pretrains the small model, unless an earlier run in this directory already did.

    Returns:
        (model directory, {"steps": log, "tokens_per_second": ..., "kt_time": ...} of its pretraining).

    Raises:
        Interrupted: Ctrl-C; a checkpoint has been saved.
    """
    base = directory / run_directory.BASE
    log = base / LOG
    if log.is_file():
        return str(base), json.loads(log.read_text(encoding="utf-8"))
    transformers.set_seed(options.seed)
    documents, tokenizer = demo_model.make_tokenizer()
    examples = demo_model.pretraining_examples(documents, tokenizer)
    if options.experts_implementation == "ktops":
        import ktops

        ktops.enable()
    model = demo_model.create(tokenizer, DTYPE, options.experts_implementation)
    place(model, replace(options, num_gpu_experts=0))
    model.config.output_router_logits = True
    report.pretraining(model, examples)
    work = directory / run_directory.PRETRAINING
    assert options.pretrain_steps is not None
    args = training.training_arguments(
        options,
        work,
        max_steps=options.pretrain_steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=int(WARM_UP * options.pretrain_steps),
        optim="adamw_torch_fused",
        per_device_train_batch_size=BATCH_SIZE // options.world_size,
        weight_decay=0.01,
        adam_beta2=0.95,
    )
    trainer, timer, kt = training.make_trainer(
        model, tokenizer, examples, [], args, ProgressCallback(report.console, "pretraining")
    )
    training.train(trainer, work, report.console, resume_command)
    result = {
        "steps": metrics.training_log(trainer),
        **timer.summary(),
        "kt_time": kt.summary(timer.seconds),
        "peak_rss_bytes": peak_rss_bytes(),
    }

    def save() -> None:
        demo_model.save(model, tokenizer, base)
        write_json(log, result)
        shutil.rmtree(work)

    processes.on_main_process(save)
    return str(base), result
