"""llama.cpp's own converter, from the source package of llama-cpp-python, reads exported adapters."""

import subprocess
import sys
import tarfile
from pathlib import Path

import numpy
import pytest
import torch
from gguf import GGUFReader

sys.path += [str(Path(__file__).parents[1] / name) for name in ("", "integrations", "adapters")]

from tiny_adapters import adapted, base_model, expect_equal, save, save_base, updates

import ktops

PACKAGE = "llama-cpp-python==0.3.36"
ATTENTION = {
    "qwen3_moe": ["v_proj", "o_proj"],
    "mixtral": ["v_proj", "o_proj"],
    "deepseek_v3": ["q_a_proj", "o_proj"],
}
NAMES = {"v_proj": "attn_v", "o_proj": "attn_output", "q_a_proj": "attn_q_a"}


@pytest.fixture(scope="module")
def converter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama.cpp")
    download = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        ":all:",
        PACKAGE,
    ]
    subprocess.run(download, cwd=folder, check=True)
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        members = [
            member for member in file if "/vendor/llama.cpp/" in member.name and member.name.endswith(".py")
        ]
        file.extractall(folder, members, filter="data")
    [script] = folder.glob("*/vendor/llama.cpp/convert_lora_to_gguf.py")
    return script


@pytest.mark.parametrize("architecture", ATTENTION)
def test_converted_adapters_change_the_model_as_peft_does(architecture, converter, tmp_path):
    model = adapted(architecture, target_modules=ATTENTION[architecture], rank_pattern={"o_proj": 2})
    base, adapter = save_base(architecture, tmp_path), save(model, tmp_path / "adapter")
    ktops.export_adapter(adapter, tmp_path / "exported", "llama.cpp", base=base)
    out = tmp_path / "adapter.gguf"
    command = [sys.executable, converter, "--base", base, "--outfile", out, tmp_path / "exported"]
    subprocess.run(command, check=True, timeout=300)
    expect_equal(read(out, architecture), updates(model))


def read(path: Path, architecture: str) -> dict[str, torch.Tensor]:
    """Returns the updates that llama.cpp computes: alpha over the rank of the tensor, times B A."""
    reader = GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    tensors = {tensor.name: torch.from_numpy(numpy.array(tensor.data)) for tensor in reader.tensors}
    products = {
        name.removesuffix(".weight.lora_b"): alpha / b.shape[-1] * b @ tensors[f"{name[:-1]}a"]
        for name, b in tensors.items()
        if name.endswith(".lora_b")
    }
    found = {}
    for name, _ in base_model(architecture).named_modules():
        parent, _, word = name.rpartition(".")
        block = f"blk.{name.split('.')[2]}" if name.startswith("model.layers.") and "." in parent else ""
        if f"{block}.{NAMES.get(word)}" in products and word in ATTENTION[architecture]:
            found[f"{name}.weight"] = products.pop(f"{block}.{NAMES[word]}")
        elif word == "experts":
            halves = [products.pop(f"{block}.ffn_{half}_exps") for half in ("gate", "up")]
            found[f"{name}.gate_up_proj"] = torch.cat(halves, dim=1)
            found[f"{name}.down_proj"] = products.pop(f"{block}.ffn_down_exps")
    assert not products
    return found
