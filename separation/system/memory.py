"""Recognises out-of-memory errors of Python, PyTorch, oneDNN, C++ and the dynamic linker; reads and frees memory."""

import ctypes
import errno
import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from separation.errors import EstimateError, SeparationError

# For a GPU's memory see `separation.device`.
_MESSAGE = re.compile(
    r"could not create a (primitive|memory)|can(no|')t allocate memory|bad_alloc|bad allocation|failed to map segment"
    r"|can't start new thread|not enough memory|insufficient memory|Unable to allocate"
    r"|error return without exception set",  # an import that was cut short
    re.IGNORECASE,
)

# Where Linux shows a container's limit: cgroups of version 2 and 1.
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def total_memory_bytes() -> int:
    """This computer's memory, or the limit of its container if that is lower; 0 if the system does not report it."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):  # Windows
        return 0
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [path.read_text(encoding="ascii").strip() for path in CONTAINER_LIMITS if path.exists()]
    return min([total, *(int(limit) for limit in limits if limit.isdecimal())])  # else it is "max"


def release_memory() -> None:
    """Return memory that is no longer used to the system. glibc keeps some of it for the process otherwise."""
    gc.collect()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):  # musl has none
        ctypes.CDLL(None).malloc_trim(0)


def lacks_memory(error: BaseException) -> bool:
    """Whether the error means that this computer ran out of memory."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return not isinstance(error, SeparationError) and bool(_MESSAGE.search(str(error)))  # ours may quote a song's name


@contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Raise EstimateError, with `what` as its subject, if memory runs out in the block."""
    try:
        yield
    except Exception as e:
        if not lacks_memory(e):
            raise
        found = _MESSAGE.search(str(e))
        reason = found[0] if found else type(e).__name__
        raise EstimateError(
            f"{what} needs more memory than this computer has free ({reason}): close other programs, or choose a "
            "smaller chunk size, batch size or number of workers"
        ) from e
