"""`ktops plan`: shows what a model needs on disk and in memory."""

from collections.abc import Callable

from rich.console import Console

from ktops.cli import processes
from ktops.cli.errors import UserError
from ktops.cli.finetune.options import Options
from ktops.cli.models import ExpertsOptions
from ktops.cli.plan.needs import Needs, NeedsOf, Planner
from ktops.cli.plan.report import as_json, require_fit, show
from ktops.cli.plan.trace import Untraceable


def plan(options: Options, context: int, json: bool) -> None:
    """Runs `ktops plan`.

    Raises:
        UserError: the model is not known, or the options do not fit it.
    """
    planner = Planner(options, context=context, processes=options.world_size)
    try:
        if json:
            print(as_json(planner))
        else:
            show(planner, Console(highlight=False))
    except Untraceable as error:
        raise UserError(f"MODEL: {planner.weights.architecture} cannot be planned: {error}") from None


def check_finetune(options: Options, length: int, force: bool, say: Callable[[str], object]) -> Needs | None:
    """Says what a run needs, with sequences of up to ``length`` tokens, and returns it; None if not known.

    If there are several processes on this machine, it is what they need together.

    Raises:
        UserError: it does not fit, and ``force`` is False.
    """
    planner = Planner(options, length, processes=processes.local_world_size())
    return _check(planner, planner.finetune, force, say)


def check_chat(
    model: str,
    dtype: str,
    options: ExpertsOptions,
    force: bool,
    say: Callable[[str], object],
) -> None:
    """Says what a conversation with a model needs, whose other weights have that dtype ("bf16" or "f32").

    Raises:
        UserError: it does not fit, and ``force`` is False.
    """
    names = ("experts_path", "weight_format", "group_size", "mmap", "linear_format", "device")
    given = {name: getattr(options, name) for name in names}
    planner = Planner(Options(model=model, dtype=dtype, **given))
    _check(planner, planner.chat, force, say)


def _check(planner: Planner, needs_of: NeedsOf, force: bool, say: Callable[[str], object]) -> Needs | None:
    if planner.options.device != "cpu" or planner.options.experts_implementation != "ktops":
        return None
    try:
        needs = needs_of(planner.options)
    except Untraceable as error:
        say(f"no plan of the memory: {error}")
        return None
    except UserError:
        return None  # loading gives the command's own error
    require_fit(planner, needs_of, force, say)
    return needs
