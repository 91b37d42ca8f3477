"""Experts stored one by one are used where they lie in the files."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import ktops
from ktops.checkpoints import CheckpointError, windows
from ktops.nn import KTExperts

E, H, N = 12, 128, 32  # one projection of an expert is two pages


@pytest.fixture(autouse=True)
def enabled():
    ktops.enable()
    yield
    ktops.disable()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model as transformers publishes it: every projection of every expert is a tensor."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=H, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, num_experts=E, num_experts_per_tok=3, moe_intermediate_size=N,
        dtype=torch.bfloat16,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("mmap") / "model"
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(path)
    return path


def load(path: Path, **options):
    config = ktops.KTConfig(**options)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=config)


def run(model) -> list[torch.Tensor]:
    """Logits, and the gradient of the embeddings."""
    embeddings = model.get_input_embeddings().weight.requires_grad_()
    logits = model(torch.arange(40)[None]).logits
    (gradient,) = torch.autograd.grad(logits.float().square().mean(), embeddings)
    return [logits.detach(), gradient]


def experts(model) -> list[KTExperts]:
    return [module for module in model.modules() if isinstance(module, KTExperts)]


def mappings(path: Path) -> int:
    """Number of the mappings of this process that show the file."""
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_mapped_experts_compute_the_same(source):
    read, mapped = load(source), load(source, mmap=True)
    report = mapped.hf_quantizer.report
    assert read.hf_quantizer.report.mapped == 0
    assert report.mapped == report.nbytes == 2 * E * 3 * H * N * 2
    for ours, theirs in zip(experts(mapped), experts(read), strict=True):
        for name in ("gate_up_proj", "down_proj"):
            weight, copy = getattr(ours, name).weight, getattr(theirs, name).weight
            assert torch.equal(weight, copy) and not weight.is_contiguous()
    for ours, theirs in zip(run(mapped), run(read), strict=True):
        assert torch.equal(ours, theirs)


def test_windows_end_with_the_model(source):
    file = source / "model.safetensors"
    gc.collect()
    before = mappings(file)
    model = load(source, mmap=True)
    assert mappings(file) >= before + 2 * 2 * E
    weight = experts(model)[1].down_proj.weight
    expected = weight.clone()
    del model
    gc.collect()
    assert torch.equal(weight, expected)
    del weight
    gc.collect()
    assert mappings(file) == before


def test_writing_to_a_mapped_weight_leaves_the_file(source):
    before = (source / "model.safetensors").read_bytes()
    with torch.no_grad():
        experts(load(source, mmap=True))[0].down_proj.weight.zero_()
    assert (source / "model.safetensors").read_bytes() == before


def test_mapped_experts_are_saved(source, tmp_path):
    model = load(source, mmap=True)
    model.save_pretrained(tmp_path)
    assert "mmap" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for ours, theirs in zip(run(again), run(model), strict=True):
        assert torch.equal(ours, theirs)


def test_load_experts(source):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    expected = run(model)
    report = ktops.load_experts(model, source, mmap=True, show_progress=False)
    assert report.mapped == report.nbytes
    budget = 2**-8 * 8**0.5
    for ours, theirs in zip(run(model), expected, strict=True):
        assert (ours - theirs).norm() <= budget * theirs.norm()


def test_layers_that_cannot_be_mapped(source, tmp_path):
    """One tensor of the second layer is in a shard of its own, where it begins elsewhere within a page."""
    moved = "model.layers.1.mlp.experts.7.down_proj.weight"
    with safe_open(source / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    shards = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": {}}
    shards["model-00002-of-00002.safetensors"][moved] = tensors.pop(moved)
    for name, part in shards.items():
        save_file(part, tmp_path / name, {"format": "pt"})
    index = {name: shard for shard, part in shards.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.warns(UserWarning, match=r"mmap: the experts of 1 of 2 layers .* model\.layers\.1\.mlp"):
        model = load(tmp_path, mmap=True)
    assert model.hf_quantizer.report.mapped == 2 * E * 3 * H * N * 2 - E * H * N * 2
    for ours, theirs in zip(run(model), run(load(source)), strict=True):
        assert torch.equal(ours, theirs)


def test_formats_that_need_quantizing(source):
    with pytest.raises(ValueError, match="mmap needs experts in the format of the files, but weight_format"):
        load(source, weight_format="int8", mmap=True)


def test_refused_addresses(monkeypatch):
    def refuse(*args):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(windows, "_mmap", refuse)
    with pytest.raises(CheckpointError, match="4096 bytes of addresses cannot be reserved: Cannot allocate"):
        windows._reserve(4096)


READ_AT_EXIT = """
import atexit
atexit.register(lambda: print(int(tensor.sum())))  # runs last
import sys
from pathlib import Path
import torch
from ktops.checkpoints.view import TensorFile, View
from ktops.checkpoints.windows import map_windows
file = TensorFile(Path(sys.argv[1]))
tensor = map_windows([View("", file, 8192 * i, torch.uint8, (8192,)) for i in (1, 0)], (8192,))
"""


def test_memory_can_be_read_until_the_process_ends(tmp_path):
    path = tmp_path / "ones"
    path.write_bytes(b"\1" * 8192 * 2)
    result = subprocess.run([sys.executable, "-c", READ_AT_EXIT, path], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"{8192 * 2}\n"), result.stderr
