"""Several songs at a time in one server: a thread for each, folders of stems, and the room for stems on their way."""

import asyncio
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from separation.errors import InputError
from separation.settings import positive
from separation.system.memory import total_memory_bytes
from separation.system.threads import Threads
from separation.web.delivery import ANSWERED, USABLE
from separation.web.errors import CancelledError

SENDING_SECONDS = 30.0  # for which stems are taken to be in the server's memory: an upload may take 25

T = TypeVar("T")


def n_slots() -> int:
    """The predictions that Cog's server accepts at once: what `cog build` made of `@concurrent`, or 1."""
    return int(positive("COG_MAX_CONCURRENCY", 1))


def n_songs() -> int:
    """The songs to work on at once: SEPARATION_CONCURRENCY, or as many as the server accepts.

    Raises InputError unless it is a whole number above 0.
    """
    number = positive("SEPARATION_CONCURRENCY", n_slots())
    if number != int(number):
        raise InputError(f"SEPARATION_CONCURRENCY is {number:g}: set it to a whole number above 0, or leave it out")
    return int(number)


class SongThreads:
    """Works on several songs at once, each on a thread of its own. The others wait, first come, first served.

    Args:
        n_songs: at once.
    """

    def __init__(self, n_songs: int) -> None:
        # A thread's first use of PyTorch sets its number of threads to what any thread set last. A song that computes
        # in pairs sets other numbers for a while, and samples depend on them.
        self._threads = Threads(n_songs, "song", torch.set_num_threads, (torch.get_num_threads(),))

    async def run(self, job: Callable[[Callable[[], None]], T]) -> T:
        """The result of a job. The job gets a function that raises CancelledError once this coroutine is cancelled.

        A cancelled job keeps its place until it has ended and removed its files, although Cog does not wait for it.
        """
        cancelled = threading.Event()

        def check() -> None:
            if cancelled.is_set():
                raise CancelledError

        future = self._threads.submit(job, check)
        result = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(result)
        except asyncio.CancelledError:
            cancelled.set()
            future.cancel()
            await asyncio.wait([result])
            if not result.cancelled():
                result.exception()  # so that asyncio does not report it as lost
            raise


class StemFolders:
    """A folder for the stems of each prediction, with a new name, so that no song's files are taken for another's.

    Cog does not delete them. It reads a prediction's files before it reuses the prediction's slot, so as many
    predictions as there are slots may have files that are still unread; older folders are removed.
    """

    def __init__(self, n_slots: int) -> None:
        self._n_slots = n_slots
        self._ended: deque[Path] = deque()

    def new(self) -> Path:
        """A path that does not exist yet, for a prediction that has a slot."""
        self._keep(self._n_slots - 1)
        return Path(tempfile.gettempdir(), f"stems-{secrets.token_hex(8)}")

    def end(self, folder: Path) -> None:
        """The folder's stems are complete and go to Cog."""
        self._ended.append(folder)
        self._keep(self._n_slots)

    def _keep(self, n_folders: int) -> None:
        while len(self._ended) > n_folders:
            shutil.rmtree(self._ended.popleft(), ignore_errors=True)


class DeliveryRoom:
    """The memory that Cog's server has for stems. Stems wait until there is room, or no others are on their way.

    Cog does not say when it has sent them, so they are taken to need the room for SENDING_SECONDS.

    Args:
        limit_bytes: of stems.
    """

    def __init__(self, limit_bytes: float) -> None:
        self._limit_bytes = limit_bytes
        self._sending: deque[tuple[float, int]] = deque()  # time of the end, bytes
        self._waiting: deque[object] = deque()

    @classmethod
    def of_this_machine(cls) -> "DeliveryRoom":
        """The room in this container's memory, if the server answers with data URIs."""
        return cls(total_memory_bytes() * USABLE / ANSWERED or float("inf"))

    async def take(self, n_bytes: int) -> None:
        """Wait for the room, first come, first served."""
        place = object()
        self._waiting.append(place)
        try:
            while self._waiting[0] is not place or not self._has_room(n_bytes):
                await asyncio.sleep(0.1)
            self._sending.append((time.monotonic() + SENDING_SECONDS, n_bytes))
        finally:
            self._waiting.remove(place)

    def _has_room(self, n_bytes: int) -> bool:
        while self._sending and self._sending[0][0] < time.monotonic():
            self._sending.popleft()
        return not self._sending or sum(other for _, other in self._sending) + n_bytes <= self._limit_bytes


def total_bytes(folder: Path) -> int:
    """The size of the files in a folder."""
    return sum(os.path.getsize(path) for path in folder.iterdir())
