"""What the servers share, the container and the local page: limits, and errors that tell a stranger no path."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from separation.errors import EstimateError, InputError, SeparationError
from separation.settings import positive
from separation.system.text import shown


def max_seconds() -> float:
    """The longest song: SEPARATION_MAX_SECONDS, else three hours, where a stem still is a plain WAV of below 4 GB."""
    return positive("SEPARATION_MAX_SECONDS", 3 * 60 * 60)


def max_mib() -> float:
    """The largest file: SEPARATION_MAX_MIB, else 4096."""
    return positive("SEPARATION_MAX_MIB", 4096)


@contextmanager
def errors_without_paths() -> Iterator[None]:
    """What is not about the caller's own song and choices may name files here: that is for the operator alone."""
    try:
        yield
    except (InputError, EstimateError):
        raise
    except Exception as e:
        tell_operator()
        cause = e if isinstance(e, OSError) else e.__cause__
        reason = (isinstance(cause, OSError) and cause.strerror) or type(e).__name__
        kind = type(e) if isinstance(e, SeparationError) else SeparationError
        raise kind(f"the server failed ({reason}): try again, or tell its operator, whose log says more") from e


def tell_operator() -> None:
    """Print the traceback to the server's own log. What is printed to `sys.stderr` goes to the prediction's."""
    with suppress(OSError):  # a log on a full disk must not make the server fail
        print(*map(shown, traceback.format_exc().split("\n")), sep="\n", file=sys.__stderr__ or sys.stderr, flush=True)
