"""Separates songs in a new process: a GPU that crashed stays unusable for the process in which it did."""

import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from separation.batch.job import AnySong, Job, Outcome
from separation.batch.run import Bar, run
from separation.batch.urls import Location, Url
from separation.engine.separator import Separator
from separation.errors import SeparationError
from separation.progress import Progress

STOP_SECONDS: float = 60.0  # how long the process may take to finish a chunk and remove its files

logger: logging.Logger = logging.getLogger("separation")

Load = Callable[[int], list[Separator]]  # the separators for so many songs


def run_afresh(songs: Sequence[AnySong], job: Job, load: Load, *, workers: int, bar: Bar) -> Iterator[Outcome]:
    """As `separation.batch.run.run`, in another process. If that dies or its GPUs crash, yet another one goes on.

    Raises SeparationError if a process cannot load the models.
    """
    waiting: dict[Location, AnySong] = {song.path: song for song in songs}
    while waiting:
        logger.warning("songs that are left for a new process: %d", len(waiting))
        process = _Process([*waiting.values()], job, load, workers)
        try:
            for outcome in process.outcomes(bar):
                del waiting[outcome.path]
                yield outcome
        finally:
            process.stop()


class _Process:
    """A process that separates songs and tells what it does."""

    def __init__(self, songs: Sequence[AnySong], job: Job, load: Load, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._news, writing = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(writing, songs, job, load, workers), daemon=True)
        self._process.start()
        writing.close()  # so that reading ends when the process does

    def outcomes(self, bar: Bar) -> Iterator[Outcome]:
        """What becomes of the songs, until the process ends. The songs that it dies with fail."""
        began = False
        with ExitStack() as stack:
            running: dict[Location, tuple[ExitStack, Progress]] = {}
            while (news := self._next()) is not None:
                match news:
                    case SeparationError():
                        raise news
                    case Outcome():
                        running.pop(news.path)[0].close()
                        yield news
                    case Path() | Url():
                        began, own = True, stack.enter_context(ExitStack())
                        running[news] = own, own.enter_context(bar(news))
                    case (Path() | Url() as song, share, stage):
                        running[song][1](share, stage)
                    case (int() as level, message):
                        logger.log(level, "%s", message)
        if not began:
            raise SeparationError("the new process died while it loaded the models: start the command again")
        for path in running:
            error = f"the process that separated {path.name!r} died: separate it alone to see why"
            yield Outcome(path, "failed", error, may_pass=True)

    def _next(self) -> Any:
        try:
            return self._news.recv()
        except (EOFError, ConnectionResetError):
            return None

    def stop(self) -> None:
        """End the process: it cancels its songs when it cannot tell anything any more."""
        self._news.close()
        self._process.join(STOP_SECONDS)
        self._process.kill()
        self._process.join()


def _work(news: Connection, songs: Sequence[AnySong], job: Job, load: Load, workers: int) -> None:
    """Separate songs; runs in the new process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the other process gets it, too, and closes the pipe
    lock = threading.Lock()

    def tell(what: Any) -> None:
        with lock:
            news.send(what)

    @contextmanager
    def bar(song: Location) -> Iterator[Progress]:
        tell(song)
        yield Progress(lambda share, stage: tell((song, share, stage)))

    handler = _Telling(tell)
    logger.addHandler(handler)
    try:
        for outcome in run(songs, job, load(len(songs)), workers=workers, bar=bar, afresh=_none):
            tell(outcome)
    except SeparationError as e:
        tell(e)
    except BrokenPipeError:  # the other process has ended or wants no more
        pass
    finally:
        logger.removeHandler(handler)


def _none(songs: Sequence[AnySong]) -> Iterator[Outcome]:
    """No outcomes: the other process starts the next one."""
    return iter(())


class _Telling(logging.Handler):
    """Tells log records to the other process."""

    def __init__(self, tell: Callable[[Any], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell((record.levelno, record.getMessage()))
