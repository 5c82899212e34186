"""Recognises out-of-memory errors of Python, PyTorch, oneDNN, C++ and the dynamic linker."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from separation.errors import EstimateError, SeparationError

# For a GPU's memory see `separation.device`.
_MESSAGE = re.compile(
    r"could not create a (primitive|memory)|can(no|')t allocate memory|bad_alloc|bad allocation|failed to map segment"
    r"|can't start new thread|not enough memory|insufficient memory|Unable to allocate"
    r"|error return without exception set",  # an import that was cut short
    re.IGNORECASE,
)


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
