"""The report of `ktops convert`: what it compares, and the activation it uses."""

import json
import shutil
from pathlib import Path

import pytest

ARGUMENTS = ("--weight-format", "int4", "--group-size", 32)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("kind", ["full", "none", "sample"])
def test_reports(convert, model_directory, tmp_path, kind):
    """The weights do not depend on the report, whose sample is the same for any number of threads."""
    runs = {}
    for threads in (1, 3):
        status, out, _ = convert(f"by-{threads}", *ARGUMENTS, "--report", kind, "--num-threads", threads)
        assert status == 0
        runs[threads] = files(tmp_path / f"by-{threads}")
    assert runs[1] == runs[3]
    report = json.loads(runs[1].pop("ktops-report.json"))
    assert (report["report"], len(report["layers"])) == (kind, 2) and report["bytes_bf16"] == 48 << 10
    assert report["measured_fraction"] == {"full": 1, "none": 0, "sample": 1 / 8}[kind]
    measured = [layer["measured_experts"] for layer in report["layers"]]
    assert measured == {"full": [8, 8], "none": [0, 0], "sample": [1, 1]}[kind]
    errors = [layer[f"{name}_error"] for layer in report["layers"] for name in ("gate_up", "down", "output")]
    assert ("lists the errors" in out) == (kind != "none")
    if kind == "none":
        assert errors == [None] * 6 and "errors are not measured (--report none)" in out
    else:
        assert all(0.03 < error < 0.3 for error in errors)
        assert ("measured on a sample, 12.5% of the weights" in out) == (kind == "sample")
    assert convert("default", *ARGUMENTS)[0] == 0
    default = files(tmp_path / "default")
    assert json.loads(default.pop("ktops-report.json"))["report"] == "sample" and default == runs[1]


@pytest.mark.parametrize(
    ("config", "activation", "said"),
    [
        ({"hidden_act": "gelu_new"}, "gelu_tanh", None),
        ({"text_config": {"hidden_activation": "gelu"}, "hidden_act": "silu"}, "gelu", None),
        ({"thinker_config": {"text_config": {"hidden_act": "silu"}}}, "silu", None),
        ({"hidden_act": "relu2"}, "relu2", None),
        ({"hidden_act": "tanh"}, None, "outputs are not compared: ktops has no activation 'tanh'"),
        (
            {"hidden_act": "silu", "swiglu_limit": 7.0},
            None,
            "outputs are not compared: ktops has no 'silu' with a swiglu_limit",
        ),
        ({}, "silu", "no config.json names the activation; outputs are compared with silu"),
    ],
)
def test_activation_of_the_report(convert, model_directory, tmp_path, config, activation, said):
    """An activation other than the model's is never used silently."""
    (tmp_path / "source").mkdir()
    shutil.copy(model_directory / "model.safetensors", tmp_path / "source")
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    status, out, _ = convert("out", "--weight-format", "int8", source="source")
    report = json.loads((tmp_path / "out" / "ktops-report.json").read_text())
    assert (status, report["activation"], report["activation_note"]) == (0, activation, said)
    assert said is None or said in " ".join(out.split())
    measured = [report["output_error"], *(layer["output_error"] for layer in report["layers"])]
    assert all(error is None for error in measured) == (activation is None)
    assert 0 < report["relative_error"] < 0.02
