"""What a command raises to stop with a message instead of a traceback."""


class UserError(Exception):
    """Something the user can put right; the message says what. The command prints it and exits with status
    1."""


class Interrupted(Exception):
    """Training was stopped by Ctrl-C after saving; the message says how to go on. Exit status 130."""
