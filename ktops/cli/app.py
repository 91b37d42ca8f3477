"""The commands and their options. What they do is imported when they run, so that help and info answer at
once."""

from pathlib import Path
from typing import Annotated

import typer

import ktops

app = typer.Typer(
    name="ktops",
    help="Fine-tune Mixture-of-Experts language models on the CPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MODEL = "Model and data"
_FORMAT = "Weight format of the experts"
_LORA = "Adapter"
_TRAINING = "Training"
_RUN = "Run"

_GROUP_SIZE = "Weights that share a scale, 0 for rows."
_METHOD = "How scales are chosen."


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ktops {ktops.__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def info(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what ktops finds on this machine: versions, kernels, threads, NUMA nodes, memory."""
    from ktops.cli.info import collect, show

    show(collect(), as_json=json)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Model directory with safetensors, or a GGUF file.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Directory to be written.")],
    weight_format: Annotated[
        str, typer.Option("--format", metavar="NAME", help="Of the experts: int4, int8, q4_k ...")
    ],
    group_size: Annotated[int | None, typer.Option(help=_GROUP_SIZE)] = None,
    method: Annotated[str | None, typer.Option(metavar="rtn|mse|hqq", help=_METHOD)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST.")] = False,
) -> None:
    """Write a checkpoint with its experts in a weight format, for ktops.load_experts.

    Streams expert by expert. DST has its name when it is complete; interrupted, the same command goes on.
    """
    from ktops.cli.command import run_convert

    run_convert(source, destination, weight_format, group_size, method, overwrite)


@app.command()
def finetune(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Hugging Face model directory with safetensors and tokenizer. Without it: a small model.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="JSON or JSONL: messages, conversations, prompt and completion, alpaca (instruction, input, "
            "output) or text.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    ignore_keys: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Keys of records and messages in FILE to leave out: id,source. Otherwise a key that the "
            "chat template doesn't write is an error.",
            rich_help_panel=_MODEL,
        ),
    ] = "",
    eval_fraction: Annotated[
        float, typer.Option(help="Share of the examples in FILE that is held out.", rich_help_panel=_MODEL)
    ] = 0.05,
    max_length: Annotated[
        int, typer.Option(help="Longest sequence in tokens; longer ones are cut.", rich_help_panel=_MODEL)
    ] = 1024,
    lora_rank: Annotated[
        int, typer.Option(help="Rank of the adapters, on experts per expert.", rich_help_panel=_LORA)
    ] = 16,
    lora_alpha: Annotated[
        float | None,
        typer.Option(help="Adapters are scaled by alpha / rank. (default: 2 * rank)", rich_help_panel=_LORA),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="What gets adapters: attention, experts or names of linear layers, with commas between.",
            rich_help_panel=_LORA,
        ),
    ] = "attention,experts",
    max_steps: Annotated[
        int | None,
        typer.Option(
            help="Optimizer steps; goes before --epochs. (small model: 200)", rich_help_panel=_TRAINING
        ),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the data. (default: 3)", rich_help_panel=_TRAINING)
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate. (default: 2e-4; small model: 1e-3)", rich_help_panel=_TRAINING
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Sequences at a time. (default: 4; small model: 16)", rich_help_panel=_TRAINING),
    ] = None,
    gradient_accumulation_steps: Annotated[
        int, typer.Option(help="Batches in one optimizer step.", rich_help_panel=_TRAINING)
    ] = 1,
    dtype: Annotated[
        str, typer.Option(metavar="bf16|f32", help="Weights and activations.", rich_help_panel=_TRAINING)
    ] = "bf16",
    experts_implementation: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="ktops, or one of transformers' own to compare with: eager, grouped_mm, batched_mm.",
            rich_help_panel=_TRAINING,
        ),
    ] = "ktops",
    weight_format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Keep the experts' weights in this format (int4, int8, q4_k ...) and train adapters on it.",
            rich_help_panel=_FORMAT,
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help=_GROUP_SIZE, rich_help_panel=_FORMAT),
    ] = None,
    quantize_method: Annotated[
        str | None,
        typer.Option(metavar="rtn|mse|hqq", help=_METHOD, rich_help_panel=_FORMAT),
    ] = None,
    pretrain_steps: Annotated[
        int | None,
        typer.Option(help="Pretraining steps of the small model. (default: 450)", rich_help_panel=_TRAINING),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.", rich_help_panel=_TRAINING)] = 0,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the adapter, metrics.json, loss.png and checkpoints go. [default: the first free of "
            "ktops-finetune, ktops-finetune-2, ...]",
            rich_help_panel=_RUN,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --output-dir with the options it had.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --output-dir.", rich_help_panel=_RUN)
    ] = False,
    save_steps: Annotated[
        int, typer.Option(help="Save a checkpoint every so many steps.", rich_help_panel=_RUN)
    ] = 50,
) -> None:
    """Fine-tune a Mixture-of-Experts model with LoRA on attention and experts.

    Without arguments: makes and pretrains a small model, fine-tunes it on packaged instructions, saves the
    adapter and checks it in a fresh process. No network, a few minutes.

    With --model and --data: your own model and data.

    Ctrl-C saves a checkpoint, --resume continues from it.
    """
    from ktops.cli.command import run_finetune

    given = {
        name: value
        for name, value in ctx.params.items()
        if (source := ctx.get_parameter_source(name)) and source.name not in ("DEFAULT", "DEFAULT_MAP")
    }
    run_finetune(given)
