"""``python -m bench.usage`` prints the figures of the usage document's 5.4."""

import re

from bench import usage


def test_prints_throughput_and_memory(capsys):
    sizes = ["--hidden", "64", "--intermediate", "32", "--experts", "4", "--batch", "1", "--length", "8"]
    assert usage.main([*sizes, "--repeats", "1", "--steps", "1", "--train-length", "4"]) == 0
    printed = capsys.readouterr().out
    for line in ("Initial memory", "After load", "After train"):
        assert re.search(rf"^{line}: \d+\.\d\d GiB$", printed, re.MULTILINE), line
    assert re.search(r"^Forward throughput of \[1, 8, 64\]: \d+\.\d\d tokens/s$", printed, re.MULTILINE)
