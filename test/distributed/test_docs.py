"""The example of docs/scale.md, run on a tiny model by two processes."""

import re
from pathlib import Path

import pytest
from ranks import run_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ktops

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"

DATA = """
import torch

torch.manual_seed(0)
data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 97, (16, 9))]
"""


@pytest.mark.usefixtures("enabled")
def test_dividing(saved_model, tmp_path, monkeypatch):
    (code,) = re.findall(r"<!-- example: dividing -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    config = ktops.KTConfig(weight_format="int4")
    model = AutoModelForCausalLM.from_pretrained(saved_model("qwen3_moe"), quantization_config=config)
    model.save_pretrained(tmp_path / "int4")
    code = code.replace('"Qwen3-30B-A3B-int4"', f'"{tmp_path / "int4"}"')
    code = code.replace('"out"', f'"{tmp_path / "out"}"').replace("use_cpu=True", "use_cpu=True, max_steps=2")
    (tmp_path / "train.py").write_text(DATA + code.replace("save_steps=100", "save_steps=1"))
    run_ranks(str(tmp_path / "train.py"), 2)
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert (tmp_path / "out" / "checkpoint-2" / "ktops_training_state.pt").exists()
