"""The kinds of CPUs that the C++ kernels are compiled for, and how.

setup.py imports this module, so it needs nothing but Python.
"""

import ctypes
import os
import platform
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from separation.errors import InputError

KERNELS = Path(__file__).parent / "models" / "kernels" / "cpu"
SOURCE = KERNELS / "fused.cpp"

_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-O3", "-std=gnu++17", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")
# What x86-64-v3 and v4 stand for, in the words of /proc/cpuinfo.
_V3 = ("avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
# The names by which macOS knows Arm's flags.
_SYSCTL_NAMES = {
    "asimd": "hw.optional.AdvSIMD",
    "asimddp": "hw.optional.arm.FEAT_DotProd",
    "bf16": "hw.optional.arm.FEAT_BF16",
    "i8mm": "hw.optional.arm.FEAT_I8MM",
}


@dataclass(frozen=True)
class Kind:
    """CPUs that share a library of kernels."""

    name: str
    machine: str  # as `machine` returns it
    compiler_flags: tuple[str, ...]
    cpu_flags: tuple[str, ...]  # that the CPU must have, in the words of /proc/cpuinfo
    precisions: tuple[str, ...]  # in which the kernels compute

    def command(self, compiler: Sequence[str], library: Path, *, emulated: bool = False) -> list[str]:
        """The command that compiles the kernels. Emulated, they need no more than the machine's oldest CPU."""
        flags = () if emulated else self.compiler_flags
        header = f'-DKIND_HEADER="kinds/{self.name}.h"'
        return [*compiler, *_FLAGS, header, *flags, str(SOURCE), "-o", str(library)]

    def missing_flag(self) -> str:
        """The first flag that the kind needs and this CPU lacks, or an empty string."""
        return next((flag for flag in self.cpu_flags if flag not in cpu_flags()), "")


_AVX512 = "-march=x86-64-v4"
_EVERY = ("fp32", "bf16", "int8")

# The fastest first.
KINDS = (
    Kind(
        "amx",
        "x86_64",
        (_AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
        (*_V4, "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"),
        _EVERY,
    ),
    Kind(
        "avx512_bf16",
        "x86_64",
        (_AVX512, "-mavx512vnni", "-mavx512bf16"),
        (*_V4, "avx512_vnni", "avx512_bf16"),
        _EVERY,
    ),
    Kind("avx512_vnni", "x86_64", (_AVX512, "-mavx512vnni"), (*_V4, "avx512_vnni"), ("fp32", "int8")),
    Kind("avx512", "x86_64", (_AVX512,), _V4, ("fp32", "int8")),
    Kind("avx_vnni", "x86_64", ("-march=x86-64-v3", "-mavxvnni"), (*_V3, "avx_vnni"), ("fp32", "int8")),
    Kind("avx2", "x86_64", ("-march=x86-64-v3",), _V3, ("fp32", "int8")),
    Kind("neon_bf16", "aarch64", ("-march=armv8.6-a+bf16+i8mm",), ("asimd", "bf16", "i8mm"), _EVERY),
    Kind("neon_dot", "aarch64", ("-march=armv8.2-a+dotprod",), ("asimd", "asimddp"), ("fp32", "int8")),
    Kind("neon", "aarch64", ("-march=armv8-a",), ("asimd",), ("fp32",)),
)


def machine() -> str:
    """The machine's architecture, `x86_64` or `aarch64` where there are kernels."""
    return machine_of(platform.machine())


def machine_of(name: str) -> str:
    """The one name of an architecture that systems and compilers name differently."""
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name.lower(), name)


@cache
def cpu_flags() -> frozenset[str]:
    """The CPU's instruction sets in the words of Linux: the flags or Features line of /proc/cpuinfo.

    Empty on Windows and on Macs with Intel CPUs.
    """
    if platform.system() == "Darwin":
        return frozenset(flag for flag, name in _SYSCTL_NAMES.items() if _sysctl(name))
    if platform.system() != "Linux":
        return frozenset()
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        line = next((line for line in file if line.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())


def usable_kinds() -> list[Kind]:
    """The kinds that this CPU is, the fastest first. SEPARATION_CPU_KIND leaves one of them.

    Raises InputError if SEPARATION_CPU_KIND names none of them.
    """
    kinds = [kind for kind in KINDS if kind.machine == machine() and not kind.missing_flag()]
    wanted = os.environ.get("SEPARATION_CPU_KIND")
    if not wanted or wanted in (kind.name for kind in kinds):
        return [kind for kind in kinds if wanted in (None, "", kind.name)]
    known = next((kind for kind in KINDS if kind.name == wanted), None)
    if known is None:
        fault = "no kind of CPU has that name"
    elif known.machine != machine():
        fault = f"this CPU is {machine()}"
    else:
        fault = f"this CPU has no {known.missing_flag()}"
    names = ", ".join(kind.name for kind in kinds)
    raise InputError(f"SEPARATION_CPU_KIND is {wanted!r}, but {fault}: {names and f'use {names}, or '}leave it out")


def bfloat16_kind() -> Kind | None:
    """The kind that this CPU is or that SEPARATION_CPU_KIND names, if it computes in bfloat16.

    Raises InputError as `usable_kinds`.
    """
    return next((kind for kind in usable_kinds()[:1] if "bf16" in kind.precisions), None)


def _sysctl(name: str) -> int:
    """A whole number that macOS's kernel publishes, or 0 if it does not know the name."""
    value, size = ctypes.c_int(), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    failed = ctypes.CDLL(None).sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return 0 if failed else value.value


def find_compiler() -> list[str]:
    """The command of the C++ compiler: CXX, else the first of c++, g++ and clang++. Empty if it is not installed."""
    words = shlex.split(os.environ.get("CXX", ""))
    if words:
        return words if shutil.which(words[0]) else []
    return next(([found] for name in _COMPILERS if (found := shutil.which(name))), [])
