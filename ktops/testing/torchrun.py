"""The command that starts several processes on this machine, for tests and benches."""

import sys


def torchrun(world_size: int, *arguments: object) -> list[str]:
    """Returns the command that runs a program in several processes, with a rendezvous of its own.

    Args:
        arguments: options of torchrun, then the program and its arguments.

    Example:
        >>> subprocess.run(torchrun(2, "train.py", "--epochs", 1), check=True)
    """
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", world_size)
    return [*map(str, launcher), *map(str, arguments)]
