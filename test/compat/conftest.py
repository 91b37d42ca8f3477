"""The writers of tiny checkpoints are those of test/checkpoints."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints"))
