"""Environment variables that commands set before they use PyTorch."""

import os
import subprocess
import sys

from ktops.cli.command import COMPILED_PRODUCTS, set_environment

CAPACITIES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")

FINETUNE = """
import os, sys
from ktops.cli.command import run_finetune
from ktops.cli.errors import UserError
try:
    run_finetune({"model": "missing", "data": "missing"})
except UserError:
    print(*(os.environ[name] for name in sys.argv[1:]))
"""


def test_finetune_limits_what_is_kept_of_products():
    environment = {name: value for name, value in os.environ.items() if name not in CAPACITIES}
    command = [sys.executable, "-c", FINETUNE, *CAPACITIES]
    assert (
        subprocess.check_output(command, text=True, env=environment).split() == [str(COMPILED_PRODUCTS)] * 2
    )


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv(CAPACITIES[0], "7")
    monkeypatch.delenv(CAPACITIES[1], raising=False)
    set_environment()
    assert [os.environ[name] for name in CAPACITIES] == ["7", str(COMPILED_PRODUCTS)]
