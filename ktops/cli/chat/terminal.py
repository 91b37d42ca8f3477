"""Reads prompts from a terminal, with a history of earlier ones."""

import os
import sys
from pathlib import Path

HELP = """\
  /clear     begin a new conversation
  /exit      end, as do Ctrl-D and Ctrl-C twice
  \"\"\"        begins and ends a prompt of several lines
  Ctrl-C     stops an answer, or clears the line\
"""

HISTORY_LENGTH = 1000
"""Prompts to keep."""

_QUOTES = '"""'


def history_file() -> Path:
    """Returns the file with the history: ``ktops/chat_history`` in the user's state directory."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "ktops" / "chat_history"


class Terminal:
    """Reads prompts; a line that begins with three double quotes begins a prompt that ends with three more.

    A prompt of one line is added to the history at once. If the file cannot be read or written, the history
    ends with the process.
    """

    def __init__(self) -> None:
        self._readline = None
        try:
            import readline
        except ImportError:  # a Python without it; lines can be edited with backspace only
            return
        self._readline = readline
        self._file: Path | None = history_file()
        readline.set_history_length(HISTORY_LENGTH)
        readline.set_auto_history(False)
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.touch(mode=0o600)
            readline.read_history_file(self._file)
        except OSError:
            self._file = None

    def read(self) -> str:
        """Returns the next prompt, or "" if it is empty.

        Raises:
            EOFError: Ctrl-D.
            KeyboardInterrupt: Ctrl-C.
        """
        line = _ask(">>> ")
        if not line.startswith(_QUOTES):
            prompt = line.strip()
        else:
            lines = [line.removeprefix(_QUOTES)]
            while not lines[-1].rstrip().endswith(_QUOTES):
                lines.append(_ask("... "))
            lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
            prompt = "\n".join(lines).strip("\n")
        self._remember(prompt)
        return prompt

    def _remember(self, prompt: str) -> None:
        if not prompt or "\n" in prompt or self._readline is None:
            return
        self._readline.add_history(prompt)
        if self._file is not None:
            try:
                self._readline.append_history_file(1, self._file)
            except OSError:
                self._file = None


def _ask(mark: str) -> str:
    """Reads a line; what is asked goes to stderr if stdout is no terminal, because answers go there."""
    if sys.stdout.isatty():
        return input(mark)
    print(mark, end="", file=sys.stderr, flush=True)
    return input()
