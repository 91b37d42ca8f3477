"""``python -m bench.regression`` on a repository of two revisions, one of them slower."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import ktops
from bench import contest, regression
from bench.contest import Entrant

ARGUMENTS = [
    "--shape",
    "64,32,8,2",
    "--tokens",
    "4",
    "--rounds",
    "3",
    "--seconds",
    "0.02",
    "--max-load",
    "inf",
]
SLEEP = 0.02
OLD, SLOWER = "    arguments = (\n", f"    __import__('time').sleep({SLEEP})\n    arguments = (\n"


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A git repository with the tags "base" and "slower", whose C++ is already built."""
    root = tmp_path_factory.mktemp("repository")
    package = Path(ktops.__file__).parent
    beyond_the_api = "testing", "reference"  # which other revisions have in another form
    ignored = shutil.ignore_patterns("*.so", "__pycache__", *beyond_the_api)
    shutil.copytree(package, root / "ktops", ignore=ignored)
    (root / "ktops_csrc").mkdir()
    (root / "ktops_csrc" / "source.cpp").touch()
    (root / "setup.py").touch()

    def git(*arguments):
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "base")
    git("tag", "base")
    file = root / "ktops" / "ops" / "moe_sft.py"
    source = file.read_text()
    assert source.count(OLD) == 1
    file.write_text(source.replace(OLD, SLOWER))
    git("commit", "-am", "slower")
    git("tag", "slower")
    return root


@pytest.fixture(autouse=True)
def _in_repository(repository, monkeypatch):
    monkeypatch.setattr(regression, "ROOT", repository)
    monkeypatch.setattr(contest, "_PAUSE_SECONDS", 0.0)
    [module] = Path(ktops.__file__).parent.glob("_C*.so")
    kept = repository / "build" / "regression" / regression.source_key("base")
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copy(module, kept / regression.MODULE.name)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def compare(*arguments) -> int:
    return regression.main([*arguments, *ARGUMENTS])


def worktrees(repository: Path) -> int:
    command = ["git", "worktree", "list"]
    return len(subprocess.run(command, cwd=repository, check=True, capture_output=True).stdout.splitlines())


def test_a_revision_passes_against_itself_and_leaves_nothing_behind(repository, capsys):
    assert compare("base", "base", "--threshold", "1000000") == 0
    printed = capsys.readouterr().out
    assert printed.count("64,32,8,2") == 2 and "SLOWER" not in printed
    assert worktrees(repository) == 1


def test_a_slower_revision_fails_twice(capsys, monkeypatch):
    """Only B's sleep is certain. The ratios are made up, because a busy machine may be as slow with A."""
    fastest = []

    def ratios(a, b):
        fastest.append(min(second for sample in b.samples.values() for second in sample))
        return [2.0, 2.1, 2.2]

    monkeypatch.setattr(regression, "ratios", ratios)
    assert compare("base", "slower", "--mode", "forward") == 1
    assert len(fastest) == 2 and min(fastest) >= SLEEP
    printed = capsys.readouterr()
    assert "SLOWER" in printed.out
    assert "1 of 1 cases look slower: again" in printed.err


@pytest.mark.parametrize(
    ("statuses", "status"),
    [(["ok", "ok"], 0), (["ok", "slower"], 1), (["wrong", "ok"], 1), (["busy", "ok"], 3)],
)
def test_exit_status(monkeypatch, capsys, statuses, status):
    row = {"shape": "s", "mode": "forward", "tokens": 1}
    monkeypatch.setattr(regression, "compare", lambda *_: [{**row, "status": word} for word in statuses])
    assert compare("base", "base") == status
    printed = capsys.readouterr().out
    assert all(word in printed for word in statuses)


def test_ratios_pair_the_rounds():
    a, b = Entrant("A", None), Entrant("B", None)
    a.samples = {0: [1.0, 1.0, 9.0], 1: [2.0], 3: [1.0]}
    b.samples = {0: [2.0], 2: [7.0], 3: [3.0]}
    assert regression.ratios(a, b) == [2.0, 3.0]


@pytest.mark.parametrize(
    ("values", "slower"),
    [
        ([1.2, 1.1, 1.3, 1.2, 1.2], True),
        ([1.04, 1.03, 1.04, 1.04, 1.05], False),
        ([0.9, 1.2, 0.95, 1.1, 1.3], False),
        ([0.5, 0.5, 0.5], False),
    ],
)
def test_slower_is_above_the_threshold_and_beyond_the_spread(values, slower):
    assert regression.judge(values, threshold=1.05)["slower"] is slower
