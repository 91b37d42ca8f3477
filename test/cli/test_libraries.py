"""Warnings of other libraries, as `ktops` shows them."""

import warnings

import pytest

from ktops.cli import info


@pytest.fixture
def warning_command(ktops_command, monkeypatch):
    """`ktops info`, in which libraries warn; returns what it writes to stderr."""
    collect = info.collect

    def collected():
        for _ in range(2):
            warnings.warn("matrices are\n  explicit here", stacklevel=1)
        warnings.warn("ktops: a warning of its own", UserWarning, stacklevel=1)
        for category in (FutureWarning, DeprecationWarning):
            warnings.warn("old_name is deprecated", category, stacklevel=1)
        return collect()

    monkeypatch.setattr(info, "collect", collected)
    monkeypatch.setattr("sys.warnoptions", [])
    return lambda: ktops_command("info")[::2]


def test_warnings_are_lines_of_one_style(warning_command):
    expected = "ktops: warning: matrices are explicit here\nktops: warning: a warning of its own\n"
    assert warning_command() == (0, expected)


def test_options_of_python_choose_other_warnings(warning_command, monkeypatch):
    monkeypatch.setattr("sys.warnoptions", ["default"])
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert warning_command()[1].count("ktops: warning: old_name is deprecated\n") == 2


def test_pythons_own_style_comes_back(warning_command):
    before = warnings.showwarning
    warning_command()
    assert warnings.showwarning is before
