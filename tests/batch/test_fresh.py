"""Songs are separated in a new process, which may die, too."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from helpers.command_line import files_in, write_songs
from helpers.common import below
from separation.audio.options import OutputOptions
from separation.batch.find import find
from separation.batch.fresh import run_afresh
from separation.batch.job import Job
from separation.batch.run import load_separators
from separation.engine.options import EngineOptions
from separation.engine.selection import Selection
from separation.engine.separator import Separator
from separation.errors import CheckpointError, SeparationError
from separation.progress import Progress
from separation.system.record import RECORD

pytestmark = pytest.mark.slow  # a new process imports PyTorch

LOAD = partial(load_separators, Selection("demo"), EngineOptions(device="cpu", precision="fp32"))
JOB = Job({}, output=OutputOptions("flac"))


class Bars:
    """Bars that count what they show, and interrupt the run at a call if wanted."""

    def __init__(self, interrupt_at: int = -1) -> None:
        self.shown: dict[str, list[float]] = {}
        self._interrupt_at = interrupt_at

    @contextmanager
    def __call__(self, song: Path) -> Iterator[Progress]:
        shares = self.shown.setdefault(song.name, [])

        def report(share: float, stage: str) -> None:
            shares.append(share)
            if len(shares) == self._interrupt_at:
                raise KeyboardInterrupt

        yield Progress(report)


def test_songs_are_separated_and_their_progress_and_warnings_are_passed_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_songs(tmp_path / "music", "1.wav", "2.wav", "3.wav")
    (tmp_path / "music" / "bad.mp3").write_text("words")
    songs, bars = find([str(tmp_path / "music")], tmp_path / "out").songs, Bars()
    outcomes = {outcome.path.name: outcome for outcome in run_afresh(songs, JOB, LOAD, workers=2, bar=bars)}
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "1.wav": "done",
        "2.wav": "done",
        "3.wav": "done",
        "bad.mp3": "failed",
    }
    assert files_in(tmp_path / "out" / "1") == [RECORD, "instrumental.flac", "vocals.flac"]
    assert bars.shown["2.wav"] == sorted(bars.shown["2.wav"]) and bars.shown["2.wav"][-1] == 1.0
    assert caplog.messages[0] == "songs that are left for a new process: 4"


def dying(marker: Path, n_songs: int) -> list[Separator]:
    """Separators whose process dies once, while it separates a song."""
    separators = LOAD(n_songs)
    if not marker.exists():
        marker.touch()
        Separator.on_decoded = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    return separators


def refused(n_songs: int) -> list[Separator]:
    raise CheckpointError("demo.safetensors is missing: download it")


def dead(n_songs: int) -> list[Separator]:
    os._exit(1)


def test_a_process_that_dies_fails_its_song_and_another_one_goes_on(tmp_path: Path) -> None:
    write_songs(tmp_path / "music", "1.wav", "2.wav")
    songs = find([str(tmp_path / "music")], tmp_path / "out").songs
    load = partial(dying, tmp_path / "died")
    first, second = run_afresh(songs, JOB, load, workers=1, bar=Bars())
    assert first.status == "failed" and first.may_pass and "the process that separated '1.wav' died" in first.error
    assert second.status == "done"


@pytest.mark.parametrize(
    "load, error", [(refused, "^demo.safetensors is missing"), (dead, "^the new process died while it loaded")]
)
def test_a_process_that_cannot_load_the_models_is_an_error(load: object, error: str, tmp_path: Path) -> None:
    write_songs(tmp_path / "music", "1.wav")
    songs = find([str(tmp_path / "music")], tmp_path / "out").songs
    with pytest.raises(SeparationError, match=error):
        list(run_afresh(songs, JOB, load, workers=1, bar=Bars()))  # type: ignore[arg-type]


def test_an_interruption_cancels_the_song_and_leaves_no_file(tmp_path: Path) -> None:
    write_songs(tmp_path / "music", "1.wav", seconds=60)
    songs = find([str(tmp_path / "music")], tmp_path / "out").songs
    with pytest.raises(KeyboardInterrupt):
        list(run_afresh(songs, JOB, LOAD, workers=1, bar=Bars(interrupt_at=3)))
    assert not below(tmp_path, ".separating-*") and not (tmp_path / "out").exists()
