"""Makes the writers of tiny checkpoints in test/checkpoints importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints"))
