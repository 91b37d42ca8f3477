"""Scratch memory is counted and placed by the same code."""

import subprocess

from programs import compiled


def test_an_array_that_was_not_counted_is_an_error(tmp_path):
    """It is an error even if the block, which consists of whole pages, has room for the array."""
    program = compiled("workspace", tmp_path, "core/workspace.cpp")
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, f"status {result.returncode}, see workspace.cpp"
    assert result.stdout == "kt: workspace too small\n"
