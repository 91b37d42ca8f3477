"""`ktops export`: writes adapters for other programs."""

from pathlib import Path

from rich.console import Console

from ktops.adapters import export_adapter
from ktops.adapters.layouts import LAYOUTS
from ktops.cli.adapters import nothing_written
from ktops.cli.errors import UserError


def export(
    adapters: list[Path],
    destination: Path,
    layout: str,
    base: Path | None,
    weights: list[float] | None,
    console: Console,
) -> None:
    """Runs `ktops export`.

    Raises:
        UserError: an adapter does not fit the model or the layout, a file is damaged or cannot be written.
        Interrupted: Ctrl-C.
    """
    if layout not in LAYOUTS:
        raise UserError(f"--for: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    with nothing_written(destination):
        notes = export_adapter(adapters, destination, layout, base=base, weights=weights, show_progress=True)
    for note in notes:
        console.print(f"  {note}", soft_wrap=True)
    console.print(f"  written: {destination}", soft_wrap=True)
    if layout == "llama.cpp":
        console.print(
            f"  next: python convert_lora_to_gguf.py --base MODEL {destination}, a script of llama.cpp",
            soft_wrap=True,
        )
