"""The plan of `ktops convert`: what it says, and what it refuses before anything is written."""

import shutil
from pathlib import Path

from ktops._display import format_bytes
from ktops.checkpoints import open_checkpoint
from ktops.cli import conversion_plan
from ktops.cli.plan.machine import Memory

ARGUMENTS = ("--weight-format", "int4", "--group-size", 32, "--quantize-method", "mse")


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_needs_space(convert, monkeypatch, tmp_path):
    """The size of the tensors is known before anything is written."""
    free, usage = [0], shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free[0]))
    status, out, err = convert("out", *ARGUMENTS)
    assert status == 1 and "KiB written (experts in int4), 0.0 KiB free on the disk; memory" in out
    assert "will be written, but only 0.0 KiB are free on its disk. --force tries anyway" in err
    assert not list(tmp_path.iterdir())
    free[0] = 1 << 20
    assert convert("out", *ARGUMENTS)[0] == 0
    checkpoint = open_checkpoint(tmp_path / "out")
    tensors = [
        *checkpoint.other_tensors().values(),
        *(t for layer in checkpoint.layers for t in layer.tensors),
    ]
    written = sum(view.nbytes for view in tensors if not view.name.endswith("_extra_state"))
    shutil.rmtree(tmp_path / "out")
    free[0] = written - 1
    assert convert("out", *ARGUMENTS)[0] == 1
    free[0] = written
    assert convert("out", *ARGUMENTS)[0] == 0
    shutil.rmtree(tmp_path / "out")
    free[0] = written - 1
    status, out, err = convert("out", *ARGUMENTS, "--force")
    assert (status, err) == (0, "") and "--force: out: " in out and "are free on its disk" in out


def test_the_rest_of_an_interrupted_conversion_needs_space(
    convert, monkeypatch, stop_after_a_layer, tmp_path
):
    assert convert("out", *ARGUMENTS)[0] == 130
    stop_after_a_layer()
    rest, usage = 1, shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=rest))
        status, out, err = convert("out", *ARGUMENTS)
    assert status == 1 and "continuing: 1 of 2 layers" in out and "are free on its disk" in err
    assert convert("out", *ARGUMENTS)[0] == 0


def test_the_plan(convert, monkeypatch, model_directory, tmp_path):
    status, out, _ = convert("out", *ARGUMENTS, "--num-threads", 2)
    plan = out.splitlines()[0]
    source = open_checkpoint(model_directory)
    read = format_bytes(sum(view.nbytes for view in source.tensors.values()))
    assert status == 0 and plan.startswith(f"  plan: {read} read (experts in fp32), ")
    monkeypatch.setattr(conversion_plan, "read_memory", lambda: Memory(8 << 30, 0))
    status, out, err = convert("again", *ARGUMENTS, "--num-threads", 2)
    assert status == 1 and not list(tmp_path.glob("again*"))
    assert "more memory are needed; 0.0 KiB available (this machine has 8.0 GiB). Fewer threads" in err
    status, out, err = convert("again", *ARGUMENTS, "--force")
    assert (status, err) == (0, "") and "--force: " in out
    assert files(tmp_path / "again") == files(tmp_path / "out")
