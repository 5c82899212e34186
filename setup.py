"""Builds the C++ kernels into wheels. pyproject.toml says everything else.

A wheel has a library for each kind of CPU of the machine that CXX compiles for. Without a compiler the wheel has none;
the kernels are then compiled on first use, as in a checkout.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).parent))

from separation.cpu import KERNELS, KINDS, Kind, find_compiler, machine_of

# By system: the linker's flags, and the wheel's platform. The libraries need no libstdc++, whose version may be older
# than the compiler's.
LINKER_FLAGS = {
    "linux": ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL", "-s"),
    "macos": ("-mmacosx-version-min=11.0",),
}
PLATFORMS = {
    ("linux", "x86_64"): "linux_x86_64",
    ("linux", "aarch64"): "linux_aarch64",
    ("macos", "aarch64"): "macosx_11_0_arm64",
}


@cache
def target() -> tuple[str, str] | None:
    """The system and machine that the compiler compiles for, or None if there is no compiler or no kernel for it."""
    compiler = find_compiler()
    if not compiler and os.environ.get("CXX"):
        raise CompileError(f"CXX is {os.environ['CXX']!r}, which is not installed: install it, or unset CXX")
    if not compiler:
        return None
    triple = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout.strip()
    system = "macos" if "apple-darwin" in triple else "linux" if "linux" in triple else "other"
    found = system, machine_of(triple.partition("-")[0])
    return found if found in PLATFORMS else None


def compile_kernels(kind: Kind, system: str, folder: Path) -> str:
    """Compile the library of a kind. Returns a warning if the compiler is too old for it, else an empty string."""
    compiler = find_compiler()
    known = [*compiler, *kind.compiler_flags, "-fsyntax-only", "-x", "c++", os.devnull]
    if subprocess.run(known, capture_output=True, check=False).returncode != 0:
        return f"{compiler[0]} does not know {' '.join(kind.compiler_flags)}: the wheel has no kernels for {kind.name}"
    command = [*kind.command(compiler, folder / f"{kind.name}.so"), *LINKER_FLAGS[system]]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise CompileError(f"{' '.join(command)}\n{ran.stderr}")
    return ""


class BuildPy(build_py):
    """Adds the kernels to what is built, except to an editable installation, which compiles on first use."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib) / KERNELS.relative_to(Path(__file__).parent)
        for earlier in folder.glob("*.so"):  # perhaps for another machine
            earlier.unlink()
        found = target()
        if found is None:
            self.warn("no C++ compiler for a known machine: the wheel has no CPU kernels, which makes it slow on CPUs")
            return
        kinds = [kind for kind in KINDS if kind.machine == found[1]]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for warning in pool.map(lambda kind: compile_kernels(kind, found[0], folder), kinds):
                if warning:
                    self.warn(warning)


class BdistWheel(bdist_wheel):
    """Tags the wheel by the machine; any Python 3 can load the kernels."""

    def get_tag(self) -> tuple[str, str, str]:
        found = target()
        return super().get_tag() if found is None else ("py3", "none", PLATFORMS[found])


class WithKernels(Distribution):
    """Belongs to a platform if the wheel has kernels."""

    def has_ext_modules(self) -> bool:
        return target() is not None


setup(distclass=WithKernels, cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
