"""Makes a virtual environment for each client, with the client from the package index and a wheel of ktops.

The environments lie in the folder named by KTOPS_CLIENTS, by default build/clients, and are kept. One is made
anew when its requirements change; ktops is installed anew every time.
"""

import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]

TEST_REQUIREMENTS = ("packaging", "pytest", "pytest-timeout")
"""What the tests need, and the code below that lists requirements."""

BROKEN_BESIDE_CPU_TORCH = ("torchvision", "torchaudio")
"""Packages that clients require but do not need for text, and whose usual builds need a torch with CUDA."""


@dataclass(frozen=True)
class Client:
    """What to install.

    Attributes:
        requirements: the client, at the version that the tests are written for.
        extra: the extra of ktops that resolves beside it, "" for none.
        pins_torch: whether it requires a torch that ktops does not run with, or whose usual build needs CUDA,
            so that its requirements are installed without those of torch.
        stand_ins: packages of ``BROKEN_BESIDE_CPU_TORCH`` that it imports without using them for text; empty
            modules take their place.
        alone: clients that need a GPU, installed without what they require; their tests stand in for it.
    """

    requirements: tuple[str, ...]
    extra: str = "transformers"
    pins_torch: bool = False
    stand_ins: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()


CLIENTS = {
    "llamafactory": Client(("llamafactory==0.9.5",), stand_ins=("torchaudio",)),
    "trl": Client(("trl==1.16.0", "peft==0.21.2")),
    "swift": Client(("ms-swift==4.6.0",)),
    "axolotl": Client(("axolotl==0.19.0",)),
    "llama_cpp": Client(("gguf==0.19.0", "peft==0.21.2", "sentencepiece")),
    "serve": Client(("transformers[serving]==5.24.0", "peft==0.21.2"), extra="cli"),
    "sglang": Client((), alone=("sglang==0.5.23",)),
    "fork": Client(
        (
            "llamafactory-kt==0.9.6.dev0",
            "transformers-kt==5.6.0.post6",
            "accelerate-kt==1.14.0.post4",
            "peft-kt==0.18.1",
            "trl-kt==0.24.0",
        ),
        extra="",
        pins_torch=True,
        stand_ins=("torchaudio",),
    ),
}
"""The tests of a client are in test_<name>.py."""


def build_wheel(folder: Path) -> Path:
    """Builds a wheel of the working tree with the running Python's torch; returns its path."""
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", folder]
    subprocess.run([sys.executable, "-m", "pip", "wheel", ROOT, *options], check=True)
    [wheel] = folder.glob("ktops-*.whl")
    return wheel


def python_of(name: str, wheel: Path) -> Path:
    """Returns the Python of a client's environment, with the client and this wheel of ktops installed."""
    folder = Path(os.environ.get("KTOPS_CLIENTS", ROOT / "build" / "clients")) / name
    python = folder / "bin" / "python"
    _make_client(folder, python, CLIENTS[name])
    _install_ktops(folder, python, wheel, CLIENTS[name].extra)
    return python


def _make_client(folder: Path, python: Path, client: Client) -> None:
    torch = f"torch=={version('torch').partition('+')[0]}"
    wanted = "".join(f"{line}\n" for line in (torch, *client.requirements, *client.alone))
    made = folder / "made-for.txt"
    if made.exists() and made.read_text() == wanted:
        return
    made.unlink(missing_ok=True)
    venv.create(folder, clear=True, with_pip=True, symlinks=True)
    _pip(python, "install", torch, *TEST_REQUIREMENTS)
    constraints = folder / "constraints.txt"
    constraints.write_text(torch + "\n")
    if client.alone:
        _pip(python, "install", "--no-deps", *client.alone)
    requirements = client.requirements
    if client.pins_torch:
        _pip(python, "install", "--no-deps", *requirements)
        requirements = _others_required(python, requirements)
    _pip(python, "install", "--constraint", constraints, *requirements)
    _pip(python, "uninstall", "--yes", *BROKEN_BESIDE_CPU_TORCH)
    [packages] = folder.glob("lib/python*/site-packages")
    for name in client.stand_ins:
        (packages / f"{name}.py").touch()
    made.write_text(wanted)


_LIST_REQUIREMENTS = """
import sys
from importlib.metadata import requires
from packaging.requirements import Requirement

names = [Requirement(line).name for line in sys.argv[1:]]
given = {Requirement(line) for name in names for line in requires(name) or ()}
own = {*names, "torch", "torchvision", "torchaudio"}
applies = (each for each in given if not each.marker or each.marker.evaluate({"extra": ""}))
print(*(f"{each.name}{each.specifier}" for each in applies if each.name not in own), sep="\\n")
"""


def _others_required(python: Path, requirements: tuple[str, ...]) -> tuple[str, ...]:
    """Returns what installed packages require besides each other and torch."""
    command = [python, "-c", _LIST_REQUIREMENTS, *requirements]
    return tuple(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def _install_ktops(folder: Path, python: Path, wheel: Path, extra: str) -> None:
    """Installs the wheel and its extra; pip fails if the extra would change a version of the client's."""
    listing = [python, "-m", "pip", "list", "--format=freeze", "--exclude", "ktops"]
    installed = subprocess.run(listing, check=True, capture_output=True, text=True).stdout
    constraints = folder / "constraints.txt"
    constraints.write_text(installed)
    _pip(python, "install", "--force-reinstall", "--no-deps", wheel)
    _pip(python, "install", "--constraint", constraints, f"{wheel}[{extra}]" if extra else wheel)


def _pip(python: Path, command: str, *arguments: str | Path) -> None:
    subprocess.run([python, "-m", "pip", command, "--quiet", *arguments], check=True)
