"""Compares the AMX emulator's instructions and addressing forms with formulas and, if available, hardware."""

import re
import signal

import numerics
import numpy
import pytest
from program import ARENA, CONFIG, MIDDLE, OUT, WAYS, A, B, C, Program, config

from ktops.testing import amx_emulator

PRODUCTS = amx_emulator.DOT_PRODUCTS
SHAPE = (5, 24)  # rows, bytes per row

STANDARD = f"lea rsi, [rdi + {OUT}]; mov rdx, 64"  # [rsi + rdx] is the tile at OUT

TILE_FORMS = {
    # setup, operand, offset of the first row, stride
    "no index": ("lea rax, [rdi + 0x1000]", "[rax]", A, 0),
    "index": ("lea rax, [rdi + 0x1000]; mov rcx, 32", "[rax + rcx]", A, 32),
    "scale 2": ("lea rax, [rdi + 0x1000]; mov rcx, 32", "[rax + 2*rcx]", A, 64),
    "scale 4": ("lea rbx, [rdi + 0x1000]; mov rbp, 32", "[rbx + 4*rbp]", A, 128),
    "scale 8": ("lea rax, [rdi + 0x1000]; mov rsi, 32", "[rax + 8*rsi]", A, 256),
    "disp8": ("lea rax, [rdi + 0x1000]; mov rcx, 40", "[rax + rcx + 0x40]", A + 0x40, 40),
    "negative disp8": ("lea rax, [rdi + 0x1000]; mov rcx, 40", "[rax + rcx - 0x40]", A - 0x40, 40),
    "disp32": ("mov rax, rdi; mov rcx, 40", "[rax + rcx + 0x1234]", 0x1234, 40),
    "negative disp32": ("lea rax, [rdi + 0x3000]; mov rcx, 40", "[rax + rcx - 0x1800]", 0x1800, 40),
    "negative stride": ("lea rax, [rdi + 0x1800]; mov rcx, -48", "[rax + rcx]", 0x1800, -48),
    "stride zero": ("lea rax, [rdi + 0x1000]; xor ecx, ecx", "[rax + rcx]", A, 0),
    "overlapping rows": ("lea rax, [rdi + 0x1000]; mov rcx, 4", "[rax + rcx]", A, 4),
    "no base": ("mov rcx, 32", f"[2*rcx + {ARENA + A}]", A, 64),
    "no base, r9": ("mov r9, 32", f"[8*r9 + {ARENA + A}]", A, 256),
    "absolute": ("", f"ds:[{ARENA + A}]", A, 0),
    "rbp": ("lea rbp, [rdi + 0x1000]; mov rcx, 32", "[rbp + rcx]", A, 32),
    "r13": ("lea r13, [rdi + 0x1000]; mov rcx, 32", "[r13 + rcx]", A, 32),
    "r12, index r9": ("lea r12, [rdi + 0x1000]; mov r9, 32", "[r12 + 4*r9]", A, 128),
    "index r12": ("lea r8, [rdi + 0x1000]; mov r12, 96", "[r8 + r12]", A, 96),
    "index r13": ("lea r11, [rdi + 0x1000]; mov r13, 96", "[r11 + r13 + 8]", A + 8, 96),
    "r15, r14": ("lea r15, [rdi + 0x1100]; mov r14, 8", "[r15 + 8*r14 - 128]", 0x1080, 64),
    "rsp": (f"mov rbx, rsp; lea rsp, [rdi + {MIDDLE}]; mov rcx, 32", "[rsp + rcx + 64]", MIDDLE + 64, 32),
    "32 bits": ("lea rax, [rdi + 0x1000]; bts rax, 40; mov rcx, 32", "[eax + 2*ecx]", A, 64),
    "32 bits, negative": ("lea eax, [edi + 0x1800]; mov ecx, -48", "[eax + ecx]", 0x1800, -48),
    "gs": ("mov rax, 0x1000; mov rcx, 32", "gs:[rax + rcx + 8]", A + 8, 32),
    "fs": ("lea rax, [rdi + 0x1000]; sub rax, fs:[0]; mov rcx, 32", "fs:[rax + rcx]", A, 32),
    "ds prefix": ("lea rax, [rdi + 0x1000]; mov rcx, 32", "[rax + rcx]", A, 32),
}  # fmt: skip

CONFIG_FORMS = {
    "rax": ("lea rax, [rdi + 0x1000]", "[rax]"),
    "disp8": ("lea rax, [rdi + 0x1000 - 0x40]", "[rax + 0x40]"),
    "disp32": ("lea rax, [rdi - 0x1000]", "[rax + 0x2000]"),
    "rsp": (f"mov rbx, rsp; lea rsp, [rdi + {MIDDLE}]", f"[rsp - {MIDDLE - A}]"),
    "rbp": ("lea rbp, [rdi + 0x1000]", "[rbp]"),
    "r8": ("lea r8, [rdi + 0x1000]", "[r8]"),
    "r12": ("lea r12, [rdi + 0x1000]", "[r12]"),
    "r13": ("lea r13, [rdi + 0x1000]", "[r13]"),
    "index": ("mov rcx, 0x200", "[rdi + 8*rcx]"),
    "index and disp": ("mov r10, 0x100; mov r11, rdi", "[r11 + 4*r10 + 0xc00]"),
    "no base": ("mov rcx, 0x1000", f"[rcx*1 + {ARENA}]"),
    "absolute": ("", f"ds:[{ARENA + A}]"),
    "gs": ("mov rax, 0x1000", "gs:[rax]"),
    "32 bits": ("lea rax, [rdi + 0x1000]; bts rax, 50", "[eax]"),
}


def restore_stack(setup: str) -> str:
    return "mov rsp, rbx" if "rsp, [" in setup else "nop"


def pieces() -> dict[str, str]:
    """All the assembly in this file."""
    code = {}
    for name, (setup, operand, *_) in TILE_FORMS.items():
        prefix = ".byte 0x3e; " if name == "ds prefix" else ""
        head, tail = f"ldtilecfg [rdi]; {setup}", f"{restore_stack(setup)}; {STANDARD}"
        for load in amx_emulator.LOADS:
            code[f"{load} {name}"] = (
                f"{head}; {prefix}{load} tmm3, {operand}; {tail}; tilestored [rsi + rdx], tmm3"
            )
        code[f"tilestored {name}"] = (
            f"{STANDARD}; ldtilecfg [rdi]; tileloadd tmm6, [rsi + rdx]; {setup}; "
            f"{prefix}tilestored {operand}, tmm6; {restore_stack(setup)}"
        )
    for name, (setup, operand) in CONFIG_FORMS.items():
        after = restore_stack(setup)
        code[f"ldtilecfg {name}"] = f"{setup}; ldtilecfg {operand}; {after}; sttilecfg [rdi + {OUT}]"
        code[f"sttilecfg {name}"] = f"{setup}; ldtilecfg [rdi]; sttilecfg {operand}; {after}"
    for kind in ("rip", "eip"):
        code[f"{kind}-relative"] = (
            f"ldtilecfg [rdi]; sttilecfg [{kind} + label]; tilerelease; sttilecfg [rdi + {OUT}]; "
            f"ldtilecfg [{kind} + label]; sttilecfg [rdi + {OUT + 64}]"
        )
    for name in PRODUCTS:
        for c, a, b in ((0, 1, 2), (7, 3, 5), (4, 6, 0)):
            code[f"{name} {c} {a} {b}"] = (
                f"ldtilecfg [rdi]; mov rdx, 64; lea rsi, [rdi + {C}]; tileloadd tmm{c}, [rsi + rdx]; "
                f"lea rax, [rdi + {A}]; tileloadd tmm{a}, [rax + rdx]; lea rcx, [rdi + {B}]; "
                f"tileloadd tmm{b}, [rcx + rdx]; {name} tmm{c}, tmm{a}, tmm{b}; "
                f"lea rsi, [rdi + {OUT}]; tilestored [rsi + rdx], tmm{c}"
            )
    load, store = f"tileloadd tmm2, [rdi + rdx + {A}]", f"tilestored [rdi + rdx + {OUT}], tmm2"
    head = "mov rdx, 64; ldtilecfg [rdi]"
    code["zero"] = f"{head}; {load}; tilezero tmm2; {store}"
    code["release"] = f"{head}; tilerelease; sttilecfg [rdi + {OUT}]"
    code["reload"] = f"{head}; {load}; ldtilecfg [rdi]; {store}"
    code["start row of a load"] = f"{head}; {load}; {store}; sttilecfg [rdi + {B}]"
    code["start row of a store"] = f"{head}; {store}; sttilecfg [rdi + {B}]"
    code["mxcsr"] = (
        f"{head}; push 0xffa0; ldmxcsr [rsp]; {load}; tileloadd tmm1, [rdi + rdx + {B}]; "
        f"tileloadd tmm0, [rdi + rdx + {C}]; tdpbf16ps tmm0, tmm2, tmm1; stmxcsr [rdi + {B}]; "
        f"tilestored [rdi + rdx + {OUT}], tmm0; mov dword ptr [rsp], 0x1f80; ldmxcsr [rsp]; pop rdx"
    )
    return code


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return Program(pieces(), tmp_path_factory.mktemp("amx"))


def random_bytes(seed: int, count: int) -> bytes:
    return numpy.random.default_rng(seed).bytes(count)


def tile(data, offset: int, rows: int, colsb: int, stride: int = 64) -> numpy.ndarray:
    return numpy.stack([data[offset + i * stride : offset + i * stride + colsb] for i in range(rows)])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", TILE_FORMS)
def test_rows_of_tiles_are_found(program, way, form):
    _, _, offset, stride = TILE_FORMS[form]
    shapes = {CONFIG: config({3: SHAPE, 6: SHAPE})}
    around = {A: random_bytes(1, 0x3000), MIDDLE: random_bytes(2, 0x1000)}
    before = numpy.zeros(256 << 10, dtype=numpy.uint8)
    for start, content in around.items():
        before[start : start + len(content)] = numpy.frombuffer(content, dtype=numpy.uint8)
    for load in amx_emulator.LOADS:
        after = program.run(f"{load} {form}", way, shapes | around).arena
        assert (tile(after, OUT, *SHAPE) == tile(before, offset, *SHAPE, stride)).all()
    rows = numpy.frombuffer(random_bytes(3, 1024), dtype=numpy.uint8)
    after = program.run(f"tilestored {form}", way, shapes | {OUT: rows.tobytes()}).arena
    expected = numpy.zeros_like(after)
    for i in range(SHAPE[0]):
        expected[offset + i * stride : offset + i * stride + SHAPE[1]] = rows[64 * i : 64 * i + SHAPE[1]]
    expected[OUT : OUT + 1024], expected[CONFIG : CONFIG + 64] = rows, after[CONFIG : CONFIG + 64]
    stack = slice(0x8000, MIDDLE)
    expected[stack] = after[stack]
    assert (after == expected).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", CONFIG_FORMS)
def test_configurations_are_found(program, way, form):
    wanted = config({i: (i + 1, 4 * i + 4) for i in range(8)})
    after = program.run(f"ldtilecfg {form}", way, {A: wanted}).arena
    assert after[OUT : OUT + 64].tobytes() == wanted
    after = program.run(f"sttilecfg {form}", way, {CONFIG: wanted}).arena
    assert after[A : A + 64].tobytes() == wanted


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["rip", "eip"])
def test_configurations_relative_to_the_instruction(program, way, kind):
    wanted = config({0: (16, 64), 5: (1, 4)})
    outcome = program.run(f"{kind}-relative", way, {CONFIG: wanted})
    after = outcome.arena
    assert after[OUT : OUT + 128].tobytes() == bytes(64) + wanted
    if way == "emulated":
        expected = {"ldtilecfg": 2, "sttilecfg": 3, "tilerelease": 1}
        assert {name: count for name, count in outcome.counts.items() if count} == expected


@pytest.mark.parametrize("way", WAYS)
def test_zero_release_and_reload(program, way):
    memory = {CONFIG: config({2: (16, 64)}), A: random_bytes(4, 1024), OUT: b"x" * 1024}
    for name in ("zero", "reload"):
        assert not program.run(name, way, memory).arena[OUT : OUT + 1024].any()
    assert not program.run("release", way, memory).arena[OUT : OUT + 64].any()


@pytest.mark.parametrize("way", WAYS)
def test_start_row(program, way):
    """An interrupted instruction resumes at the start row, and clears it."""
    data = random_bytes(5, 1024)
    memory = {CONFIG: config({2: (8, 32)}, start_row=3), A: data, OUT: b"x" * 1024}
    after = program.run("start row of a load", way, memory).arena
    expected = tile(numpy.frombuffer(data, dtype=numpy.uint8), 0, 8, 32).copy()
    expected[:3] = 0
    assert (tile(after, OUT, 8, 32) == expected).all() and after[B + 1] == 0
    after = program.run("start row of a store", way, memory).arena
    stored = tile(after, OUT, 8, 32)
    assert (stored[:3] == ord("x")).all() and not stored[3:].any() and after[B + 1] == 0


SHAPES = [(16, 16, 16), (1, 1, 1), (5, 16, 3), (16, 7, 16), (3, 2, 11)]
"""rows of C, columns of C, groups of four bytes of k"""


def operands(kind: str, seed: int) -> dict[int, numpy.ndarray]:
    """Returns bits for A, B and C: "normal" values, values that underflow, special values or any bits."""
    rng = numpy.random.default_rng(seed)
    a, b = (rng.integers(0, 1 << 16, (16, 32), dtype=numpy.uint16) for _ in range(2))
    c = rng.integers(0, 1 << 32, (16, 16), dtype=numpy.uint32)

    def exponents(x, low, high, shift):
        keep = x & x.dtype.type(~(0xFF << shift) & ((1 << 8 * x.itemsize) - 1))
        return keep | (rng.integers(low, high, x.shape).astype(x.dtype) << x.dtype.type(shift))

    if kind in ("normal", "special"):
        a, b, c = exponents(a, 110, 140, 7), exponents(b, 110, 140, 7), exponents(c, 105, 150, 23)
    if kind == "underflow":
        a, b, c = exponents(a, 0, 80, 7), exponents(b, 40, 100, 7), exponents(c, 0, 40, 23)
    if kind == "special":
        for x in (a, b):
            values = numpy.array([0x7F80, 0xFF80, 0x7FC1, 0xFF91, 0, 0x8000, 1, 0x807F], dtype=numpy.uint16)
            x[:] = numpy.where(rng.random(x.shape) < 0.02, values[rng.integers(0, 8, x.shape)], x)
    return {A: a, B: b, C: c}


def product_inputs(data: dict[int, numpy.ndarray], m: int, n: int, k: int, tiles: tuple) -> dict[int, bytes]:
    c, a, b = tiles
    shapes = config({c: (m, 4 * n), a: (m, 4 * k), b: (k, 4 * n)})
    return {CONFIG: shapes} | {offset: x.tobytes() for offset, x in data.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["normal", "underflow", "special", "anything"])
def test_bfloat16_product(program, way, kind):
    """Results match bit for bit, including NaNs."""
    for seed, (m, n, k) in enumerate(SHAPES * 2):
        tiles = [(0, 1, 2), (7, 3, 5), (4, 6, 0)][seed % 3]
        data = operands(kind, seed)
        memory = product_inputs(data, m, n, k, tiles)
        after = program.run("tdpbf16ps {} {} {}".format(*tiles), way, memory).arena
        actual = tile(after, OUT, m, 4 * n).view(numpy.uint32)
        c = data[C][:m, :n].copy().view(numpy.float32)
        expected = numerics.tdpbf16ps(c, data[A][:m, : 2 * k], data[B][:k, : 2 * n])
        assert (actual == numerics.bits(expected)).all(), (m, n, k)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name in PRODUCTS if name != "tdpbf16ps"])
def test_int8_product(program, way, name):
    """Sums wrap around."""
    for seed, (m, n, k) in enumerate(SHAPES):
        tiles = [(0, 1, 2), (7, 3, 5), (4, 6, 0)][seed % 3]
        data = operands("anything", seed)
        memory = product_inputs(data, m, n, k, tiles)
        after = program.run("{} {} {} {}".format(name, *tiles), way, memory).arena
        a, b = (numpy.ascontiguousarray(data[x]).view(numpy.uint8) for x in (A, B))
        expected = numerics.int8_product(name, data[C][:m, :n], a[:m, : 4 * k].copy(), b[:k, : 4 * n].copy())
        assert (tile(after, OUT, m, 4 * n).view(numpy.uint32) == expected).all(), (m, n, k)


@pytest.mark.parametrize("way", WAYS)
def test_the_programs_rounding_mode_is_neither_used_nor_changed(program, way):
    data = operands("underflow", 9)
    after = program.run("mxcsr", way, product_inputs(data, 16, 16, 16, (0, 2, 1))).arena
    expected = numerics.tdpbf16ps(data[C].view(numpy.float32), data[A], data[B])
    assert (tile(after, OUT, 16, 64).view(numpy.uint32) == numerics.bits(expected)).all()
    assert int(after[B : B + 4].view(numpy.uint32)[0]) == 0xFFA0


def test_the_reference_rounds_once():
    """Rounded to float64, the sum is halfway between two float32 values; the exact sum is not."""
    one, half_ulp, tiny = (numpy.array([x], dtype=numpy.float32) for x in (1.0, 2.0**-24, 2.0**-80))
    with_tie = numerics.fused(one, half_ulp, numpy.float32(1))
    assert with_tie == 1.0
    above = numerics.fused(numpy.float32(1) + numpy.float32(2.0**-23), half_ulp, numpy.float32(1))
    assert above == 1 + 2.0**-22
    assert numerics.fused(half_ulp * 0 + numpy.float32(2.0**-126), tiny, -tiny) == numpy.float32(2.0**-126)


@pytest.mark.parametrize("way", WAYS)
def test_every_thread_has_its_own_tiles(program, way):
    outcome = program.run("threads", way)
    for i in range(8):
        stored = tile(outcome.arena, 4096 * i + 1024, 16, 64)
        expected = numpy.full((16, 64), 0xFF)
        expected[: i + 1, : 4 * (i + 1)] = i
        assert (stored == expected).all()
    if way == "emulated":
        expected = {"ldtilecfg": 8, "tileloadd": 8, "tilestored": 160, "tilerelease": 8}
        assert {name: count for name, count in outcome.counts.items() if count} == expected


@pytest.mark.parametrize("way", WAYS)
def test_a_thread_without_configuration(program, way):
    outcome = program.run("foreign_tiles", way)
    assert outcome.status == -signal.SIGILL
    assert bool(re.search("tilezero tmm0 .*no tiles are configured", outcome.stderr)) == (way == "emulated")


@pytest.mark.parametrize("way", WAYS)
def test_other_illegal_instructions_are_the_programs_own(program, way):
    """A handler installed after the emulator's receives the faults and the signals of others."""
    first, second, *_ = program.run("own_handler", way).stdout.split(b"\n", 2)
    assert first == b"1 2 1" and second == b"1"


def test_counts_outside_of_the_emulator():
    with pytest.raises(RuntimeError, match="does not run under the AMX emulator"):
        amx_emulator.counts()
