"""Exceptions that stop a command with a message instead of a traceback."""


class UserError(Exception):
    """An error that the user can fix; the message says how. The command prints it and exits with status 1."""


class Interrupted(Exception):
    """Ctrl-C stopped the command; the message says how to continue if anything was saved. Exit status 130."""
