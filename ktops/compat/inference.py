"""KTMoEWrapper in mode "inference": forwards, at once or submitted, and deferred experts."""

import functools
import weakref
from concurrent.futures import Future
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ktops._warn import warn_once
from ktops.compat import gpu_buffers
from ktops.compat.calls import Call, now, on_stream, worker
from ktops.compat.experts import ExpertsWrapper, expect_shape
from ktops.devices import streams
from ktops.devices.grouped import clamp_ids
from ktops.devices.streams import captured
from ktops.devices.transfer import upload


class Deferred(NamedTuple):
    """A call whose result the next layer adds to its output."""

    call: Call
    num_tokens: int
    captured: bool  # by a CUDA graph


class InferenceWrapper(ExpertsWrapper):
    """The class that ``KTMoEWrapper(mode="inference")`` creates.

    With ``max_deferred_experts_per_token`` = d > 0, up to d routes of each token, those with the smallest
    weights, are computed after the others, and the next layer adds them to its output; see
    :meth:`select_deferred_experts`. The next layer is the wrapper with the next larger layer_idx, created
    after this one.
    """

    mode = "inference"
    compute = "auto"
    _latest: ClassVar[weakref.WeakValueDictionary] = weakref.WeakValueDictionary()

    def __init__(self, *args, max_deferred_experts_per_token: int | None, **options) -> None:
        super().__init__(*args, **options)
        self.max_deferred_experts_per_token = max_deferred_experts_per_token or 0
        if self.max_deferred_experts_per_token < 0:
            raise ValueError(
                "KTMoEWrapper: max_deferred_experts_per_token must not be negative, got "
                f"{max_deferred_experts_per_token}"
            )
        self._pending: list[Call] | None = None
        self._writes: list[Future] = []
        self._deferred: Deferred | None = None
        self._previous = self._next = lambda: None
        self._follow(max((i for i in self._latest if i < self.layer_idx), default=None))
        self._latest[self.layer_idx] = self

    def _follow(self, layer_idx: int | None) -> None:
        """Makes this the next layer of ``layer_idx``, unless that has a next layer or a different size."""
        previous = self._latest.get(layer_idx)
        if previous and previous._next() is None and previous.hidden_size == self.hidden_size:
            self._previous, previous._next = weakref.ref(previous), weakref.ref(self)

    def select_deferred_experts(
        self, expert_ids: Tensor, expert_scores: Tensor, protected_k: int
    ) -> tuple[Tensor, Tensor]:
        """Splits expert_ids [T, K] into (immediate, deferred), each with -1 where the other has the id.

        Immediate routes are the ``protected_k`` routes of every token with the largest scores [T, K], plus
        all routes to an expert that these select for any token, because its weights are read anyway.
        """
        protected_k = max(0, min(protected_k, expert_ids.shape[1]))
        ids = clamp_ids(expert_ids, self.num_experts).long()
        protected = ids.new_zeros(self.num_experts + 1, dtype=torch.bool)
        chosen = ids.gather(1, expert_scores.topk(protected_k, dim=1).indices)
        protected.scatter_(0, chosen.flatten(), True)
        immediate = protected[ids]
        not_deferred = immediate | (ids == self.num_experts)
        return expert_ids.masked_fill(~immediate, -1), expert_ids.masked_fill(not_deferred, -1)

    def submit_forward(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, cuda_stream=None
    ) -> None:
        """Starts :meth:`forward`; :meth:`sync_forward` returns its result.

        With hidden_states on a CUDA device, work is enqueued on the stream, and a CUDA graph may capture it.
        Otherwise it runs in the background, on copies of the arguments.
        """
        self._start(worker().submit, hidden_states, topk_ids, topk_weights, cuda_stream)

    def sync_forward(self, hidden_states: Tensor, cuda_stream=None) -> Tensor:
        """Returns the output of the last submitted forward, as :meth:`forward` returns it.

        Args:
            hidden_states: a tensor with the dtype and device of the output.
            cuda_stream: the stream that may use the output next; not necessarily that of submit_forward.

        Raises:
            RuntimeError: no forward was submitted, or a CUDA graph captures only one of the two calls.
        """
        if self._pending is None:
            raise RuntimeError("KTMoEWrapper: no pending forward: call submit_forward() first")
        calls, self._pending = self._pending, None
        with on_stream(cuda_stream, hidden_states.device):
            output = functools.reduce(torch.add, [call.result() for call in calls])
            return upload(output, hidden_states.device).to(hidden_states.dtype)

    def forward(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, cuda_stream=None
    ) -> Tensor:
        """Returns the experts' output plus what the previous layer deferred.

        Args:
            hidden_states: [..., H], computed in bfloat16; on any device, like the next two arguments.
            topk_ids: [T, num_experts_per_tok], physical ids; ids outside [0, E), and those in
                gpu_experts_mask, contribute nothing.
            topk_weights: [T, num_experts_per_tok].
            cuda_stream: a stream or its address; None for the current one. Python does not wait for it.

        Returns:
            [T, H] with the dtype and device of hidden_states.

        Raises:
            RuntimeError: no weights are loaded, the previous layer deferred experts for a different number of
                tokens or in another CUDA graph, or an earlier forward on a CUDA device failed.
            ValueError: a wrong shape or device.
        """
        self._start(now, hidden_states, topk_ids, topk_weights, cuda_stream)
        return self.sync_forward(hidden_states, cuda_stream)

    def submit_write_weight_scale_to_buffer(
        self,
        gpu_tp_count: int,
        expert_id: int,
        w13_weight_ptrs: list[int],
        w13_scale_ptrs: list[int],
        w2_weight_ptrs: list[int],
        w2_scale_ptrs: list[int],
    ) -> None:
        """Starts to copy one expert to buffers in the background, for a server that prefills on its GPUs.

        Args:
            gpu_tp_count: the number of GPUs that share the experts.
            expert_id: the physical id of the expert.
            w13_weight_ptrs, w13_scale_ptrs, w2_weight_ptrs, w2_scale_ptrs: the address of a buffer for every
                GPU, in the layouts that ``docs/compat.md`` describes; 0 for the scales of BF16.

        Raises:
            RuntimeError: no weights are loaded.
            NotImplementedError: servers have no such buffers for the method.
            ValueError: an argument is out of range, or an address is missing.
        """
        self._check_loaded()
        given = w13_weight_ptrs, w13_scale_ptrs, w2_weight_ptrs, w2_scale_ptrs
        if any(len(pointers) != gpu_tp_count for pointers in given):
            counts = [len(pointers) for pointers in given]
            raise ValueError(
                f"KTMoEWrapper: every list must have gpu_tp_count={gpu_tp_count} addresses, got {counts}"
            )
        assert self.gate_up_proj is not None and self.down_proj is not None
        weights, to = (self.gate_up_proj, self.down_proj), gpu_buffers.Addresses(*given)
        gpu_buffers.check(self.method, *weights, expert_id, to)
        self._writes.append(worker().submit(gpu_buffers.write, *weights, expert_id, to))

    def sync_write_weight_scale_to_buffer(self) -> None:
        """Waits for all copies that were submitted."""
        while self._writes:
            self._writes.pop(0).result()

    def _start(self, submit, hidden_states, topk_ids, topk_weights, cuda_stream) -> None:
        self._check_loaded()
        if hidden_states.dim() < 2 or hidden_states.shape[-1] != self.hidden_size:
            expect_shape("hidden_states", hidden_states, ["num_tokens", self.hidden_size])
        device = hidden_states.device
        with on_stream(cuda_stream, device):
            on_host = not streams.available(device.type)
            x, ids, weights = self._tokens(hidden_states, topk_ids, topk_weights, on_host=on_host)
            before, deferred = self._take_deferred(x), None
            if self.max_deferred_experts_per_token:
                protected_k = self.num_experts_per_tok - self.max_deferred_experts_per_token
                ids, deferred = self.select_deferred_experts(ids, weights, protected_k)
            self._pending = [self._begin(submit, x, ids, weights), *before]
            if deferred is not None:
                self._defer(x, self._begin(worker().submit, x, deferred, weights))

    def _defer(self, x: Tensor, call: Call) -> None:
        if self._deferred is not None:
            warn_once(
                f"KTMoEWrapper: the experts that layer {self.layer_idx} deferred were never added. Set "
                "max_deferred_experts_per_token=0 for the last layer of a model"
            )
        self._deferred = Deferred(call, len(x), captured(x.device))

    def _take_deferred(self, x: Tensor) -> list[Call]:
        """Returns what the previous layer deferred, one call or none."""
        previous = self._previous()
        if previous is None or previous._deferred is None:
            return []
        deferred, previous._deferred = previous._deferred, None
        if deferred.num_tokens != len(x):
            raise RuntimeError(
                f"KTMoEWrapper: layer {previous.layer_idx} deferred experts of {deferred.num_tokens} tokens, "
                f"but layer {self.layer_idx} got {len(x)} tokens"
            )
        if deferred.captured != captured(x.device):
            raise RuntimeError(
                f"KTMoEWrapper: a CUDA graph captures only one of layer {previous.layer_idx}, which deferred "
                f"experts, and layer {self.layer_idx}, which adds them"
            )
        return [deferred.call]
