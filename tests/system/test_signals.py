"""A signal never leaves a half-finished song, is never lost, and always ends the program."""

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import common
from helpers.common import below, quick_first
from separation.batch.done import unfinished
from separation.batch.job import Job, Song
from separation.batch.separate import separate_song
from separation.engine.options import EngineOptions
from separation.engine.separator import Separator
from separation.progress import Progress
from separation.system import signals
from separation.system.output import OutputFolder
from separation.system.record import RECORD
from separation.system.signals import Stopping, uninterrupted


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stopping]:
    """Handle signals in this process as the command line does."""
    before = {number: signal.getsignal(number) for number in signals.NUMBERS}
    monkeypatch.setattr(signals, "_stopping", None)
    found = signals.install()
    found.began = True
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", signals.NUMBERS)
def test_signals_wait_for_the_end_of_an_uninterrupted_block(number: int, stopping: Stopping) -> None:
    steps = []

    def work() -> None:
        with uninterrupted():
            with uninterrupted():
                signal.raise_signal(number)
                steps.append("inner")
            steps.append("outer")
        steps.append("never")

    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as raised:
        work()
    assert steps == ["inner", "outer"]
    if number != signal.SIGINT:
        assert raised.value.code == 128 + number
    with pytest.raises(type(raised.value)):
        signals.check()  # the next progress callback raises it again


def test_other_threads_change_no_handler_and_the_main_thread_restores_them() -> None:
    before = {number: signal.getsignal(number) for number in signals.NUMBERS}
    ran = []

    def job() -> None:
        with uninterrupted():
            ran.append(True)

    thread = threading.Thread(target=job)
    thread.start()
    thread.join()
    with uninterrupted():
        assert {number: signal.getsignal(number) for number in signals.NUMBERS} != before
    assert ran and {number: signal.getsignal(number) for number in signals.NUMBERS} == before
    signals.check()  # no signal came


def test_an_echo_of_a_signal_is_ignored(stopping: Stopping) -> None:
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("step", quick_first(["publish", "write"], 1))
def test_a_signal_while_a_song_is_published_leaves_it_finished_and_recorded(
    step: str, stopping: Stopping, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "song.wav").write_bytes(common.song(0.3))
    song, job = Song(tmp_path / "song.wav", tmp_path / "out"), Job({})
    undisturbed = getattr(OutputFolder, step)

    def interrupted(folder: OutputFolder, *written: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return undisturbed(folder, *written)

    monkeypatch.setattr(OutputFolder, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        separate_song(song, job, Separator("demo", options=EngineOptions(device="cpu")), Progress())
    assert unfinished([song], job)[0] == []
    assert sorted(path.name for path in song.folder.iterdir()) == [RECORD, "instrumental.wav", "vocals.wav"]
    assert not below(tmp_path, ".separating-*")
