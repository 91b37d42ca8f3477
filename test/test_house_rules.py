"""Checks the rules of docs/contributing.md that a machine can check."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ktops
from ktops import reference

ROOT = Path(__file__).parent.parent
FOLDERS = ("ktops", "ktops_csrc", "test", "bench", "docs", ".ci")
TOP_LEVEL = {
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "ktops",
    "ktops_csrc",
    "test",
    "bench",
    "docs",
}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80

CSRC_LAYERS = (
    "ops", "streams", "dispatch", "quantize", "moe", "gemm", "weights", "formats", "isa", "parallel", "core",
)  # fmt: skip
"""A folder of ktops_csrc includes only files from itself and the folders after it."""

FLOORS = (
    ("launcher", "testing"),
    ("cli", "compat", "reference"),
    ("__init__",),
    ("integrations",),
    ("adapters",),
    ("checkpoints",),
    ("nn",),
    ("devices",),
    ("ops",),
    ("formats", "numa"),
    ("_display", "_huge_pages", "_library", "_modes", "_version", "_warn", "_workers"),
    ("_C",),
)
"""A package of ktops imports only itself and the floors after its own; ``__init__`` is ``import ktops``."""


def project_files() -> list[str]:
    """Paths of the project's files relative to the root: tracked, or new and not ignored."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return [line for line in listed.splitlines() if (ROOT / line).exists()]
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    paths += [ROOT / name for name in TOP_LEVEL]
    return [
        str(path.relative_to(ROOT))
        for path in paths
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    ]


FILES = project_files()
PYTHON = [name for name in FILES if name.endswith(".py")]
CPP = [name for name in FILES if name.startswith("ktops_csrc/") and name.endswith((".cpp", ".h", ".def"))]
OTHER_CPP = [name for name in FILES if name.endswith((".cpp", ".h")) and name not in CPP]
TEXT = [
    name
    for name in FILES
    if name.endswith((".py", ".cpp", ".h", ".def", ".md", ".toml", ".yml", ".yaml", ".sh"))
]


def read(name: str) -> str:
    return (ROOT / name).read_text()


def stem(op: str) -> str:
    """Returns the name that the files of an operator share; forward and backward have the same."""
    return op if (ROOT / "ktops_csrc" / "ops" / f"{op}.cpp").exists() else re.sub("_(fwd|bwd)$", "", op)


OPS = re.findall(r'm\.def\("(moe_(?:\w+_)?(?:fwd|bwd))\(', read("ktops_csrc/ops/schemas.cpp"))


def test_the_lists_above_are_not_empty():
    assert {"moe_fwd", "moe_sft_fwd", "moe_sft_bwd"} <= set(OPS)
    assert "ktops/ops/moe_sft.py" in PYTHON and "ktops_csrc/ops/schemas.cpp" in CPP
    assert {Path(name).parts[1] for name in CPP} <= set(CSRC_LAYERS)


def test_top_level():
    visible = {Path(name).parts[0] for name in FILES if not name.startswith(".")}
    assert visible == TOP_LEVEL


@pytest.mark.parametrize("name", PYTHON + CPP + OTHER_CPP)
def test_file_length(name):
    assert len(read(name).splitlines()) <= MAX_FILE_LINES


def python_functions(source: str):
    """Yields (name, lines of the body without the docstring) of every function; signatures follow schemas."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            yield node.name, body[-1].end_lineno - body[0].lineno + 1 if body else 0


FUNCTION = re.compile(r"[^{]*[(\[].*(?<!=) {")
"""Matches a function from its first line to its brace; an `if` looks the same, and a struct may."""

NO_FUNCTION = re.compile(
    r"}|(public|protected|private|namespace|struct|class|enum|union"
    r"|if|else|for|while|do|switch|case|default|try|catch)\b"
)


def cpp_functions(source: str):
    """Yields (first line, lines) of every function, method and lambda with a body of more than one line.

    clang-format indents the lines between the first and the last of a block, but not those of namespaces.
    """
    lines, begins = [line.split("  //")[0] for line in source.splitlines()], {}
    for end, line in enumerate(lines):
        if not line or line.startswith("#"):
            continue
        indent = len(line) - len(line.lstrip())
        begin = begins.get(indent, end)
        head = next((lines[begin : i + 1] for i in range(begin, end) if lines[i].endswith("{")), [])
        text = " ".join(part.strip() for part in head)
        if line.lstrip().startswith("}") and FUNCTION.fullmatch(text) and not NO_FUNCTION.match(text):
            template = begin > 0 and lines[begin - 1].lstrip().startswith("template")
            yield lines[begin].strip(), end - begin + 1 + template
        begins = {i: begin for i, begin in begins.items() if i < indent} | {indent: end}


@pytest.mark.parametrize("name", PYTHON)
def test_python_function_length(name):
    long = {f: lines for f, lines in python_functions(read(name)) if lines > MAX_FUNCTION_LINES}
    assert not long


@pytest.mark.parametrize("name", CPP + OTHER_CPP)
def test_cpp_function_length(name):
    long = {f: lines for f, lines in cpp_functions(read(name)) if lines > MAX_FUNCTION_LINES}
    assert not long


PYTHON_SAMPLE = '''
def f(a,
      b):
    """Doc.

    More.
    """
    x = a

    return x
'''

CPP_SAMPLE = """
namespace kt {

int f(int a,
      int b) {
    return a;

}

constexpr int kNumbers[] = {
    f(1, 2),
};

template <class T>
class C : public Base<T> {
public:
    explicit C(T a)
        : Base<T>(a),
          b_{a} {
#ifdef KT_B
        g(a);
#endif
    }

    template <class U>
    static U h(U a) {
        if (a) {
            return a;
        }
        each(a, [&](int i) {
            a += i;
        });
        return f(1, 2);
    }

private:
    T b_;
};

C<int>::~C() {  // frees b_
    release();
}

const auto k = [](int a) {
    return a;
};

}  // namespace kt
"""

CPP_SAMPLE_FUNCTIONS = {
    "int f(int a,": 5,
    "explicit C(T a)": 7,
    "static U h(U a) {": 10,
    "each(a, [&](int i) {": 3,
    "C<int>::~C() {": 3,
    "const auto k = [](int a) {": 3,
}


def test_function_lengths_are_seen():
    assert dict(python_functions(PYTHON_SAMPLE)) == {"f": 3}
    assert dict(cpp_functions(CPP_SAMPLE)) == CPP_SAMPLE_FUNCTIONS
    assert len([function for name in CPP for function in cpp_functions(read(name))]) > 400


@pytest.mark.parametrize("name", CPP)
def test_includes_point_downwards(name):
    layer = CSRC_LAYERS.index(Path(name).parts[1])
    for included in re.findall(r'#include "([^"]+)"', read(name)):
        assert (ROOT / "ktops_csrc" / included).exists(), included
        assert CSRC_LAYERS.index(included.split("/")[0]) >= layer, included


MODULES = {
    ".".join(Path(name).with_suffix("").parts).removesuffix(".__init__"): name
    for name in PYTHON
    if name.startswith("ktops/")
}


def imported_modules(name: str) -> set[str]:
    """Returns the modules of ktops that a file imports anywhere, or names in a string to import later."""
    found = set()
    for node in ast.walk(ast.parse(read(name))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            inner = {member for member in members if member in MODULES or member == "ktops._C"}
            found |= inner | ({node.module} if inner != members else set())
        elif isinstance(node, ast.Constant):
            found |= {node.value} & (MODULES.keys() - {"ktops"})
    return {module for module in found if module.partition(".")[0] == "ktops" and MODULES.get(module) != name}


IMPORTS = {module: imported_modules(name) for module, name in MODULES.items()}


def floor(module: str) -> int:
    package = (*module.split("."), "__init__")[1]
    return next(index for index, packages in enumerate(FLOORS) if package in packages)


def package(module: str) -> str:
    return ".".join(module.split(".")[:2])


def on_a_circle(graph: dict[str, set[str]]) -> set[str]:
    """Returns what is left after repeatedly removing nodes without successors or without predecessors."""
    left = dict(graph)
    while True:
        reached = set().union(*left.values())
        kept = {
            node: targets & left.keys()
            for node, targets in left.items()
            if targets & left.keys() and node in reached
        }
        if kept.keys() == left.keys():
            return set(kept)
        left = kept


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    for imported in IMPORTS[module]:
        assert floor(imported) > floor(module) or package(imported) == package(module), imported


def test_imports_have_no_circle():
    """Checks imports between modules, including those inside functions. The ``__init__`` of a module's
    packages, which importing it also runs, does not count."""
    assert not on_a_circle(IMPORTS)


def test_circles_and_late_imports_are_seen():
    assert on_a_circle({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == {"b", "c"}
    assert {"ktops.integrations.load_experts", "ktops.nn", "ktops._library"} <= IMPORTS["ktops"]
    assert "ktops.integrations.transformers.quantizer" in IMPORTS["ktops.integrations.transformers.saving"]
    assert sum(map(len, IMPORTS.values())) > 300


@pytest.mark.parametrize("name", CPP)
def test_only_ops_know_torch_and_only_its_stable_abi(name):
    for included in re.findall(r"#include <((?:torch|ATen|c10|pybind11)/[^>]+|Python\.h)>", read(name)):
        assert name.startswith("ktops_csrc/ops/"), included
        assert included == "Python.h" or included.startswith(("torch/csrc/stable/", "torch/headeronly/")), (
            included
        )


@pytest.mark.parametrize("name", CPP)
def test_machine_specific_code_stays_in_its_folder(name):
    source = read(name)
    if name != "ktops_csrc/core/environment.cpp":
        assert "getenv" not in source
    if not name.startswith("ktops_csrc/dispatch/"):
        assert "GCC target" not in source
    if not name.startswith(("ktops_csrc/isa/", "ktops_csrc/dispatch/")):
        assert "immintrin.h" not in source
        assert not re.search(r"\b_mm\d*_", source)
    assert "#pragma omp" not in source


def test_build_flags():
    source = read("setup.py")
    assert not re.search(r"-march|-mavx|-mamx|-fopenmp|-ffast-math", source)
    assert "py_limited_api=True" in source and "TORCH_TARGET_VERSION" in source


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_files(op):
    name = stem(op)
    for path in (f"ktops_csrc/ops/{name}.cpp", f"ktops/ops/{name}.py", f"bench/{name}.py"):
        assert (ROOT / path).exists(), path
    assert (ROOT / f"test/ops/test_{name}.py").exists()
    assert f'register_fake("kt::{op}")' in read(f"ktops/ops/{name}.py")
    assert f'register_autograd("kt::{op}"' in read(f"ktops/ops/{name}.py")
    assert f"register_flop_formula(torch.ops.kt.{op})" in read(f"ktops/ops/{name}.py")
    assert callable(getattr(reference, op))
    assert op in read("docs/ops.md")
    assert any(f"kt.{op}" in read(path) for path in PYTHON if path.startswith("test/ops/"))


def test_public_names_have_docstrings():
    for name in ktops.__all__:
        if not name.startswith("__"):
            assert getattr(ktops, name).__doc__, name


@pytest.mark.parametrize("name", TEXT)
def test_no_leftovers(name):
    source = read(name)
    marks = "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"))
    assert not re.search(rf"\b({marks})\b", source)
    assert not re.search(r"^(<{7}|={7}|>{7})( |$)", source, re.MULTILINE)
    assert not re.search(r"/(?:root|home)/\w", source)


@pytest.mark.parametrize("name", [name for name in PYTHON if name.startswith("test/")])
def test_no_test_is_switched_off(name):
    off = "|".join(("mark" + r"\.skip", "mark" + r"\.xfail", r"pytest\." + "xfail", "import" + "orskip"))
    assert not re.search(off, read(name))


@pytest.mark.parametrize("name", [name for name in PYTHON if name.startswith("test/")])
def test_no_test_reads_a_clock_or_resident_memory(name):
    """Such checks depend on the machine and belong in ``bench/check.py``."""
    clocks = ("perf" + "_counter", "mono" + "tonic", "process" + "_time", "thread" + "_time", r"time\.time")
    memory = ("getru" + "sage", "Vm" + "HWM", "Vm" + "RSS", "Rss" + "Anon", "resident" + "_bytes")
    calls = "|".join((*(rf"{clock}(_ns)?\(" for clock in clocks), *memory))
    assert not re.search(calls, read(name))


@pytest.mark.parametrize(
    "command",
    [
        "ruff check --no-cache .",
        "ruff format --check --no-cache .",
        "mypy",
        "clang-format --dry-run -Werror " + " ".join(name for name in FILES if name.endswith((".h", ".cpp"))),
    ],
    ids=lambda command: command.split(" -")[0],
)
def test_lint(command):
    tool, *arguments = command.split()
    executable = str(Path(sys.executable).with_name(tool))
    result = subprocess.run([executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
