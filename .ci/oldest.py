"""Prints pip constraints: for each package of the extra "transformers", the oldest version that ktops allows.

The bounds come from the metadata of the installed ktops, and so from pyproject.toml.
"""

import re
from importlib.metadata import requires

for line in requires("ktops"):
    if match := re.fullmatch(r"([\w-]+)>=([\d.]+); extra == ['\"]transformers['\"]", line):
        print("==".join(match.groups()))
