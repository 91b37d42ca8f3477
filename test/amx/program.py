"""Pieces of assembly that use tiles, run natively or under the emulator by driver.cpp."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy

from ktops.testing import amx_emulator
from ktops.testing.compiler import compile_cpp

ARENA = 0x60000000
ARENA_BYTES = 256 << 10
CONFIG, A, B, C, OUT, MIDDLE = 0x0, 0x1000, 0x2000, 0x3000, 0x4000, 0x20000
"""Offsets in the arena. The space below MIDDLE can hold a stack."""


def cpu_has_amx() -> bool:
    """Returns True if CPU and kernel support tiles of bfloat16 and int8."""
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    return {"amx_tile", "amx_bf16", "amx_int8"} <= set(flags.split())


WAYS = ["emulated", "native"] if cpu_has_amx() else ["emulated"]
"""How a program can run here. If the hardware exists, the same tests compare it with the same reference."""


def config(shapes: dict[int, tuple[int, int]], start_row: int = 0, palette: int = 1) -> bytes:
    """Returns the 64 bytes of LDTILECFG for {tile: (rows, bytes per row)}."""
    data = bytearray(64)
    data[0], data[1] = palette, start_row
    for tile, (rows, colsb) in shapes.items():
        data[16 + 2 * tile : 18 + 2 * tile] = colsb.to_bytes(2, "little")
        data[48 + tile] = rows
    return bytes(data)


@dataclass(frozen=True)
class Outcome:
    """The end of a run: the exit status (negative for a signal), the output, and the arena afterward."""

    status: int
    stderr: str
    stdout: bytes
    counts: dict[str, int]

    @property
    def arena(self) -> numpy.ndarray:
        assert self.status == 0, (self.status, self.stderr)
        return numpy.frombuffer(self.stdout[-ARENA_BYTES:], dtype=numpy.uint8)


class Program:
    """The driver with the given pieces of assembly (Intel syntax; rdi is the arena), by name."""

    def __init__(self, pieces: dict[str, str], folder: Path) -> None:
        self.names, self.folder = list(pieces), folder
        push = "".join(f"push {r}\n" for r in ("rbx", "rbp", "r12", "r13", "r14", "r15"))
        pop = "".join(f"pop {r}\n" for r in ("r15", "r14", "r13", "r12", "rbp", "rbx"))
        text = ".intel_syntax noprefix\n.text\n"
        for number, body in enumerate(pieces.values()):
            text += f"case_{number}:\n{push}{body.replace(';', chr(10))}\n{pop}ret\n"
        text += ".data\n.balign 64\nlabel:\n.zero 64\n.globl cases\ncases:\n"
        text += "".join(f".quad case_{number}\n" for number in range(len(pieces))) + ".quad 0\n"
        text += '.section .note.GNU-stack,"",@progbits\n'
        source = folder / "cases.s"
        source.write_text(text)
        driver = Path(__file__).parent / "driver.cpp"
        flags = ("-no-pie", "-pthread")
        self.path = compile_cpp([driver, source], folder / "driver", *flags)

    def run(self, what: str, way: str, memory: dict[int, bytes] | None = None, **options) -> Outcome:
        """Runs a piece or a scenario of the driver; ``memory`` is {offset in the arena: content}."""
        arena = bytearray(ARENA_BYTES)
        for offset, content in (memory or {}).items():
            arena[offset : offset + len(content)] = content
        argument = str(self.names.index(what)) if what in self.names else what
        for file in self.folder.glob("*.json"):
            file.unlink()
        env = amx_emulator.environment(counts=self.folder, **options) if way == "emulated" else None
        result = subprocess.run([self.path, argument], input=bytes(arena), capture_output=True, env=env)
        counts = dict(amx_emulator.read_counts(self.folder))
        return Outcome(result.returncode, result.stderr.decode(), result.stdout, counts)
