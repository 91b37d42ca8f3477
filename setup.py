"""Builds ktops._C, the one extension module: stable ABI of torch 2.10, limited Python API."""

import os
import shutil
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        "ktops: building needs PyTorch in the current environment.\n"
        "  pip install torch setuptools ninja\n"
        "  pip install --no-build-isolation ."
    ) from error

if shutil.which(os.environ.get("CXX", "c++")) is None:
    raise SystemExit(
        f"ktops: no C++ compiler named {os.environ.get('CXX', 'c++')!r} on the PATH. Install one "
        "(Debian and Ubuntu: apt-get install g++) or name it in CXX. g++ 12 or later is known to work."
    )

ROOT = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("ktops_csrc/**/*.cpp"))
SANITIZE = os.environ.get("KTOPS_SANITIZE")  # e.g. "address,undefined"

compile_args = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]
link_args = []
if SANITIZE:
    compile_args += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g", "-O1"]
    link_args += [f"-fsanitize={SANITIZE}"]

setup(
    ext_modules=[
        CppExtension(
            "ktops._C",
            SOURCES,
            include_dirs=[str(ROOT / "ktops_csrc")],
            define_macros=[
                ("Py_LIMITED_API", "0x030A0000"),
                ("TORCH_TARGET_VERSION", "0x020a000000000000"),
            ],
            extra_compile_args={"cxx": compile_args},
            extra_link_args=link_args,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=False)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
