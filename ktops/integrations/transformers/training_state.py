"""TrainingState: resumes training of models that are sharded among processes."""

import uuid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ktops.integrations.transformers.loaded import listed

FILE = "ktops_training_state.pt"
"""The file in a Trainer's checkpoint."""


class TrainingState(TrainerCallback, ExportableState):
    """Saves optimizer, learning rate schedule and random numbers with every checkpoint of a Trainer.

    transformers' Trainer resumes no model that a ``DistributedConfig`` has sharded: it saves only weights.
    With this callback, ``trainer.train(resume_from_checkpoint=...)`` goes on where the checkpoint was
    written. The file has whole tensors, by the names of their parameters, so that a different number of
    processes can resume, too; random numbers then begin anew. They are those of PyTorch on the CPU.

    Only rank 0 writes. All processes must take part, as they do in a Trainer. The checkpoint must be in the
    Trainer's ``output_dir``.

    Example:
        >>> arguments = TrainingArguments("out", save_only_model=True, save_steps=100)
        >>> trainer = Trainer(model, arguments, train_dataset=data, callbacks=[ktops.TrainingState()])
        >>> trainer.train(resume_from_checkpoint="out/checkpoint-100")
    """

    def __init__(self) -> None:
        self._run = uuid.uuid4().hex
        self._saved_step = 0
        self._random: Tensor | None = None

    def state(self) -> dict[str, dict[str, str]]:
        """Returns what the Trainer writes into trainer_state.json, by which the file is recognized."""
        return {"args": {}, "attributes": {"run": self._run}}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Writes the file before the Trainer completes the checkpoint and deletes older ones."""
        if control.should_save:
            self._save(args, state, objects)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Writes the file if the Trainer has decided only after the step to save it."""
        if self._saved_step != state.global_step:
            self._save(args, state, objects)

    def _save(self, args: TrainingArguments, state: TrainerState, objects: dict[str, Any]) -> None:
        self._saved_step = state.global_step
        saved = {
            "run": self._run,
            "optimizer": _whole_state(objects["model"], objects["optimizer"]),
            "learning_rates": [group["lr"] for group in objects["optimizer"].param_groups],
            "scheduler": objects["lr_scheduler"].state_dict(),
            "random": _of_every_rank(torch.get_rng_state()),
        }
        if args.should_save:
            path = self._path(args, state)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(saved, path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Reads the file of the checkpoint that the Trainer resumes.

        Raises:
            FileNotFoundError: it was written without this callback, or is not in output_dir.
            ValueError: the file in output_dir is of another run; the optimizer trains other parameters, or
                several learning rates cannot be matched.
        """
        if not state.global_step:
            return
        path = self._path(args, state)
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: not found. The checkpoint was written without ktops.TrainingState, so its "
                "optimizer is lost, or it is not in output_dir, where it must be to be resumed"
            )
        saved = torch.load(path, weights_only=True)
        resumed: Any = (state.stateful_callbacks or {}).get(type(self).__name__, {})
        if resumed.get("attributes", {}).get("run") != saved["run"]:
            raise ValueError(
                f"{path}: is of another run than the checkpoint that is resumed, which must be in output_dir"
            )
        _load_state(objects["model"], objects["optimizer"], saved["optimizer"], path)
        groups = objects["optimizer"].param_groups
        rates = _for_groups(saved["learning_rates"], len(groups), path)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        schedule = {
            name: _for_groups(value, len(groups), path) if name in ("base_lrs", "_last_lr") else value
            for name, value in saved["scheduler"].items()
        }
        objects["lr_scheduler"].load_state_dict(schedule)
        if len(saved["random"]) == _world_size():
            self._random = saved["random"][_rank()]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Sets the random numbers that the checkpoint was written with, once the order of data is drawn."""
        if self._random is not None:
            torch.set_rng_state(self._random)
            self._random = None

    @staticmethod
    def _path(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / FILE


def _whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Returns the optimizer's state of each parameter that it has changed, by name."""
    return {
        name: {key: _whole(value) for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def _whole(value: Any) -> Any:
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def _load_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, dict], path: Path
) -> None:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    unknown = sorted(saved.keys() - trained.keys())
    if unknown:
        raise ValueError(f"{path}: its optimizer trained {listed(unknown)}, which this model does not train")
    for name, values in saved.items():
        parameter = trained[name]
        optimizer.state[parameter] = {key: _like(value, parameter) for key, value in values.items()}


def _like(value: Any, parameter: nn.Parameter) -> Any:
    """Returns a value of the optimizer's state, divided as the parameter is if it has its shape."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(value, Tensor) or value.shape != parameter.shape or not value.dim():
        return value
    if isinstance(parameter.data, DTensor):
        mesh, placements = parameter.data.device_mesh, parameter.data.placements
        return distribute_tensor(value, mesh, placements, src_data_rank=None)
    return value.to(parameter.device)


def _for_groups(rates: list[float], count: int, path: Path) -> list[float]:
    """Returns a learning rate for each group of parameters; how many there are depends on the processes."""
    if len(rates) == count:
        return rates
    if len(set(rates)) > 1:
        raise ValueError(
            f"{path}: has {len(rates)} groups of parameters with different learning rates, but this "
            f"optimizer has {count} groups. Resume with as many processes as wrote it"
        )
    return rates[:1] * count


def _of_every_rank(value: Tensor) -> list[Tensor]:
    values: list[Any] = [value]
    if _world_size() > 1:
        values = [None] * _world_size()
        distributed.all_gather_object(values, value)
    return values


def _world_size() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _rank() -> int:
    return distributed.get_rank() if _world_size() > 1 else 0
