"""Declares the commands and their options. Implementations are imported on use, to keep --help fast."""

from pathlib import Path
from typing import Annotated

import typer

import ktops
from ktops.cli.chat.app import chat, serve
from ktops.cli.finetune.app import GROUP_SIZE, METHOD, finetune
from ktops.cli.plan.app import plan

app = typer.Typer(
    name="ktops",
    help="Fine-tune, convert and talk to Mixture-of-Experts language models on the CPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


_GroupSize = Annotated[int | None, typer.Option(help=GROUP_SIZE)]
_QuantizeMethod = Annotated[
    str | None, typer.Option("--quantize-method", "--method", metavar="rtn|mse|hqq", help=METHOD)
]


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Model directory with safetensors files, or a GGUF file.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Directory to create.")],
    weight_format: Annotated[
        str,
        typer.Option(
            "--weight-format",
            "--format",
            metavar="NAME",
            help="Weight format of the experts, such as int4, int8 or q4_k.",
        ),
    ],
    group_size: _GroupSize = None,
    quantize_method: _QuantizeMethod = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if ktops wrote it.")] = False,
    report: Annotated[
        str,
        typer.Option(
            metavar="full|sample|none",
            help="What to compare with SRC: up to 16 experts of every layer, a part of one, or nothing.",
        ),
    ] = "sample",
    num_threads: Annotated[
        int | None, typer.Option(min=1, help="Number of threads. (default: PyTorch's)")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Try even if the disk or the memory is not enough.")
    ] = False,
) -> None:
    """Convert the experts of a checkpoint to a weight format, for from_pretrained or ktops.load_experts.

    Holds one expert per thread in memory at a time. DST appears when it is complete. After an interruption,
    run the same command again to continue.
    """
    from ktops.cli.command import run_convert

    run_convert(
        source, destination, weight_format, group_size, quantize_method, overwrite, report, num_threads, force
    )


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
    group_size: _GroupSize = None,
    quantize_method: _QuantizeMethod = None,
) -> None:
    """Add LoRA adapters to the weights of a model, and write it.

    Holds one expert in memory at a time. OUT appears when it is complete.
    """
    from ktops.cli.command import run_merge

    run_merge(base, adapters, destination, weights, weight_format, group_size, quantize_method)


app.command()(finetune)
app.command()(plan)
app.command()(chat)
app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(serve)


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
