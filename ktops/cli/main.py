"""Entry point of the ``ktops`` command: runs it, and turns errors into messages and exit statuses.

0: done. 1: something the user can put right, said in one message. 2: wrong usage. 130: stopped by Ctrl-C.
"""

import sys

INSTALL = "pip install 'ktops[cli]'"
OPTIONAL = frozenset(
    {"accelerate", "jinja2", "matplotlib", "numpy", "peft", "psutil", "rich", "safetensors", "tokenizers"}
    | {"transformers", "typer"}
)
"""What the ``cli`` extra brings and ``import ktops`` does without."""


def main() -> None:
    """Runs the command line in sys.argv."""
    from ktops.cli.errors import Interrupted, UserError

    try:
        from ktops.cli.app import app

        app()
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in OPTIONAL:
            raise
        _exit(f"ktops: the package {package} is missing. Install what this command needs with\n  {INSTALL}")
    except UserError as error:
        _exit(f"ktops: {error}")
    except Interrupted as error:
        _exit(str(error), status=130)
    except KeyboardInterrupt:
        _exit("Interrupted.", status=130)


def _exit(message: str, status: int = 1) -> None:
    print(message, file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
