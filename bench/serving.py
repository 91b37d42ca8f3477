"""Answers requests over pipes: lines of JSON on standard input, replies on the original standard output.

Anything that libraries print goes to standard error. Needs nothing but Python, whatever the environment.
"""

import json
import os
import sys
import traceback


class Host:
    """A base class whose methods are the requests; each takes and returns what JSON can hold."""

    def handle(self, request: dict) -> dict:
        """Returns the reply to {"do": method, **arguments}; {"error": ...} if it raised."""
        try:
            return getattr(self, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}".split("\n")[0]}


def serve(host: Host) -> None:
    """Answers requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        replies.write(json.dumps(host.handle(json.loads(line))) + "\n")
