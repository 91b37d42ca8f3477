"""Shows a plan: as tables, as JSON, or in the first lines of a command."""

import json
from collections.abc import Callable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ktops._display import format_bytes
from ktops.cli.errors import UserError
from ktops.cli.plan.machine import Memory
from ktops.cli.plan.needs import LIBRARIES, Needs, NeedsOf, Planner, summary
from ktops.cli.plan.weights import converted_bytes


def as_json(planner: Planner) -> str:
    """Returns a plan as a JSON object; sizes in bytes."""
    weights, memory = planner.weights, planner.memory
    plan = {
        "architecture": weights.architecture,
        "parameters": {
            "total": sum(weights.parameters.values()),
            "active": planner.active_parameters,
            **weights.parameters,
        },
        "experts_format": weights.experts_format,
        "disk_bytes": weights.disk,
        "converted_bytes": converted_bytes(planner.options),
        "memory": {
            "total_bytes": memory.total,
            "available_bytes": memory.available,
            "limited": memory.limited,
        },
    }
    for name, needs_of in _commands(planner).items():
        needs = needs_of(planner.options)
        change = None if needs.fits(memory) else planner.cheapest_change(needs_of)
        plan[name] = _as_dict(needs, memory) | {
            "change": change and {"options": change.text, **_as_dict(change.needs, memory)}
        }
    return json.dumps(plan, indent=2)


def _as_dict(needs: Needs, memory: Memory) -> dict:
    return {
        "parts": needs.parts,
        "mapped": needs.mapped,
        "anonymous_bytes": needs.anonymous,
        "total_bytes": needs.total,
        "fits": needs.fits(memory),
        "mapped_bytes_beyond_memory": needs.missing_cache(memory),
    }


def show(planner: Planner, console: Console) -> None:
    """Prints a plan."""
    weights = planner.weights
    counts = ", ".join(f"{name} {_billions(number)}" for name, number in weights.parameters.items())
    total = _billions(sum(weights.parameters.values()))
    console.print(Text(f"{weights.architecture}: {total} parameters", style="bold"))
    console.print(f"  {_billions(planner.active_parameters)} active for a token; {counts}", soft_wrap=True)
    converted = converted_bytes(planner.options)
    then = "" if converted is None else f", {format_bytes(converted)} as ktops convert writes it"
    console.print(f"  on disk {format_bytes(weights.disk)}{then}; experts in {weights.experts_format}")
    console.print(_table(planner))
    console.print(f"  {planner.memory}")
    for name, needs_of in _commands(planner).items():
        needs = needs_of(planner.options)
        console.print(f"  {verdict(name, needs, planner.memory)}", soft_wrap=True)
        if not needs.fits(planner.memory):
            console.print(f"  {_advice(planner, needs_of)}", soft_wrap=True)


def _commands(planner: Planner) -> dict[str, NeedsOf]:
    return {"finetune": planner.finetune, "chat": planner.chat}


def _table(planner: Planner) -> Table:
    options = planner.options
    columns = [needs_of(options) for needs_of in _commands(planner).values()]
    processes = f"{planner.processes} x " if planner.processes > 1 else ""
    table = Table.grid(padding=(0, 3))
    table.add_column()
    for _ in columns:
        table.add_column(justify="right")
    table.add_row(
        "  memory",
        f"{processes}finetune, {options.batch_size} x {options.max_length}",
        f"chat, {planner.context:,} tokens",
    )
    for kind in ("parts", "mapped"):
        found = [getattr(needs, kind) for needs in columns]
        for name in dict.fromkeys(name for part in found for name in part):
            title = f"  {name}" if kind == "parts" else f"  {name}, mapped"
            table.add_row(title, *(format_bytes(part[name]) if name in part else "" for part in found))
    table.add_row("  total", *(format_bytes(needs.total) for needs in columns), style="bold")
    return table


def verdict(name: str, needs: Needs, memory: Memory) -> str:
    """Returns whether a command fits, and what that means for mapped files."""
    if not needs.fits(memory):
        return f"{name} does not fit: it needs {format_bytes(needs.anonymous)}"
    missing = needs.missing_cache(memory)
    if not missing:
        return f"{name} fits"
    return (
        f"{name} fits, but {format_bytes(missing)} of the mapped files do not stay in memory: they are read "
        "again when they are used, at the speed of the disk"
    )


def require_fit(planner: Planner, needs_of: NeedsOf, force: bool, say: Callable[[str], object]) -> None:
    """Says in one line what a command needs.

    Args:
        planner: of the model.
        needs_of: ``planner.finetune`` or ``planner.chat``.
        force: whether to go on if it does not fit.
        say: is called with each line.

    Raises:
        UserError: it does not fit, and ``force`` is False.
    """
    needs, memory = needs_of(planner.options), planner.memory
    mapped = sum(needs.mapped.values())
    files = f", {format_bytes(mapped)} more mapped from files" if mapped else ""
    total = _billions(sum(planner.weights.parameters.values()))
    memory_text = f"memory{_of(needs)} {format_bytes(needs.anonymous)} ({summary(needs)}){files}"
    say(f"plan: {total} parameters; {memory_text}; {memory}")
    if needs.fits(memory):
        if needs.missing_cache(memory):
            say(verdict("it", needs, memory))
        return
    problem = (
        f"{format_bytes(needs.anonymous)} of memory{_of(needs)} are needed ({summary(needs)}), and "
        f"{format_bytes(memory.available + needs.parts[LIBRARIES])} are available"
    )
    if not force:
        raise UserError(f"{problem}. {_advice(planner, needs_of)}. --force tries anyway")
    say(f"--force: {problem}")


def _advice(planner: Planner, needs_of: NeedsOf) -> str:
    needs = needs_of(planner.options)
    change = planner.cheapest_change(needs_of)
    one = ""
    if needs.processes > 1:
        one = f". One process needs {format_bytes(needs.anonymous // needs.processes)}"
    if change is None:
        return f"No format of the experts, smaller batch or gradient checkpointing makes it fit{one}"
    now = format_bytes(needs.anonymous)
    return f"With {change.text}, it needs {format_bytes(change.needs.anonymous)} instead of {now}{one}"


def _of(needs: Needs) -> str:
    return f" of {needs.processes} processes" if needs.processes > 1 else ""


def _billions(number: int) -> str:
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"
