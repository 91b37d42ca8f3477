"""Replaces this process by a command, with the variable that makes its Python processes use ktops."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from ktops.cli.errors import UserError

VARIABLE = "KTOPS_LAUNCH"

PYTHON = re.compile(r"(python|pypy)[\d.]*")

_CHECK = """
import sys
from importlib.machinery import PathFinder
real = PathFinder.find_spec("kt_kernel")
print("ktops.launcher.startup" in sys.modules, getattr(real, "origin", None) or "")
"""


def launch(command: list[str]) -> NoReturn:
    """Runs a command in place of this process, with ktops in every Python process that it starts.

    Raises:
        UserError: the command does not exist or cannot be run; ktops is not installed where it runs, or
            kt-kernel is.

    Example:
        >>> launch(["llamafactory-cli", "train", "qwen3_lora_sft_kt.yaml"])
    """
    executable = find(command[0])
    environment = {**os.environ, VARIABLE: "1"}
    interpreter = interpreter_of(executable)
    if interpreter == [executable]:
        interpreter += python_options(command[1:])
    if interpreter is None:
        print(
            f"ktops launch: {executable} is not a Python script. The Python processes that it starts use "
            f"ktops if it is installed in their environment, and if they get the variable {VARIABLE}.",
            file=sys.stderr,
        )
    else:
        require_hooks(interpreter, environment)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(executable, command, environment)
    except OSError as error:
        raise UserError(f"launch: {executable} cannot be run: {error.strerror}") from None


def find(command: str) -> str:
    """Returns the path of a command on PATH, or else beside this interpreter.

    Raises:
        UserError: there is none.
    """
    found = shutil.which(command) or shutil.which(command, path=str(Path(sys.executable).parent))
    if found is None and Path(command).is_file():
        raise UserError(
            f"launch: {command} is not executable. A Python script: ktops launch python {command}"
        )
    if found is None:
        raise UserError(f"launch: {command!r} is not a command: it is neither a path nor on PATH")
    return found


def interpreter_of(executable: str) -> list[str] | None:
    """Returns the command that runs the Python interpreter of an executable, or None if it has none.

    Example:
        >>> interpreter_of("/venv/bin/torchrun")
        ['/venv/bin/python3']
    """
    if PYTHON.fullmatch(Path(executable).name):
        return [executable]
    try:
        with open(executable, "rb") as file:
            head = file.read(4096)
    except PermissionError:
        return None
    if not head.startswith(b"#!"):
        return None
    lines = head.decode(errors="replace").splitlines()
    line = lines[0][2:]
    if len(lines) > 1 and lines[1].startswith("'''exec' "):  # pip's, where the path is too long for "#!"
        line = lines[1].removeprefix("'''exec' ").removesuffix(' "$0" "$@"')
    words = shlex.split(line)
    if words and Path(words[0]).name == "env":
        words = [word for word in words[1:] if word != "-S"]
        words[:1] = [shutil.which(word) or word for word in words[:1]]
    return words if words and PYTHON.fullmatch(Path(words[0]).name) else None


def python_options(arguments: list[str]) -> list[str]:
    """Returns the options of the interpreter itself at the start of a Python command's arguments.

    Example:
        >>> python_options(["-u", "-X", "dev", "-m", "torch.distributed.run", "-S"])
        ['-u', '-X', 'dev']
    """
    found: list[str] = []
    left = list(reversed(arguments))
    while left and re.match(r"-[^cmh?V-]+$", left[-1]):
        found.append(left.pop())
        if found[-1][-1] in "WX" and left:
            found.append(left.pop())
    return found


def require_hooks(interpreter: list[str], environment: dict[str, str]) -> None:
    """Raises UserError unless an interpreter, started with the variable, loads ktops' startup file."""
    python = shlex.join(interpreter)
    try:
        run = subprocess.run(
            [*interpreter, "-c", _CHECK], env=environment, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise UserError(f"launch: {python} does not run: {error.strerror}") from None
    if run.returncode:
        raise UserError(f"launch: {python} does not run: {run.stderr.strip()}")
    installed, _, real = run.stdout.strip().splitlines()[-1].partition(" ")
    if real:
        raise UserError(
            f"launch: kt-kernel is installed in the environment of {python} ({real}). ktops does not "
            f"take its place there: {python} -m pip uninstall kt-kernel"
        )
    if installed != "True":
        raise UserError(
            f"launch: ktops is not installed in the environment of {python}, which runs the command: "
            f"{python} -m pip install ktops" + (f"\n{run.stderr.strip()}" if run.stderr.strip() else "")
        )
