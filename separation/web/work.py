"""The work on a song of the local page: download weights, separate, make the page to listen; with words and times."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from separation.analysis.facts import MIXTURE
from separation.analysis.song import analyse
from separation.audio.ffmpeg import is_installed
from separation.audio.options import STEM_FILE, OutputOptions
from separation.audio.video import is_video
from separation.checkpoints.catalogue import missing, read_config
from separation.checkpoints.download import fetch
from separation.engine.cache import Cache
from separation.engine.pool import ModelPool
from separation.engine.recipes import Recipe
from separation.engine.separator import DECODED, DECODING, ESTIMATED, Separator
from separation.errors import AudioError, CheckpointError, DownloadError, InputError
from separation.progress import Progress
from separation.report.page import Report, write_report
from separation.web.mixing import MIX, VIDEO
from separation.web.pace import Paces, SongPace
from separation.web.queued import LISTEN, PROJECT_SUFFIX, WORK_PREFIX, ZIP, QueuedSong

SEPARATED = 0.8  # share of the progress bar for the separation; the rest is for the analysis and the listening page
ANALYSED = 0.3  # share of that rest

logger: logging.Logger = logging.getLogger("separation")

# Called with the share that is done, the stage in words, and the seconds left if they can be told. It may raise.
Tell = Callable[[float, str, float | None], None]


@dataclass(frozen=True)
class Worker:
    """Separates songs.

    Args:
        pool: holds the models of the last song.
        cache: holds estimates, so that a whole song reuses what was computed for a part of it; None for none.
        max_seconds: the longest song.
    """

    pool: ModelPool
    cache: Cache | None
    max_seconds: float
    paces: Paces = field(default_factory=Paces)

    def work(self, song: QueuedSong, tell: Tell) -> None:
        """Make the stems of a song and the page to listen to them, and set its `files` and its `analysis`.

        Raises SeparationError if that fails, and what `tell` raises.
        """
        recipe = song.order.load()
        self._download(recipe, tell)
        expected = self.expected_seconds(song)
        tell(0.0, "Loading the models", expected)
        self.pool.keep_only(recipe.models)
        separator = _TimedSeparator(recipe, pool=self.pool, cache=self.cache)
        pace = SongPace(self.paces, song.order.choice, lambda: separator.seconds, 1 + len(recipe.stems))
        stages = _Stages(recipe, pace, tell, expected)
        stems = separator.separate_file(
            song.path,
            song.folder / "stems",
            song.order.output,
            max_seconds=self.max_seconds,
            accept_damaged=song.order.accept_damaged,
            progress=stages.separating,
        )
        song.files = {path.name: path for path in stems.values()}
        song.is_video = song.order.part is None and _is_video(song.path)
        try:
            self._analyse_and_write_page(song, stages)
        except AudioError as e:  # too long for a page
            song.problem = str(e)
        pace.end()

    def expected_seconds(self, song: QueuedSong) -> float | None:
        """How long a song will take; None if nothing tells."""
        return self.paces.total(song.order.choice, song.order.seconds(song.n_bytes), 1 + song.order.n_stems)

    def _download(self, recipe: Recipe, tell: Tell) -> None:
        """Download the weights that are missing.

        Raises InputError, whose message names no file on the server, if they cannot be had; a warning says more.
        """
        files = {file: name for name, stems in recipe.models.items() for file in missing(name, stems)}
        for file, name in files.items():
            title, started = _title(name), time.monotonic()

            def report(share: float, stage: str, title: str = title, started: float = started) -> None:
                took = time.monotonic() - started
                left = took / share * (1 - share) if share > 0.02 and took > 2 else None
                tell(share, f"Downloading {title}, once", left)

            try:
                fetch(file, quiet=True, progress=Progress(report))
            except DownloadError as e:
                logger.warning(e)
                raise InputError(
                    f"the weights of {title} could not be downloaded: connect the server to the internet, and send the "
                    "song again"
                ) from e
            except CheckpointError as e:
                logger.warning(e)
                raise InputError(
                    f"the weights of {title} are missing or wrong: do what the server's log says, or choose another "
                    "model"
                ) from e

    def _analyse_and_write_page(self, song: QueuedSong, stages: "_Stages") -> None:
        with TemporaryDirectory(prefix=WORK_PREFIX, dir=song.folder, ignore_cleanup_errors=True) as name:
            folder, part, analysed = Path(name), song.order.part, 0.0
            stems = {stem: path for stem, path in song.stems(folder).items() if stem != MIXTURE}
            if part is None:  # tempo and key of a part may not be the song's
                analysed = ANALYSED
                analysing = stages.finishing("Finding tempo and key").part(0, analysed)
                song.analysis = analyse(song.path, stems, folder=folder, progress=analysing)
            title = f"{song.name}, {part}" if part else song.name
            links = {"← all songs": "/", **_links(song)}
            report = Report(
                title,
                song.path,
                stems,
                links=links,
                mix=MIX,
                video=VIDEO if song.is_video else "",
                excerpt=part,
                analysis=song.analysis,
            )
            writing = stages.finishing("Making the listening page").part(analysed, 1)
            write_report(report, song.folder / LISTEN, progress=writing)
        song.files = {**song.files, LISTEN: song.folder / LISTEN}


def _is_video(path: Path) -> bool:
    try:
        return is_installed() and is_video(path)
    except AudioError:  # libsndfile reads more sound files than ffprobe
        return False


def _links(song: QueuedSong) -> dict[str, str]:
    """Links to the downloads of a song, by their texts."""
    if song.order.format == STEM_FILE:
        return {"↓ stem file": next(iter(song.downloads))}
    stems = {path.stem: name for name, path in song.downloads.items() if path.suffix != PROJECT_SUFFIX}
    archive = "REAPER project" if len(stems) < len(song.downloads) else "all"
    return {**{f"↓ {stem}": name for stem, name in stems.items()}, f"↓ {archive} as zip": ZIP}


class _TimedSeparator(Separator):
    """Notes how much music it separates."""

    seconds = 0.0

    def on_decoded(self, duration_seconds: float, options: OutputOptions) -> None:
        self.seconds = duration_seconds


class _Stages:
    """Turns the progress of the engine and of the report into words and times."""

    def __init__(self, recipe: Recipe, pace: SongPace, tell: Tell, expected: float | None) -> None:
        self._expected = expected
        self._models = {name: number for number, name in enumerate(recipe.models, 1)}
        self._pace, self._tell = pace, tell

    def separating(self, share: float, stage: str) -> None:
        """Progress of `separate_file`."""
        if stage in self._models:
            done = (share - DECODED) / (ESTIMATED - DECODED)
            number = f" ({self._models[stage]} of {len(self._models)})" if len(self._models) > 1 else ""
            words, left = f"Separating with {_title(stage)}{number}", self._pace.in_models(done, stage)
        elif stage == DECODING:
            words, left = "Reading the song", self._expected
        else:
            words, left = "Writing the stems", self._pace.after_models()
        self._tell(SEPARATED * share, words, left)

    def finishing(self, words: str) -> Progress:
        """Progress of everything after the stems are written."""

        def report(share: float, stage: str) -> None:
            self._tell(SEPARATED + (1 - SEPARATED) * share, words, self._pace.after_models(share))

        return Progress(report)


def _title(model: str) -> str:
    return read_config(model).facts.title or model
