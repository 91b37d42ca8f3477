"""Exports adapters, and reads the results as the programs do that they are for."""

from pathlib import Path

import peft
import pytest
import readers
from packaging.version import Version
from tiny_adapters import expect_equal, load, swap_roles, updates

import ktops
from ktops.adapters import AdapterError
from ktops.adapters.peft_files import READS_IT_RIGHT

READERS = {"vllm": readers.vllm, "sglang": readers.sglang, "llama.cpp": readers.llama_cpp, "kt": readers.kt}

BFLOAT16 = {"kt": {"tolerance": 2**-7}}
"""The layout that rounds factors."""


def assert_exports(model: Path, adapter: Path, folder: Path, architecture: str = "qwen3_moe") -> None:
    """Asserts that an adapter changes the weights in each layout as PEFT does. Writes to a new folder."""
    expected = updates(load(architecture, adapter))
    ktops.export_adapter(adapter, folder / "peft", "peft", base=model)
    expect_equal(updates(load(architecture, _for_this_peft(folder / "peft"))), expected)
    for layout, read in READERS.items():
        if layout == "llama.cpp" and any("kv_b_proj" in name for name in expected):
            with pytest.raises(AdapterError, match="kv_b_proj"):
                ktops.export_adapter(adapter, folder / layout, layout, base=model)
            continue
        ktops.export_adapter(adapter, folder / layout, layout, base=model)
        expect_equal(read(architecture, folder / layout), expected, **BFLOAT16.get(layout, {}))


def _for_this_peft(adapter: Path) -> Path:
    """Returns an exported adapter, or if the installed PEFT exchanges roles, a copy that it loads."""
    if Version(peft.__version__) >= READS_IT_RIGHT:
        return adapter
    return swap_roles(adapter, adapter.with_name("swapped"))
