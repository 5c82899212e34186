"""Separates songs, one by one or several at once."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from queue import SimpleQueue

from separation.batch.claims import Waiting
from separation.batch.job import AnySong, Job, Outcome
from separation.batch.staged import separate_anywhere
from separation.batch.urls import Location
from separation.checkpoints.load import load_model
from separation.device import is_out_of_memory, parallel_devices, works
from separation.engine.cache import chosen_cache
from separation.engine.options import EngineOptions
from separation.engine.pool import ModelPool
from separation.engine.selection import Selection
from separation.engine.separator import Separator
from separation.errors import EstimateError
from separation.progress import Progress
from separation.system.threads import Threads

logger: logging.Logger = logging.getLogger("separation")

Bar = Callable[[Location], AbstractContextManager[Progress]]


def load_separators(
    selection: Selection, options: EngineOptions, n_songs: int, *, gpus: Sequence[int] = (), refresh: bool = False
) -> list[Separator]:
    """Load a separator for each GPU that `options.device` allows, or one for the CPU, and no more than there are songs.

    `gpus` are the numbers of the GPUs to use instead of all. A GPU whose memory does not hold the models is left out;
    if that is so of all, raises EstimateError. See `load_separator` for other errors.
    """
    separators: list[Separator] = []
    full: RuntimeError | None = None
    devices = parallel_devices(options.device, gpus)[:n_songs]
    for device in devices:
        try:
            separators.append(load_separator(selection, replace(options, device=device), refresh=refresh))
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            full = e
            if len(devices) > 1:
                logger.warning("%s is left out: its memory does not hold the models", device)
    if not separators:
        raise EstimateError(
            "the GPU's memory does not hold the models: end other programs that use it, or choose precision bf16 or "
            "fp16, or device cpu"
        ) from full
    return separators


def load_separator(selection: Selection, options: EngineOptions, *, refresh: bool = False) -> Separator:
    """Load the selected models. The separator uses the cache that SEPARATION_CACHE names.

    With `refresh`, cached estimates are computed again. Raises what `Separator` raises.
    """
    pool = ModelPool(options)
    logger.info(pool.choice.reason)
    cache = chosen_cache(default=True, refresh=refresh)
    on_pool = replace(options, device="auto", precision="auto", attention="auto")  # the pool decides these
    if selection.model is None:
        return Separator(selection.load(), options=on_pool, pool=pool, cache=cache)
    (stems,) = selection.models().values()
    model = load_model(
        selection.model,
        checkpoint=selection.model_path,
        stems=stems,
        device=pool.choice.device,
        precision=pool.choice.precision,
        attention=options.attention,
    )
    return Separator.from_model(model, two_stems=selection.two_stems, only=selection.only, options=on_pool, cache=cache)


def run(
    songs: Sequence[AnySong],
    job: Job,
    separators: list[Separator],
    *,
    workers: int = 1,
    bar: Bar,
    afresh: Callable[[Sequence[AnySong]], Iterator[Outcome]],
) -> Iterator[Outcome]:
    """Separate the songs and yield each outcome as soon as it is known.

    If this thread gets an exception, such as Ctrl-C, or the iterator is closed, the songs in progress are cancelled and
    leave no file behind. Songs that another process is separating come last; see `separation.batch.claims`.

    Args:
        songs: at least one.
        job: what to do with each.
        separators: one for each GPU, or one for the CPU. Those whose GPU crashes are removed.
        workers: songs at once on each separator. Its model works on one of them while others are decoded and encoded.
        bar: shows the progress of that song.
        afresh: separates the songs that are left when no separator is; see `separation.batch.fresh`.
    """
    waiting = Waiting(songs)
    workers = min(workers, -(-len(songs) // max(1, len(separators))))
    if workers == len(separators) == 1:  # in this thread, which sees an exception at once
        while separators:
            with waiting.next(threading.Event()) as song:
                if song is None:
                    break
                outcome = _separate_next(song, job, separators, separators[0], bar)
            yield outcome
    elif separators:
        yield from _run_together(waiting, job, separators, workers, bar)
    if left := waiting.left():
        yield from afresh(left)


def _run_together(waiting: Waiting, job: Job, separators: list[Separator], workers: int, bar: Bar) -> Iterator[Outcome]:
    """Separate songs in threads, until none is waiting or no separator is left."""
    stopped = threading.Event()
    told: SimpleQueue[Outcome | BaseException | None] = SimpleQueue()  # None: a thread has ended

    def cancellable_bar(song: Location) -> AbstractContextManager[Progress]:
        return _cancellable_bar(bar, song, stopped)

    def work(separator: Separator) -> None:
        try:
            while separator in separators and not stopped.is_set():
                with waiting.next(stopped) as song:
                    if song is None:
                        break
                    outcome = _separate_next(song, job, separators, separator, cancellable_bar)
                told.put(outcome)
            told.put(None)
        except BaseException as e:
            told.put(e)

    pool = Threads(max_workers=workers * len(separators))
    try:
        n_running = len([pool.submit(work, separator) for separator in [*separators] * workers])
        while n_running:
            news = told.get()
            if isinstance(news, BaseException):
                raise news
            if news is None:
                n_running -= 1
            else:
                yield news
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def _separate_next(song: AnySong, job: Job, separators: list[Separator], separator: Separator, bar: Bar) -> Outcome:
    """Separate a song; if that crashes the GPU, remove the separator from the list."""
    with bar(song.path) as progress:
        outcome = separate_anywhere(song, job, separator, progress)
    if outcome.may_pass and not works(separator.device):
        with suppress(ValueError):  # another thread has removed it
            separators.remove(separator)
            logger.warning("%s has crashed and is used no more in this process", separator.device)
    return outcome


@contextmanager
def _cancellable_bar(bar: Bar, song: Location, stopped: threading.Event) -> Iterator[Progress]:
    with bar(song) as progress:
        yield cancellable(progress, stopped)


class _StoppedError(Exception):
    """Cancels a worker's song when the run ends."""


def cancellable(progress: Progress, stopped: threading.Event) -> Progress:
    """A progress that cancels its song once `stopped` is set."""

    def report(share: float, stage: str) -> None:
        if stopped.is_set():
            raise _StoppedError
        progress(share, stage)

    return Progress(report)
