"""Songs that wait to be separated, each claimed by one process, so that commands on one output folder share the work.

A claim is a lock on a file beside the song's record, `.separation.lock`. The system releases it when its process ends,
however that ends. It is a claim on the record and not on the job, because only one process at a time may change a
record. Where files cannot be locked, and for stems in an object store, there are no claims: a song that two commands
separate at once is computed twice, and published once.
"""

import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from separation.batch.job import AnySong
from separation.system.locks import lock
from separation.system.output import present

POLL_SECONDS = 0.5  # how often to look whether another process has left a song
ATTEMPTS = 3  # to make a folder that others remove

logger: logging.Logger = logging.getLogger("separation")


class Waiting:
    """The songs that wait. Any thread may take one."""

    def __init__(self, songs: Sequence[AnySong]) -> None:
        self._songs = deque(songs)
        self._told = False

    def left(self) -> list[AnySong]:
        """The songs that nobody has taken."""
        return [*self._songs]

    @contextmanager
    def next(self, stopped: threading.Event) -> Iterator[AnySong | None]:
        """Take a song, which no other process separates until the block ends; None if none is left, or once `stopped`.

        Songs that another process has are taken last, when it has finished or left them.
        """
        n_refused = 0
        while not stopped.is_set():
            try:
                song = self._songs.popleft()
            except IndexError:
                break
            with claimed(song) as is_mine:
                if is_mine:
                    yield song
                    return
            self._songs.append(song)
            n_refused += 1
            if n_refused >= len(self._songs):
                self._tell(song, n_refused)
                stopped.wait(POLL_SECONDS)
                n_refused = 0
        yield None

    def _tell(self, song: AnySong, n_songs: int) -> None:
        if not self._told:
            self._told = True
            more = f" and {n_songs - 1} more" if n_songs > 1 else ""
            logger.warning("waiting for another command, which is separating %r%s", song.path.name, more)


@contextmanager
def claimed(song: AnySong) -> Iterator[bool]:
    """Whether this process has the song for itself until the block ends; False if another has it."""
    with ExitStack() as held:
        yield not isinstance(song.folder, Path) or _claim(song.folder, song.place.record, held)


def _claim(folder: Path, record: str, held: ExitStack) -> bool:
    """Claim a record, until `held` is closed. False if another process has it."""
    path = folder / Path(record).with_suffix(".lock")
    for _ in range(ATTEMPTS):
        try:
            with ExitStack() as own:
                own.enter_context(present(folder))
                own.enter_context(lock(path, wait=False))
                own.callback(_remove, path)
                held.push(own.pop_all())
            return True
        except TimeoutError:
            return False
        except FileNotFoundError:  # another process has just removed the folder, which was empty
            continue
        except OSError:  # there are no locks, or no folder can be made: whoever writes to it says why
            break
    return True


def _remove(path: Path) -> None:
    with suppress(OSError):  # Windows removes it when the lock is released
        path.unlink()
