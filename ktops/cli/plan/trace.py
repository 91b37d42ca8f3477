"""Counts the memory that tensors would occupy, by running PyTorch on tensors without data.

Fake tensors have a shape, a dtype and the device "cpu", so PyTorch chooses the operators that it would choose
for real ones, and autograd saves what it would save.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ktops.ops.arguments import MoeArguments

TEMPORARY = "temporary"
LOGITS = "logits and loss"
ACTIVATIONS = "saved activations"
"""Kinds of tensors that are known when they are created: those as wide as the vocabulary, what ktops' forward
saves, and the others."""

HEAP_BYTES = 32 << 20
"""From this size on, glibc maps an allocation by itself, and unmaps it when it is freed."""


@dataclass(frozen=True)
class Traced:
    """What a command allocates besides the weights.

    Attributes:
        parts: bytes by kind when they are the most together.
        in_heap: bytes of them in tensors that malloc does not map one by one.
        most_in_heap: the most bytes of such tensors at any time.
        experts: (number of experts, experts per token) of every call of ktops' operators.
    """

    parts: dict[str, int]
    in_heap: int
    most_in_heap: int
    experts: tuple[tuple[int, int], ...]


class MemoryTrace(TorchDispatchMode):
    """Counts the bytes of the storages that operators create while it is entered.

    Args:
        vocab_size: the last dimension of logits.

    Attributes:
        live: bytes that exist now, by kind.
        peak: bytes by kind when they were the most together, since :meth:`reset_peak`.
        peak_in_heap: bytes of tensors at that time that are smaller than those malloc maps one by one.
        most_in_heap: the most bytes of such tensors at any time.
        scratch: the most bytes of scratch memory that a call of ktops' operators needs.
        experts: (number of experts, experts per token) of every call of ktops' operators.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.vocab_size = cast(Any, model.config).get_text_config().vocab_size
        self._held = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.in_heap = self.peak_in_heap = self.most_in_heap = 0
        self.scratch = 0
        self.experts: list[tuple[int, int]] = []
        self._kinds: dict[int, str] = {}

    def reset_peak(self) -> None:
        self.peak, self.peak_in_heap = Counter(self.live), self.in_heap

    def set_kind(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Sets the kind of temporary tensors; those of another kind keep it."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if self._kinds.get(storage._cdata) == TEMPORARY:
                self._kinds[storage._cdata] = kind
                self.live[TEMPORARY] -= storage.nbytes()
                self.live[kind] += storage.nbytes()

    @contextmanager
    def saved(self) -> Iterator[None]:
        """Gives what autograd saves the kind ACTIVATIONS."""

        def pack(tensor: Tensor) -> Tensor:
            self.set_kind(ACTIVATIONS, [tensor])
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.nonzero.default:
            out = args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.long)
        else:
            out = function(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        if function.namespace == "kt":
            self._add_call(function, args)
        if function is torch.ops.kt.moe_sft_fwd.default:
            self.set_kind(ACTIVATIONS, [tensor for tensor in out if tensor is not None])
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._kinds or key in self._held:
            return
        wide = tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size
        kind = LOGITS if wide else TEMPORARY
        self._kinds[key] = kind
        self.live[kind] += nbytes
        self.in_heap += nbytes if nbytes < HEAP_BYTES else 0
        self.most_in_heap = max(self.most_in_heap, self.in_heap)
        weakref.finalize(storage, self._remove, key, nbytes)
        if self.live.total() > self.peak.total():
            self.reset_peak()

    def _remove(self, key: int, nbytes: int) -> None:
        self.live[self._kinds.pop(key)] -= nbytes
        self.in_heap -= nbytes if nbytes < HEAP_BYTES else 0

    def _add_call(self, function, args: tuple) -> None:
        if function not in SCRATCH_COLUMNS:
            return
        skipped, columns = SCRATCH_COLUMNS[function]
        arguments = MoeArguments._make(args[skipped : skipped + len(MoeArguments._fields)])
        top_k = arguments.topk_ids.shape[1]
        self.experts.append((arguments.num_experts, top_k))
        row = columns(arguments) * arguments.hidden_states.dtype.itemsize + 4
        self.scratch = max(self.scratch, arguments.topk_ids.numel() * row)


def _ranks(arguments: MoeArguments) -> int:
    factors = arguments.gate_up_lora_A, arguments.down_lora_A
    return sum(factor.shape[1] for factor in factors if factor is not None)


SCRATCH_COLUMNS = {
    torch.ops.kt.moe_fwd.default: (0, lambda call: call.intermediate_size + _ranks(call)),
    torch.ops.kt.moe_sft_fwd.default: (0, lambda call: call.intermediate_size),
    torch.ops.kt.moe_sft_bwd.default: (1, lambda call: call.gate_up_rows + _ranks(call)),
}
"""Operator -> position of its first common argument, and what a route occupies of its workspace, in elements.

The rest of a workspace does not grow with the number of tokens; see ``ktops_csrc/moe``.
"""


class Untraceable(Exception):
    """A model cannot run on tensors without data; the message says why."""


@contextmanager
def fake(model: nn.Module) -> Iterator[None]:
    """Makes a model on the meta device, and tensors created in the block, fake ones on the CPU.

    Raises:
        Untraceable: what runs in the block failed.
    """
    mode = FakeTensorMode()
    _make_fake(model, mode)
    with mode:
        try:
            yield
        except Exception as error:
            reason = str(error).split("\n")[0]
            raise Untraceable(f"{type(error).__name__}: {reason}") from error


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    made: dict[int, Tensor] = {}
    with mode:
        for module in model.modules():
            for tensors in cast("list[dict[str, Tensor | None]]", [module._parameters, module._buffers]):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = made.setdefault(id(tensor), _fake(tensor))


def _fake(tensor: Tensor) -> Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
