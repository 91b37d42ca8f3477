"""Writes a model with random weights, in the layout of a published one.

Examples:
    python -m bench.models make --like deepseek-v2-lite --layers 8 OUT
    python -m bench.models make --like qwen3-30b-a3b --dtype fp8 OUT

The files have the published names of tensors, in shards of 5 GB, with config.json and a tokenizer whose
vocabulary has the model's size. Matrices are normally distributed as in transformers' initialization. They
are windows into one block of random numbers, so that writing takes little more time and memory than writing
the bytes. The first layers of a model do not depend on the number of layers.
"""

import argparse
import json
import math
import shutil
import sys
import zlib
from functools import cached_property
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from bench.arguments import Parser, positive
from bench.models import layout
from bench.models.tokenizer import make_tokenizer
from ktops._display import Step, format_bytes, progress
from ktops.checkpoints.stream import SafetensorsStream

SHARD_SIZE = "5GB"
_BLOCK = 1 << 24
_WINDOW = _BLOCK // 2
_FP8_DEVIATION = 100.0
"""Of codes: the largest of 128 x 128 is then near 448, the maximum of e4m3."""
_E2M1_DEVIATION = 2.93
"""Of e2m1 numbers whose codes are uniformly distributed."""


class _Values:
    """Blocks of random numbers by kind, made when first needed."""

    def __init__(self, config: dict, seed: int) -> None:
        self.deviation = config.get("initializer_range", 0.02)
        self.num_experts = config.get("n_routed_experts", 1)
        self.generator = torch.Generator().manual_seed(seed)

    @cached_property
    def normal(self) -> Tensor:
        return torch.randn(_BLOCK, generator=self.generator).mul_(self.deviation).bfloat16()

    @cached_property
    def codes(self) -> Tensor:
        return (
            (self.normal.float() * (_FP8_DEVIATION / self.deviation))
            .clamp_(-448, 448)
            .to(torch.float8_e4m3fn)
        )

    @cached_property
    def scales(self) -> Tensor:
        spread = torch.rand(_BLOCK >> 4, generator=self.generator) * 0.2 + 0.9
        return spread * (self.deviation / _FP8_DEVIATION)

    @cached_property
    def bytes(self) -> Tensor:
        return torch.randint(256, (_BLOCK,), generator=self.generator, dtype=torch.uint8)

    def window(self, name: str, spec: layout.Spec, size: int) -> Tensor:
        """Returns ``size`` values of the kind; which ones depends on the name."""
        if spec.values == layout.ONES:
            return torch.ones(size, dtype=spec.dtype)
        if spec.values == layout.ZEROS:
            return torch.zeros(size, dtype=spec.dtype)
        if spec.values == layout.EXPONENTS:
            exponent = 127 + round(math.log2(self.deviation / _E2M1_DEVIATION))
            return torch.full((size,), exponent, dtype=spec.dtype)
        if spec.values == layout.IDS:
            return torch.randint(self.num_experts, (size,), generator=self.generator, dtype=spec.dtype)
        block: Tensor = getattr(self, spec.values)
        start = zlib.crc32(name.encode()) % (len(block) - size)
        return block[start : start + size].to(spec.dtype)


def _write_tensor(
    stream: SafetensorsStream, name: str, spec: layout.Spec, values: _Values, step: Step
) -> None:
    size = math.prod(spec.shape)
    pieces = next(number for number in count(-(-size // _WINDOW)) if size % number == 0)
    for index in range(pieces):
        piece = values.window(f"{name} {index}", spec, size // pieces)
        stream.write(name, piece, index)
        step(piece.nbytes)


def _write(folder: Path, config: dict, specs: dict[str, layout.Spec], seed: int, shard_size: str) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from transformers import AutoConfig, GenerationConfig

    values = _Values(config, seed)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    make_tokenizer(config).save_pretrained(folder)
    empty = {name: torch.empty(s.shape, dtype=s.dtype, device="meta") for name, s in specs.items()}
    split = split_torch_state_dict_into_shards(empty, max_shard_size=shard_size)
    total = split.metadata["total_size"]
    with progress(f"{folder.stem}, {format_bytes(total)}", total) as step:
        for file, names in split.filename_to_tensors.items():
            names = sorted(names, key=lambda name: (-specs[name].dtype.itemsize, name))  # as safetensors does
            kinds = {name: (specs[name].dtype, specs[name].shape) for name in names}
            with SafetensorsStream(folder / file, kinds) as stream:
                for name in names:
                    _write_tensor(stream, name, specs[name], values, step)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def make(
    config: dict, out: Path, *, seed: int = 0, shard_size: str = SHARD_SIZE, experts: bool = True
) -> None:
    """Writes the model directory. Until it is complete, its name ends in ``.partial``. A failure deletes it.

    Args:
        config: a configuration as published; see :func:`bench.models.layout.changed_config`.
        out: the directory to create.
        seed: of the random numbers.
        shard_size: maximum size of a file, such as "5GB".
        experts: False leaves the routed experts out; they are elsewhere, for example in a GGUF file.

    Raises:
        FileExistsError: out exists, or an interrupted run's directory.
    """
    partial = out.with_name(f"{out.name}.partial")
    for path in (out, partial):
        if path.exists():
            raise FileExistsError(f"{path}: already exists. Pass another path, or delete it")
    specs = layout.tensors(config)
    if not experts:
        specs = {name: spec for name, spec in specs.items() if ".experts." not in name}
    partial.mkdir(parents=True)
    try:
        _write(partial, config, specs, seed, shard_size)
    except BaseException:
        shutil.rmtree(partial)
        raise
    partial.replace(out)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("models make", __doc__)
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="the directory to create")
    add("--like", required=True, metavar="NAME", help=f"{', '.join(layout.NAMES)}, or a config.json")
    add("--layers", type=positive, metavar="N", help="only the first layers")
    add("--dtype", choices=layout.DTYPES, help="of experts and other matrices (default: as published)")
    add(
        "--shard-size",
        default=SHARD_SIZE,
        metavar="SIZE",
        help="maximum size of a file (default: %(default)s)",
    )
    parser.seed()
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    try:
        config = layout.changed_config(layout.read_config(args.like), args.layers, args.dtype)
        make(config, args.out, seed=args.seed, shard_size=args.shard_size)
    except (ValueError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(f"{args.out}: {config['num_hidden_layers']} layers, {format_bytes(size)}")
    return 0
