"""Adapter files equal those of plain PEFT byte for byte and load in both; and what an adapter targets."""

import json
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import Recorder, adapted, logits
from safetensors import safe_open
from tiny_models import ARCHITECTURES, tiny_batch, tiny_model

import ktops
from ktops.integrations.peft import expert_target_parameters
from ktops.testing.budgets import forward_budget, relative_error

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
BUDGET = 2 * forward_budget(torch.float32, inner_size=64)

pytestmark = pytest.mark.usefixtures("enabled")


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "deepseek_v3", "olmoe"])
def test_files_are_those_of_plain_peft(architecture, tmp_path):
    ktops.disable()
    adapted(architecture, "eager").save_pretrained(tmp_path / "plain")
    ktops.enable()
    model = adapted(architecture)
    logits(model)
    model.save_pretrained(tmp_path / "ktops")
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "ktops").iterdir())
    weights = "adapter_model.safetensors"
    assert weights in files
    assert (tmp_path / "plain" / weights).read_bytes() == (tmp_path / "ktops" / weights).read_bytes()
    configs = [json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("plain", "ktops")]
    assert configs[0] == configs[1]


def test_keys_and_shapes(tmp_path):
    adapted("qwen3_moe").save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys() if "layers.0.mlp" in key}  # noqa: SIM118
    sizes = {"experts.base_layer": (32, 2 * 24), "experts": (24, 32)}  # in, out
    if Version(peft.__version__) < Version("0.19.1"):
        sizes = {name: size[::-1] for name, size in sizes.items()}
    expected = {}
    for name, (size_a, size_b) in sizes.items():
        prefix = f"base_model.model.model.layers.0.mlp.{name}"
        expected[f"{prefix}.lora_A.weight"] = [4 * 8, size_a]
        expected[f"{prefix}.lora_B.weight"] = [size_b, 4 * 8]
    assert shapes == expected


def test_a_process_without_ktops_loads_them(tmp_path):
    model = adapted("qwen3_moe")
    model.save_pretrained(tmp_path / "adapter")
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "base")
    script = f"""
        import sys, torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r}, dtype="float32")
        model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r})
        ids = torch.tensor({tiny_batch()["input_ids"].tolist()})
        with torch.no_grad():
            torch.save(model(input_ids=ids).logits, {str(tmp_path / "logits.pt")!r})
        assert "ktops" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)
    assert relative_error(logits(model), torch.load(tmp_path / "logits.pt")) < BUDGET


def test_weighted_adapters_are_refused_by_peft():
    model = adapted("qwen3_moe")
    with pytest.raises(ValueError, match="add_weighted_adapter does not support"):
        model.add_weighted_adapter(["default"], [0.5], "sum")


def test_modules_to_save_beside_the_experts(tmp_path):
    model = adapted("qwen3_moe", lora={"modules_to_save": ["lm_head"]})
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(1.5)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(tiny_model("qwen3_moe", experts_implementation="ktops"), tmp_path)
    assert torch.equal(logits(other), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_expert_target_parameters(architecture):
    model = tiny_model(architecture)
    assert expert_target_parameters(model) == EXPERTS
    experts = [name for name, _ in model.named_modules() if name.endswith(".mlp.experts")]
    config = LoraConfig(r=2, target_parameters=expert_target_parameters(model), target_modules=[])
    model = get_peft_model(model, config)
    assert expert_target_parameters(model) == EXPERTS
    adapters = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert len(adapters) == 2 * len(experts) > 0


def test_no_experts_no_target_parameters():
    assert expert_target_parameters(torch.nn.Linear(2, 2)) == []


@pytest.mark.parametrize("architecture", sorted({"qwen2_moe", "qwen3_5_moe"} & ARCHITECTURES.keys()))
@pytest.mark.parametrize("target_modules", ["all-linear", ["gate_proj", "up_proj", "down_proj"]], ids=str)
def test_targets_that_miss_the_experts_are_reported(architecture, target_modules):
    model = tiny_model(architecture)
    with pytest.warns(UserWarning, match="does not reach the routed experts") as caught:
        get_peft_model(model, LoraConfig(target_modules=target_modules))
    messages = [str(w.message) for w in caught if "routed experts" in str(w.message)]
    assert len(messages) == 1
    assert f"LoraConfig(target_parameters={EXPERTS})" in messages[0]


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        ("qwen2_moe", {"target_modules": ["q_proj", "v_proj"]}),
        ("qwen2_moe", {"target_modules": ["shared_expert.down_proj"]}),
        ("qwen2_moe", {"target_modules": ["down_proj"], "target_parameters": EXPERTS[:1]}),
        ("qwen2_moe", {"target_modules": "all-linear", "inference_mode": True}),
    ],
    ids=str,
)
def test_targets_that_hit_or_mean_something_else_are_not(architecture, targets):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(tiny_model(architecture), LoraConfig(**targets))
    assert not [w for w in caught if "routed experts" in str(w.message)]


def test_example_of_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "peft.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    with Recorder() as recorder:
        exec(compile(code, "docs/peft.md", "exec"), names)
    assert recorder.calls == {"moe_sft_fwd": 2, "moe_sft_bwd": 2}
    trained = {name for name, p in names["model"].named_parameters() if p.grad is not None}
    assert any("experts" in name for name in trained) and any("q_proj" in name for name in trained)
