"""`ktops info`."""

import json
import subprocess
import sys

import torch

import ktops
from ktops.numa.topology import parse_list


def test_json(ktops_command):
    status, out, err = ktops_command("info", "--json")
    info = json.loads(out)
    assert (status, err) == (0, "")
    assert info["versions"]["ktops"] == ktops.__version__
    assert info["versions"]["torch"] == torch.__version__
    assert info["cpu_capabilities"] == ktops.cpu_capabilities()
    assert info["cpu_capabilities"][info["cpu_capability"]] is True
    (*_, node) = info["numa_nodes"]
    assert info["cpu"] and node["memory_bytes"] > 0
    assert parse_list(node["cpus"]) == list(ktops.numa.nodes()[-1].cpus)
    assert info["threads"] == torch.get_num_threads()
    assert 0 < info["memory_available_bytes"] < info["memory_total_bytes"]


def test_text_says_the_same(ktops_command):
    info = json.loads(ktops_command("info", "--json")[1])
    status, out, _ = ktops_command("info")
    assert status == 0
    for words in (
        info["cpu"],
        f"{info['cpu_capability']} (in use)",
        info["versions"]["peft"],
        "NUMA node 0",
        "GiB available",
    ):
        assert words in out


def test_nodes_that_cannot_be(ktops_command, monkeypatch):
    monkeypatch.setenv("KTOPS_NUMA_NODES", "x")
    status, out, err = ktops_command("info")
    assert (status, out) == (1, "") and err.startswith("ktops: KTOPS_NUMA_NODES must be a number of nodes")


def test_nothing_heavy_is_imported():
    code = (
        "import sys; sys.argv = ['ktops', 'info', '--json']\n"
        "from ktops.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'transformers', 'peft', 'matplotlib', 'accelerate'}\n"
        "print(heavy & set(sys.modules), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == "set()\n"
