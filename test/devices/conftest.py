"""What ``simulated`` holds runs in a process of its own, started by test_simulated.py."""

import os

collect_ignore = [] if os.environ.get("KTOPS_SIMULATED") else ["simulated"]
