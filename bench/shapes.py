"""The layers that are measured: their sizes, and what their experts compute."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The sizes of one Mixture-of-Experts layer, as in the op's documentation."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int

    @property
    def expert_elements(self) -> int:
        """The elements of gate_up_proj and down_proj of one expert with a gate, 3·H·I."""
        return 3 * self.hidden_size * self.intermediate_size


@dataclass(frozen=True)
class Layout:
    """How the weights of experts lie, and what is computed with them.

    transposed: the weights are views ``W.mT`` of [E, in, out]. bias: both biases are given. The other fields
    are arguments of ktops.moe_sft.
    """

    transposed: bool = False
    bias: bool = False
    gating: str = "concatenated"
    activation: str = "silu"
    activation_args: tuple[float, ...] = ()
    reduce: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of ktops.moe_sft that are not tensors, without its defaults."""
        names = ("gating", "activation", "activation_args", "reduce")
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(PLAIN, name)}

    def gate_up_rows(self, shape: Shape) -> int:
        """The rows of gate_up_proj of one expert, 2I, or I without a gate."""
        return shape.intermediate_size * (1 if self.gating == "none" else 2)

    def output_size(self, shape: Shape, tokens: int) -> tuple[int, ...]:
        """The sizes of the output, [T, H], or [T, K, H] without reduce."""
        routes = () if self.reduce else (shape.top_k,)
        return tokens, *routes, shape.hidden_size


PLAIN = Layout()
LAYOUTS = {
    "plain": PLAIN,
    "transposed": Layout(transposed=True),
    "interleaved": Layout(gating="interleaved"),
    "clamped": Layout(activation="swiglu_clamped", activation_args=(10.0, 1.0, 0.0)),
    "gpt_oss": Layout(True, True, "interleaved", "swiglu_clamped", (7.0, 1.702, 1.0)),
    "no_gate": Layout(gating="none", activation="relu2"),
    "routes": Layout(reduce=False),
}
"""The values of --layout. clamped: as in DeepSeek-V4; no_gate: as in Nemotron-H; routes: not added up."""

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3_30b", 2048, 768, 128, 8),
        Shape("dsv2_lite", 2048, 1408, 64, 6),
        Shape("mixtral_small", 2048, 7168, 8, 2),
    )
}

TOKENS = (1, 16, 128, 512, 2048)
QUICK_TOKENS = (1, 128, 2048)


def parse_shape(text: str) -> Shape:
    """Parses a name in SHAPES, or "H,I,E,K".

    Raises:
        ValueError: the text is neither of the two.

    Example:
        >>> parse_shape("64,32,8,2")
        Shape(name='64,32,8,2', hidden_size=64, intermediate_size=32, num_experts=8, top_k=2)
    """
    if text in SHAPES:
        return SHAPES[text]
    sizes = text.split(",")
    if len(sizes) != 4 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, or H,I,E,K; got {text!r}")
    shape = Shape(text, *map(int, sizes))
    if shape.top_k > shape.num_experts:
        raise ValueError(f"shape must have K <= E, got {text!r}")
    return shape
