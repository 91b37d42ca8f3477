"""``bench.quality``: errors of formats, and the table generated from them."""

import json

import pytest
import torch

import ktops
from bench import quality, results
from bench.plots import fill


def heavy_tailed(num_experts: int = 4, hidden: int = 128, intermediate: int = 64) -> quality.Layer:
    """Returns experts with outliers in some columns, as in trained ones; tokens have a common direction."""
    torch.manual_seed(0)
    student = torch.distributions.StudentT(4.0)
    spread = torch.rand(hidden).mul(2).exp2()
    gate_up = student.sample((num_experts, 2 * intermediate, hidden)) * spread / hidden**0.5
    down = student.sample((num_experts, hidden, intermediate)) / intermediate**0.5
    weights, ids = torch.rand(256, num_experts).softmax(-1).topk(2)
    return quality.Layer(gate_up, down, torch.randn(256, hidden) + torch.randn(hidden), ids, weights)


@pytest.fixture(scope="module")
def rows() -> dict[tuple, dict]:
    found = quality.measure("trained", [heavy_tailed()])
    return {(row["format"], row["group_size"], row["method"]): row for row in found}


@pytest.mark.parametrize("group_size", quality.GROUP_SIZES)
@pytest.mark.parametrize(("name", "method"), [("int4", "mse"), ("uint4", "mse"), ("uint4", "hqq")])
def test_searched_scales_beat_the_nearest(rows, name, method, group_size):
    best, nearest = (rows[name, group_size, kind] for kind in (method, "rtn"))
    assert best["output_error"] < 0.99 * nearest["output_error"]
    assert best["weight_error"] < nearest["weight_error"]


def test_errors_and_bits_are_those_of_the_formats(rows):
    assert {name for name, _, _ in rows} >= {"bf16", "int8", "int4", "uint4", "fp8_e4m3", "mxfp4", "q8_0"}
    assert rows["int4", 32, "rtn"]["bits"] == 4.5 and rows["q4_0", 0, "rtn"]["bits"] == 4.5
    assert rows["fp32", 0, "rtn"]["output_error"] == 0
    for name, least, most in (("bf16", 1e-4, 5e-3), ("int8", 3e-3, 3e-2), ("int4", 3e-2, 0.5)):
        errors = [row["output_error"] for (kind, _, _), row in rows.items() if kind == name]
        assert all(least < error < most for error in errors)
    layer = heavy_tailed()
    decoded = [ktops.dequantize(ktops.quantize(dense, "int4", group_size=32)) for dense in layer[:2]]
    expected = layer.run(*layer[:2])
    error = (layer.run(*decoded) - expected).norm() / expected.norm()
    assert rows["int4", 32, "rtn"]["output_error"] == pytest.approx(error.item(), rel=1e-4)


def test_layers_of_a_trained_model(tmp_path):
    """Tokens and routes are those of the model, and so are the outputs of the experts."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from ktops.cli.finetune import demo_model
    from ktops.cli.models import load_model

    tokenizer = demo_model.train_tokenizer(["One day a fox met a hen.", "The hen had two eggs."] * 20, 300)
    model = demo_model.create(tokenizer, torch.float32, "eager")
    demo_model.save(model, tokenizer, tmp_path)
    layers = quality.trained_layers(tmp_path)
    assert len(layers) == model.config.num_hidden_layers
    eager = load_model(str(tmp_path), torch.float32, "eager")
    (experts, *_) = (module for module in eager.modules() if isinstance(module, Qwen3MoeExperts))
    with torch.no_grad():
        expected = experts(layers[0].hidden_states, layers[0].topk_ids, layers[0].topk_weights)
    assert layers[0].hidden_states.shape == (quality.TOKENS, model.config.hidden_size)
    assert (layers[0].run(*layers[0][:2]) - expected).norm() / expected.norm() < 1e-5


def test_the_page_of_the_tree_is_made_from_its_results():
    page = quality.PAGE.read_text()
    assert fill(page, "quality", quality.section()) == page


def test_the_saved_errors_show_that_methods_pay():
    """Uses the model that `ktops finetune` trains."""
    rows = json.loads((results.RESULTS / "quality.json").read_text())["rows"]
    errors = {(r["case"], r["format"], r["group_size"], r["method"]): r["output_error"] for r in rows}
    for case in quality.CASES:
        for name, method in (("int4", "mse"), ("uint4", "mse"), ("uint4", "hqq")):
            for group_size in quality.GROUP_SIZES:
                variant = case, name, group_size
                assert errors[(*variant, method)] < errors[(*variant, "rtn")], (*variant, method)
        for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"):
            assert errors[case, name, 0, "mse"] < errors[case, name, 0, "rtn"], (case, name)


def test_saving_and_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(quality, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(quality, "SHAPE", (2, 64, 32))
    monkeypatch.setattr(quality, "trained_layers", lambda directory: quality.gaussian_layers(1))
    kinds = [("int8", 0, "rtn"), ("mxfp4", 32, "rtn")]
    monkeypatch.setattr(quality, "variants", lambda columns: kinds)
    (tmp_path / "page.md").write_text("<!-- begin quality -->\n<!-- end quality -->\n")
    with pytest.raises(SystemExit):
        quality.main(["--case", "gaussian", "--save"])
    assert quality.main(["--model", str(tmp_path), "--threads", "1", "--save"]) == 0
    record = json.loads((tmp_path / "quality.json").read_text())
    assert [(r["case"], r["format"]) for r in record["rows"]] == [
        ("gaussian", "int8"), ("gaussian", "mxfp4"), ("trained", "int8"), ("trained", "mxfp4"),
    ]  # fmt: skip
    page = (tmp_path / "page.md").read_text()
    assert "| format | group | method | bits | gaussian: weights % | gaussian: output % | trained:" in page
    assert "| mxfp4 | 32 | rtn | 4.25 | " in page
