"""Declares `ktops chat` and `ktops serve`, and their options."""

from pathlib import Path
from typing import Annotated

import typer

from ktops.cli.finetune.app import FORCE, GROUP_SIZE, METHOD, MMAP

_MODEL = "Model"
_ANSWERS = "Answers"


_Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hugging Face model directory, or the directory of an adapter, which names its model.",
    ),
]
_Adapter = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="LoRA adapter from PEFT or ktops finetune.", rich_help_panel=_MODEL),
]
_WeightFormat = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Quantize the experts to this format, such as int4, int8 or q4_k. (default: as the adapter "
        "was trained; else the model's own)",
        rich_help_panel=_MODEL,
    ),
]
_GroupSize = Annotated[int | None, typer.Option(help=GROUP_SIZE, rich_help_panel=_MODEL)]
_QuantizeMethod = Annotated[
    str | None, typer.Option(metavar="rtn|mse|hqq", help=METHOD, rich_help_panel=_MODEL)
]
_ExpertsPath = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Directory or GGUF file to load the experts from, instead of MODEL.",
        rich_help_panel=_MODEL,
    ),
]
_Mmap = Annotated[bool, typer.Option("--mmap", help=MMAP, rich_help_panel=_MODEL)]
_LinearFormat = Annotated[
    str | None,
    typer.Option(
        metavar="int8",
        help="Quantize the linear layers outside the experts too. (default: as the adapter was trained)",
        rich_help_panel=_MODEL,
    ),
]
_NumThreads = Annotated[
    int | None,
    typer.Option(help="CPU threads, at most one per core. (default: PyTorch's)", rich_help_panel=_MODEL),
]


def chat(
    ctx: typer.Context,
    model: _Model,
    adapter: _Adapter = None,
    weight_format: _WeightFormat = None,
    group_size: _GroupSize = None,
    quantize_method: _QuantizeMethod = None,
    experts_path: _ExpertsPath = None,
    linear_format: _LinearFormat = None,
    mmap: _Mmap = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="bf16|f32",
            help="Dtype of other weights and activations. (default: as the adapter was trained; else bf16)",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Where everything but the experts is computed: cpu, or an accelerator such as cuda.",
            rich_help_panel=_MODEL,
        ),
    ] = "cpu",
    num_gpu_experts: Annotated[
        int,
        typer.Option(
            help="Experts of each layer, the first ones, that --device computes from copies.",
            rich_help_panel=_MODEL,
        ),
    ] = 0,
    num_threads: _NumThreads = None,
    force: Annotated[bool, typer.Option("--force", help=FORCE, rich_help_panel=_MODEL)] = False,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Answer this, and end.", rich_help_panel=_ANSWERS)
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Answer the text in a file, and end. - is stdin, the default if that is no terminal.",
            rich_help_panel=_ANSWERS,
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="System message of the conversation.", rich_help_panel=_ANSWERS),
    ] = None,
    no_chat_template: Annotated[
        bool,
        typer.Option(
            "--no-chat-template",
            help="Continue each prompt as plain text, as without a chat template.",
            rich_help_panel=_ANSWERS,
        ),
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of an answer. (default: the model's generation_config, or 2048)",
            rich_help_panel=_ANSWERS,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0 always takes the likeliest token. (default: the model's generation_config)",
            rich_help_panel=_ANSWERS,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the likeliest tokens with this probability together. (default: the model's "
            "generation_config)",
            rich_help_panel=_ANSWERS,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Random seed, for the same answers again.", rich_help_panel=_ANSWERS),
    ] = None,
    metrics: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the figures of all answers to a JSON file.",
            rich_help_panel=_ANSWERS,
        ),
    ] = None,
) -> None:
    """Talk to a model in a terminal, with its experts on the CPU.

    Answers go to stdout, everything else to stderr. Ctrl-C stops an answer; Ctrl-D ends the conversation.
    With --prompt, --file or input from a pipe, there is one answer.
    """
    from ktops.cli.command import run_chat

    run_chat(ctx.params)


def serve(
    ctx: typer.Context,
    model: _Model,
    adapter: _Adapter = None,
    weight_format: _WeightFormat = None,
    group_size: _GroupSize = None,
    quantize_method: _QuantizeMethod = None,
    experts_path: _ExpertsPath = None,
    linear_format: _LinearFormat = None,
    mmap: _Mmap = False,
    num_threads: _NumThreads = None,
) -> None:
    """Answer over HTTP, by OpenAI's interface: the server of transformers, with experts on the CPU.

    Other options, after MODEL, are those of `transformers serve`, such as --port 8000. Clients name the model
    as this command does.
    """
    from ktops.cli.command import run_serve

    run_serve(ctx.params, ctx.args)
