"""Separates one song, analyses it and writes its page, as far as that is not done."""

import logging
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from separation.analysis.song import analyse
from separation.audio.beside import PROJECT, VIDEO
from separation.audio.video import is_video
from separation.batch.done import (
    SongFile,
    add_run,
    analysis_of,
    check_folder,
    find_run,
    needs_analysis,
    needs_page,
    outcome_of,
    stem_paths,
)
from separation.batch.job import Job, Outcome, Song
from separation.batch.retry import may_pass
from separation.device import is_gpu_fault, is_out_of_memory
from separation.documents import first_line
from separation.engine.separator import Separator
from separation.engine.song_context import song_context
from separation.errors import AudioError, SeparationError
from separation.progress import Progress
from separation.report.page import Report, write_report
from separation.system.output import OutputFolder
from separation.system.signals import uninterrupted

logger: logging.Logger = logging.getLogger("separation")

SEPARATED = 0.7  # share of a song's progress bar for the separation, if an analysis or a page follows
ANALYSED = 0.5  # share of the rest for the analysis, if a page follows


def separate_song(song: Song, job: Job, separator: Separator, progress: Progress) -> Outcome:
    """Write the song's stems, unless another process has, and then its page if the job wants one."""
    run, status = find_run(song, job), "skipped"
    song = song.analysed(analysis_of(run or {}))
    warnings: list[str] = []
    try:
        with song_context(song.path.name) as warnings:
            check_folder(song, job, run)
            if run is None:
                run, status = _write_stems(song, job, separator, progress, warnings), "done"
                song = song.analysed(analysis_of(run))
            rest = progress.part(SEPARATED if status == "done" else 0, 1)
            if needs_analysis(job, run):
                run, status = _analyse(song, job, run, rest.part(0, ANALYSED if job.report else 1)), "done"
                rest = rest.part(ANALYSED, 1)
            if needs_page(song, job, run):
                run, status = _write_page(song, job, run, rest), "done"
    except (SeparationError, OSError, RuntimeError) as e:  # OSError: the disk fails or is removed
        if isinstance(e, RuntimeError) and not (is_out_of_memory(e) or is_gpu_fault(e)):
            raise
        told = str(e) if isinstance(e, SeparationError) else f"{song.path.name!r} cannot be separated: {first_line(e)}"
        failed = Outcome(song.path, "failed", told, warnings=warnings)
        failed = failed if run is None else outcome_of(song, "failed", run, told)
        return replace(failed, may_pass=may_pass(e, song.path))
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
            replace(job.output, name=job.output.name and song.place.template, video=_video(song, job)),
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
            **({"analysis": files.analysis.as_json()} if files.analysis else {}),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        add_run(song, run)
    return run


def _video(song: Song, job: Job) -> str | None:
    """What the sound of the song's video is to be; None, with a warning, if a song among videos has no picture."""
    if job.output.video is None or job.needs_picture:
        return job.output.video
    with suppress(AudioError):  # the decoder says more
        if not is_video(song.path):
            logger.warning("there is no picture, so only the stems are written")
            return None
    return job.output.video


def _stems_of(song: Song, run: dict[str, Any]) -> dict[str, Path]:
    """The stems' files, without the REAPER project and the video beside them."""
    return {name: path for name, path in stem_paths(song, run).items() if name not in (PROJECT, VIDEO)}


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
