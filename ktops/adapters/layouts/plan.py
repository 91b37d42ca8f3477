"""What a layout writes: files of tensors, each made from the factors of one weight, and the config."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ktops.adapters.adapter import Adapter
from ktops.adapters.factors import PROJECTIONS, Factors, zeros
from ktops.adapters.peft_files import PREFIX
from ktops.adapters.tensors import sizes
from ktops.checkpoints.view import View

Named = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class Scale:
    """The rank and the scaling of everything that a program reads with one rank and one alpha."""

    rank: int
    scaling: float

    @property
    def alpha(self) -> float:
        alpha = self.scaling * self.rank
        return int(alpha) if alpha == int(alpha) else alpha

    @classmethod
    def of(cls, parts: Iterable[Factors]) -> "Scale":
        """Returns the largest rank and the most common scaling."""
        ranks, scalings = set(), Counter[float]()
        for part in parts:
            ranks.add(part.rank)
            scalings[part.scaling] += 1
        return cls(max(ranks), scalings.most_common(1)[0][0])


@dataclass(frozen=True)
class Piece:
    """Tensors of a file that are made together.

    Attributes:
        kinds: dtype and shape of the tensors, by name.
        make: returns the tensors.
    """

    kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    make: Callable[[], Named]


@dataclass
class Plan:
    """The files of a layout.

    Attributes:
        files: the pieces of each safetensors file.
        config: the contents of adapter_config.json.
        notes: what the layout leaves out, or rounds.
        finish: called with the directory after the files are written.
    """

    files: dict[str, list[Piece]]
    config: dict
    notes: list[str] = field(default_factory=list)
    finish: Callable[..., None] | None = None


Planner = Callable[[Adapter], Plan]


def factor_names(module: str, *, embedding: bool = False) -> tuple[str, str]:
    """Returns PEFT's keys of the two factors of a module."""
    a, b = (f"{PREFIX}{module}.lora_{'embedding_' if embedding else ''}{factor}" for factor in "AB")
    return (a, b) if embedding else (f"{a}.weight", f"{b}.weight")


def matrix(name: str, part: Factors, scale: Scale, *, embedding: bool = False) -> Piece:
    """Returns the two tensors of a weight other than the experts."""
    names = factor_names(name, embedding=embedding)
    shapes = (scale.rank, part.in_features), (part.out_features, scale.rank)
    kinds = zip(part.scaled_dtypes(scale.scaling), shapes, strict=True)
    return Piece(
        dict(zip(names, kinds, strict=True)),
        lambda: zip(names, part.scaled(scale.rank, scale.scaling), strict=True),
    )


def other_weights(adapter: Adapter, scale: Scale, *, published: bool) -> Iterator[Piece]:
    """Yields the tensors of weights other than the experts, under the names that checkpoints or transformers
    have for them."""
    for name, part in adapter.weights.items():
        written = adapter.base.published_weight(name) if published else name
        yield matrix(written, part, scale, embedding=name in adapter.base.embeddings)


def whole(name: str, view: View) -> Piece:
    """Returns a tensor that is copied."""
    return Piece({name: (view.dtype, view.shape)}, lambda: iter([(name, view.read())]))


def parts_of_experts(adapter: Adapter) -> Iterator[Factors]:
    """Yields the updates of the experts, separately for gate and up."""
    for module in adapter.experts:
        for name in PROJECTIONS:
            part = adapter.projection(module, name)
            if part is not None:
                yield part


def projections(adapter: Adapter, module: str, names: Iterable[str], rank: int) -> dict[str, Factors]:
    """Returns the updates of projections of a layer, zeros for those without one."""
    found = {name: adapter.projection(module, name) for name in names}
    some = next(part for part in adapter.experts[module].values())
    stacks = adapter.base.experts[module]
    return {
        name: part if part is not None else zeros(rank, *sizes(stacks, name), like=some)
        for name, part in found.items()
    }


def config_for(adapter: Adapter, scale: Scale, targets: Iterable[str]) -> dict:
    """Returns an adapter_config.json with one rank, one alpha and names of modules."""
    kept = ("task_type", "revision", "inference_mode")
    return {key: adapter.config[key] for key in kept if key in adapter.config} | {
        "peft_type": "LORA",
        "bias": "none",
        "base_model_name_or_path": adapter.config.get("base_model_name_or_path")
        or str(adapter.base.where.parent),
        "r": scale.rank,
        "lora_alpha": scale.alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted(set(targets)),
    }


def left_out(adapter: Adapter, program: str) -> list[str]:
    """Returns a note about tensors that a program cannot load."""
    if not adapter.others:
        return []
    names = ", ".join(list(adapter.others)[:3]) + (", ..." if len(adapter.others) > 3 else "")
    return [
        f"{program} loads LoRA factors only, so {len(adapter.others)} tensors are left out, and its outputs "
        f"will differ: {names}. To keep them, merge the adapter into the model"
    ]
