"""`ktops merge`: adds adapters to the weights of a model."""

from pathlib import Path

from rich.console import Console

from ktops.adapters import merge_adapter
from ktops.cli.adapters import nothing_written


def merge(
    base: Path,
    adapters: list[Path],
    destination: Path,
    weights: list[float] | None,
    weight_format: str | None,
    group_size: int | None,
    method: str | None,
    console: Console,
) -> None:
    """Runs `ktops merge`.

    Raises:
        UserError: an adapter does not fit the model, a file is damaged or cannot be written, or the format
            cannot hold the weights.
        Interrupted: Ctrl-C.
    """
    with nothing_written(destination):
        merge_adapter(
            base,
            adapters,
            destination,
            weights=weights,
            weight_format=weight_format,
            group_size=group_size,
            method=method,
            show_progress=True,
        )
    console.print(f"  written: {destination}", soft_wrap=True)
