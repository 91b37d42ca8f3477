"""``bench.models decode``: all variants of a tiny model, and an error for a wrong result."""

import re

import pytest
import torch

from bench.models import __main__ as models
from bench.models import decode, layout
from bench.models.make import make

SMALL = {
    "vocab_size": 304, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "eos_token_id": 299, "bos_token_id": 298,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("ktops.cli.finetune.demo_model.NUM_STORIES", 50)
    config = layout.changed_config(layout.read_config("deepseek-v2-lite"), 3)
    make(config | SMALL, tmp_path / "made")
    return tmp_path / "made"


def rows(text: str) -> list[tuple[str, str, float, float]]:
    found = re.findall(r"^ +(bf16|int8) +(none|PEFT|frozen) +([\d.]+) +([\d.]+)$", text, re.MULTILINE)
    return [(linear, adapter, float(token), float(layer)) for linear, adapter, token, layer in found]


def test_every_variant(folder, capsys, single_thread):
    assert models.main(["decode", str(folder), "--tokens", "5", "--rounds", "1", "--rank", "2"]) == 0
    found = rows(capsys.readouterr().out)
    assert [row[:2] for row in found] == [(f, a) for f in ("bf16", "int8") for a in decode.ADAPTERS]
    assert all(0 < 2 * layer < token for *_, token, layer in found), "two layers have experts"
    assert models.main(["decode", str(folder), "--tokens", "5", "--rounds", "1", "--rank", "0"]) == 0
    assert [row[:2] for row in rows(capsys.readouterr().out)] == [("bf16", "none"), ("int8", "none")]


def test_no_figures_for_a_wrong_result(folder, capsys, single_thread, monkeypatch):
    def freeze_nothing(model):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.zeros_(parameter)
        return model

    monkeypatch.setattr("ktops.freeze_adapters", freeze_nothing, raising=False)
    assert models.main(["decode", str(folder), "--tokens", "5", "--rounds", "1"]) == 1
    captured = capsys.readouterr()
    assert "the frozen adapter computes other logits than PEFT's modules" in captured.err
    assert captured.out == ""
