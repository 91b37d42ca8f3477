"""`ktops finetune --device`."""

import json

import pytest
from model_files import save_model

from ktops.cli.finetune import corpus, demo_model, verify
from ktops.cli.finetune import run as finetune

pytestmark = pytest.mark.usefixtures("enabled", "single_thread")


OPTIONS = (
    "--lora-rank", 4, "--max-length", 96, "--eval-examples", 2, "--max-steps", 2, "--dtype", "f32",
    "--output-dir", "out",
)  # fmt: skip


@pytest.fixture
def command(ktops_command, tmp_path, monkeypatch):
    """``command(device, ...)`` trains a tiny model; the results are those of ktops_command."""

    def check_here(path):
        return verify.check(verify.Record(**json.loads(path.read_text())))

    def command(device: str, *more: str):
        monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", device)
        files = "--model", "model", "--data", "train.jsonl"
        return ktops_command("finetune", *files, *OPTIONS, "--device", device, *more)

    monkeypatch.setattr(verify, "run", check_here)
    monkeypatch.setattr(finetune, "NEW_TOKENS", 4)
    save_model(tmp_path / "model", demo_model.train_tokenizer(corpus.stories(50), vocab_size=400))
    records = corpus.instructions()[0][:8]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return command


def test_device(command, tmp_path):
    status, out, err = command("simgpu", "--num-gpu-experts", "2")
    assert (status, err) == (0, "")
    assert "on simgpu:0, and the experts of 2 layers, " in out and ", with copies of 4, " in out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    calls = {name: op["calls"] for name, op in metrics["kt_time"]["ops"].items()}
    assert calls == {"moe_sft_fwd": 4, "moe_sft_bwd": 4, "moe_fwd": 0}
    assert metrics["options"]["device"] == "simgpu" and metrics["reload"]["max_abs_difference"] == 0
    assert metrics["reload"]["adapter_effect"] > 0 and len(metrics["steps"]) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "--device: device must be an accelerator of this machine"),
        (
            "simgpu:0",
            "--device must be cpu or simgpu, got 'simgpu:0'. Of several devices",
        ),
    ],
)
def test_no_such_device(command, tmp_path, name, message):
    status, _, err = command(name)
    assert status == 1 and message in err
    assert not (tmp_path / "out").exists()
