"""Tries songs again that failed for a reason that may pass, such as a network disk that was away."""

import errno
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from time import sleep
from typing import TypeVar

from separation.batch.job import AnySong, Outcome
from separation.batch.urls import Location
from separation.device import is_gpu_fault, is_out_of_memory
from separation.errors import AudioError, DownloadError
from separation.system.memory import lacks_memory

BACKOFF_SECONDS: float = 5.0  # before the first retry
BACKOFF_FACTOR: int = 4  # by which every further wait is longer

_READ_BYTES = 2**20  # at once
# Of disks and networks. A full disk is not among them: somebody must free space first.
_PASSING = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.EMFILE,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.ENFILE,
    errno.ENOTCONN,
    errno.ESTALE,
    errno.ETIMEDOUT,
    getattr(errno, "EHOSTDOWN", errno.EIO),  # Windows has none
}

logger: logging.Logger = logging.getLogger("separation")

S = TypeVar("S", bound=AnySong)

Attempt = Callable[[Sequence[S], bool], Iterator[Outcome]]  # the songs, and whether this is a retry


def retried(songs: Sequence[S], attempt: Attempt[S], retries: int) -> Generator[Outcome]:
    """Separate the songs and yield each outcome as soon as it is final, with the number of tries.

    Songs whose failure may pass are tried again when all others are finished, with backoff, up to `retries` times.
    """
    for n_before in count():
        again: list[S] = []
        by_path: dict[Location, S] = {song.path: song for song in songs}
        with closing(_generator(attempt(songs, n_before > 0))) as outcomes:
            for outcome in outcomes:
                if outcome.may_pass and n_before < retries:
                    again.append(by_path[outcome.path])
                    logger.warning("%s; tried again at the end", outcome.error)
                else:
                    yield replace(outcome, tries=n_before + 1)
        if not again:
            return
        sleep(BACKOFF_SECONDS * BACKOFF_FACTOR**n_before)
        songs = again


def _generator(outcomes: Iterator[Outcome]) -> Generator[Outcome]:
    yield from outcomes


def may_pass(error: BaseException, song: Path) -> bool:
    """Whether another try may succeed: memory ran out, a disk or a network failed, or a GPU did.

    A song that cannot be decoded counts if its file cannot be read to the end either.
    """
    causes = list(_causes(error))
    if any(_passes(cause) for cause in causes):
        return True
    return isinstance(error, AudioError) and _reading_may_pass(song)


def _passes(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _PASSING or isinstance(error, TimeoutError | ConnectionError) or lacks_memory(error)
    return isinstance(error, DownloadError) or lacks_memory(error) or is_out_of_memory(error) or is_gpu_fault(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _reading_may_pass(song: Path) -> bool:
    """Whether reading the file fails for a reason that may pass: decoders only tell that they cannot go on."""
    try:
        with song.open("rb") as file:
            while file.read(_READ_BYTES):
                pass
    except OSError as e:
        return _passes(e)
    return False
