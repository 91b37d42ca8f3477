"""docs/devices.md: its examples run, with the simulated device for "cuda", and its tables are right."""

import re
import warnings
from pathlib import Path

import every_model
import pytest
import torch
from simulated.conftest import on_device
from simulated.offloaded import on_cpu
from transformers import BatchEncoding

import ktops
from ktops.testing.inputs import moe_inputs, require_grad
from ktops.testing.simulated_device import traffic

PAGE = (Path(__file__).parents[3] / "docs/devices.md").read_text()
BLOCKS = re.findall(r"^(?:<!-- example: (\w+) -->\n)?```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
EXAMPLES = {name: text for name, text in BLOCKS if name}

ON_CPU = ("several", "many_tokens")
"""Examples whose models are on the CPU here: accelerate's "auto" does not know the simulated device."""

SHAPES = {"DeepSeek-V3, fp8_e4m3": (7168, 2048, 256, 8, 1), "Qwen3-30B-A3B, bf16": (2048, 768, 128, 8, 2)}
"""layer -> H, I, E, K and bytes per weight."""

UNITS = {"kB": 1e3, "MB": 1e6, "us": 1e-6, "ms": 1e-3}


class Tokenizer:
    """Takes the place of a tokenizer with a vocabulary."""

    def __call__(self, text: str, return_tensors: str) -> BatchEncoding:
        ids = torch.tensor([[len(word) + 3 for word in text.split()]])
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def decode(self, ids: torch.Tensor) -> str:
        return " ".join(map(str, ids.tolist()))


def test_examples_in_order(enabled, single_thread, device, trainers_use, tmp_path, monkeypatch, capsys):
    """Training lasts for two steps here, without what transformers allows only on known devices."""
    monkeypatch.chdir(tmp_path)
    trainers_use(device)
    every_model.tiny_model("qwen3_moe", num_experts=8).to(torch.bfloat16).save_pretrained("model")
    row = {name: tensor[0] for name, tensor in every_model.tiny_batch("qwen3_moe").items()}
    names = {"path": "model", "tokenizer": Tokenizer(), "dataset": [row] * 16}
    names["sample"] = {name: tensor[None].to(device) for name, tensor in row.items()}
    for name, text in EXAMPLES.items():
        text = text.replace('"cuda"', f'"{device}"').replace(
            "bf16=True", "max_steps=2, dataloader_pin_memory=False"
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "(?i).*ktops")
            exec(compile(text, name, "exec"), names)
        if name not in ON_CPU:
            assert names["model"].device == device, name
            assert all(".experts." in tensor for tensor in on_cpu(names["model"])), name
    printed = capsys.readouterr().out
    assert f"on {device}, and the experts of 2 layers" in printed and len(EXAMPLES) == 7


def test_other_examples_need_cuda():
    assert all("torch.cuda." in text for name, text in BLOCKS if not name)


def rows(heading: str) -> list[list[str]]:
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def quantity(text: str) -> float:
    number, unit = text.split()
    return float(number) * UNITS[unit]


def test_what_moves(device):
    """The bytes are those that are counted, and the times follow from them."""
    table = [row for row in rows("What moves") if row[0] in SHAPES]
    assert len(table) == 6
    for layer, tokens, *cells in table:
        hidden_size, intermediate_size, num_experts, top_k, weight_bytes = SHAPES[layer]
        counted = moved(device, int(tokens), hidden_size, top_k)
        expected = [*counted]
        expected += [nbytes / rate for nbytes in counted for rate in (25e9, 50e9)]
        weights = 3 * hidden_size * intermediate_size
        used = num_experts * (1 - (1 - top_k / num_experts) ** int(tokens))
        flops = 2 * weights * int(tokens) * top_k
        expected.append(max(used * weights * weight_bytes / 200e9, flops / 4e12))
        assert [quantity(cell) for cell in cells] == pytest.approx(expected, rel=0.03), (layer, tokens)


def moved(device, num_tokens: int, hidden_size: int, top_k: int) -> tuple[int, int]:
    """Returns the bytes that forward and backward move, as counted with small experts and few tokens."""
    few = min(num_tokens, 4)
    sizes = {"T": few, "H": hidden_size, "I": 1, "E": top_k, "K": top_k}
    given = on_device(moe_inputs(**sizes, dtype=torch.bfloat16, weights_dtype=torch.float32))
    given = require_grad(given, "hidden_states", "topk_weights")
    grad_output = torch.ones(few, hidden_size, dtype=torch.bfloat16).to(device)
    with traffic() as forward:
        output = ktops.moe_sft(**given)
    with traffic() as backward:
        output.backward(grad_output)
    return tuple((count["down"] + count["up"]) * num_tokens // few for count in (forward, backward))


def test_what_to_buy():
    table = [row for row in rows("What to buy") if row[1].count(",") == 4 and row[1][0].isdigit()]
    assert len(table) == 5
    for model, sizes, *cells in table:
        layers, num_experts, top_k, hidden_size, intermediate_size = map(int, sizes.split(","))
        one = 3 * layers * hidden_size * intermediate_size / 1e9
        every = one * num_experts
        expected = [every, one * top_k, 2 * every, every, 0.5625 * every]
        assert [float(cell) for cell in cells[:-1]] == pytest.approx(expected, rel=0.03), model
