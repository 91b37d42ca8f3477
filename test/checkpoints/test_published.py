"""Compares experts in files written by other libraries with those libraries' dequantizers; see publish.py."""

import json
import shutil
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from tiny_checkpoints import decode

from ktops import quantize
from ktops._warn import warn_once
from ktops.checkpoints import CheckpointError, Layer, open_checkpoint

PUBLISHED = Path(__file__).parent / "published"
CASES = {path.stem: json.loads(path.read_text()) for path in sorted(PUBLISHED.glob("*.json"))}
FORMATS = {
    "auto_awq": "uint4",
    "auto_gptq": "uint4",
    "auto_round": "uint4",
    "auto_round_auto_awq": "uint4",
    "auto_round_gptqmodel": "uint4",
    "auto_round_sym": "int4",
    "auto_round_w8": "int8",
    "gptqmodel": "uint4",
    "gptqmodel_v2": "uint4",
    "gptqmodel_w8_v2": "int8",
    "llm_compressor": "uint4",
    "llm_compressor_mxfp4": "mxfp4",
    "llmcompressor_w4_zero_points": "uint4",
    "llmcompressor_w8": "int8",
}
REFUSED = {
    "extra_config": (
        r"experts\.1\.up_proj\.qweight .*: expert 1 differs from the others: expected int4 .*, got int8 .*\. "
        "Pass weight_format"
    ),
    "llmcompressor_w8_zero_points": "experts.0.gate_proj.weight_packed .* got 8 bits with other zero points",
    "mxint4": r"gate_proj.weight_packed .* must be floats, .* says mx_int \(quant_method auto-round\)",
}
MODEL = "model.safetensors"


def publish(folder: Path, case: str, config: dict | None = None) -> None:
    """Writes the files of a case, with their quantization config in config.json."""
    shutil.copy(PUBLISHED / f"{case}.safetensors", folder / MODEL)
    if config is None:
        config = {"quantization_config": CASES[case]["quantization_config"]}
    (folder / "config.json").write_text(json.dumps({"model_type": "test", **config}))


def opened(path: Path) -> Layer:
    """Reads the layer; a warning is an error."""
    warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (layer,) = open_checkpoint(path).layers
        layer.check()
    return layer


def expect_weights(case: str, gate_up, down) -> None:
    """Compares expert 1 with the float16 weights of the library's own modules."""
    known = numpy.load(PUBLISHED / f"{CASES[case]['weights']}.npz")
    gate, up, expected_down = (
        torch.from_numpy(known[f"model.layers.0.mlp.experts.1.{name}"])
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    assert torch.equal(decode(gate_up)[1].half(), torch.cat([gate, up]))
    assert torch.equal(decode(down)[1].half(), expected_down)


def test_every_case_is_listed():
    assert set(CASES) == {*FORMATS, *REFUSED}


@pytest.mark.parametrize("case", FORMATS)
def test_case(tmp_path, case):
    publish(tmp_path, case)
    for path in (tmp_path, tmp_path / MODEL):
        layer = opened(path)
        assert layer.formats == (FORMATS[case], FORMATS[case])
        expect_weights(case, *layer.read()[:2])


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    publish(tmp_path, case)
    for path in (tmp_path, tmp_path / MODEL):
        with pytest.raises(CheckpointError, match=REFUSED[case]):
            opened(path).read()


def test_experts_of_several_widths_are_read_in_one_format(tmp_path):
    """The checkpoint is int4, but up of expert 1 has 8 bits and its down 16."""
    publish(tmp_path, "extra_config")
    layer = opened(tmp_path)
    assert layer.scheme == "mixed gptq and mixed gptq and bf16"
    expect_weights("extra_config", *layer.read("fp32")[:2])
    for weight, exact in zip(layer.read("int8")[:2], layer.read("fp32")[:2], strict=True):
        expected = quantize(decode(exact), "int8")
        assert torch.equal(weight.weight, expected.weight) and torch.equal(weight.scale, expected.scale)


@pytest.mark.parametrize("case", ["auto_round", "auto_gptq", "gptqmodel_v2"])
@pytest.mark.parametrize(
    "where", ["quantize_config.json", "quant_config.json", "text_config", "thinker_config"]
)
def test_where_the_config_is(tmp_path, case, where):
    said = CASES[case]["quantization_config"]
    nested = {
        "text_config": {"text_config": {"quantization_config": said}},
        "thinker_config": {"thinker_config": {"text_config": {"quantization_config": said}}},
    }
    publish(tmp_path, case, nested.get(where, {}))
    if where.endswith(".json"):
        (tmp_path / where).write_text(json.dumps(said))
    for path in (tmp_path, tmp_path / MODEL):
        expect_weights(case, *opened(path).read()[:2])


def test_config_json_comes_first(tmp_path):
    publish(tmp_path, "gptqmodel_v2")
    (tmp_path / "quantize_config.json").write_text(json.dumps({"checkpoint_format": "gptq", "bits": 8}))
    expect_weights("gptqmodel_v2", *opened(tmp_path).read()[:2])


@pytest.mark.parametrize("case", ["auto_round_sym", "gptqmodel_w8_v2"])
@pytest.mark.filterwarnings("ignore:ktops. nothing in")
def test_zero_points_in_the_middle_need_no_config(tmp_path, case):
    """Zero points are stored minus one in the first case, unchanged in the second."""
    publish(tmp_path, case, {})
    (layer,) = open_checkpoint(tmp_path).layers
    assert layer.formats == (FORMATS[case], FORMATS[case])
    expect_weights(case, *layer.read()[:2])
