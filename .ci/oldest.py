"""Prints pip constraints with the oldest version that ktops allows of packages in the extra "transformers".

The bounds come from the metadata of the installed ktops, and thus from pyproject.toml.
"""

import re
from importlib.metadata import requires

for line in requires("ktops"):
    if match := re.fullmatch(r"([\w-]+)>=([\d.]+); extra == ['\"]transformers['\"]", line):
        print("==".join(match.groups()))
