"""bench.kills notices results that differ, and files that load half-written."""

import sys

import pytest
import torch
from safetensors.torch import save_file

from bench import kills


class Writer(kills.Command):
    """A program that writes numbers to one file, a line at a time, and continues it when it is run again.

    ``arguments``: code that changes it.
    """

    PROGRAM = """
import pathlib, sys, time
path = pathlib.Path({path!r})
begin = len(path.read_text().split()) if path.exists() else 0
{change}
for number in range(begin, 20):
    with path.open("a") as file:
        print(number, file=file)
    time.sleep(0.02)
"""

    def next(self):
        return ["-c", self.PROGRAM.format(path=str(self.out), change="".join(self.arguments))]

    def half_written(self, expected):
        return []

    def result(self):
        return {"numbers": self.out.read_text().split()}

    def delete(self):
        self.out.unlink()


@pytest.mark.parametrize("change, wrong", [("", 0), ("begin += begin > 0", 1)])
def test_results_that_differ(change, wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kills, "COMMAND", (sys.executable,))
    assert (kills.try_kills(Writer([change], tmp_path / "out"), 3, seed=0) > 0) == wrong
    assert "3 kills" in capsys.readouterr().out


def test_half_written(tmp_path):
    run = kills.Finetune([], tmp_path)
    adapter, metrics = tmp_path / "adapter_model.safetensors", tmp_path / "metrics.json"
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"lora_A": torch.zeros(4)}, adapter)
    expected = run.result()
    assert run.half_written(expected) == [] and not run.is_complete()
    metrics.write_text('{"steps": [')
    assert run.half_written(expected) == [metrics]
    metrics.write_text('{"steps": [{"loss": 1.0}]}')
    save_file({"lora_A": torch.ones(4)}, adapter)
    assert run.half_written(expected) == [tmp_path]
    adapter.write_bytes(adapter.read_bytes()[:-1])
    assert run.half_written(expected) == []
