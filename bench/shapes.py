"""The layers that are measured."""

from dataclasses import dataclass


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
        """The elements of gate_up_proj and down_proj of one expert, 3·H·I."""
        return 3 * self.hidden_size * self.intermediate_size


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
