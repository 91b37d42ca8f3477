"""Makes ``import bench`` find the folder at the root of the tree, wherever pytest is started."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
