"""Python exits with calls pending in every stage, without a deadlock or a crash."""

import os
import subprocess
import sys
from pathlib import Path

from exiting import CASES, STATUS

import ktops
from ktops.testing import fake_cuda

HERE = Path(__file__).parent


def test_exit():
    path = [Path(ktops.__file__).parents[1], HERE, *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "exiting.py", fake_cuda.library()]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    wanted = [f"{stage.__name__} {way} {STATUS} ''" for stage, way in CASES]
    assert (result.stdout.splitlines(), result.stderr) == (wanted, "")
