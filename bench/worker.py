"""Runs contestants in a process controlled over pipes: ``python -m bench.worker [--ktops FOLDER]``.

The requests, as in :mod:`bench.serving`, are the methods of :class:`Host`. Tensors are passed in files. Needs
torch and whatever its contestants import; another environment may lack ktops.
"""

import argparse
import importlib
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from bench import serving
from bench.layer import Inputs, Layer


class Host(serving.Host):
    """Holds a layer and the contestants that share it."""

    def load(self, file: str, rank: int, threads: int, contestants: dict[str, dict]) -> dict:
        """Copies the layer in a file and creates the contestants: {name: {"module": ..., "options": {...}}}.

        Replies with what each lacks, or None: {"unavailable": {name: "ImportError: ..." or None}}.
        """
        torch.set_num_threads(threads)
        layer = Layer.read(Path(file), copy=True)
        self.contestants: dict[str, Any] = {}
        unavailable: dict[str, str | None] = {}
        for name, entry in contestants.items():
            try:
                module = importlib.import_module(f"bench.peers.{entry['module']}")
                self.contestants[name] = module.Contestant(layer, rank, **entry["options"])
                unavailable[name] = None
            except Exception as error:
                traceback.print_exc()
                unavailable[name] = f"{type(error).__name__}: {error}".split("\n")[0]
        return {"unavailable": unavailable, "torch": torch.__version__}

    def inputs(self, file: str) -> dict:
        """Receives the inputs of the following calls, a list of Inputs as dictionaries."""
        self.calls = [Inputs(**fields) for fields in torch.load(file, weights_only=True)]
        self.next = 0
        return {}

    def run(self, contestant: str, mode: str, seconds: float, max_calls: int) -> dict:
        """Calls the contestant with one input after another until ``seconds`` or max_calls is reached.

        Replies {"seconds": of each call, "cpu_seconds": of this process, "last": index of the last input}.
        """
        call = getattr(self.contestants[contestant], mode)
        times: list[float] = []
        cpu = time.process_time()
        while not times or (sum(times) < seconds and len(times) < max_calls):
            index = self.next % len(self.calls)
            self.next += 1
            inputs = self.calls[index]
            start = time.perf_counter()
            result = call(inputs)
            times.append(time.perf_counter() - start)
        self.last = result
        return {"seconds": times, "cpu_seconds": time.process_time() - cpu, "last": index}

    def result(self, file: str) -> dict:
        """Writes the result of the last call."""
        torch.save(self.last, file)
        self.last = None
        return {}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.worker", description=__doc__)
    parser.add_argument("--ktops", metavar="FOLDER", help="folder from which to import ktops")
    folder = parser.parse_args().ktops
    if folder:
        sys.path.insert(0, folder)
        import ktops

        if not Path(ktops.__file__).is_relative_to(Path(folder).resolve()):
            raise ImportError(f"ktops must come from {folder}, got {ktops.__file__}")
    serving.serve(Host())


if __name__ == "__main__":
    main()
