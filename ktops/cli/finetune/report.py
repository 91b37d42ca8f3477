"""Prints the output of `ktops finetune`."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import ktops
from ktops._display import format_bytes
from ktops.cli.finetune.encoding import Encoded
from ktops.cli.finetune.measure import count_weights
from ktops.cli.finetune.options import Options
from ktops.integrations.offload import OffloadReport
from ktops.integrations.quantize_experts import QuantizationReport


class Report:
    """Prints the parts of a run to a console, one method each."""

    def __init__(self, console: Console):
        self.console = console

    def heading(self, text: str) -> None:
        self.console.print(Text(text, style="bold"))

    def line(self, text: str, style: str | None = None) -> None:
        self.console.print(f"  {text}", style=style, soft_wrap=True)

    def pretraining(self, model, examples: list[dict]) -> None:
        tokens = sum(len(example["input_ids"]) for example in examples)
        config = model.config
        self.heading("A small Mixture-of-Experts model, pretrained on short stories")
        self.line(
            f"Qwen3-MoE, {_millions(model)} parameters, {config.num_hidden_layers} layers of "
            f"{config.num_experts} experts ({config.num_experts_per_tok} per token)"
        )
        self.line(f"vocabulary of {config.vocab_size:,}, corpus of {tokens:,} tokens")

    def shortened(self, encoded: Encoded, max_length: int) -> None:
        if encoded.truncated or encoded.dropped:
            self.line(
                f"--max-length {max_length}: {encoded.truncated} examples were truncated, and "
                f"{encoded.dropped} dropped because none of the answer remained",
                style="yellow",
            )

    def model(
        self,
        model,
        options: Options,
        split,
        quantized: QuantizationReport | None,
        placed: OffloadReport | None,
    ) -> None:
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.heading("LoRA fine-tuning on instructions")
        self.line(
            f"{type(model.get_base_model()).__name__}, {_millions(model)} parameters, "
            f"{trainable / 1e6:.2f} M in adapters of rank {options.lora_rank} on {options.target}"
        )
        kernels = f"kernels {ktops.cpu_capability()}"
        self.line(f"{options.dtype}, experts run by {options.experts_implementation}, {kernels}")
        if quantized is not None:
            self.line(str(quantized))
        if placed is not None:
            self.line(str(placed))
        self.line(f"{len(split.train):,} examples, {len(split.held_out):,} held out")

    def packing(self, padded: str | None) -> None:
        how = "packed, without padding" if padded is None else f"padded: {padded}"
        self.line(f"the examples of a batch are {how}")

    def result(self, before: dict | None, after: dict | None, samples: list[dict]) -> None:
        if before is None or after is None:
            return
        table = Table(box=box.SIMPLE_HEAD)
        for column in ("held-out examples", "before", "after"):
            table.add_column(column, justify="left" if column.startswith("held") else "right")
        table.add_row("loss", f"{before['loss']:.3f}", f"{after['loss']:.3f}")
        names = {"token_accuracy": "answer tokens predicted", "answer_accuracy": "answers fully correct"}
        for name, title in names.items():
            table.add_row(title, f"{before[name]:.1%}", f"{after[name]:.1%}")
        self.console.print(table)
        for sample in samples:
            for title, style in (("prompt", "bold"), ("before", "red"), ("after", "green")):
                text = " / ".join(filter(None, sample[title].split("\n")))
                self.console.print(Text(f"  {title:>6}  ", style=style) + Text(text), soft_wrap=True)
            self.console.print()

    def cost(self, metrics: dict) -> None:
        peak = format_bytes(metrics["peak_rss_bytes"])
        if metrics["step_time"] is None:
            self.line(f"peak memory {peak}, no steps left to train")
            return
        share = f"{metrics['kt_time']['share']:.0%} of the training time inside kt ops"
        self.line(f"{metrics['tokens_per_second']:,.0f} tokens/s, peak memory {peak}, {share}")
        parts = ", ".join(f"{name} {part['share']:.0%}" for name, part in metrics["step_time"].items())
        self.line(f"{metrics['padding_per_second']:,.0f} tokens/s of padding; time of a step: {parts}")

    def reload(self, reload: dict, directory: Path) -> None:
        if reload["max_abs_difference"] == 0:
            self.line("saved and reloaded in a fresh process: the same logits, bit for bit")
        else:
            self.line(
                "saved and reloaded in a fresh process: logits differ by "
                f"{reload['relative_difference']:.1e} (accepted: {reload['tolerance']:.1e})"
            )
        self.line(f"adapter, metrics.json and loss.png: {directory}", style="bold")


def _millions(model) -> str:
    return f"{count_weights(model) / 1e6:.1f} M"
