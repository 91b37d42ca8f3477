"""Declares `ktops finetune` and its options."""

from pathlib import Path
from typing import Annotated

import typer

_MODEL = "Model and data"
_FORMAT = "Weight format of the experts"
_LORA = "Adapter"
_TRAINING = "Training"
_RUN = "Run"

FORCE = "Try even if the plan says that the memory is not enough."
GROUP_SIZE = "Weights per scale; 0 for one scale per row. (default: depends on the format)"
MMAP = "Use the experts where they lie in the files, as far as possible, without a copy in memory."
METHOD = "How to choose the scales. (default: rtn, round to nearest)"


def finetune(
    ctx: typer.Context,
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="YAML file with LLaMA-Factory's keys; options override it."),
    ] = None,
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
            "alpaca (instruction, input, output) or text; or several, or names in dataset_info.json, "
            "separated by commas. (default: packaged instructions)",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    dataset_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Directory of a dataset_info.json with names for --data.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Data to evaluate on, like --data, instead of examples held out.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    max_samples: Annotated[
        int | None,
        typer.Option(
            help="Examples to use of each data set, the first ones. (default: all)", rich_help_panel=_MODEL
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
        float | None,
        typer.Option(help="Fraction of the examples to hold out. (default: 0.05)", rich_help_panel=_MODEL),
    ] = None,
    eval_examples: Annotated[
        int | None, typer.Option(help="Number of examples to hold out.", rich_help_panel=_MODEL)
    ] = None,
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
    lora_dropout: Annotated[
        float,
        typer.Option(
            help="Dropout of the adapters of linear layers; those of experts have none.",
            rich_help_panel=_LORA,
        ),
    ] = 0.0,
    use_rslora: Annotated[
        bool,
        typer.Option("--use-rslora", help="Scale adapters by alpha / sqrt(rank).", rich_help_panel=_LORA),
    ] = False,
    target: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Where to add adapters: all, all_attention, or attention, experts and names of linear "
            "layers, separated by commas.",
            rich_help_panel=_LORA,
        ),
    ] = "attention,experts",
    freeze_experts: Annotated[
        bool, typer.Option("--freeze-experts", help="Add no adapters to the experts.", rich_help_panel=_LORA)
    ] = False,
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
    lr_scheduler: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Schedule of the learning rate, such as linear, cosine or constant.",
            rich_help_panel=_TRAINING,
        ),
    ] = "cosine",
    warmup_ratio: Annotated[
        float,
        typer.Option(
            help="Fraction of the steps over which the learning rate rises to its peak.",
            rich_help_panel=_TRAINING,
        ),
    ] = 0.05,
    warmup_steps: Annotated[
        int | None,
        typer.Option(help="The same in steps; overrides --warmup-ratio.", rich_help_panel=_TRAINING),
    ] = None,
    optimizer: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Optimizer of transformers, such as adamw_torch, adafactor or sgd.",
            rich_help_panel=_TRAINING,
        ),
    ] = "adamw_torch_fused",
    adam_beta1: Annotated[
        float, typer.Option(help="Decay of AdamW's mean of gradients.", rich_help_panel=_TRAINING)
    ] = 0.9,
    adam_beta2: Annotated[
        float, typer.Option(help="Decay of AdamW's mean of squared gradients.", rich_help_panel=_TRAINING)
    ] = 0.999,
    adam_epsilon: Annotated[float, typer.Option(help="AdamW's epsilon.", rich_help_panel=_TRAINING)] = 1e-8,
    weight_decay: Annotated[
        float, typer.Option(help="Weight decay of the adapters.", rich_help_panel=_TRAINING)
    ] = 0.0,
    max_grad_norm: Annotated[
        float, typer.Option(help="Norm to clip gradients to; 0 for none.", rich_help_panel=_TRAINING)
    ] = 1.0,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Sequences per batch. (default: 4; small model: 16)", rich_help_panel=_TRAINING),
    ] = None,
    eval_batch_size: Annotated[
        int | None,
        typer.Option(
            help="Sequences per batch of an evaluation. (default: --batch-size)", rich_help_panel=_TRAINING
        ),
    ] = None,
    gradient_accumulation_steps: Annotated[
        int, typer.Option(help="Batches per optimizer step.", rich_help_panel=_TRAINING)
    ] = 1,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Compute activations again in backward, except those of experts, to save memory.",
            rich_help_panel=_TRAINING,
        ),
    ] = False,
    packing: Annotated[
        bool,
        typer.Option(
            "--packing/--no-packing",
            help="Compute the examples of a batch one after the other, without padding, "
            "if the layers of the model can keep them apart.",
            rich_help_panel=_TRAINING,
        ),
    ] = True,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="bf16|f32", help="Dtype of base weights and activations.", rich_help_panel=_TRAINING
        ),
    ] = "bf16",
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Where everything but the experts is trained: cpu, or an accelerator such as cuda. Experts "
            "and the adapters on them stay in CPU memory.",
            rich_help_panel=_TRAINING,
        ),
    ] = "cpu",
    num_gpu_experts: Annotated[
        int,
        typer.Option(
            help="Experts of each layer, the first ones, that --device computes from copies.",
            rich_help_panel=_TRAINING,
        ),
    ] = 0,
    experts_implementation: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="ktops or, for comparison, one of transformers' own: eager, grouped_mm, batched_mm.",
            rich_help_panel=_TRAINING,
        ),
    ] = "ktops",
    num_threads: Annotated[
        int | None,
        typer.Option(
            help="CPU threads, at most one per core. (default: PyTorch's)", rich_help_panel=_TRAINING
        ),
    ] = None,
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
        typer.Option(help=GROUP_SIZE, rich_help_panel=_FORMAT),
    ] = None,
    quantize_method: Annotated[
        str | None,
        typer.Option(metavar="rtn|mse|hqq", help=METHOD, rich_help_panel=_FORMAT),
    ] = None,
    experts_path: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Directory or GGUF file to load the experts from, instead of --model.",
            rich_help_panel=_FORMAT,
        ),
    ] = None,
    mmap: Annotated[bool, typer.Option("--mmap", help=MMAP, rich_help_panel=_FORMAT)] = False,
    linear_format: Annotated[
        str | None,
        typer.Option(
            metavar="int8",
            help="Quantize the linear layers outside the experts too, and train adapters on them.",
            rich_help_panel=_FORMAT,
        ),
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
    force: Annotated[bool, typer.Option("--force", help=FORCE, rich_help_panel=_RUN)] = False,
    logging_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps between lines of progress, outside a terminal. (default: a tenth)",
            rich_help_panel=_RUN,
        ),
    ] = None,
    eval_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps between evaluations. (default: only before and after)", rich_help_panel=_RUN
        ),
    ] = None,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.", rich_help_panel=_RUN)] = 50,
    save_total_limit: Annotated[
        int | None, typer.Option(help="Checkpoints to keep.", rich_help_panel=_RUN)
    ] = 1,
) -> None:
    """Fine-tune a Mixture-of-Experts model with LoRA on attention and experts.

    Without arguments, pretrains a small model, fine-tunes it on packaged instructions, saves the adapter, and
    checks it in a fresh process. This takes a few minutes and needs no network.

    With --model and --data, or a CONFIG that names them, fine-tunes your own model on your own data.

    Ctrl-C saves a checkpoint, from which --resume continues.
    """
    from ktops.cli.command import run_finetune

    given = {
        name: value
        for name, value in ctx.params.items()
        if (source := ctx.get_parameter_source(name)) and source.name not in ("DEFAULT", "DEFAULT_MAP")
    }
    run_finetune(given)
