"""Loads every scheme, in experts only or also in attention, with every loader, for every kind of model.

Each combination is right, bit for bit, or a named error. None leaves experts unloaded or loads wrong ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_checkpoints import decode
from tiny_kinds import KINDS, SCHEMES, E, H, I, Published, publish
from tiny_published import DECODED

import ktops
from ktops.cli.convert import Options, convert
from ktops.cli.errors import UserError
from ktops.cli.models import load_model
from ktops.compat import KTMoEWrapper
from ktops.nn import KTExperts

STORED = {
    "bf16": ("bf16", None, "BF16"),
    "fp8": ("fp8_e4m3", 128, "FP8"),
    "compressed fp8": ("fp8_e4m3", 0, "FP8_PERCHANNEL"),
    "compressed int4": ("int4", 32, "RAWINT4"),
    "compressed mixed": ("int4", 32, "RAWINT4"),
    "gptq": ("int4", 32, "GPTQ_INT4"),
    "gptq act-order": ("fp16", None, "GPTQ_INT4"),
    "awq": ("uint4", 32, "GPTQ_INT4"),
}
"""Maps each scheme to the format and group size that hold its codes unchanged, and to kt-kernel's method."""

pytestmark = [
    pytest.mark.usefixtures("enabled"),
    pytest.mark.filterwarnings("ignore:ktops. the GPTQ weights were quantized with reordered"),
]


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=SCHEMES)
def scheme(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=["experts", "attention too"])
def source(request, kind, scheme, tmp_path_factory) -> Published:
    folder = tmp_path_factory.mktemp("published") / "source"
    return publish(folder, kind, scheme, attention=request.param == "attention too")


def expect_equal(weight, expected: torch.Tensor) -> None:
    """Compares bit for bit, except scales that are too small for fp16 but not for the source's float32."""
    got = decode(weight) if isinstance(weight, ktops.ExpertWeight) else weight.float()
    torch.testing.assert_close(got, expected, rtol=0, atol=2.0**-20)


def expect(model, source: Published) -> None:
    """Asserts that the experts of the model are those of the source."""
    found = [module for module in model.modules() if isinstance(module, KTExperts)]
    assert len(found) == len(source.experts)
    for module, weights in zip(found, source.experts, strict=True):
        for weight, expected in zip((module.gate_up_proj, module.down_proj), weights, strict=True):
            expect_equal(weight, expected)


@torch.no_grad()
def expect_attention(model, source: Published) -> None:
    """Asserts that the linear layers of the attention compute with the source's weights."""
    for name, expected in source.attention.items():
        got = model.get_submodule(name)(torch.eye(expected.shape[1])).T
        torch.testing.assert_close(got, expected, rtol=2.0**-8, atol=0)


@contextmanager
def refused(source: Published) -> Iterator[None]:
    """Attention that transformers cannot decode here is an error, not silently dropped."""
    if not source.attention or source.scheme in (*DECODED, "bf16"):
        yield
        return
    with pytest.raises((ImportError, UserError), match="and the library that reads them cannot run here"):
        yield


def in_memory(source: Published):
    return source.kind.model(source.kind.config)


def test_load_experts_from_a_directory(source):
    model = in_memory(source)
    ktops.load_experts(model, source.path, show_progress=False)
    expect(model, source)


def test_load_experts_from_a_file(source):
    model = in_memory(source)
    ktops.load_experts(model, source.path / "model.safetensors", show_progress=False)
    expect(model, source)


def test_from_pretrained_with_a_config(source):
    with refused(source):
        model = source.kind.model.from_pretrained(
            source.path, quantization_config=ktops.KTConfig(), dtype=torch.float32
        )
        expect(model, source)
        expect_attention(model, source)


@pytest.fixture(scope="module")
def converted(source) -> Path:
    """`ktops convert` into the experts' own format keeps the codes."""
    name, group_size, _ = STORED[source.scheme]
    options = Options(source.path, source.path.parent / "converted", name, group_size)
    convert(options, Console(quiet=True))
    return options.destination


def test_convert_and_from_pretrained(source, converted):
    with refused(source):
        model = source.kind.model.from_pretrained(converted, dtype=torch.float32)
        expect(model, source)
        expect_attention(model, source)


def test_convert_and_load_experts(source, converted):
    model = in_memory(source)
    ktops.load_experts(model, converted, show_progress=False)
    expect(model, source)


def test_converted_is_refused_without_enable(source, converted):
    ktops.disable()
    with pytest.raises((ValueError, ImportError)):
        source.kind.model.from_pretrained(converted)


def test_convert_and_finetune(source, converted):
    """`ktops finetune --model` loads this; from a composite model, its language model."""
    with refused(source):
        expect(load_model(str(converted), torch.float32, "ktops"), source)


def test_wrapper(source):
    """KTMoEWrapper finds the layer by its number only."""
    _, group_size, method = STORED[source.scheme]
    for index, weights in enumerate(source.experts):
        wrapper = KTMoEWrapper(
            index, E, 2, H, I, None, torch.get_num_threads(), 1, str(source.path), 512,
            method=method, group_size=group_size or 32,
        )  # fmt: skip
        wrapper.load_weights()
        for weight, expected in zip((wrapper.gate_up_proj, wrapper.down_proj), weights, strict=True):
            expect_equal(weight, expected)
