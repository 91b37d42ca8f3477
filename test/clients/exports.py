"""Exports adapters that clients wrote, and reads the results as the programs do that they are for."""

import sys
from pathlib import Path

import ktops

sys.path += [str(Path(__file__).parents[1] / name) for name in ("adapters", "integrations", "")]
import readers
from tiny_adapters import expect_equal, load, updates

READERS = {"vllm": readers.vllm, "sglang": readers.sglang, "llama.cpp": readers.llama_cpp, "kt": readers.kt}

BFLOAT16 = {"kt": {"tolerance": 2**-7}}
"""The layout that rounds factors."""


def assert_exports(model: Path, adapter: Path, folder: Path, architecture: str = "qwen3_moe") -> None:
    """Asserts that an adapter changes the weights in each layout as PEFT does. Writes to a new folder."""
    expected = updates(load(architecture, adapter))
    ktops.export_adapter(adapter, folder / "peft", "peft", base=model)
    expect_equal(updates(load(architecture, folder / "peft")), expected)
    for layout, read in READERS.items():
        ktops.export_adapter(adapter, folder / layout, layout, base=model)
        expect_equal(read(architecture, folder / layout), expected, **BFLOAT16.get(layout, {}))
