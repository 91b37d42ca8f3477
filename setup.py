"""Builds ktops._C, the only extension module, with torch 2.10's stable ABI and the limited Python API."""

import os
import shutil
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.build import build

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
LAUNCH_FILE = Path("ktops", "launcher", "ktops_launch.pth")
SOURCES, HEADERS = (
    sorted(
        str(path.relative_to(ROOT)) for suffix in suffixes for path in ROOT.glob(f"ktops_csrc/**/*.{suffix}")
    )
    for suffixes in (("cpp",), ("h", "def"))
)
SANITIZE = os.environ.get("KTOPS_SANITIZE")  # e.g. "address,undefined"

compile_args = [
    "-std=c++17",
    "-O3",
    "-g0",  # Python's own flags often include -g, which makes up two thirds of the library
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


class BuildWithObjects(BuildExtension.with_options(no_python_abi_suffix=False)):
    """Keeps the objects of an editable install where later builds look for them, for ninja to reuse."""

    def run(self) -> None:
        if self.editable_mode:
            build_base = self.get_finalized_command("build").build_base
            self.build_temp = os.path.join(
                build_base, f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
            )
        super().run()


class BuildLaunchFile(Command):
    """Installs, next to the package, the file that ``ktops launch`` relies on. Python runs it at startup."""

    editable_mode = False
    user_options: ClassVar = []

    def initialize_options(self) -> None:
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        folder = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        self.mkpath(folder)
        self.copy_file(str(LAUNCH_FILE), folder)


class BuildWithLaunchFile(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_launch_file", None)]


setup(
    ext_modules=[
        CppExtension(
            "ktops._C",
            SOURCES,
            depends=HEADERS,  # includes them in the sdist
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
    cmdclass={
        "build": BuildWithLaunchFile,
        "build_ext": BuildWithObjects,
        "build_launch_file": BuildLaunchFile,
    },
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
