"""Memory that runs out, in the words of Python, PyTorch, oneDNN, C++ and the loader of libraries."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from separation.errors import EstimateError, SeparationError

# A GPU's memory is another matter (`separation.device`).
_WORDS = re.compile(
    r"could not create a (primitive|memory)|can(no|')t allocate memory|bad_alloc|bad allocation|failed to map segment"
    r"|can't start new thread|not enough memory|insufficient memory|Unable to allocate"
    r"|error return without exception set",  # by an import that broke off
    re.IGNORECASE,
)


def lacks_memory(error: BaseException) -> bool:
    """Whether the error says that this computer's memory was not enough."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return not isinstance(error, SeparationError) and bool(_WORDS.search(str(error)))  # ours may hold a song's name


@contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Raises EstimateError, a sentence about `what`, where memory runs out in the block."""
    try:
        yield
    except Exception as e:
        if not lacks_memory(e):
            raise
        found = _WORDS.search(str(e))
        reason = found[0] if found else type(e).__name__
        raise EstimateError(
            f"{what} needs more memory than this computer has free ({reason}): close other programs, or choose a "
            "smaller chunk size, batch size or number of workers"
        ) from e
