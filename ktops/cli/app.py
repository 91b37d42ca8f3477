"""Declares the commands and their options. Implementations are imported on use, to keep --help fast."""

from pathlib import Path
from typing import Annotated

import typer

import ktops

app = typer.Typer(
    name="ktops",
    help="Fine-tune and convert Mixture-of-Experts language models on the CPU.",
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

_GROUP_SIZE = "Weights per scale; 0 for one scale per row. (default: depends on the format)"
_METHOD = "How to choose the scales. (default: rtn, round to nearest)"


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
    """Show installed versions and this machine's CPU, kernels, threads, NUMA nodes and memory."""
    from ktops.cli.info import collect, show

    show(collect(), as_json=json)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Model directory with safetensors files, or a GGUF file.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Directory to create.")],
    weight_format: Annotated[
        str,
        typer.Option(
            "--format", metavar="NAME", help="Weight format of the experts, such as int4, int8 or q4_k."
        ),
    ],
    group_size: Annotated[int | None, typer.Option(help=_GROUP_SIZE)] = None,
    method: Annotated[str | None, typer.Option(metavar="rtn|mse|hqq", help=_METHOD)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if ktops wrote it.")] = False,
) -> None:
    """Convert the experts of a checkpoint to a weight format, for from_pretrained or ktops.load_experts.

    Holds one expert in memory at a time. DST appears when it is complete. After an interruption, run the same
    command again to continue.
    """
    from ktops.cli.command import run_convert

    run_convert(source, destination, weight_format, group_size, method, overwrite)


_ADAPTERS = "Directories of adapters of one model, from PEFT, ktops, kt-kernel, vLLM or SGLang."
_WEIGHTS = "Factors of several adapters, separated by commas. (default: 1 each)"


@app.command()
def export(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help=_ADAPTERS)],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to create.")],
    layout: Annotated[
        str,
        typer.Option(
            "--for", metavar="peft|vllm|sglang|llama.cpp|kt", help="The program that will load the adapter."
        ),
    ],
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Directory of the model, or its config.json. (default: the model that the adapter names)",
        ),
    ] = None,
    weights: Annotated[str | None, typer.Option(metavar="NUMBERS", help=_WEIGHTS)] = None,
) -> None:
    """Write a LoRA adapter for another program.

    Several adapters become one, the sum of their updates. Holds one layer's factors in memory at a time. OUT
    appears when it is complete.
    """
    from ktops.cli.command import run_export

    run_export(adapters, destination, layout, base, weights)


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Model directory with safetensors files.")],
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help=_ADAPTERS)],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to create.")],
    weights: Annotated[str | None, typer.Option(metavar="NUMBERS", help=_WEIGHTS)] = None,
    weight_format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Weight format of the experts, such as int4, written as by ktops convert. (default: BASE's "
            "layout and names, quantized weights in bfloat16)",
        ),
    ] = None,
    group_size: Annotated[int | None, typer.Option(help=_GROUP_SIZE)] = None,
    method: Annotated[str | None, typer.Option(metavar="rtn|mse|hqq", help=_METHOD)] = None,
) -> None:
    """Add LoRA adapters to the weights of a model, and write it.

    Holds one expert in memory at a time. OUT appears when it is complete.
    """
    from ktops.cli.command import run_merge

    run_merge(base, adapters, destination, weights, weight_format, group_size, method)


@app.command()
def finetune(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Hugging Face model directory with safetensors files and a tokenizer. (default: a small "
            "model that ktops pretrains)",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="JSON or JSONL file in one of the layouts messages, conversations, prompt and completion, "
            "alpaca (instruction, input, output) or text. (default: packaged instructions)",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    ignore_keys: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Keys of records and messages in FILE to ignore, such as id,source. Any other key that the "
            "chat template leaves out is an error.",
            rich_help_panel=_MODEL,
        ),
    ] = "",
    eval_fraction: Annotated[
        float, typer.Option(help="Fraction of the examples to hold out.", rich_help_panel=_MODEL)
    ] = 0.05,
    max_length: Annotated[
        int,
        typer.Option(
            help="Maximum number of tokens per sequence; longer ones are truncated.", rich_help_panel=_MODEL
        ),
    ] = 1024,
    lora_rank: Annotated[
        int,
        typer.Option(
            help="Rank of the adapters; for experts, the rank of each expert.", rich_help_panel=_LORA
        ),
    ] = 16,
    lora_alpha: Annotated[
        float | None,
        typer.Option(help="Adapters are scaled by alpha / rank. (default: 2 * rank)", rich_help_panel=_LORA),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Where to add adapters: attention, experts, or names of linear layers, separated by commas.",
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
        typer.Option(
            metavar="bf16|f32", help="Dtype of base weights and activations.", rich_help_panel=_TRAINING
        ),
    ] = "bf16",
    experts_implementation: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="ktops or, for comparison, one of transformers' own: eager, grouped_mm, batched_mm.",
            rich_help_panel=_TRAINING,
        ),
    ] = "ktops",
    weight_format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Quantize the experts to this format, such as int4, int8 or q4_k. The adapters are trained "
            "on the quantized weights.",
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
            help="Directory for the adapter, metrics.json, loss.png and checkpoints. (default: "
            "ktops-finetune, or the first of ktops-finetune-2, -3, ... that holds no run)",
            rich_help_panel=_RUN,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --output-dir with its original options; only --max-steps may change.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --output-dir.", rich_help_panel=_RUN)
    ] = False,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.", rich_help_panel=_RUN)] = 50,
) -> None:
    """Fine-tune a Mixture-of-Experts model with LoRA on attention and experts.

    Without arguments, pretrains a small model, fine-tunes it on packaged instructions, saves the adapter, and
    checks it in a fresh process. This takes a few minutes and needs no network.

    With --model and --data, fine-tunes your own model on your own data.

    Ctrl-C saves a checkpoint, from which --resume continues.
    """
    from ktops.cli.command import run_finetune

    given = {
        name: value
        for name, value in ctx.params.items()
        if (source := ctx.get_parameter_source(name)) and source.name not in ("DEFAULT", "DEFAULT_MAP")
    }
    run_finetune(given)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def launch(
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND [ARGS]...", help="A trainer or a server, with options.")
    ],
) -> None:
    """Run a command with ktops in every Python process that it starts.

    Experts of transformers models run through ktops unless the command asks for another implementation, and
    training that would leave ktops unused is an error. LLaMA-Factory takes use_kt, and `import kt_kernel`
    imports ktops' replacement.

    For example: ktops launch llamafactory-cli train qwen3_lora_sft_kt.yaml
    """
    from ktops.cli.launch import launch

    launch(command)
