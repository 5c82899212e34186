"""Separates songs, one by one or several at once."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

from separation.batch.job import Job, Outcome, Song
from separation.batch.separate import separate_song
from separation.checkpoints.load import load_model
from separation.device import parallel_devices
from separation.engine.cache import chosen_cache
from separation.engine.options import EngineOptions
from separation.engine.pool import ModelPool
from separation.engine.selection import Selection
from separation.engine.separator import Separator
from separation.progress import Progress
from separation.system.threads import Threads

logger: logging.Logger = logging.getLogger("separation")


def load_separators(
    selection: Selection, options: EngineOptions, n_songs: int, *, gpus: Sequence[int] = (), refresh: bool = False
) -> list[Separator]:
    """Load a separator for each GPU that `options.device` allows, or one for the CPU, and no more than there are songs.

    `gpus` are the numbers of the GPUs to use instead of all. See `load_separator`.
    """
    devices = parallel_devices(options.device, gpus)[:n_songs]
    return [load_separator(selection, replace(options, device=device), refresh=refresh) for device in devices]


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
    songs: Sequence[Song],
    job: Job,
    separators: Sequence[Separator],
    *,
    workers: int = 1,
    bar: Callable[[Path], AbstractContextManager[Progress]],
) -> Iterator[Outcome]:
    """Separate the songs and yield each outcome as soon as it is known.

    If this thread gets an exception, such as Ctrl-C, or the iterator is closed, the songs in progress are cancelled and
    leave no file behind.

    Args:
        songs: at least one.
        job: what to do with each.
        separators: one for each GPU, or one for the CPU.
        workers: songs at once on each separator. Its model works on one of them while others are decoded and encoded.
        bar: shows the progress of that song.
    """
    workers = min(workers, -(-len(songs) // len(separators)))
    if workers == len(separators) == 1:  # in this thread, which sees an exception at once
        for song in songs:
            with bar(song.path) as progress:
                outcome = separate_song(song, job, separators[0], progress)
            yield outcome
        return
    stopped = threading.Event()
    free: SimpleQueue[Separator] = SimpleQueue()
    for separator in [*separators] * workers:
        free.put(separator)

    def work(song: Song) -> Outcome:
        separator = free.get()
        try:
            with bar(song.path) as progress:
                return separate_song(song, job, separator, cancellable(progress, stopped))
        finally:
            free.put(separator)

    pool = Threads(max_workers=workers * len(separators))
    try:
        for future in as_completed([pool.submit(work, song) for song in songs]):
            yield future.result()
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


class _StoppedError(Exception):
    """Cancels a worker's song when the run ends."""


def cancellable(progress: Progress, stopped: threading.Event) -> Progress:
    """A progress that cancels its song once `stopped` is set."""

    def report(share: float, stage: str) -> None:
        if stopped.is_set():
            raise _StoppedError
        progress(share, stage)

    return Progress(report)
