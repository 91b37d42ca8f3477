"""Collects the contents of metrics.json."""

import socket
from dataclasses import asdict

import torch

import ktops
from ktops.cli import processes
from ktops.cli.finetune.measure import count_weights, peak_rss_bytes
from ktops.cli.finetune.options import Options
from ktops.cli.finetune.timing import KtTime, StepTimer
from ktops.cli.versions import versions
from ktops.integrations.quantize_experts import QuantizationReport


def training_log(trainer) -> list[dict]:
    """Returns step, loss, learning_rate, grad_norm and what StepTimer measures of every step, including those
    before a resume."""
    names = ("step", "loss", "learning_rate", "grad_norm", "seconds", "tokens", "padding", "parts")
    return [
        {name: entry.get(name) for name in names} for entry in trainer.state.log_history if "loss" in entry
    ]


def evaluations(trainer) -> list[dict]:
    """Returns step and held-out loss of every evaluation since the first step, including those before a
    resume."""
    losses = {
        entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry
    }
    return [{"step": step, "loss": loss} for step, loss in losses.items()]


def collect(options: Options, trainer, timer: StepTimer, kt: KtTime, **parts) -> dict:
    """Returns the contents of metrics.json.

    Throughput, peak memory and the time of each part cover only the steps since the last resume, and the
    losses the whole run. Losses and throughput are those of all processes; the time of each part and the peak
    memory are those of this one. Waits for all processes.
    """
    own = {
        "host": socket.gethostname(),
        "num_threads": torch.get_num_threads(),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    return {
        "versions": versions(),
        "cpu_capability": ktops.cpu_capability(),
        "options": {name: value for name, value in asdict(options).items() if name != "world_size"},
        "world_size": processes.world_size(),
        "processes": processes.all_gather(own),
        "parameters": count_weights(trainer.model),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "steps": training_log(trainer),
        "evaluations": evaluations(trainer),
        **timer.summary(),
        "kt_time": kt.summary(timer.seconds),
        "peak_rss_bytes": own["peak_rss_bytes"],
        **parts,
    }


def quantization(report: QuantizationReport | None) -> dict | None:
    """Returns the entry of metrics.json for the weight format of the experts; None if they are dense."""
    if report is None:
        return None
    sizes = {"bytes": report.bytes_after, "bytes_before": report.bytes_before, "ratio": report.ratio}
    return {**asdict(report), **sizes, "relative_error": report.relative_error}
