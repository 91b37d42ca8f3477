"""KTMoEWrapper in mode "inference": synchronous or background forward, and deferred experts."""

import weakref
from concurrent.futures import Future
from typing import ClassVar

import torch
from torch import Tensor

from ktops._warn import warn_once
from ktops.compat import gpu_buffers
from ktops.compat.experts import COMPUTE_DTYPE, ExpertsWrapper, expect_shape, on_stream, worker


class InferenceWrapper(ExpertsWrapper):
    """The class that ``KTMoEWrapper(mode="inference")`` creates.

    With ``max_deferred_experts_per_token`` = d > 0, up to d routes of each token, those with the smallest
    weights, are computed in the background, and the next layer adds them to its output; see
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
        self._pending: Future | None = None
        self._writes: list[Future] = []
        self._deferred: tuple[int, Future] | None = None
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
        known = (expert_ids >= 0) & (expert_ids < self.num_experts)
        ids = expert_ids.where(known, self.num_experts)
        protected = torch.zeros(self.num_experts + 1, dtype=torch.bool, device=ids.device)
        protected[ids.gather(1, expert_scores.topk(protected_k, dim=1).indices)] = True
        immediate = protected[ids]
        return expert_ids.where(immediate, -1), expert_ids.where(~immediate & known, -1)

    def submit_forward(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, cuda_stream=None
    ) -> None:
        """Starts :meth:`forward` in the background; :meth:`sync_forward` returns its result."""
        self._pending = self._start(hidden_states, topk_ids, topk_weights, cuda_stream, worker().submit)

    def sync_forward(self, hidden_states: Tensor, cuda_stream=None) -> Tensor:
        """Returns the output of the last submitted forward, as :meth:`forward` returns it.

        Raises:
            RuntimeError: no forward was submitted.
        """
        if self._pending is None:
            raise RuntimeError("KTMoEWrapper: no pending forward: call submit_forward() first")
        pending, self._pending = self._pending, None
        with on_stream(cuda_stream, hidden_states.device):
            return pending.result().to(hidden_states)

    def forward(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, cuda_stream=None
    ) -> Tensor:
        """Returns the experts' output plus what the previous layer deferred.

        Args:
            hidden_states: [..., H], computed in bfloat16; on any device, like the next two arguments.
            topk_ids: [T, num_experts_per_tok], physical ids; ids outside [0, E), and those in
                gpu_experts_mask, contribute nothing.
            topk_weights: [T, num_experts_per_tok].
            cuda_stream: a stream or its address, for copies to and from a CUDA device.

        Returns:
            [T, H] with the dtype and device of hidden_states.

        Raises:
            RuntimeError: no weights are loaded, or the previous layer deferred experts for a different
                number of tokens.
            ValueError: a wrong shape.
        """
        self._pending = self._start(hidden_states, topk_ids, topk_weights, cuda_stream, _now)
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

    def _start(self, hidden_states, topk_ids, topk_weights, cuda_stream, submit) -> Future:
        x, ids, weights = self._inputs(hidden_states, topk_ids, topk_weights, cuda_stream)
        before = self._take_deferred(len(x))
        if not self.max_deferred_experts_per_token:
            return submit(self._compute, x, ids, weights, before)
        protected_k = self.num_experts_per_tok - self.max_deferred_experts_per_token
        ids, deferred = self.select_deferred_experts(ids, weights, protected_k)
        output = submit(self._compute, x, ids, weights, before)
        self._defer(x, deferred, weights)
        return output

    def _inputs(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, cuda_stream):
        """Returns copies of hidden_states [T, H], topk_ids and topk_weights in CPU memory."""
        self._check_loaded()
        if hidden_states.dim() < 2 or hidden_states.shape[-1] != self.hidden_size:
            expect_shape("hidden_states", hidden_states, ["num_tokens", self.hidden_size])
        x = hidden_states.detach().reshape(-1, self.hidden_size)
        if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "KTMoEWrapper: a CUDA graph cannot capture experts that the CPU computes: start the server "
                "with --disable-cuda-graph"
            )
        with on_stream(cuda_stream, x.device):
            x = x.to("cpu", COMPUTE_DTYPE, copy=True)
            return x, *self._routes(len(x), topk_ids, topk_weights)

    @torch.no_grad()
    def _compute(self, x: Tensor, ids: Tensor, weights: Tensor, before: Future | None) -> Tensor:
        earlier = None if before is None else before.result()
        output = self._run(x, ids, weights)
        return output if earlier is None else output + earlier

    def _defer(self, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        if self._deferred is not None:
            warn_once(
                f"KTMoEWrapper: the experts that layer {self.layer_idx} deferred were never added. Set "
                "max_deferred_experts_per_token=0 for the last layer of a model"
            )
        self._deferred = None
        if (ids >= 0).any():
            self._deferred = len(x), worker().submit(self._compute, x, ids, weights, None)

    def _take_deferred(self, num_tokens: int) -> Future | None:
        """Returns what the previous layer deferred."""
        previous = self._previous()
        if previous is None or previous._deferred is None:
            return None
        (expected, future), previous._deferred = previous._deferred, None
        if expected != num_tokens:
            raise RuntimeError(
                f"KTMoEWrapper: layer {previous.layer_idx} deferred experts of {expected} tokens, "
                f"but layer {self.layer_idx} got {num_tokens} tokens"
            )
        return future


def _now(compute, *args) -> Future:
    """Like the submit method of an executor, but runs in this thread."""
    future: Future = Future()
    future.set_result(compute(*args))
    return future
