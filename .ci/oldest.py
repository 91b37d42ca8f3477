"""Prints constraints for pip: of each package that ktops[transformers] asks for the oldest version it allows.

Reads what the installed ktops says, which pyproject.toml says.
"""

import re
from importlib.metadata import requires

for line in requires("ktops"):
    if match := re.fullmatch(r"([\w-]+)>=([\d.]+); extra == ['\"]transformers['\"]", line):
        print("==".join(match.groups()))
