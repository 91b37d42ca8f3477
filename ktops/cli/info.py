"""`ktops info`: shows what ktops finds on this machine."""

import json
import platform
from pathlib import Path

import torch

import ktops
from ktops._display import format_bytes
from ktops.cli.errors import UserError
from ktops.cli.packages import require_packages
from ktops.cli.versions import versions
from ktops.numa.topology import Node, format_list


def collect() -> dict:
    """Returns versions, CPU, kernels, threads, NUMA nodes and memory of this machine; sizes in bytes."""
    require_packages("psutil")
    import psutil

    memory = psutil.virtual_memory()
    return {
        "versions": versions(),
        "cpu": cpu_name(),
        "cpu_capabilities": ktops.cpu_capabilities(),
        "cpu_capability": ktops.cpu_capability(),
        "threads": torch.get_num_threads(),
        "logical_cpus": psutil.cpu_count(),
        "numa_nodes": [
            {"node": node.id, "cpus": format_list(node.cpus), "memory_bytes": node.memory_bytes}
            for node in numa_nodes()
        ],
        "memory_total_bytes": memory.total,
        "memory_available_bytes": memory.available,
    }


def numa_nodes() -> tuple[Node, ...]:
    """Returns ``ktops.numa.nodes()``.

    Raises:
        UserError: KTOPS_NUMA_NODES is not a number that this machine can have.
    """
    try:
        return ktops.numa.nodes()
    except ValueError as error:
        raise UserError(str(error)) from None


def cpu_name() -> str:
    """Returns the name that the CPU reports."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def show(info: dict, as_json: bool) -> None:
    """Prints what collect returns, as JSON or as a table."""
    if as_json:
        print(json.dumps(info, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    rows = [
        f"{name} (in use)" if name == info["cpu_capability"] else f"{name} ({'yes' if runs else 'no'})"
        for name, runs in info["cpu_capabilities"].items()
    ]
    total, available = (format_bytes(info[f"memory_{part}_bytes"]) for part in ("total", "available"))
    table = Table.grid(padding=(0, 2))
    for name, version in info["versions"].items():
        table.add_row(name, version or "not installed")
    table.add_row("CPU", info["cpu"])
    table.add_row("kernels", ", ".join(rows))
    table.add_row("threads", f"{info['threads']} of {info['logical_cpus']} logical CPUs")
    for node in info["numa_nodes"]:
        table.add_row(
            f"NUMA node {node['node']}", f"CPUs {node['cpus']}, {format_bytes(node['memory_bytes'])}"
        )
    table.add_row("memory", f"{total}, {available} available")
    Console(highlight=False).print(table)
