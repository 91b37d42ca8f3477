"""ktops launch: the startup file, its hooks, and the checks before a command runs."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ktops
from ktops import compat
from ktops.cli.errors import UserError
from ktops.cli.launch import VARIABLE, find, interpreter_of, launch, python_options, require_hooks
from ktops.launcher import startup
from ktops.launcher.startup import HOOKS, PostImportFinder

LAUNCHER = Path(ktops.__file__).parent / "launcher"

ROOT = LAUNCHER.parents[1]


@pytest.fixture
def site(tmp_path) -> dict[str, str]:
    """An environment whose Python processes read the startup file as if ktops were installed."""
    (tmp_path / "sitecustomize.py").write_text(f"import site\nsite.addsitedir({str(LAUNCHER)!r})\n")
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    return {**os.environ, "PYTHONPATH": path, VARIABLE: "1"}


def python(code: str, environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return result.stdout.strip()


STATE = "import sys; print([n in sys.modules for n in ('ktops', 'torch', 'ktops.launcher.startup')])"


def test_startup_imports_nothing_but_itself(site):
    assert python(STATE, site) == "[False, False, True]"


def test_off_without_the_variable(site):
    for value in ({}, {VARIABLE: "0"}, {VARIABLE: "False"}):
        site.pop(VARIABLE, None)
        assert python(STATE, {**site, **value}) == "[False, False, False]"


def test_other_words_for_yes(site):
    assert python(STATE, {**site, VARIABLE: "true"}) == "[False, False, True]"


def test_child_processes_wait_for_imports_too(site):
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {STATE!r}], check=True)"
    assert python(code, site) == "[False, False, True]"


@pytest.fixture
def hooked(tmp_path, monkeypatch):
    """Modules ``outer`` and ``outer.inner``, and a hook on the second, which appends to ``hook.calls``."""
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "__init__.py").write_text("")
    (tmp_path / "outer" / "inner.py").write_text("import hook\nvalue = len(hook.calls)\n")
    (tmp_path / "hook.py").write_text(
        "calls = []\ndef call():\n    from outer import inner\n    calls.append(inner.value)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    finder = PostImportFinder({"outer.inner": "hook:call"})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    yield finder
    for name in ("outer", "outer.inner", "hook"):
        sys.modules.pop(name, None)


def test_hook_runs_once_after_the_module(hooked):
    import hook
    import outer

    assert hook.calls == []
    import outer.inner

    assert hook.calls == [0]
    assert "exec_module" not in vars(outer.inner.__spec__.loader)
    assert outer.inner.__spec__.loader.get_source("outer.inner").startswith("import hook")


def test_modules_imported_before(hooked, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if f is not hooked])
    monkeypatch.setattr(startup, "HOOKS", hooked.hooks)
    import hook
    import outer.inner  # noqa: F401

    with contextlib.ExitStack() as stack:
        stack.callback(compat.uninstall)
        startup.install()
        startup.install()
    assert hook.calls == [0]


def test_looking_for_a_module_runs_no_hook(hooked):
    import importlib.util

    import hook

    assert importlib.util.find_spec("outer.inner") is not None
    assert hook.calls == []


def test_an_error_in_a_hook_is_the_importer_s(hooked):
    hooked.hooks["outer.inner"] = "hook:missing"
    with pytest.raises(AttributeError, match="missing"):
        import outer.inner  # noqa: F401


def test_hooks_exist():
    """Each hook is a function of ktops that takes no arguments, whose module needs no client."""
    import importlib
    import inspect

    for hook in HOOKS.values():
        module, _, name = hook.partition(":")
        function = getattr(importlib.import_module(module), name)
        assert not inspect.signature(function).parameters


def script(folder: Path, *lines: str) -> str:
    path = folder / "command"
    path.write_text("".join(f"{line}\n" for line in lines))
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("lines", "interpreter"),
    [
        (["#!/venv/bin/python3.11"], ["/venv/bin/python3.11"]),
        (["#!/venv/bin/python -I"], ["/venv/bin/python", "-I"]),
        (["#!/bin/sh", "'''exec' /a\\ long/python3 \"$0\" \"$@\"", "' '''"], ["/a long/python3"]),
        (["#!/bin/sh", "exec python train.py"], None),
        (["\x7fELF"], None),
    ],
)
def test_interpreter_of_a_script(lines, interpreter, tmp_path):
    assert interpreter_of(script(tmp_path, *lines)) == interpreter


def test_interpreter_found_by_env(tmp_path, monkeypatch):
    (tmp_path / "python3").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for line in ("#!/usr/bin/env python3", "#!/usr/bin/env -S python3"):
        assert interpreter_of(script(tmp_path, line)) == [str(tmp_path / "python3")]


def test_interpreter_itself():
    assert interpreter_of("/venv/bin/python3.12") == ["/venv/bin/python3.12"]


def test_unknown_command():
    with pytest.raises(UserError, match="'no-such-command' is not a command"):
        find("no-such-command")


def test_script_that_is_not_executable(tmp_path):
    script = tmp_path / "train.py"
    script.touch(mode=0o644)
    with pytest.raises(UserError, match=r"train\.py is not executable.*ktops launch python .*train\.py"):
        find(str(script))


def test_command_beside_this_python(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert find(Path(sys.executable).name) == str(Path(sys.executable).with_name(Path(sys.executable).name))


def test_environment_without_ktops(site):
    require_hooks([sys.executable], site)
    with pytest.raises(UserError, match=r"not installed in .* -m pip install ktops"):
        require_hooks([sys.executable, "-S"], site)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["-u", "-m", "trl", "-S"], ["-u"]),
        (
            ["-X", "dev", "-Wignore", "-W", "error", "train.py", "-S"],
            ["-X", "dev", "-Wignore", "-W", "error"],
        ),
        (["-uS", "train.py"], ["-uS"]),
        (["-c", "pass", "-S"], []),
        (["-Im", "trl"], []),
        (["train.py"], []),
        ([], []),
    ],
)
def test_options_of_the_interpreter(arguments, options):
    assert python_options(arguments) == options


def test_an_interpreter_without_site_packages(site, monkeypatch):
    monkeypatch.setattr(os, "environ", site)
    monkeypatch.setattr(os, "execve", lambda *args: pytest.fail("started"))
    with pytest.raises(UserError, match=r"not installed in the environment of .* -S"):
        launch([sys.executable, "-u", "-S", "train.py"])


@pytest.mark.parametrize("line", ["#!/no/such/python3", "#!/usr/bin/env no-such-python", "no script"])
def test_a_command_that_cannot_be_run(line, site, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", site)
    with pytest.raises(UserError, match=r"does not run: No such file|cannot be run: Exec format error"):
        launch([script(tmp_path, line.replace("no-such-python", "python9.9"))])


def test_real_kt_kernel(site, tmp_path):
    (tmp_path / "kt_kernel").mkdir()
    (tmp_path / "kt_kernel" / "__init__.py").write_text("")
    with pytest.raises(UserError, match=r"kt-kernel is installed .* pip uninstall kt-kernel"):
        require_hooks([sys.executable], site)


def test_launch_replaces_the_process(site, monkeypatch):
    started = []
    monkeypatch.setattr(os, "environ", site)
    monkeypatch.setattr(os, "execve", lambda *args: started.append(args))
    launch([sys.executable, "train.py", "--lr", "1"])
    [(path, command, environment)] = started
    assert (path, command) == (sys.executable, [sys.executable, "train.py", "--lr", "1"])
    assert environment[VARIABLE] == "1"


def test_what_is_no_python_script_is_said(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "execve", lambda *args: None)
    launch([script(tmp_path, "#!/bin/sh", "python train.py")])
    assert "is not a Python script" in capsys.readouterr().err


def test_options_after_the_command_are_its_own(monkeypatch):
    from typer.testing import CliRunner

    from ktops.cli import launch as module
    from ktops.cli.app import app

    given = []
    monkeypatch.setattr(module, "launch", given.append)
    result = CliRunner().invoke(app, ["launch", "trl", "sft", "--help", "--lr=1"])
    assert result.exit_code == 0, result.output
    assert given == [["trl", "sft", "--help", "--lr=1"]]
