"""What is trained with several processes, and how it is compared with one."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from ranks import once, run_ranks
from tiny_models import SIZES, tiny_model
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, PreTrainedModel

from ktops.integrations.peft import expert_target_parameters
from ktops.testing.budgets import model_budget, relative_error, safety

STEPS = 5
RANK = 4

CONFIGURATIONS: dict[str, dict[str, Any] | None] = {
    "tp2": {"tp_size": 2},
    "ep2_all_reduce": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
    "ep2_all_to_all": {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
    "fsdp2": {"fsdp_size": 2},
    "ddp2": None,
    "tp4": {"tp_size": 4},
    "ep4_all_reduce": {"tp_size": 4, "ep_size": 4, "ep_implementation": "all_reduce"},
    "ep4_all_to_all": {"fsdp_size": 4, "ep_size": 4, "ep_implementation": "all_to_all"},
    "ep2_fsdp2": {"fsdp_size": 4, "ep_size": 2, "ep_implementation": "all_to_all"},
    "ep2_replicate2": {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2},
    "tp2_ep4": {"tp_size": 2, "fsdp_size": 2, "ep_size": 4, "ep_implementation": "all_to_all"},
    "tp2_fsdp2": {"tp_size": 2, "fsdp_size": 2},
    "fsdp4": {"fsdp_size": 4},
    "ddp4": None,
}
"""Name -> arguments of DistributedConfig; None for DistributedDataParallel."""

TRAINED = ("frozen", "lora", "experts", "full")
"""LoRA on attention beside frozen experts, on attention and experts, on experts; all weights."""

WITHOUT_ATTENTION = ("ep2_replicate2", "tp2_ep4", "tp2_fsdp2")
"""Configurations in which only experts have LoRA. That of attention fails in PEFT for most models, whatever
computes the experts, and without a Trainer it would have to be averaged over ranks."""

WEIGHTS = ("float32", "int4", "bfloat16")
"""Dtype of the model; "int4" has experts in that format and the rest in float32. In bfloat16, every token
goes to all experts, because rounding would send some to others."""

UNROUNDED = {"float32": "float32", "int4": "int4", "bfloat16": "all_experts"}
"""Weights -> what their results are compared with; "all_experts" is float32, with all experts for every
token."""

OPERATIONS = 40
"""Depth of the models in operations, forward and backward: two layers of about ten."""


class Cell(NamedTuple):
    """A run of STEPS steps: of CONFIGURATIONS, of TRAINED, of WEIGHTS."""

    configuration: str
    trained: str
    weights: str

    @property
    def name(self) -> str:
        return "-".join(self)

    @property
    def size(self) -> dict[str, int]:
        """How many ranks share a batch ("tensor"), and how many have batches of their own ("data")."""
        arguments = CONFIGURATIONS[self.configuration]
        if arguments is None:
            return {"tensor": 1, "data": int(self.configuration[-1])}
        data = arguments.get("fsdp_size", 1) * arguments.get("dp_replicate_size", 1)
        return {"tensor": arguments.get("tp_size", 1), "data": data}

    @property
    def world_size(self) -> int:
        return self.size["tensor"] * self.size["data"]

    @property
    def error(self) -> str | None:
        """A part of the error message, if ktops refuses the cell."""
        if self.weights == "int4" and self.configuration in ("tp2", "tp4", "tp2_fsdp2"):
            return "KTConfig: DistributedConfig(tp_size="
        return None


def cells(world_size: int) -> list[Cell]:
    """Returns the cells of a number of processes: all, but full fine-tuning only of dense experts."""
    every = (Cell(*cell) for cell in itertools.product(CONFIGURATIONS, TRAINED, WEIGHTS))
    return [
        cell
        for cell in every
        if cell.world_size == world_size
        and not (cell.trained == "full" and cell.weights == "int4")
        and (cell.trained in ("experts", "full") or cell.configuration not in WITHOUT_ATTENTION)
        and (cell.trained != "experts" or cell.configuration in WITHOUT_ATTENTION)
    ]


def tiny_model_for_ranks(architecture: str) -> PreTrainedModel:
    """Returns a tiny model whose heads and experts four ranks can share."""
    if architecture != "gpt_oss":
        return tiny_model(architecture, num_key_value_heads=4)
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GptOssForCausalLM(GptOssConfig(**SIZES, **heads, initializer_range=0.2, pad_token_id=None))


def lora_config(model: PreTrainedModel, trained: str = "lora", **options) -> LoraConfig:
    """Returns LoRA on what one of TRAINED names."""
    attention = ["q_proj", "k_proj", "q_b_proj"] if trained != "experts" else []
    experts = expert_target_parameters(model) if trained != "frozen" else None
    return LoraConfig(r=RANK, lora_alpha=6, target_modules=attention, target_parameters=experts, **options)


def save_adapters(model: Path) -> None:
    """Writes random LoRA into a model's directory: PEFT's own, without ktops."""
    for trained in TRAINED[:-1]:
        base = AutoModelForCausalLM.from_pretrained(model, experts_implementation="eager")
        config = lora_config(base, trained, init_lora_weights=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            get_peft_model(base, config).save_pretrained(model / trained)


def run_cells(model: Path, output: Path, wanted: list[Cell]) -> tuple[dict[Cell, dict], dict[str, dict]]:
    """Runs cells of one number of processes, and what they are compared with in one process.

    Returns:
        The result of each cell, and of "trained-weights" in one process.
    """
    kinds = {
        f"{cell.trained}-{weights}": None
        for cell in wanted
        for weights in (cell.weights, UNROUNDED[cell.weights])
    }
    alone = [f"ddp2-{kind}" for kind in kinds]
    names = [cell.name for cell in wanted]

    def run() -> None:
        run_ranks("training_program.py", 0, model, output / "alone", *alone)
        run_ranks("training_program.py", wanted[0].world_size, model, output / "together", *names)

    once(output, run)
    together = {cell: torch.load(output / "together" / cell.name / "result.pt") for cell in wanted}
    return together, {kind: torch.load(output / "alone" / f"ddp2-{kind}" / "result.pt") for kind in kinds}


def check(cell: Cell, result: dict, alone: dict[str, dict]) -> None:
    """Requires the losses, norms, first gradients and trained weights of one process.

    In float32, within the error budget of a model. In bfloat16, which one process computes with other
    roundings, the error against float32 in one process may not be larger than that of one process.
    """
    if cell.error is not None:
        assert cell.error in result.get("error", "no error"), result
        return
    assert "error" not in result, result["error"]
    expected = alone[f"{cell.trained}-{UNROUNDED[cell.weights]}"]
    rounded = alone[f"{cell.trained}-{cell.weights}"]
    assert {"moe_sft_fwd", "moe_sft_bwd"} <= result["operators"]
    assert len(result["losses"]) == STEPS
    for key in ("losses", "norms", "gradients", "parameters"):
        actual, reference, one = (_flat(run[key]) for run in (result, expected, rounded))
        error = relative_error(actual, reference)
        if cell.weights == "bfloat16":
            few = len(actual) if key in ("losses", "norms") else len(actual) // 2
            assert error <= safety(few) * relative_error(one, reference) + 1e-12, f"{key}: {error:.2e}"
        else:
            assert error <= model_budget(torch.float32, 32, OPERATIONS), f"{key}: {error:.2e}"


def _flat(values: list | dict) -> torch.Tensor:
    """Returns numbers, or tensors in the order of their names, as one vector."""
    if isinstance(values, list):
        return torch.tensor(values)
    return torch.cat([values[name].flatten().float() for name in sorted(values)])
