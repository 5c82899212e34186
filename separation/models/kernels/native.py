"""The C++ kernels for this CPU: from the wheel, or compiled on first use and kept in the user's cache folder."""

import ctypes
import errno
import hashlib
import logging
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from separation.cpu import KERNELS, KINDS, SOURCE, Kind, find_compiler, machine, usable_kinds
from separation.progress import WAIT
from separation.system.places import cache_folder

logger: logging.Logger = logging.getLogger("separation")

PANEL = 32  # weights are packed in panels of so many columns; the columns of a panel belong to one head

# The numbers by which fused.cpp knows precisions. In int8 only a transformer's linear layers compute in integers.
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}

_OUT_OF_MEMORY = 1  # what the functions return instead of raising std::bad_alloc


class NotFusedError(Exception):
    """Fused layers are not available; the message is the reason."""


@dataclass(frozen=True)
class Library:
    """The kernels for a kind of CPU. The functions raise MemoryError."""

    kind: Kind
    functions: ctypes.CDLL
    origin: str  # such as "from the wheel"
    reason: str  # for choosing the kind

    def __str__(self) -> str:
        return f"{self.kind.name}, {self.origin}{self.reason and '; '}{self.reason}"


@cache
def library() -> Library:
    """The kernels of the fastest kind that this CPU is, or of the one that SEPARATION_CPU_KIND names.

    Raises NotFusedError if the CPU is of no kind or there is no library for it, InputError for a SEPARATION_CPU_KIND
    that this CPU is not.
    """
    candidates = [kind for kind in KINDS if kind.machine == machine()]
    usable = usable_kinds()
    if not candidates:
        raise NotFusedError(f"there are no kernels for {machine()}")
    if not usable:
        raise NotFusedError(_lacks(candidates))
    faults: dict[str, str] = {}
    for kind in usable:
        try:
            functions, origin = load(kind)
        except NotFusedError as e:
            faults[kind.name] = str(e)
            continue
        reasons = [f"not {name}: {fault}" for name, fault in faults.items()]
        if os.environ.get("SEPARATION_CPU_KIND"):
            reasons.append("requested by SEPARATION_CPU_KIND")
        elif lacks := _lacks(candidates[: candidates.index(kind)]):
            reasons.append(lacks)
        return Library(kind, functions, origin, "; ".join(reasons))
    raise NotFusedError("; ".join(dict.fromkeys(faults.values())))


def _lacks(kinds: Sequence[Kind]) -> str:
    """The flags that the CPU would need to be one of these kinds, one for each, in a sentence."""
    flags = list(dict.fromkeys(flag for kind in kinds if (flag := kind.missing_flag())))
    return f"the CPU has no {' or '.join(flags)}" if flags else ""


@cache
def load(kind: Kind, *, emulated: bool = False) -> tuple[ctypes.CDLL, str]:
    """The functions of a kind's library, and where that comes from. Emulated, they run on every CPU, slowly.

    Raises NotFusedError if they cannot be compiled or if the system does not let this process use them.
    """
    shipped = KERNELS / f"{kind.name}.so"
    if not emulated and shipped.exists():
        functions, origin = ctypes.CDLL(str(shipped)), "from the wheel"
    else:
        functions, origin = _compiled(kind, emulated=emulated)
    _declare(functions)
    if not functions.usable():
        raise NotFusedError("the system does not let this process use it")
    return functions, origin


def _compiled(kind: Kind, *, emulated: bool) -> tuple[ctypes.CDLL, str]:
    compiler = find_compiler()
    if not compiler:
        raise NotFusedError("no C++ compiler (c++, g++ or clang++) is installed")
    ran = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    version = ran.stdout.partition("\n")[0]
    sources = [path.read_text(encoding="utf-8") for path in sorted(KERNELS.rglob("*")) if path.suffix in (".h", ".cpp")]
    # Without the path of the sources: in another folder, the same sources give the same library.
    command = [word for word in kind.command(compiler, Path("library"), emulated=emulated) if word != str(SOURCE)]
    key = hashlib.sha256("\0".join([*sources, version, *command]).encode()).hexdigest()[:16]
    name = f"{kind.name}{'-emulated' if emulated else ''}-{key}.so"
    for folder in _cache_folders():
        path = folder / name
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if {folder.lstat().st_uid, folder.stat().st_uid} != {os.getuid()} or folder.stat().st_mode & 0o002:
                # Another user could replace the library by code of their own.
                raise PermissionError(errno.EPERM, "other users can write to its folder")
            if not path.exists():
                logger.log(WAIT, "compiling the kernels for this CPU (%s), only this once: about 20 s", kind.name)
                _compile(kind, compiler, path, emulated=emulated)
            return ctypes.CDLL(str(path)), f"compiled by {version}"
        except OSError as e:
            reason = NotFusedError(f"{path} cannot be written or loaded ({e.strerror or e})")
    raise reason


def _cache_folders() -> list[Path]:
    return [cache_folder(), Path(tempfile.gettempdir()) / f"music-separation-{os.getuid()}"]


def _compile(kind: Kind, compiler: list[str], path: Path, *, emulated: bool) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        command = kind.command(compiler, part, emulated=emulated)
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode != 0:
            said = next((line for line in ran.stderr.splitlines() if "error" in line), f"exit code {ran.returncode}")
            raise NotFusedError(f"{Path(compiler[0]).name} cannot compile {SOURCE.name} ({said.strip()})")
        os.replace(part, path)


def _declare(functions: ctypes.CDLL) -> None:
    """Declare the types of the library's functions, and let those that run out of memory raise MemoryError."""
    long, pointer, double = ctypes.c_long, ctypes.c_void_p, ctypes.c_double
    functions.packed_bytes.argtypes, functions.packed_bytes.restype = [long, long, long], long
    functions.operations_per_second.argtypes = [long, long, double]
    functions.operations_per_second.restype = double
    functions.unet_packed_size.argtypes, functions.unet_packed_size.restype = [long, long], long
    arguments = {
        "unet_pack": [pointer, long, long, pointer, long],
        "unet_convolve": [pointer, pointer, pointer, pointer, pointer, long],
        "unet_moments": [pointer, long, long, pointer, long],
        "unet_normalise": [pointer, pointer, long, long, long, ctypes.c_float, pointer, long],
        "unet_over_bins": [pointer, pointer, pointer, pointer, pointer, long],
        "pack": [pointer, long, long, pointer, pointer, pointer, pointer, long, long],
        "transformer_layer": [pointer, long, long, long, long, pointer, pointer, pointer, long, long],
        "attention": [pointer, pointer, pointer, pointer, pointer, pointer, long, long],
        "lstm": [pointer, pointer, pointer, pointer, pointer, long, long],
        "add_linear": [pointer, pointer, pointer, pointer, pointer, long, long],
        "add_time_branches": [pointer, pointer, pointer, pointer, pointer, long],
        "split_bands": [pointer, long, long, long, pointer, pointer, long, long],
        "estimate_masks": [pointer, long, long, pointer, long, pointer, long, long, long],
    }
    for name, types in arguments.items():
        function = getattr(functions, name)
        function.argtypes = types
        function.errcheck = _check


def _check(result: int, function: object, arguments: tuple[object, ...]) -> int:
    check(result)
    return result


def check(result: int) -> None:
    """Raise MemoryError if a function of the library returned that it could not allocate memory."""
    if result == _OUT_OF_MEMORY:
        raise MemoryError("the C++ layers cannot allocate memory: close other programs, or choose a smaller batch size")
