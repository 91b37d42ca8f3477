"""Entry point of the ``ktops`` command, which turns errors into messages and exit statuses.

0: success. 1: an error that the user can fix; the message says how. 2: incorrect usage. 130: Ctrl-C.
"""

import sys

from ktops.cli.errors import Interrupted, UserError
from ktops.cli.libraries import warnings_in_one_style
from ktops.cli.packages import require_packages


def main() -> None:
    """Runs the command line in sys.argv."""
    try:
        require_packages("rich", "typer")
        with warnings_in_one_style():
            from ktops.cli.app import app

            app()
    except UserError as error:
        _exit(f"ktops: {error}")
    except Interrupted as error:
        _exit(str(error), status=130)
    except KeyboardInterrupt:  # while the command is being imported
        _exit("Interrupted.", status=130)


def _exit(message: str, status: int = 1) -> None:
    print(message, file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
