"""BaseModel: the names and sizes of the weights that an adapter can change."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from ktops.adapters.errors import AdapterError
from ktops.checkpoints.model_names import ModelNames, empty_model
from ktops.checkpoints.names import layer_number
from ktops.checkpoints.quantization_config import CONFIG, read_json
from ktops.nn.find import find_experts, has_stacks
from ktops.nn.layout import declared_gating
from ktops.ops.activation import UNGATED, ExpertFunction

PROJECTION_NAMES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Stacks:
    """The stacked weights of the experts of a layer.

    Attributes:
        num_experts, hidden_size, intermediate_size: E, H, I.
        gating: the order of the rows of gate and up, as in :func:`ktops.moe_sft`.
        transposed: whether the weights are [E, in, out].
        declared: whether the module says so itself, by ``is_transposed``.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    gating: str
    transposed: bool
    declared: bool

    @property
    def parameters(self) -> dict[str, str]:
        """What each of the two parameters holds, "gate_up" or "up", and "down" -> its name."""
        first = "up" if self.gating == UNGATED else "gate_up"
        return {first: ExpertFunction(gating=self.gating).first_name, "down": "down_proj"}

    @property
    def first_rows(self) -> int:
        """The number of rows of the first parameter's weight [out, in]."""
        return ExpertFunction(gating=self.gating).rows(self.intermediate_size)


class BaseModel:
    """The model that config.json describes, as transformers creates it, without weights.

    Args:
        config: the contents of config.json.
        where: its path, for messages.

    Attributes:
        weights: [out, in] of every two-dimensional ``weight``, by the name of its module.
        embeddings, linears: the names of those modules that are nn.Embedding and nn.Linear.
        tied: weight -> the weight that it is the same as, such as that of the head, which checkpoints omit.
        experts: the stacked experts, by the name of their module.

    Raises:
        AdapterError: transformers cannot create the model.
    """

    def __init__(self, config: dict, where: Path) -> None:
        self.config, self.where = config, where
        try:
            model = empty_model(config)
        except Exception as error:
            raise AdapterError(
                f"{where}: transformers cannot create the model: {type(error).__name__}: {error}"
            ) from None
        if model is None:
            raise AdapterError(
                f"{where}: transformers has no model for model_type {config.get('model_type')!r}"
            )
        experts = find_experts(model)
        stacked = {name: module for name, module in experts.items() if has_stacks(module)}
        self.experts = {name: _stacks(name, module) for name, module in stacked.items()}
        self.weights: dict[str, tuple[int, int]] = {}
        self.embeddings, self.linears = set(), set()
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 2:
                self.weights[name] = (weight.shape[0], weight.shape[1])
            if isinstance(module, nn.Embedding):
                self.embeddings.add(name)
            elif isinstance(module, nn.Linear):
                self.linears.add(name)
        self.tied = dict(model.all_tied_weights_keys)
        self.names = ModelNames(model, experts)

    @cached_property
    def by_layer(self) -> dict[int | None, list[str]]:
        """The experts modules by layer number."""
        found: dict[int | None, list[str]] = {}
        for name in self.experts:
            found.setdefault(layer_number(name), []).append(name)
        return found

    def published(self, experts: str) -> tuple[str, tuple[str, str, str]]:
        """Returns the name that checkpoints have for experts with one tensor per expert, and for projections.

        Example:
            >>> mixtral.published("model.layers.0.mlp.experts")
            ('model.layers.0.block_sparse_moe.experts', ('w1', 'w3', 'w2'))
        """
        parent = experts.rpartition(".")[0]
        of_mixtral = f"{parent.rpartition('.')[0]}.block_sparse_moe.experts", ("w1", "w3", "w2")
        key = self.names.key(f"{of_mixtral[0]}.0.{of_mixtral[1][0]}.weight")
        return of_mixtral if key is not None and key.module == experts else (experts, PROJECTION_NAMES)

    def published_weight(self, name: str) -> str:
        """Returns the name that checkpoints have for a module other than experts, such as their router."""
        for parent, published in self._published_blocks.items():
            if name.startswith(f"{parent}."):
                return published + name[len(parent) :]
        return name

    @cached_property
    def _published_blocks(self) -> dict[str, str]:
        """The blocks with experts whose names in checkpoints differ."""
        blocks = {
            name.rpartition(".")[0]: self.published(name)[0].rpartition(".")[0] for name in self.experts
        }
        return {block: published for block, published in blocks.items() if block != published}

    def weight_named(self, name: str) -> str | None:
        """Returns the module with this name here or in checkpoints; None if there is none."""
        if name in self.weights:
            return name
        return self._by_published_name.get(name)

    @cached_property
    def _by_published_name(self) -> dict[str, str]:
        return {self.published_weight(name): name for name in self.weights}


def _stacks(name: str, module: nn.Module) -> Stacks:
    down = module._parameters["down_proj"]
    gating = declared_gating(module)
    function = ExpertFunction(gating=gating)
    gate_up = module._parameters[function.first_name]
    assert down is not None and gate_up is not None
    if gate_up.shape[0] != down.shape[0]:
        raise AdapterError(
            f"{name}: adapters of models in which some experts return their input are not supported "
            f"({gate_up.shape[0]} experts in gate_up_proj, {down.shape[0]} in down_proj)"
        )
    declared = bool(getattr(module, "is_transposed", False))
    first, second = gate_up.shape[1:]
    transposed = (first, second) == (down.shape[2], function.rows(down.shape[1]))
    ambiguous = transposed and (first, second) == (function.rows(down.shape[2]), down.shape[1])
    transposed = declared if ambiguous else transposed
    intermediate_size, hidden_size = down.shape[1:] if transposed else down.shape[:0:-1]
    return Stacks(down.shape[0], hidden_size, intermediate_size, gating, transposed, declared)


def open_base(base: str | Path | None, adapter: Path, config: dict) -> BaseModel:
    """Returns the model that an adapter is for.

    Args:
        base: directory of the model, or its config.json. Default: the model that the adapter's config names,
            if it is a directory or in the cache of huggingface_hub.
        adapter, config: directory of the adapter, and its adapter_config.json.

    Raises:
        AdapterError: there is no config.json.
    """
    if base is not None:
        path = Path(base)
        path = path / CONFIG if path.is_dir() else path
        if not path.is_file():
            raise AdapterError(
                f"base={str(base)!r}: expected a model directory with {CONFIG}, or such a file"
            )
        return BaseModel(read_json(path), path)
    name = config.get("base_model_name_or_path") or ""
    found = Path(name) / CONFIG if name else None
    if found is None or not found.is_file():
        found = _cached(name, config.get("revision")) if name else None
    if found is None:
        named = f"names {name!r}, which is not on this machine" if name else "names no base model"
        raise AdapterError(
            f"{adapter}: adapter_config.json {named}. Pass base (--base), the directory of the model or its "
            f"{CONFIG}"
        )
    return BaseModel(read_json(found), found)


def _cached(name: str, revision: str | None) -> Path | None:
    """Returns config.json of a model in the cache of huggingface_hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, CONFIG, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
