"""Sets up the Hugging Face Trainer for both phases: pretraining of the small model, and LoRA fine-tuning."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from ktops.cli import processes
from ktops.cli.errors import Interrupted
from ktops.cli.finetune import run_directory
from ktops.cli.finetune.encoding import IGNORED
from ktops.cli.finetune.interrupt import StopOnInterrupt
from ktops.cli.finetune.options import Options
from ktops.cli.finetune.packing import PackingCollator
from ktops.cli.finetune.progress import ProgressCallback
from ktops.cli.finetune.timing import KtTime, StepTimer
from ktops.integrations.chunked_loss import ChunkedLoss, chunk_loss
from ktops.integrations.lora_linear import adapters_in_input_dtype
from ktops.ops import checkpoint_context_fn

CHECKPOINTING: dict[str, Any] = {"use_reentrant": False, "context_fn": checkpoint_context_fn}
"""How --gradient-checkpointing calls torch.utils.checkpoint: what the experts' forward saves is kept."""


class _Arguments(TrainingArguments):
    @property
    def n_gpu(self) -> int:
        """One device at most, although Trainer would copy the model to every GPU."""
        return min(super().n_gpu, 1)


def training_arguments(options: Options, directory: Path, max_steps: int, **kwargs) -> TrainingArguments:
    """Returns the settings that both phases share; each passes its own optimizer, batch size and steps."""
    return _Arguments(
        output_dir=str(directory),
        use_cpu=options.device == "cpu",
        seed=options.seed,
        max_steps=max_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=options.save_steps,
        save_total_limit=options.save_total_limit,
        report_to="none",
        log_level_replica="error",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **kwargs,
    )


class BatchOrder(torch.utils.data.Sampler):
    """Orders examples in shuffled batches of similar length, because padding costs as much as text.

    The order depends only on the seed and the epoch, so a resumed run sees the same batches as an
    uninterrupted one. Several processes take the batches in turn. In the last turn of an epoch, a process
    for which no batch is left gets an example without labels, whose index is ``len(lengths)``.
    """

    POOL = 8
    """Batches whose examples are sorted together: enough to limit padding, few enough to stay mixed."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        starts = range(0, len(self.lengths), self.batch_size)
        own = starts[self.rank :: self.world_size]
        examples = sum(min(self.batch_size, len(self.lengths) - start) for start in own)
        return examples + (len(own) < len(starts[:: self.world_size]))

    def __iter__(self):
        rng = random.Random(f"{self.seed} {self.epoch}")
        order = rng.sample(range(len(self.lengths)), len(self.lengths))
        pool = self.POOL * self.batch_size
        for start in range(0, len(order), pool):
            order[start : start + pool] = sorted(order[start : start + pool], key=self.lengths.__getitem__)
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        rng.shuffle(batches)
        batches += last
        own = batches[self.rank :: self.world_size]
        if len(own) < len(batches[:: self.world_size]):
            own.append([len(self.lengths)])
        return iter([example for batch in own for example in batch])


class _Trainer(Trainer):
    timer: StepTimer
    chunked: ChunkedLoss
    train_collator: PackingCollator | None = None
    """Of training, if it is not that of evaluation, which needs the examples apart."""

    def get_batch_samples(self, *args, **kwargs):
        self.timer.begin()
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self.timer.collected(batches)
        return batches, num_items

    def _clip_grad_norm(self, model):
        with self.timer.clock.during("optimizer"):
            return super()._clip_grad_norm(model)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Loads a whole model by the names in its files, which Trainer takes for those of its parameters: it
        would leave experts that are stored one by one as they are."""
        model = self.model if model is None else model
        if not isinstance(model, PreTrainedModel):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Returns loss, the most probable tokens [B, T] instead of logits, and labels.

        The loss is the mean over the tokens of this batch, whatever other processes evaluate at this time.
        """
        across, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self.args.average_tokens_across_devices = across
        return loss, self.chunked.predictions if self.chunked.reason is None else logits.argmax(-1), labels

    def get_train_dataloader(self):
        size = self.args.train_batch_size
        lengths = [len(example["input_ids"]) for example in self.train_dataset]
        order = BatchOrder(lengths, size, self.args.seed, processes.rank(), processes.world_size())
        loader = DataLoader(
            [*self.train_dataset, _without_labels(self.train_dataset[0])],
            batch_size=size,
            sampler=order,
            collate_fn=self.train_collator or self.data_collator,
        )
        # Each process has an order of its own already.
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True
        )

    def _wrap_model(self, model, training=True, dataloader=None):
        """Trains the model of several processes as one, which Trainer does not after an evaluation."""
        if processes.world_size() == 1 or not training or isinstance(model, DistributedDataParallel):
            return super()._wrap_model(model, training, dataloader)
        return _data_parallel(model)

    def _save_rng_state(self, output_dir):
        """Writes the state of each process before the first completes the checkpoint."""
        super()._save_rng_state(output_dir)
        processes.barrier()


def _without_labels(example: dict[str, list[int]]) -> dict[str, list[int]]:
    """Returns the first tokens of an example, with nothing to learn from them."""
    start = {name: values[:2] for name, values in example.items()}
    return {**start, "labels": [IGNORED] * len(start["input_ids"])}


class _HeldOut(list):
    """Examples to evaluate on, the shortest first, and some without labels so that all processes get as many.

    Attributes:
        total_dataset_length: the number of those with labels; accelerate drops the results of others.
    """

    def __init__(self, examples: list[dict[str, list[int]]], batch_size: int):
        super().__init__(sorted(examples, key=lambda example: len(example["input_ids"])))
        self.total_dataset_length = len(examples)
        if examples and processes.world_size() > 1:
            missing = -len(examples) % (batch_size * processes.world_size())
            self.extend([_without_labels(self[0])] * missing)


def _data_parallel(model: nn.Module) -> DistributedDataParallel:
    """Wraps a model of which all processes have a copy, so that its gradients are the mean over processes.

    Only what is trained is exchanged. The rest is the same everywhere, may be large, and may be mapped from
    files, whose pages must not be written to.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.distributed.broadcast(parameter.detach(), src=0)
    return DistributedDataParallel(
        model, init_sync=False, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def make_trainer(
    model,
    tokenizer,
    train: list[dict],
    held_out: list[dict],
    args: TrainingArguments,
    progress: ProgressCallback,
    packed: bool = False,
) -> tuple[Trainer, StepTimer, KtTime]:
    """Returns a Trainer for examples from encoding.encode, and the callbacks that measure it."""
    timer = StepTimer()
    kt = KtTime(timer.clock)
    trainer = _Trainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=_HeldOut(held_out, args.eval_batch_size),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
        processing_class=tokenizer,
        compute_metrics=_count_right,
        callbacks=[timer, kt, progress],
    )
    if packed:
        trainer.train_collator = PackingCollator()
    trainer.remove_callback(PrinterCallback)
    trainer.timer, trainer.chunked = timer, chunk_loss(model)
    if processes.rank():
        set_seed(args.seed + processes.rank())  # each process has a dropout of its own
    return trainer, timer, kt


def _count_right(prediction) -> dict[str, float]:
    """Returns the fraction of answer tokens predicted correctly, and of answers with no wrong token."""
    guesses, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    asked = labels != IGNORED
    right = (guesses == labels) & asked
    return {
        "token_accuracy": float(right.sum() / asked.sum()),
        "answer_accuracy": float(np.mean((right == asked).all(axis=1))),
    }


def evaluate(trainer: Trainer) -> dict[str, float] | None:
    """Returns ``loss`` (mean over the answer tokens of a batch, then over batches), ``token_accuracy`` and
    ``answer_accuracy``; None if no examples are held out."""
    if not len(trainer.eval_dataset):
        return None
    metrics = trainer.evaluate()
    return {name: round(metrics[f"eval_{name}"], 5) for name in ("loss", "token_accuracy", "answer_accuracy")}


def train(trainer: Trainer, directory: Path, console: Console, resume_command: str) -> None:
    """Trains to the end, starting from the latest checkpoint in the directory, if any.

    Raises:
        Interrupted: Ctrl-C; a checkpoint has been saved.
    """
    interrupt = StopOnInterrupt(lambda: console.print("  Ctrl-C: saving a checkpoint after this step ..."))
    trainer.add_callback(interrupt)
    checkpoint = processes.on_main_process(lambda: run_directory.last_checkpoint(directory))
    if checkpoint is not None:
        console.print(f"  continuing from {checkpoint}")
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step >= trainer.args.max_steps:  # Trainer would train for another step
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = state
            return
    with adapters_in_input_dtype(trainer.model):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    processes.barrier()  # torchrun would end the first, which writes the checkpoint, when others have
    if interrupt.stopped and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"Stopped after step {trainer.state.global_step} of {trainer.state.max_steps}. To continue:\n"
            f"  {resume_command}"
        )
