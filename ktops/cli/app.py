"""The commands and their options. Their implementations are imported when a command runs, so help is fast."""

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

_GROUP_SIZE = "Number of weights that share a scale; 0 for one scale per row."
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
    """Show this machine's versions, kernels, threads, NUMA nodes and memory."""
    from ktops.cli.info import collect, show

    show(collect(), as_json=json)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Model directory with safetensors, or a GGUF file.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Directory to write.")],
    weight_format: Annotated[
        str, typer.Option("--format", metavar="NAME", help="Format of the experts: int4, int8, q4_k ...")
    ],
    group_size: Annotated[int | None, typer.Option(help=_GROUP_SIZE)] = None,
    method: Annotated[str | None, typer.Option(metavar="rtn|mse|hqq", help=_METHOD)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST.")] = False,
) -> None:
    """Convert the experts of a checkpoint to a weight format, for ktops.load_experts.

    Streams expert by expert. DST appears once it is complete. If interrupted, the same command continues.
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
            help="Hugging Face model directory with safetensors and tokenizer. Default: a small model.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="JSON or JSONL file of messages, conversations, prompt and completion, alpaca (instruction, "
            "input, output) or text.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    ignore_keys: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Keys of records and messages in FILE to leave out, such as id,source. Otherwise, a key "
            "that the chat template doesn't write is an error.",
            rich_help_panel=_MODEL,
        ),
    ] = "",
    eval_fraction: Annotated[
        float, typer.Option(help="Fraction of the examples in FILE to hold out.", rich_help_panel=_MODEL)
    ] = 0.05,
    max_length: Annotated[
        int, typer.Option(help="Maximum tokens per sequence; longer ones are cut.", rich_help_panel=_MODEL)
    ] = 1024,
    lora_rank: Annotated[
        int, typer.Option(help="Rank of the adapters; for experts, per expert.", rich_help_panel=_LORA)
    ] = 16,
    lora_alpha: Annotated[
        float | None,
        typer.Option(help="Adapters are scaled by alpha / rank. (default: 2 * rank)", rich_help_panel=_LORA),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Where to add adapters: attention, experts or names of linear layers, separated by commas.",
            rich_help_panel=_LORA,
        ),
    ] = "attention,experts",
    max_steps: Annotated[
        int | None,
        typer.Option(
            help="Optimizer steps; overrides --epochs. (small model: 200)", rich_help_panel=_TRAINING
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
        typer.Option(help="Sequences per batch. (default: 4; small model: 16)", rich_help_panel=_TRAINING),
    ] = None,
    gradient_accumulation_steps: Annotated[
        int, typer.Option(help="Batches per optimizer step.", rich_help_panel=_TRAINING)
    ] = 1,
    dtype: Annotated[
        str,
        typer.Option(metavar="bf16|f32", help="Dtype of weights and activations.", rich_help_panel=_TRAINING),
    ] = "bf16",
    experts_implementation: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="ktops, or one of transformers' own for comparison: eager, grouped_mm, batched_mm.",
            rich_help_panel=_TRAINING,
        ),
    ] = "ktops",
    weight_format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Quantize the experts to this format (int4, int8, q4_k ...) and train adapters on them.",
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
    seed: Annotated[int, typer.Option(help="Random seed.", rich_help_panel=_TRAINING)] = 0,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Directory for the adapter, metrics.json, loss.png and checkpoints. (default: the first "
            "unused of ktops-finetune, ktops-finetune-2, ...)",
            rich_help_panel=_RUN,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --output-dir with its original options.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --output-dir.", rich_help_panel=_RUN)
    ] = False,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.", rich_help_panel=_RUN)] = 50,
) -> None:
    """Fine-tune a Mixture-of-Experts model with LoRA on attention and experts.

    Without arguments, pretrains a small model, fine-tunes it on packaged instructions, saves the adapter and
    checks it in a fresh process. Takes a few minutes and needs no network.

    With --model and --data, fine-tunes your own model on your own data.

    Ctrl-C saves a checkpoint; --resume continues from it.
    """
    from ktops.cli.command import run_finetune

    given = {
        name: value
        for name, value in ctx.params.items()
        if (source := ctx.get_parameter_source(name)) and source.name not in ("DEFAULT", "DEFAULT_MAP")
    }
    run_finetune(given)
