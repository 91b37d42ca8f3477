"""ExpertWeight: the weights of a layer's experts in a weight format, in place of a dense tensor."""

import json

import torch
from torch import Tensor, nn

from ktops._huge_pages import in_huge_pages
from ktops.formats.format import Codes
from ktops.formats.registry import get_format

COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class ExpertWeight(nn.Module):
    """Weights [E, N, K] of E experts in a weight format, as :func:`ktops.quantize` returns them.

    :func:`ktops.moe_sft` and :class:`ktops.nn.KTExperts` accept it in place of a tensor. Forward and backward
    read the same bytes; no other copy exists. Its tensors are buffers, so the state dict of the module that
    holds it contains them, along with the format. ``.to(device)`` and ``.half()`` do not convert them:
    experts stay in CPU memory, and a floating dtype only sets the dtype ktops computes in.
    ``copy.deepcopy`` shares them. Do not modify an ExpertWeight after creating it.

    Args:
        format: name of the format, one of ``ktops.formats.names()``.
        shape: [E, N, K], the shape of the decoded weights.
        weight: the codes, [E, N, ...], as ``docs/formats.md`` specifies for the format.
        scale, zero: [E, N, G], if the format has them. fp8_e4m3 with 128 x 128 blocks has a scale
            [E, ceil(N / 128), G].
        group_size: number of columns that share a scale; 0 for a whole row, or if the format's blocks
            determine it.
        dtype: the dtype to compute in, to which hidden states are cast: bfloat16, float16, float32 or
            float64.

    Raises:
        ValueError, TypeError: unknown format, or a tensor has the wrong shape or dtype; the message names it.

    Example:
        >>> experts = torch.randn(8, 64, 128)
        >>> weight = ktops.quantize(experts, "int4", group_size=32)
        >>> weight.shape, weight.format
        (torch.Size([8, 64, 128]), 'int4')
    """

    weight: Tensor
    scale: Tensor | None
    zero: Tensor | None

    def __init__(
        self,
        format: str,
        shape: tuple[int, int, int] | torch.Size,
        weight: Tensor,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
        *,
        group_size: int = 0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"ExpertWeight: shape must be [E, N, K], got {list(shape)}")
        if dtype not in COMPUTE_DTYPES:
            names = ", ".join(str(known) for known in COMPUTE_DTYPES)
            raise TypeError(f"ExpertWeight: dtype must be one of {names}, got {dtype}")
        try:
            get_format(format).check(Codes(weight, scale, zero), torch.Size(shape), group_size)
        except (ValueError, TypeError) as error:
            raise type(error)(f"ExpertWeight: {error}") from None
        self.format = format
        self.shape = torch.Size(shape)
        self.group_size = group_size
        self.dtype = dtype
        self.requires_grad = False
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    @property
    def codes(self) -> Codes:
        return Codes(self.weight, self.scale, self.zero)

    def expert(self, index: int) -> Codes:
        """Returns the tensors of one expert: weight [N, ...], scale and zero [N, G]."""
        return self.codes.map(lambda tensor: tensor[index])

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.codes if tensor is not None)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the dense weights; see :func:`ktops.dequantize`."""
        out = in_huge_pages(torch.empty(self.shape, dtype=self.dtype if dtype is None else dtype))
        for index in range(self.shape[0]):
            codes = self.expert(index).map(lambda tensor: tensor[None])
            out[index] = torch.ops.kt.dequantize(*codes, self.format, self.group_size, self.shape[-1])[0]
        return out

    def _apply(self, fn, recurse: bool = True) -> "ExpertWeight":
        """Sets the dtype to compute in for ``.to()`` and the like; leaves the tensors in place."""
        dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if dtype in COMPUTE_DTYPES:
            self.dtype = dtype
        return self

    def __deepcopy__(self, memo: dict) -> "ExpertWeight":
        copy = ExpertWeight(
            self.format, self.shape, *self.codes, group_size=self.group_size, dtype=self.dtype
        )
        memo[id(self)] = copy
        return copy

    def _layout(self) -> dict:
        return {"format": self.format, "shape": list(self.shape), "group_size": self.group_size}

    def get_extra_state(self) -> Tensor:
        """Returns the format as JSON in a uint8 tensor, because safetensors requires tensors only."""
        return torch.frombuffer(bytearray(json.dumps(self._layout()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        layout = json.loads(bytes(state.tolist()))
        if layout != self._layout():
            raise ValueError(
                f"ExpertWeight: the state dict has another layout: expected {self._layout()}, got {layout}"
            )

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        """Adopts the state dict's tensors; writing into its own would change copies and mapped files.

        Raises:
            ValueError, TypeError: the state dict has another layout, or a tensor has a wrong shape or dtype.
        """
        state = state_dict.get(f"{prefix}_extra_state")
        if state is not None:
            self.set_extra_state(state)
        given = {
            name: state_dict[prefix + name].to(tensor.device)
            for name, tensor in self.codes._asdict().items()
            if tensor is not None and prefix + name in state_dict
        }
        try:
            get_format(self.format).check(self.codes._replace(**given), self.shape, self.group_size)
        except (ValueError, TypeError) as error:
            raise type(error)(
                f"ExpertWeight: {prefix.removesuffix('.')} in the state dict: {error}"
            ) from None
        tensors = {**state_dict, **{prefix + name: tensor for name, tensor in given.items()}}
        metadata = {**local_metadata, "assign_to_params_buffers": True}
        super()._load_from_state_dict(tensors, prefix, metadata, *args)

    def extra_repr(self) -> str:
        group = f", group_size={self.group_size}" if self.group_size else ""
        return f"{self.format!r}, shape={list(self.shape)}{group}, dtype={self.dtype}"
