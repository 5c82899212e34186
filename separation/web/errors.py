"""Errors as clients see them: with an HTTP status, and without paths on the server."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus

from separation.audio.damage import DamagedError
from separation.errors import AudioError, DownloadError, EstimateError, InputError, SeparationError
from separation.system.os_errors import DISK_FULL
from separation.system.text import shown


class RefusedError(InputError):
    """A request that is refused with a status of its own."""

    def __init__(self, status: HTTPStatus, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers: dict[str, str] = headers or {}


class CancelledError(BaseException):
    """The song was cancelled. Not an Exception, so that no handler on the way takes it for a failure."""


@contextmanager
def errors_as_failures() -> Iterator[None]:
    """Keep Cog's server from taking an error for a cancellation, as it does if `cancelled` is in its text."""
    try:
        yield
    except SeparationError as e:  # a song may have that name
        e.args = (str(e).replace("cancelled", "canceled").replace("CancelledError", "CanceledError"),)
        raise


@contextmanager
def errors_without_paths() -> Iterator[None]:
    """Log unexpected errors on the server and tell the client only the kind of error.

    Errors about the client's own song and options pass unchanged. Other messages may name files on the server.
    """
    try:
        yield
    except DamagedError as e:  # a server has no --accept-damaged
        raise AudioError(f"{e.args[0]}: get the file again") from e
    except (InputError, EstimateError):
        raise
    except DownloadError as e:
        log_traceback()
        raise DownloadError(
            "the server could not download the models' weights: try again when its internet connection works, or ask "
            "its operator to read the log"
        ) from e
    except Exception as e:
        log_traceback()
        cause = e if isinstance(e, OSError) else e.__cause__
        reason = (isinstance(cause, OSError) and cause.strerror) or type(e).__name__
        kind = type(e) if isinstance(e, SeparationError) else SeparationError
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:
            raise kind("the server's disk is full: free some space there, or ask its operator, and try again") from e
        raise kind(f"the server failed ({reason}): try again, or ask its operator to read the log") from e


def log_traceback() -> None:
    """Print the current traceback to the server's log.

    The original stderr is used because Cog sends `sys.stderr` to the client as the prediction's log.
    """
    with suppress(OSError):  # a log on a full disk must not make the request fail
        print(*map(shown, traceback.format_exc().split("\n")), sep="\n", file=sys.__stderr__ or sys.stderr, flush=True)
