"""Declares `ktops plan` and its options."""

from typing import Annotated

import typer

from ktops.cli.finetune.app import GROUP_SIZE, METHOD, MMAP

_TRAINING = "Training"
_CHAT = "Chat"


def plan(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Model directory, with or without weights, or a config.json."),
    ],
    weight_format: Annotated[
        str | None, typer.Option(metavar="NAME", help="Quantize the experts to this format, such as int4.")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help=GROUP_SIZE)] = None,
    quantize_method: Annotated[str | None, typer.Option(metavar="rtn|mse|hqq", help=METHOD)] = None,
    experts_path: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Directory or GGUF file of the experts, instead of MODEL."),
    ] = None,
    mmap: Annotated[bool, typer.Option("--mmap", help=MMAP)] = False,
    linear_format: Annotated[
        str | None, typer.Option(metavar="int8", help="Quantize the linear layers outside the experts too.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="bf16|f32", help="Dtype of other weights and activations.")
    ] = "bf16",
    batch_size: Annotated[int, typer.Option(help="Sequences per batch.", rich_help_panel=_TRAINING)] = 4,
    max_length: Annotated[
        int, typer.Option(help="Tokens of each sequence.", rich_help_panel=_TRAINING)
    ] = 1024,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapters.", rich_help_panel=_TRAINING)] = 16,
    target: Annotated[
        str,
        typer.Option(metavar="NAMES", help="As for ktops finetune.", rich_help_panel=_TRAINING),
    ] = "attention,experts",
    freeze_experts: Annotated[
        bool,
        typer.Option("--freeze-experts", help="Add no adapters to the experts.", rich_help_panel=_TRAINING),
    ] = False,
    gradient_accumulation_steps: Annotated[
        int, typer.Option(help="Batches per optimizer step.", rich_help_panel=_TRAINING)
    ] = 1,
    packing: Annotated[
        bool,
        typer.Option("--packing/--no-packing", help="As for ktops finetune.", rich_help_panel=_TRAINING),
    ] = True,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Compute activations again in backward.",
            rich_help_panel=_TRAINING,
        ),
    ] = False,
    optimizer: Annotated[
        str, typer.Option(metavar="NAME", help="As for ktops finetune.", rich_help_panel=_TRAINING)
    ] = "adamw_torch_fused",
    processes: Annotated[
        int, typer.Option(help="Processes of torchrun on this machine.", rich_help_panel=_TRAINING)
    ] = 1,
    context: Annotated[int, typer.Option(help="Tokens of a conversation.", rich_help_panel=_CHAT)] = 4096,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what fine-tuning a model and talking to it need in memory, before anything is loaded.

    Computed from the model's config, and from its files if they are there. What is mapped from files need not
    fit into memory as a whole, but whatever does not is read again and again.
    """
    from ktops.cli.command import run_plan

    run_plan(dict(ctx.params))
