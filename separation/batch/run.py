"""Separates songs, one by one or several at once."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from separation.analysis.song import analyse
from separation.audio.beside import PROJECT, VIDEO
from separation.batch.done import (
    SongFile,
    add_run,
    analysis_of,
    check_folder,
    find_run,
    needs_analysis,
    needs_page,
    outcome_of,
)
from separation.batch.job import Job, Outcome, Song
from separation.checkpoints.load import load_model
from separation.device import parallel_devices
from separation.engine.cache import chosen_cache
from separation.engine.options import EngineOptions
from separation.engine.pool import ModelPool
from separation.engine.selection import Selection
from separation.engine.separator import Separator
from separation.engine.song_context import song_context
from separation.errors import SeparationError
from separation.progress import Progress
from separation.report.page import Report, write_report
from separation.system.output import OutputFolder
from separation.system.signals import uninterrupted
from separation.system.threads import Threads

SEPARATED = 0.7  # share of a song's progress bar for the separation, if an analysis or a page follows
ANALYSED = 0.5  # share of the rest for the analysis, if a page follows

logger = logging.getLogger("separation")


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


def separate_song(song: Song, job: Job, separator: Separator, progress: Progress) -> Outcome:
    """Write the song's stems, unless another process has, and then its page if the job wants one."""
    run, status = find_run(song, job), "skipped"
    warnings: list[str] = []
    try:
        with song_context(song.path.name) as warnings:
            check_folder(song, job, run)
            if run is None:
                run, status = _write_stems(song, job, separator, progress, warnings), "done"
            rest = progress.part(SEPARATED if status == "done" else 0, 1)
            if needs_analysis(job, run):
                run, status = _analyse(song, job, run, rest.part(0, ANALYSED if job.report else 1)), "done"
                rest = rest.part(ANALYSED, 1)
            if needs_page(song, job, run):
                run, status = _write_page(song, job, run, rest), "done"
    except (SeparationError, OSError) as e:  # OSError: the disk fails or is removed
        error = str(e) if isinstance(e, SeparationError) else f"{song.path.name!r} cannot be separated: {e}"
        if run is None:
            return Outcome(song.path, "failed", error, warnings=warnings)
        return outcome_of(song, "failed", run, error)
    return outcome_of(song, status, run)


def _write_stems(song: Song, job: Job, separator: Separator, progress: Progress, warnings: list[str]) -> dict[str, Any]:
    """Separate a song and record it; returns the recorded run."""
    source = SongFile(song).source()
    stems_progress = progress.part(0, SEPARATED if job.report or job.analyse else 1)
    with ExitStack() as finishing:

        def report(share: float, stage: str) -> None:
            stems_progress(share, stage)
            if share == 1.0:  # publishing follows: signals wait until the stems are recorded
                finishing.enter_context(uninterrupted())

        files = separator.separate_file(
            song.path,
            song.folder,
            replace(job.output, name=job.output.name and song.place.template),
            accept_damaged=job.accept_damaged,
            progress=report,
        )
        run = {
            "source": source,
            "settings": job.settings,
            "stems": {
                stem: (path.relative_to(song.folder).as_posix(), path.stat().st_size) for stem, path in files.items()
            },
            "duration_seconds": files.duration_seconds,
            "elapsed_seconds": files.elapsed_seconds,
            "gain": files.gain,
            "warnings": warnings,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        add_run(song, run)
    return run


def _stems_of(song: Song, run: dict[str, Any]) -> dict[str, Path]:
    """The stems' files, without the REAPER project and the video beside them."""
    files = outcome_of(song, "done", run).stems
    return {name: path for name, path in files.items() if name not in (PROJECT, VIDEO)}


def _analyse(song: Song, job: Job, run: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Analyse a song and record what was found; returns the recorded run. A page without it is to be written again."""
    stems = _stems_of(song, run)
    with OutputFolder(song.folder, record=song.place.record) as output:
        found = analyse(song.path, stems, excerpt=job.output.excerpt, folder=output.work, progress=progress)
    run = {**run, "analysis": found.as_json()}
    if job.report:
        run.pop("page_bytes", None)
    add_run(song, run)
    return run


def _write_page(song: Song, job: Job, run: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Write a song's listening page and record it; returns the recorded run."""
    stems, analysis = _stems_of(song, run), analysis_of(run)
    report = Report(
        song.path.name, song.path, stems, record=song.place.record, excerpt=job.output.excerpt, analysis=analysis
    )
    write_report(report, song.page, overwrite=job.output.overwrite, progress=progress)
    run = {**run, "page": song.page.name, "page_bytes": song.page.stat().st_size}
    add_run(song, run)
    return run
