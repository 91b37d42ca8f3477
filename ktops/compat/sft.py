"""KTMoEWrapper in mode "sft": forward and backward with separate adapters of gate, up and down."""

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ktops._warn import warn_once
from ktops.compat import lora
from ktops.compat.calls import Call, in_host_memory, on_stream, worker
from ktops.compat.experts import COMPUTE_DTYPE, ExpertsWrapper, expect_shape
from ktops.compat.methods import Method
from ktops.devices import streams
from ktops.devices.streams import captured
from ktops.devices.transfer import upload
from ktops.ops.check_devices import LORA

LORA_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Forward(NamedTuple):
    """A forward that a backward may follow: the output with its graph, and the leaves of the graph."""

    output: Tensor
    hidden_states: Tensor
    weights: Tensor
    adapters: tuple[Tensor, ...]


class SFTWrapper(ExpertsWrapper):
    """The class that ``KTMoEWrapper(mode="sft")`` creates.

    The six adapter tensors are attributes, gate_lora_a to down_lora_b, as are their gradients,
    grad_gate_lora_a to grad_down_lora_b.
    """

    mode = "sft"
    compute = "bf16"

    def __init__(
        self,
        method: str,
        storage: Method,
        *,
        lora_rank: int,
        lora_alpha: float,
        max_cache_depth: int,
        **options,
    ) -> None:
        super().__init__(method, storage, **options)
        for name, value in (("lora_rank", lora_rank), ("max_cache_depth", max_cache_depth)):
            if value < 1:
                raise ValueError(f"KTMoEWrapper: {name} must be positive, got {value}")
        if not (lora_alpha > 0 and math.isfinite(lora_alpha)):
            raise ValueError(f"KTMoEWrapper: lora_alpha must be positive and finite, got {lora_alpha}")
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        self.lora_scaling = lora_alpha / lora_rank
        self.trains_lora = storage.trains_lora
        self.max_cache_depth = max_cache_depth
        for name in lora.NAMES:
            setattr(self, name, None)
            setattr(self, f"grad_{name}", None)
        self._joint: tuple[Tensor, ...] | None = None
        self._joint_of: tuple[int, ...] = ()
        self._in_graph = False
        self._forwards: deque[Forward] = deque(maxlen=max_cache_depth)
        self._pending: Future | None = None
        self._pending_inference: tuple[Call, Tensor, torch.Size] | None = None
        self._pending_backward: tuple[Future, float, torch.device | None] | None = None

    def init_lora_weights(
        self,
        gate_lora_a: Tensor,
        gate_lora_b: Tensor,
        up_lora_a: Tensor,
        up_lora_b: Tensor,
        down_lora_a: Tensor,
        down_lora_b: Tensor,
        grad_gate_lora_a: Tensor | None = None,
        grad_gate_lora_b: Tensor | None = None,
        grad_up_lora_a: Tensor | None = None,
        grad_up_lora_b: Tensor | None = None,
        grad_down_lora_a: Tensor | None = None,
        grad_down_lora_b: Tensor | None = None,
    ) -> None:
        """Sets the adapters, and the tensors for the gradients that :meth:`backward` writes. Copies nothing.

        With E experts, H hidden_size, I moe_intermediate_size, r lora_rank:

        Args:
            gate_lora_a, up_lora_a: [E, r, H]; all six are on the CPU, in bfloat16, float16, float32
                or float64.
            gate_lora_b, up_lora_b: [E, I, r].
            down_lora_a, down_lora_b: [E, r, I] and [E, H, r].
            grad_*: same shapes; None creates a new tensor, available as the attribute.

        Raises:
            ValueError: a wrong shape or device.
            TypeError: a wrong dtype. Nothing is changed in either case.
        """
        given = (gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b)
        grads = (
            grad_gate_lora_a, grad_gate_lora_b, grad_up_lora_a, grad_up_lora_b, grad_down_lora_a,
            grad_down_lora_b,
        )  # fmt: skip
        sizes = self.num_experts, self.hidden_size, self.moe_intermediate_size, self.lora_rank
        named = dict(zip(lora.NAMES, given, strict=True))
        named_grads = {f"grad_{name}": grad for name, grad in zip(lora.NAMES, grads, strict=True)}
        for name, tensor in {**named, **named_grads}.items():
            if tensor is not None:
                _check_adapter(name, tensor, lora.shapes(*sizes)[name.removeprefix("grad_")])
        for name, tensor in named.items():
            grad = named_grads[f"grad_{name}"]
            if grad is not None and grad.dtype != tensor.dtype:
                raise TypeError(
                    f"KTMoEWrapper: grad_{name} must have the dtype of {name}={tensor.dtype}, "
                    f"got {grad.dtype}"
                )
        for name, tensor in named.items():
            setattr(self, name, tensor)
            grad = named_grads[f"grad_{name}"]
            setattr(self, f"grad_{name}", torch.zeros_like(tensor.detach()) if grad is None else grad)
        self._joint = None

    def update_lora_weights(self) -> None:
        """Signals that the adapters have changed; call it after ``optimizer.step()``.

        Changes that PyTorch tracks (in-place operations, so every optimizer's) are detected without this
        call; changes through ``.data`` or another library are not.

        Raises:
            RuntimeError: the weights are not loaded or the adapters not initialized.
        """
        self._check_loaded()
        if self.trains_lora:
            self._check_initialized()
            self._joint = None

    def _check_initialized(self) -> None:
        if getattr(self, lora.NAMES[0]) is None:
            raise RuntimeError("KTMoEWrapper: LoRA weights not initialized: call init_lora_weights() first")

    def _adapters(self) -> tuple[Tensor, ...]:
        """Returns the op's four LoRA tensors, rebuilt if the adapters have changed."""
        if not self.trains_lora:
            return ()
        self._check_initialized()
        tensors = [getattr(self, name).detach() for name in lora.NAMES]
        versions = tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)
        if self._joint is None or versions != self._joint_of:
            if self._in_graph:
                warn_once(
                    "KTMoEWrapper: adapters have changed since a CUDA graph captured a forward. The graph "
                    "uses some of the old ones: capture it again"
                )
                self._in_graph = False
            joint = *lora.join(*tensors[:4]), *tensors[4:]
            self._joint, self._joint_of = joint, versions
        return self._joint

    def _inputs(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """Returns (hidden_states, expert_ids, weights, adapters...) on the CPU, the first three as copies."""
        self._check_loaded()
        expect_shape("hidden_states", hidden_states, ["num_tokens", self.hidden_size])
        return *self._tokens(hidden_states, expert_ids, weights, on_host=True), *self._adapters()

    def _lora_options(self, adapters: Sequence[Tensor]) -> dict[str, Any]:
        if not adapters:
            return {}
        options: dict[str, Any] = dict(zip(LORA, adapters, strict=True))
        return options | {"gate_up_scaling": self.lora_scaling, "down_scaling": self.lora_scaling}

    def _compute(self, save: bool, x: Tensor, ids: Tensor, weights: Tensor, *adapters: Tensor) -> Forward:
        with torch.set_grad_enabled(save):
            x, weights, *leaves = (tensor.detach().requires_grad_(save) for tensor in (x, weights, *adapters))
            output = self._run(x, ids, weights, **self._lora_options(leaves))
        return Forward(output, x, weights, tuple(leaves))

    def _finish(self, forward: Forward, output_device: torch.device | None) -> Tensor:
        if forward.output.requires_grad:
            self._forwards.append(forward)
        return on_device(forward.output.detach(), output_device)

    def forward(
        self,
        hidden_states: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        save_for_backward: bool = True,
        output_device: torch.device | None = None,
    ) -> Tensor:
        """Returns the experts' output, bfloat16 [T, H] in CPU memory or on output_device.

        Args:
            hidden_states: [T, H], computed in bfloat16.
            expert_ids, weights: [T, num_experts_per_tok]; ids outside [0, E), and those of experts on the
                GPU, contribute nothing.
            save_for_backward: whether a backward will follow. The latest ``max_cache_depth`` such forwards
                are kept; backward uses the latest first.

        Raises:
            RuntimeError: the weights are not loaded or the adapters not initialized.
            ValueError: a wrong shape.
        """
        inputs = self._inputs(hidden_states, expert_ids, weights)
        return self._finish(self._compute(save_for_backward, *inputs), output_device)

    def submit_forward(
        self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save_for_backward: bool = True
    ) -> None:
        """Starts :meth:`forward` in the background; :meth:`sync_forward` returns its result."""
        inputs = self._inputs(hidden_states, expert_ids, weights)
        self._pending = worker().submit(self._compute, save_for_backward, *inputs)

    def sync_forward(self, output_device: torch.device | None = None) -> Tensor:
        """Returns the output of the last submitted forward.

        Raises:
            RuntimeError: no forward was submitted.
        """
        if self._pending is None:
            raise RuntimeError("KTMoEWrapper: no pending forward: call submit_forward() first")
        pending, self._pending = self._pending, None
        return self._finish(pending.result(), output_device)

    def submit_forward_inference(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, cuda_stream=None
    ) -> None:
        """Starts a forward without backward, as servers of adapters call it.

        With hidden_states on a CUDA device, work is enqueued on the stream, and a CUDA graph may capture it;
        the graph keeps the adapters of that time. Otherwise it runs in the background.

        Args:
            hidden_states: [..., H], on any device, like the next two arguments.
            topk_ids, topk_weights: [T, num_experts_per_tok].
            cuda_stream: a stream or its address; None for the current one.

        Raises:
            RuntimeError, ValueError: as :meth:`forward`.
        """
        self._check_loaded()
        device = hidden_states.device
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        expect_shape("hidden_states", rows, ["num_tokens", self.hidden_size])
        with on_stream(cuda_stream, device):
            on_host = not streams.available(device.type)
            tokens = self._tokens(rows, topk_ids, topk_weights, on_host=on_host)
            call = self._begin(worker().submit, *tokens, **self._lora_options(self._adapters()))
            self._in_graph |= captured(device)
        self._pending_inference = call, hidden_states.new_empty(0), hidden_states.shape

    def sync_forward_inference(self, cuda_stream=None) -> Tensor:
        """Returns the last submitted output, with the shape, dtype and device of its hidden_states.

        Args:
            cuda_stream: the stream that may use the output next; not necessarily that of the submission.

        Raises:
            RuntimeError: no such forward was submitted, or a CUDA graph captures only one of the two calls.
        """
        if self._pending_inference is None:
            raise RuntimeError("KTMoEWrapper: no pending forward: call submit_forward_inference() first")
        (call, like, shape), self._pending_inference = self._pending_inference, None
        with on_stream(cuda_stream, like.device):
            return upload(call.result(), like.device).to(like.dtype).reshape(shape)

    def backward(
        self,
        grad_output: Tensor,
        output_device: torch.device | None = None,
        optimizer_grad_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Computes the gradients of the latest saved forward, and discards that forward.

        The adapters' gradients are written to the tensors of :meth:`init_lora_weights`. They overwrite the
        previous values, or accumulate if the adapter's ``.grad`` is that tensor. Backward sets the ``.grad``
        of adapters that are ``nn.Parameter``, so gradients accumulate until the optimizer's ``zero_grad()``.

        Args:
            grad_output: [T, H], the gradient of the output.
            output_device: the device of the returned gradients; None keeps them in CPU memory.
            optimizer_grad_scale: a factor for the adapters' gradients.

        Returns:
            (grad_input bfloat16 [T, H], grad_weights float32 [T, num_experts_per_tok])

        Raises:
            RuntimeError: no forward is left, or the ``.grad`` of an adapter is another tensor.
            ValueError: a wrong shape, or optimizer_grad_scale is not positive and finite. The saved forward
                is kept.
        """
        last = self._last_forward(grad_output, optimizer_grad_scale)
        return self._publish(gradients(last, grad_on_host(grad_output)), optimizer_grad_scale, output_device)

    def submit_backward_async(
        self,
        grad_output: Tensor,
        output_device: torch.device | None = None,
        optimizer_grad_scale: float = 1.0,
    ) -> None:
        """Starts :meth:`backward` in the background; :meth:`sync_backward` writes and returns its results."""
        last = self._last_forward(grad_output, optimizer_grad_scale)
        future = worker().submit(gradients, last, grad_on_host(grad_output))
        self._pending_backward = future, optimizer_grad_scale, output_device

    def sync_backward(self) -> tuple[Tensor, Tensor]:
        """Returns what :meth:`backward` returns, for the submitted backward.

        Raises:
            RuntimeError: no backward was submitted.
        """
        if self._pending_backward is None:
            raise RuntimeError("KTMoEWrapper: no pending backward: call submit_backward_async() first")
        (future, scale, output_device), self._pending_backward = self._pending_backward, None
        return self._publish(future.result(), scale, output_device)

    def _last_forward(self, grad_output: Tensor, optimizer_grad_scale: float) -> Forward:
        """Checks the arguments, then removes and returns the latest forward."""
        if not self._forwards:
            raise RuntimeError(
                "KTMoEWrapper: no forward to differentiate: call forward(save_for_backward=True) first; "
                f"max_cache_depth={self.max_cache_depth} forwards are kept"
            )
        expect_shape("grad_output", grad_output, list(self._forwards[-1].output.shape))
        if not (optimizer_grad_scale > 0 and math.isfinite(optimizer_grad_scale)):
            raise ValueError(
                f"KTMoEWrapper: optimizer_grad_scale must be positive and finite, got {optimizer_grad_scale}"
            )
        for name in lora.NAMES if self._forwards[-1].adapters else ():
            adapter = getattr(self, name)
            if adapter.grad is not None and adapter.grad is not getattr(self, f"grad_{name}"):
                raise RuntimeError(
                    f"KTMoEWrapper: {name}.grad must be None or the tensor grad_{name} of "
                    "init_lora_weights(), got another tensor"
                )
        return self._forwards.pop()

    def _publish(
        self, gradients: tuple[Tensor, ...], scale: float, output_device: torch.device | None
    ) -> tuple[Tensor, Tensor]:
        grad_input, grad_weights, *adapters = gradients
        if adapters:
            for name, gradient in zip(lora.NAMES, (*lora.split(*adapters[:2]), *adapters[2:]), strict=True):
                self._write(name, gradient * scale)
        return on_device(grad_input, output_device), on_device(grad_weights, output_device)

    def _write(self, name: str, gradient: Tensor) -> None:
        adapter, grad = getattr(self, name), getattr(self, f"grad_{name}")
        if adapter.grad is grad:
            grad.add_(gradient)
            return
        grad.copy_(gradient)
        if isinstance(adapter, nn.Parameter) and adapter.requires_grad:
            adapter.grad = grad


def grad_on_host(grad_output: Tensor) -> Tensor:
    """Returns a copy in CPU memory, in the dtype of the computation."""
    grad_output = grad_output.detach().to(COMPUTE_DTYPE, copy=grad_output.is_cpu)
    return in_host_memory([grad_output])[0]


def gradients(last: Forward, grad_output: Tensor) -> tuple[Tensor, ...]:
    """Returns (grad_input, grad_weights, gradients of the op's LoRA tensors...), all in CPU memory."""
    leaves = last.hidden_states, last.weights, *last.adapters
    return torch.autograd.grad(last.output, leaves, grad_output)


def on_device(result: Tensor, device: torch.device | str | None) -> Tensor:
    """Returns a result, which is in CPU memory, on a device; None leaves it there."""
    return result if device is None else upload(result, torch.device(device))


def _check_adapter(name: str, tensor: Tensor, shape: list[int]) -> None:
    expect_shape(name, tensor, shape)
    if tensor.device.type != "cpu":
        raise ValueError(f"KTMoEWrapper: {name} must be on the CPU, got {tensor.device}")
    if tensor.dtype not in LORA_DTYPES:
        names = ", ".join(str(dtype) for dtype in LORA_DTYPES)
        raise TypeError(f"KTMoEWrapper: {name} must have one of the dtypes {names}, got {tensor.dtype}")
