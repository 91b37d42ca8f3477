"""No function of the compiled library has an instruction outside the ISA that it was compiled for.

The kernels of each ISA have their own namespace (kt::avx2, kt::avx512, ...). Everything else runs on any
x86-64: scalar kernels, static initializers, inline functions of the standard library, code from the linker.
"""

import re
import subprocess
from collections import defaultdict

import pytest

import ktops
from ktops import _C

WIDE = r"%zmm|%k[0-7]\b|%[xy]mm(?:1[6-9]|2\d|3[01])\b|\{evex\}"
"""Operands that only EVEX can encode; mnemonics for mask registers start with k."""

EXTENSIONS = {
    "sse3": r"lddqu|mov(dd|sh|sl)dup|h(add|sub)p[sd]|addsubp[sd]|ph(add|sub)(w|d|sw)|pabs[bwd]|palignr|pshufb"
    r"|pmulhrsw|pmaddubsw|psign[bwd]|p?blendv?(p[sd]|b|w)|dpp[sd]|extractps|insertps|movntdqa|mpsadbw|packusdw"
    r"|pcmp(eq|gt)q|pextr[bdq]|pinsr[bdq]|phminposuw|pm(ax|in)(sb|sd|ud|uw)|pmov[sz]x[a-z]+|pmul(dq|ld)|ptest"
    r"|round[ps][sd]|pcmp[ei]str[im]|crc32[bwlq]?|popcnt[wlq]?|cmpxchg16b|movbe[wlq]?",
    "bmi": r"andn|bextr|bls(i|r|msk)|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx|adcx|adox",
    "amx": r"tile[a-z0-9]+|ldtilecfg|sttilecfg|tdp[a-z0-9]+",
    "avx512_bf16": r"vdpbf16ps|vcvtne2?ps2?bf16[a-z]*|vcvtneps2bf16[a-z]*",
    "avx512_vnni": r"vpdpbusds?|vpdpwssds?",
    "avx512_vbmi": r"vpermb|vperm[it]2b",
    "avx512_other": r"vpsh[lr]d[vwdq]+|vpopcnt[bwdq]"
    r"|vpmultishiftqb|vp(compress|expand)[bw]|vpmadd52[lh]uq|(?!vcvtps2ph)v[a-z0-9]+[ps]h|vp2intersect[dq]|vpconflict[dq]|vplzcnt[dq]",
}
"""Extensions by mnemonic. tzcnt is not listed: older CPUs run the same bytes as bsf, which GCC relies on."""

ALLOWED = {
    "avx2": {"sse3", "bmi", "avx"},
    "avx512": {"sse3", "bmi", "avx", "avx512"},
    "avx512_bf16": {"sse3", "bmi", "avx", "avx512", "avx512_bf16", "avx512_vnni"},
    "amx_bf16": {"sse3", "bmi", "avx", "avx512", "avx512_bf16", "avx512_vnni", "amx"},
    "avx512_vbmi": {"sse3", "bmi", "avx", "avx512", "avx512_vbmi"},
    "scalar": set(),
    "": set(),
}
"""Extensions by ISA; "" is everything outside the ISA namespaces."""


def extension(mnemonic: str, operands: str) -> str | None:
    """Returns the name of the extension that an instruction belongs to; None if every x86-64 has it."""
    for name, pattern in EXTENSIONS.items():
        if re.fullmatch(pattern, mnemonic):
            return name
    if re.search(WIDE, operands) or re.match(r"k(mov|and|or|x|shift|not|test|add|unpck)", mnemonic):
        return "avx512"
    if mnemonic == "{evex}":
        return "avx512"
    return "avx" if mnemonic.startswith("v") and mnemonic not in ("verr", "verw") else None


def run(*command: str, text: str | None = None) -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def functions(listing: str) -> dict[str, set[tuple[str, str]]]:
    """Returns {mangled name: {(mnemonic, extension)}} from an objdump listing, for extensions only."""
    found: dict[str, set[tuple[str, str]]] = {}
    name = None
    for line in listing.splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            name = header.group(1)
            found.setdefault(name, set())
        elif match := re.match(r"\s+[0-9a-f]+:\s+(\S+)\s*(.*)", line):
            which = extension(match.group(1), match.group(2))
            found[name] |= {(match.group(1), which)} if which else set()
    return found


@pytest.fixture(scope="module")
def by_row() -> dict[str, dict[str, set[tuple[str, str]]]]:
    """Returns {ISA: {function: its instructions of extensions}}."""
    found = functions(run("objdump", "-d", "--no-show-raw-insn", "--wide", _C.__file__))
    readable = run("c++filt", text="\n".join(found)).splitlines()
    rows = defaultdict(dict)
    isas = "|".join(row for row in ALLOWED if row)
    for (_, instructions), name in zip(found.items(), readable, strict=True):
        # c++filt gives up on some lambdas and leaves their names as they are
        row = re.search(rf"\bkt::({isas})::", name) or re.match(rf"_ZNK?2kt\d+({isas})\d", name)
        rows[row.group(1) if row else ""].setdefault(name, set()).update(instructions)
    return rows


@pytest.mark.parametrize("row", ALLOWED)
def test_instructions_of_a_row(by_row, row):
    alien = {
        name: sorted(mnemonic for mnemonic, which in instructions if which not in ALLOWED[row])
        for name, instructions in by_row[row].items()
    }
    assert not {name: mnemonics for name, mnemonics in alien.items() if mnemonics}


def test_every_row_is_seen(by_row):
    """The names are those of the compiled kernels, and each uses its extensions."""
    assert set(ktops.cpu_capabilities()) | {"avx512_vbmi"} == {row for row in ALLOWED if row}
    used = {row: {which for found in by_row[row].values() for _, which in found} for row in ALLOWED}
    assert {"avx"} <= used["avx2"] and {"avx512"} <= used["avx512"]
    assert {"avx512_vbmi"} <= used["avx512_vbmi"]
    assert {"avx512_bf16"} <= used["avx512_bf16"] and {"amx"} <= used["amx_bf16"]
    assert all(len(by_row[row]) >= 2 for row in ALLOWED)


def test_static_initializers_are_among_the_functions(by_row):
    """Code that runs when the library is loaded is disassembled too, and belongs to no ISA."""
    assert any("_GLOBAL__sub_I" in name for name in by_row[""])
    assert {"_init", "PyInit__C"} <= set(by_row[""])


@pytest.mark.parametrize(
    "instruction, expected",
    [
        ("mov    %rax,%rbx", None),
        ("movaps %xmm0,%xmm15", None),
        ("tzcnt  %rax,%rbx", None),
        ("pshufb %xmm0,%xmm1", "sse3"),
        ("popcnt %rax,%rbx", "sse3"),
        ("shlx   %rax,%rbx,%rcx", "bmi"),
        ("vaddps %ymm0,%ymm1,%ymm2", "avx"),
        ("vaddps %xmm16,%xmm1,%xmm2", "avx512"),
        ("vaddps %ymm0,%ymm1,%ymm2{%k1}", "avx512"),
        ("vmovdqu64 (%rax),%zmm1", "avx512"),
        ("kmovw  %eax,%k1", "avx512"),
        ("vdpbf16ps %zmm0,%zmm1,%zmm2", "avx512_bf16"),
        ("vpdpbusd %zmm0,%zmm1,%zmm2", "avx512_vnni"),
        ("vpermb %zmm0,%zmm1,%zmm2", "avx512_vbmi"),
        ("vplzcntd %zmm0,%zmm1", "avx512_other"),
        ("tdpbf16ps %tmm0,%tmm1,%tmm2", "amx"),
        ("tilerelease", "amx"),
    ],
)
def test_extensions_are_recognized(instruction, expected):
    listing = f"0000000000001000 <f>:\n    1000:\t{instruction}\n"
    assert {which for _, which in functions(listing)["f"]} == ({expected} if expected else set())
