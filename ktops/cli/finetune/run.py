"""`ktops finetune`: trains a LoRA adapter on a data file, saves it, and verifies it after reloading."""

import gc
import math
import random
import shlex
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console

import ktops
from ktops.checkpoints.stream import write_json
from ktops.cli import processes
from ktops.cli.errors import UserError
from ktops.cli.finetune import corpus, lora, metrics, packing, pretrain, run_directory, training, verify
from ktops.cli.finetune import options as options_file
from ktops.cli.finetune.datasets import load_examples
from ktops.cli.finetune.encoding import Encoded, encode, encode_question, prepare_tokenizer
from ktops.cli.finetune.layouts import Example, from_alpaca
from ktops.cli.finetune.options import Options
from ktops.cli.finetune.plot import plot_loss
from ktops.cli.finetune.progress import ProgressCallback
from ktops.cli.finetune.report import Report
from ktops.cli.models import (
    check_directory,
    load_base,
    load_tokenizer,
    place,
    quantize_linear,
    require_device,
)
from ktops.cli.plan.needs import Needs
from ktops.cli.plan.run import check_finetune

NEW_TOKENS = 40
"""Maximum number of tokens in a generated sample."""


@dataclass
class Split:
    """Examples for training and evaluation, and (question, token ids) pairs for samples."""

    train: list[dict]
    held_out: list[dict]
    samples: list[tuple[str, list[int]]]


def finetune(
    options: Options, directory: Path, console: Console, overwrite: bool = False, force: bool = False
) -> dict:
    """Runs `ktops finetune` in a directory from run_directory.choose, continuing any run in it.

    Of several processes, each trains on its part of the batches, and the first prints, writes and verifies.

    Returns:
        The contents of metrics.json, in all but the first process without the verification.

    Raises:
        UserError: something is wrong with the model, the data, or the reloaded adapter; or the memory is not
            enough, unless ``force``.
        Interrupted: Ctrl-C; a checkpoint has been saved.
    """
    report = Report(console)
    resume_command = _resume_command(directory)
    _require_device(options.device)
    _set_num_threads(options.num_threads, report)

    def begin() -> None:
        """Writes the first files of the run; until then, an error leaves the directory as it was."""
        processes.barrier()
        processes.on_main_process(lambda: _begin(directory, options, overwrite))
        processes.continue_with(resume_command)

    if options.model is None:
        pretrain.require_equal_batches(directory, options.world_size)
        begin()
        base, pretraining = pretrain.base_model(options, directory, report, resume_command)
        planned = None
        tokenizer, split = _encode(_packaged(), base, options, report)
    else:
        base, pretraining = options.model, None
        tokenizer, split = _user_data(base, options, report)
        planned = _plan(options, split, force, report)

    transformers.set_seed(options.seed)
    model, quantized = load_base(
        base, options.torch_dtype, options, show_progress=processes.is_main_process()
    )
    if options.linear_format is not None:
        report.line(str(quantize_linear(model, options.linear_format)))
    model = lora.add_adapters(model, options, report)
    placed = place(model, options)
    if options.experts_implementation == "ktops":
        _require_kt(model, split.train[0]["input_ids"])
    if options.model is not None:
        begin()
    report.model(model, options, split, quantized, placed)
    padded = packing.why_padded(model) if options.packing else "--no-packing"
    report.packing(padded)
    trainer, timer, kt = training.make_trainer(
        model,
        tokenizer,
        split.train,
        split.held_out,
        _training_arguments(options, directory, len(split.train)),
        ProgressCallback(console, "fine-tuning", options.logging_steps),
        packed=padded is None,
    )
    asked = split.samples if processes.is_main_process() else []
    before = training.evaluate(trainer)
    samples = [{"prompt": text, "before": _sample(model, tokenizer, ids)} for text, ids in asked]
    training.train(trainer, directory / run_directory.CHECKPOINTS, console, resume_command)
    after = training.evaluate(trainer)
    for sample, (_, ids) in zip(samples, asked, strict=True):
        sample["after"] = _sample(model, tokenizer, ids)
    report.result(before, after, samples)
    result = metrics.collect(
        options,
        trainer,
        timer,
        kt,
        held_out={"before": before, "after": after},
        pretraining=pretraining,
        plan=planned and {**asdict(planned), "anonymous_bytes": planned.anonymous},
        quantization=metrics.quantization(quantized),
        samples=samples,
    )
    if not processes.is_main_process():
        return result
    model.save_pretrained(directory)
    report.cost(result)
    checked = (split.held_out or split.train)[0]["input_ids"]
    with tempfile.TemporaryDirectory() as scratch:
        record = _record(model, base, directory, options, checked, Path(scratch))
        del model, trainer
        gc.collect()
        result["reload"] = verify.run(record)
    plot_loss(result, directory / "loss.png")
    write_json(directory / "metrics.json", result)  # with which the run is complete
    verify.require(result["reload"])
    report.reload(result["reload"], directory)
    return result


def _resume_command(directory: Path) -> str:
    return f"{processes.launcher()}ktops finetune --resume --output-dir {shlex.quote(str(directory))}"


def _require_device(device: str) -> None:
    if processes.world_size() > 1 and device != "cpu":
        raise UserError(f"--device {device}: several processes train on the CPU only. Start one process")
    require_device(device)


def _set_num_threads(wanted: int | None, report: Report) -> None:
    threads, cpus = processes.share_threads(wanted)
    if wanted is not None and threads < wanted:
        report.line(f"--num-threads {wanted}: this machine has {cpus} cores, so {threads} threads")
    if processes.world_size() > 1:
        report.line(f"{processes.world_size()} processes, {threads} threads each")


def _plan(options: Options, split: Split, force: bool, report: Report) -> Needs | None:
    """Says what the processes of this host need together; see check_finetune."""
    longest = max(len(example["input_ids"]) for example in split.train)
    planned = None
    if processes.is_local_main_process():
        planned = check_finetune(options, longest, force, report.line)
    processes.barrier()
    return planned


def _begin(directory: Path, options: Options, overwrite: bool) -> None:
    run_directory.prepare(directory, overwrite)
    options_file.save(options, directory)


def _require_kt(model, input_ids: list[int]) -> None:
    """Raises UserError if a forward runs no operator of ktops."""
    with ktops.profile() as profile:
        verify.logits(model, torch.tensor([input_ids[:2]]))
    if not profile.steps:
        name = type(model.get_base_model()).__name__
        raise UserError(
            f"--model: unsupported architecture: {name} has no routed experts that ktops runs. "
            "docs/models.md lists the models that it supports. To train without ktops: "
            "--experts-implementation eager"
        )


def _packaged() -> tuple[list[Example], list[Example]]:
    train, held_out = corpus.instructions()
    return [from_alpaca(record) for record in train], [from_alpaca(record) for record in held_out]


def _user_data(model: str, options: Options, report: Report):
    """Returns the tokenizer of --model, and --data in its tokens; only the seed decides what is held out."""
    assert options.data is not None
    check_directory(model)
    examples = _load(options.data, options)
    shuffled = random.Random(options.seed).sample(examples, len(examples))
    if options.eval_data is not None:
        return _encode((shuffled, _load(options.eval_data, options)), model, options, report)
    held_out = _held_out(len(examples), options)
    return _encode((shuffled[held_out:], shuffled[:held_out]), model, options, report)


def _load(data: str, options: Options) -> list[Example]:
    ignored = {key.strip() for key in options.ignore_keys.split(",")}
    return load_examples(data, options.dataset_dir, ignored, options.max_samples, options.seed)


def _held_out(num_examples: int, options: Options) -> int:
    """Returns how many examples to hold out: with --eval-fraction above 0, one at least."""
    if options.eval_fraction == 0:
        return 0
    if num_examples < 2:
        raise UserError(
            f"--data: {options.data} has one example; at least two are needed, because one is held out"
        )
    if options.eval_examples is None:
        assert options.eval_fraction is not None
        return min(max(1, round(options.eval_fraction * num_examples)), num_examples - 1)
    if options.eval_examples >= num_examples:
        raise UserError(
            f"--eval-examples {options.eval_examples}: the data has {num_examples} examples, so none would "
            "be left to train on"
        )
    return options.eval_examples


def _encode(examples: tuple[list[Example], list[Example]], base: str, options: Options, report: Report):
    """Returns the tokenizer of a model directory, and the (training, held-out) examples in its tokens."""
    tokenizer = load_tokenizer(base)
    prepare_tokenizer(tokenizer)
    train, held_out = (encode(part, tokenizer, options.max_length) for part in examples)
    for encoded, part in zip((train, held_out), examples, strict=True):
        if part and not encoded.examples:
            raise UserError(
                f"--max-length {options.max_length}: no example has its answer within that many tokens"
            )
    both = Encoded([], train.truncated + held_out.truncated, train.dropped + held_out.dropped)
    report.shortened(both, options.max_length)
    sampled = random.Random(1).sample(examples[1], min(3, len(examples[1])))
    questions = [(example.question, encode_question(example, tokenizer)) for example in sampled]
    return tokenizer, Split(train.examples, held_out.examples, [q for q in questions if q[1]])


def _training_arguments(options: Options, directory: Path, num_examples: int):
    assert options.batch_size is not None
    batches = math.ceil(num_examples / (options.batch_size * options.world_size))
    steps_per_epoch = math.ceil(batches / options.gradient_accumulation_steps)
    max_steps = options.max_steps
    if not max_steps:
        assert options.epochs is not None
        max_steps = math.ceil(options.epochs * steps_per_epoch)
    warmup_steps = options.warmup_steps
    if warmup_steps is None:
        warmup_steps = int(options.warmup_ratio * max_steps)
    evaluation = (
        {} if options.eval_steps is None else {"eval_strategy": "steps", "eval_steps": options.eval_steps}
    )
    return training.training_arguments(
        options,
        directory / run_directory.CHECKPOINTS,
        max_steps=max_steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.lr_scheduler,
        warmup_steps=warmup_steps,
        optim=options.optimizer,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_epsilon=options.adam_epsilon,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.eval_batch_size or options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs=training.CHECKPOINTING,
        **evaluation,
    )


@torch.no_grad()
def _sample(model, tokenizer, question: list[int]) -> str:
    """Returns the model's answer to a question's token ids, by greedy decoding."""
    prompt = torch.tensor([question], device=model.device)
    model.eval()
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(output[0, len(question) :], skip_special_tokens=True).strip()


def _record(model, base: str, directory: Path, options: Options, input_ids: list[int], scratch: Path) -> Path:
    record = verify.Record(
        base=str(Path(base).resolve()),
        adapter=str(directory.resolve()),
        tensors=str(scratch / "logits.safetensors"),
        dtype=str(options.torch_dtype).removeprefix("torch."),
        experts_implementation=options.experts_implementation,
        num_threads=torch.get_num_threads(),
        device=options.device,
        num_gpu_experts=options.num_gpu_experts,
        weight_format=options.weight_format,
        group_size=options.group_size,
        quantize_method=options.quantize_method,
        experts_path=options.experts_path,
        mmap=options.mmap,
        linear_format=options.linear_format,
    )
    tokens = torch.tensor([input_ids])
    verify.write(record, tokens, verify.logits(model, tokens), scratch / "record.json")
    return scratch / "record.json"
