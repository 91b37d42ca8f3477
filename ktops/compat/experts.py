"""ExpertsWrapper: the part of KTMoEWrapper that both modes share."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ktops
from ktops._warn import warn_once
from ktops.compat.calls import Call, in_host_memory
from ktops.compat.masks import SkippedExperts
from ktops.compat.methods import Method
from ktops.compat.weights import expert_order, from_checkpoint, from_tensors
from ktops.devices import streams
from ktops.formats import ExpertWeight
from ktops.ops.activation import ExpertFunction
from ktops.ops.moe_sft import moe_arguments

COMPUTE_DTYPE = torch.bfloat16


def expect_shape(name: str, tensor: Tensor, shape: Sequence[int | str]) -> None:
    """Raises ValueError unless the tensor has this shape; a name matches any size."""
    sizes = list(tensor.shape)
    if len(sizes) != len(shape) or any(
        isinstance(w, int) and w != s for w, s in zip(shape, sizes, strict=True)
    ):
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"KTMoEWrapper: {name} must have shape [{wanted}], got {sizes}")


class ExpertsWrapper:
    """The experts of one layer. ``compute`` is as in :func:`ktops.moe_sft`: "auto", "bf16" or "int8"."""

    mode: str
    compute: str

    def __init__(
        self,
        method: str,
        storage: Method,
        *,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        gpu_experts_mask: Tensor | None,
        cpuinfer_threads: int,
        threadpool_count: int,
        weight_path: str | None,
        prefix: str | None,
        chunked_prefill_size: int,
        numa_nodes: list[int] | None,
        group_size: int,
        num_gpu_experts: int,
        function: ExpertFunction,
    ) -> None:
        self.method = method
        self.function = function
        self.layer_idx = layer_idx
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.hidden_size = hidden_size
        self.moe_intermediate_size = moe_intermediate_size
        self.cpuinfer_threads = cpuinfer_threads
        self.threadpool_count = threadpool_count
        self.weight_path, self.prefix = weight_path, prefix
        self.chunked_prefill_size = chunked_prefill_size
        self._check_sizes(numa_nodes)
        self._storage = storage
        self.group_size = group_size if storage.group_size is None else storage.group_size
        self._skipped = SkippedExperts(_mask(gpu_experts_mask, num_gpu_experts, num_experts))
        self.gate_up_proj: Tensor | ExpertWeight | None = None
        self.down_proj: Tensor | ExpertWeight | None = None

    def _check_sizes(self, numa_nodes: list[int] | None) -> None:
        for name in (
            "num_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size",
            "cpuinfer_threads", "threadpool_count",
        ):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"KTMoEWrapper: {name} must be positive, got {getattr(self, name)}")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"KTMoEWrapper: num_experts_per_tok must be at most num_experts={self.num_experts}, "
                f"got {self.num_experts_per_tok}"
            )
        if numa_nodes is not None and len(numa_nodes) != self.threadpool_count:
            raise ValueError(
                f"KTMoEWrapper: numa_nodes must have threadpool_count={self.threadpool_count} entries, "
                f"got {numa_nodes}"
            )
        if self.cpuinfer_threads != torch.get_num_threads():
            warn_once(
                f"KTMoEWrapper: ktops computes with torch's {torch.get_num_threads()} threads, "
                f"not with cpuinfer_threads={self.cpuinfer_threads}: call torch.set_num_threads"
            )

    @property
    def gpu_experts_mask(self) -> Tensor:
        """The experts that are computed elsewhere, bool [E]; may be changed in place or assigned."""
        return self._skipped.mask

    @gpu_experts_mask.setter
    def gpu_experts_mask(self, mask: Tensor) -> None:
        expect_shape("gpu_experts_mask", mask, [self.num_experts])
        self._skipped.mask.copy_(mask)

    @property
    def num_gpu_experts(self) -> int:
        """Number of experts that are skipped because they are computed elsewhere."""
        return int(self.gpu_experts_mask.sum())

    def load_weights_from_tensors(
        self,
        gate_proj: Tensor,
        up_proj: Tensor,
        down_proj: Tensor,
        physical_to_logical_map_cpu: Tensor | None = None,
    ) -> None:
        """Stores the experts in the method's format, replacing any weights loaded before.

        Args:
            gate_proj, up_proj: [num_experts, moe_intermediate_size, hidden_size], both in the same dtype:
                bfloat16, float16 or float32.
            down_proj: [num_experts, hidden_size, moe_intermediate_size].
            physical_to_logical_map_cpu: [num_experts]; the id p in topk_ids means expert map[p] of these
                tensors. None means the identity.

        Raises:
            ValueError: a wrong shape, a map with entries outside 0 to num_experts - 1, or sizes that the
                format does not support.
            TypeError: a wrong dtype.
            NotImplementedError: method LLAMAFILE, whose formats come from a file.
        """
        if not self._storage.format:
            raise NotImplementedError(
                f"KTMoEWrapper: method {self.method!r} takes its formats from a GGUF file: call load_weights"
            )
        rows, columns = self.moe_intermediate_size, self.hidden_size
        expect_shape("gate_proj", gate_proj, [self.num_experts, rows, columns])
        expect_shape("up_proj", up_proj, [self.num_experts, rows, columns])
        expect_shape("down_proj", down_proj, [self.num_experts, columns, rows])
        order = expert_order(physical_to_logical_map_cpu, self.num_experts)
        with torch.device("cpu"):
            self.gate_up_proj, self.down_proj = from_tensors(
                gate_proj, up_proj, down_proj, order, self._storage.format, self.group_size
            )

    def load_weights(self, physical_to_logical_map_cpu: Tensor | None = None) -> None:
        """Loads the experts of layer ``layer_idx`` from ``weight_path``; see ``docs/compat.md``.

        Args:
            physical_to_logical_map_cpu: as for :meth:`load_weights_from_tensors`.

        Raises:
            ValueError: weight_path is None or cannot be read (CheckpointError); it has no such layer, several
                (pass prefix), or one with other sizes; or the map is wrong. Previously loaded weights remain.
        """
        if not self.weight_path:
            raise ValueError("KTMoEWrapper: weight_path must name a checkpoint for load_weights, got none")
        order = expert_order(physical_to_logical_map_cpu, self.num_experts)
        sizes = {
            name: getattr(self, name) for name in ("num_experts", "hidden_size", "moe_intermediate_size")
        }
        with torch.device("cpu"):
            self.gate_up_proj, self.down_proj = from_checkpoint(
                Path(self.weight_path),
                self.layer_idx,
                self.prefix,
                sizes,
                order,
                self._storage,
                self.group_size,
            )

    def _check_loaded(self) -> None:
        if self.gate_up_proj is None:
            raise RuntimeError(
                "KTMoEWrapper: weights not loaded: call load_weights() or load_weights_from_tensors() first"
            )

    def _tokens(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, *, on_host: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns hidden_states [T, H], topk_ids without experts computed elsewhere, and topk_weights.

        Args:
            on_host: whether to return copies in CPU memory; otherwise they stay on their device.
        """
        device, copy = hidden_states.device, hidden_states.is_cpu
        x = hidden_states.detach().reshape(-1, self.hidden_size)
        for name, tensor in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
            expect_shape(name, tensor, [len(x), self.num_experts_per_tok])
            if tensor.device != device:
                raise ValueError(
                    f"KTMoEWrapper: {name} must be on {device}, the device of hidden_states, "
                    f"got {tensor.device}"
                )
        if topk_ids.is_floating_point():
            raise TypeError(f"KTMoEWrapper: topk_ids must be integers, got {topk_ids.dtype}")
        ids_dtype = topk_ids.dtype if topk_ids.dtype in (torch.int32, torch.int64) else torch.int64
        tokens = [
            x.to(COMPUTE_DTYPE, copy=copy),
            topk_ids.detach().to(ids_dtype, copy=copy),
            topk_weights.detach().to(torch.float32, copy=copy),
        ]
        x, ids, weights = in_host_memory(tokens) if on_host else tokens
        return x, self._skipped.remove(ids), weights

    def _begin(self, submit: Callable[..., Future], x: Tensor, ids: Tensor, weights: Tensor, **lora) -> Call:
        """Starts a forward for inference, in stream order where that is possible, or else by ``submit``."""
        if streams.available(x.device.type):
            return streams.begin(moe_arguments(**self._arguments(x, ids, weights, **lora)))
        return submit(self._infer, x, ids, weights, **lora)

    @torch.no_grad()
    def _infer(self, hidden_states: Tensor, ids: Tensor, weights: Tensor, **lora) -> Tensor:
        return self._run(hidden_states, ids, weights, **lora)

    def _run(self, hidden_states: Tensor, ids: Tensor, weights: Tensor, **lora) -> Tensor:
        return ktops.moe_sft(**self._arguments(hidden_states, ids, weights, **lora))

    def _arguments(self, hidden_states: Tensor, ids: Tensor, weights: Tensor, **lora) -> dict[str, Any]:
        """Returns the keyword arguments of ``ktops.moe_sft``."""
        return {
            "hidden_states": hidden_states,
            "topk_ids": ids,
            "topk_weights": weights,
            "gate_up_proj": self.gate_up_proj,
            "down_proj": self.down_proj,
            "compute": self.compute,
            **self.function._asdict(),
            **lora,
        }


def _mask(gpu_experts_mask: Tensor | None, num_gpu_experts: int, num_experts: int) -> Tensor:
    """Returns the experts computed elsewhere, bool [E]: those of a mask, or else the first ones."""
    if not 0 <= num_gpu_experts <= num_experts:
        raise ValueError(
            f"KTMoEWrapper: num_gpu_experts must be from 0 to num_experts={num_experts}, "
            f"got {num_gpu_experts}"
        )
    if gpu_experts_mask is None:
        return torch.arange(num_experts, device="cpu") < num_gpu_experts
    expect_shape("gpu_experts_mask", gpu_experts_mask, [num_experts])
    mask = gpu_experts_mask.to("cpu", torch.bool, copy=True)
    if num_gpu_experts not in (0, int(mask.sum())):
        raise ValueError(
            "KTMoEWrapper: num_gpu_experts must be 0 or the number of experts in gpu_experts_mask, "
            f"{int(mask.sum())}, got {num_gpu_experts}"
        )
    return mask
