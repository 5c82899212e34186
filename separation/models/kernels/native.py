"""Compiles fused.cpp on first use, which takes seconds, caches the library in the user's cache folder, and loads it."""

import ctypes
import errno
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from separation.device import bfloat16_instructions, cpu_flags
from separation.system.places import cache_folder

SOURCE = Path(__file__).with_name("fused.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")
PANEL = 32  # weights are packed in panels of so many columns; the columns of a panel belong to one head


class NotFusedError(Exception):
    """Fused layers are not available; the message is the reason."""


@cache
def library() -> ctypes.CDLL:
    """Load fused.cpp, compiled for this CPU. Compiles it unless the cache has it for this CPU and compiler.

    Raises NotFusedError if the CPU has no suitable instructions, or if there is no compiler.
    """
    instructions = bfloat16_instructions()
    if instructions != "avx512_bf16":
        has = f"has {instructions}, for which PyTorch is faster" if instructions else "has no AVX-512 BF16"
        raise NotFusedError(f"the CPU {has}")
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        raise NotFusedError("no C++ compiler (c++, g++ or clang++) is installed")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = "\n".join([SOURCE.read_text(encoding="utf-8"), version, " ".join(FLAGS), cpu_flags()])
    name = f"fused-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    for folder in _cache_folders():
        path = folder / name
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if {folder.lstat().st_uid, folder.stat().st_uid} != {os.getuid()} or folder.stat().st_mode & 0o002:
                # Another user could replace the library by code of their own.
                raise PermissionError(errno.EPERM, "other users can write to its folder")
            if not path.exists():
                _compile(compiler, path)
            return _with_types(ctypes.CDLL(str(path)))
        except OSError as e:
            reason = NotFusedError(f"{path} cannot be written or loaded ({e.strerror or e})")
    raise reason


def _cache_folders() -> list[Path]:
    return [cache_folder(), Path(tempfile.gettempdir()) / f"music-separation-{os.getuid()}"]


def _compile(compiler: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(part)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode != 0:
            said = next((line for line in ran.stderr.splitlines() if "error" in line), f"exit code {ran.returncode}")
            raise NotFusedError(f"{Path(compiler).name} cannot compile {SOURCE.name} ({said.strip()})")
        os.replace(part, path)


def _with_types(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the argument types of the library's functions."""
    long, pointer = ctypes.c_long, ctypes.c_void_p
    library.pack.argtypes = [pointer, long, long, pointer, pointer, long]
    library.transformer_layer.argtypes = [pointer, long, long, long, long, pointer, pointer, pointer, long]
    library.attention.argtypes = [pointer] * 4 + [long] * 5 + [pointer, long]
    library.split_bands.argtypes = [pointer, long, long, long, pointer, pointer, long]
    library.estimate_masks.argtypes = [pointer, long, long, pointer, long, pointer, long, long]
    for name in ("pack", "transformer_layer", "attention", "split_bands", "estimate_masks"):
        library[name].restype = None
    return library
