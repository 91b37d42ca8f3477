"""The emulator faults where the hardware does and gives a reason; permission to use tiles."""

import errno
import re
import signal

import pytest
from program import CONFIG, WAYS, Program, config

BAD_OPERANDS = {
    # configuration, assembly, the emulator's message
    "nothing configured": ({}, "tilezero tmm3", r"tilezero tmm3 at .*no tiles are configured"),
    "load without configuration": (
        {}, "tileloadd tmm2, [rdi + rdx]", r"tileloadd tmm2 \[0x60000000\] at .*no tiles",
    ),
    "store without configuration": ({}, "tilestored [rdi + rdx], tmm2", r"tilestored tmm2 .*no tiles"),
    "product without configuration": (
        {}, "tdpbssd tmm0, tmm1, tmm2", r"tdpbssd tmm0, tmm1, tmm2 at .*no tiles",
    ),
    "tile without shape": ({0: (16, 64)}, "ldtilecfg [rdi]; tilezero tmm5", "tmm5 is not configured"),
    "product of a tile without shape": (
        {0: (16, 64), 1: (16, 64)}, "ldtilecfg [rdi]; tdpbf16ps tmm0, tmm1, tmm2", "tmm2 is not configured",
    ),
    "released": ({0: (16, 64)}, "ldtilecfg [rdi]; tilerelease; tilezero tmm0", "no tiles are configured"),
    "rows": (
        {0: (16, 64), 1: (8, 64), 2: (16, 64)}, "ldtilecfg [rdi]; tdpbf16ps tmm0, tmm1, tmm2",
        "tdpbf16ps tmm0, tmm1, tmm2 at rip 0x.*: tmm0 and tmm1 differ in rows; tmm0: 16 rows of 64 bytes; "
        "tmm1: 8 rows of 64 bytes; tmm2: 16 rows of 64 bytes",
    ),
    "columns": (
        {0: (16, 64), 1: (16, 64), 2: (16, 32)}, "ldtilecfg [rdi]; tdpbuud tmm0, tmm1, tmm2",
        "tmm0 and tmm2 differ in columns",
    ),
    "inner size": (
        {0: (16, 64), 1: (16, 32), 2: (16, 64)}, "ldtilecfg [rdi]; tdpbusd tmm0, tmm1, tmm2",
        "tmm1 has 8 columns of 4 bytes and tmm2 16 rows",
    ),
    "odd bytes, load": ({0: (3, 6)}, "ldtilecfg [rdi]; tileloadd tmm0, [rdi + rdx]", "not a multiple of 4"),
    "odd bytes, store": ({0: (3, 6)}, "ldtilecfg [rdi]; tilestored [rdi + rdx], tmm0", "not a multiple of 4"),
    "odd bytes, product": (
        {0: (4, 6), 1: (4, 16), 2: (4, 6)},
        "ldtilecfg [rdi]; tdpbsud tmm0, tmm1, tmm2", "not a multiple of 4",
    ),
}  # fmt: skip

SAME_TILES = {
    # tdpbf16ps, which assemblers reject: c4 e2 vvvv 5c modrm
    "tdpbf16ps tmm1, tmm1, tmm2": ".byte 0xc4, 0xe2, 0x6a, 0x5c, 0xc9",
    "tdpbf16ps tmm1, tmm2, tmm1": ".byte 0xc4, 0xe2, 0x72, 0x5c, 0xca",
    "tdpbf16ps tmm1, tmm2, tmm2": ".byte 0xc4, 0xe2, 0x6a, 0x5c, 0xca",
    "tdpbssd tmm0, tmm0, tmm0": ".byte 0xc4, 0xe2, 0x7b, 0x5e, 0xc0",
}

BAD_ENCODINGS = {
    "tilezero, W": ".byte 0xc4, 0xe2, 0xfb, 0x49, 0xc0",
    "tilezero, L": ".byte 0xc4, 0xe2, 0x7f, 0x49, 0xc0",
    "tilezero, vvvv": ".byte 0xc4, 0xe2, 0x73, 0x49, 0xc0",
    "tilezero, tmm8": ".byte 0xc4, 0x62, 0x7b, 0x49, 0xc0",
    "tilezero, r/m": ".byte 0xc4, 0xe2, 0x7b, 0x49, 0xc1",
    "tilerelease, r/m": ".byte 0xc4, 0xe2, 0x78, 0x49, 0xc1",
    "tdpbf16ps, L": ".byte 0xc4, 0xe2, 0x6e, 0x5c, 0xc1",
    "tdpbf16ps, W": ".byte 0xc4, 0xe2, 0xea, 0x5c, 0xc1",
    "tdpbf16ps, tmm9": ".byte 0xc4, 0xc2, 0x6a, 0x5c, 0xc1",
    "tdpbf16ps, vvvv 13": ".byte 0xc4, 0xe2, 0x2a, 0x5c, 0xc1",
    "tileloadd without SIB": ".byte 0xc4, 0xe2, 0x7b, 0x4b, 0x07",
    "tileloadd, vvvv": ".byte 0xc4, 0xe2, 0x73, 0x4b, 0x04, 0x17",
    "tileloadd, operand size": ".byte 0x66, 0xc4, 0xe2, 0x7b, 0x4b, 0x04, 0x17",
    "tileloadd, repeat": ".byte 0xf2, 0xc4, 0xe2, 0x7b, 0x4b, 0x04, 0x17",
    "tileloadd, REX": ".byte 0x48, 0xc4, 0xe2, 0x7b, 0x4b, 0x04, 0x17",
    "ud2": "ud2",
}

GOOD_ENCODINGS = {
    # bits that the hardware ignores
    "tilezero, B": ".byte 0xc4, 0xc2, 0x7b, 0x49, 0xc0",
    "tilezero, X": ".byte 0xc4, 0xa2, 0x7b, 0x49, 0xc0",
    "tdpbf16ps, X": ".byte 0xc4, 0xa2, 0x6a, 0x5c, 0xc1",
    "tilerelease, B": ".byte 0xc4, 0xc2, 0x78, 0x49, 0xc0",
}


def changed(offset: int, value: int, shapes=None) -> bytes:
    """Returns a configuration that is valid except for one byte."""
    data = bytearray(config(shapes or {0: (16, 64)}))
    data[offset] = value
    return bytes(data)


BAD_CONFIGS = {
    "palette": (changed(0, 2), "palette 2"),
    "last palette": (changed(0, 255), "palette 255"),
    "reserved": (changed(2, 1), "reserved byte 2"),
    "last reserved": (changed(15, 1), "reserved byte 15"),
    "rows": (changed(48, 17), "tmm0 has 17 rows; the maximum is 16"),
    "bytes": (changed(16, 65), "tmm0 has rows of 65 bytes; the maximum is 64"),
    "bytes in the high half": (changed(17, 1), "tmm0 has rows of 320 bytes"),
    "rows without bytes": (changed(55, 1), "tmm7 has 1 rows of 0 bytes"),
    "bytes without rows": (changed(20, 4), "tmm2 has 0 rows of 4 bytes"),
    "ninth tile": (changed(32, 4), "tmm8 does not exist"),
    "last tile": (changed(63, 1), "tmm15 does not exist"),
}

FULL = {0: (16, 64), 1: (16, 64), 2: (16, 64)}
BEYOND = {
    f"start row, {name}": f"ldtilecfg [rdi]; {code}"
    for name, code in (("load", "tileloadd tmm0, [rdi + rdx]"), ("store", "tilestored [rdi + rdx], tmm0"))
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    pieces = {name: f"mov rdx, 64; {code}" for name, (_, code, _) in BAD_OPERANDS.items()}
    for name, code in (SAME_TILES | BAD_ENCODINGS | GOOD_ENCODINGS).items():
        pieces[name] = f"mov rdx, 64; ldtilecfg [rdi]; {code}"
    for name, code in BEYOND.items():
        pieces[name] = f"mov rdx, 64; {code}"
    return Program(pieces | {"ldtilecfg": "ldtilecfg [rdi]"}, tmp_path_factory.mktemp("amx"))


def assert_fault(outcome, way: str, number: int, message: str) -> None:
    assert outcome.status == -number
    assert bool(re.search(message, outcome.stderr)) == (way == "emulated"), outcome.stderr


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BAD_OPERANDS)
def test_operands(program, way, name):
    shapes, _, message = BAD_OPERANDS[name]
    assert_fault(program.run(name, way, {CONFIG: config(shapes)}), way, signal.SIGILL, message)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SAME_TILES)
def test_tiles_of_a_product_must_differ(program, way, name):
    outcome = program.run(name, way, {CONFIG: config(FULL)})
    assert_fault(outcome, way, signal.SIGILL, f"{name} at rip .*must differ")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BAD_ENCODINGS)
def test_what_is_no_tile_instruction(program, way, name):
    outcome = program.run(name, way, {CONFIG: config(FULL)})
    assert (outcome.status, outcome.stderr) == (-signal.SIGILL, "")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GOOD_ENCODINGS)
def test_ignored_bits(program, way, name):
    assert program.run(name, way, {CONFIG: config(FULL)}).status == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_configurations(program, way, name):
    data, message = BAD_CONFIGS[name]
    assert_fault(program.run("ldtilecfg", way, {CONFIG: data}), way, signal.SIGSEGV, f"ldtilecfg .*{message}")


@pytest.mark.parametrize("way", WAYS)
def test_palette_zero_needs_nothing_else(program, way):
    assert program.run("ldtilecfg", way, {CONFIG: b"\0" + b"\xff" * 63}).status == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BEYOND)
@pytest.mark.parametrize("start_row,fits", [(7, True), (8, False), (16, False), (255, False)])
def test_start_row_beyond_the_tile(program, way, name, start_row, fits):
    outcome = program.run(name, way, {CONFIG: config({0: (8, 64)}, start_row=start_row)})
    if fits:
        assert outcome.status == 0
    else:
        assert_fault(outcome, way, signal.SIGILL, f"start_row {start_row} is past the last row of tmm0")


def test_the_kernel_is_never_asked(program):
    outcome = program.run("permission", "emulated")
    assert (outcome.status, outcome.stdout) == (0, b"0 0 1 0\n")


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL])
def test_refused_permission(program, number):
    outcome = program.run("permission", "emulated", refuse=number)
    assert outcome.stdout == f"-1 {number} 0 0\n".encode()
    assert_fault(outcome, "emulated", signal.SIGILL, "tilezero tmm0 .*refused permission")
