"""Songs whose failure may pass are tried again at the end, others are not."""

import errno
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.command_line import json_lines, separate, write_songs
from separation.batch import retry
from separation.batch import separate as one_song
from separation.batch.job import Outcome, Song
from separation.batch.retry import may_pass, retried
from separation.errors import AudioError, DownloadError, EstimateError, InputError, OutputError
from separation.system.memory import enough_memory
from separation.system.os_errors import output_errors

SONGS = [Song(Path(f"{name}.wav"), Path(name)) for name in "abc"]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were slept; nobody waits for them."""
    slept: list[float] = []
    monkeypatch.setattr(retry, "sleep", slept.append)
    return slept


@pytest.mark.parametrize(
    "retries, statuses, tries, expected_waits",
    [
        (0, ["failed", "failed", "failed"], [1, 1, 1], []),
        (1, ["failed", "done", "failed"], [1, 2, 2], [5]),
        (2, ["failed", "done", "done"], [1, 2, 3], [5, 20]),
        (9, ["failed", "done", "done"], [1, 2, 3], [5, 20]),
    ],
)
def test_only_failures_that_may_pass_are_tried_again(
    retries: int, statuses: list[str], tries: list[int], expected_waits: list[float], waits: list[float]
) -> None:
    counts: Counter[str] = Counter()
    rounds = []

    def attempt(songs: Sequence[Song], is_retry: bool) -> Iterator[Outcome]:
        rounds.append((is_retry, [song.path.stem for song in songs]))
        for song in songs:
            counts[song.path.stem] += 1
            failures = {"a": 9, "b": 1, "c": 2}[song.path.stem]
            failed = counts[song.path.stem] <= failures
            yield Outcome(song.path, "failed" if failed else "done", may_pass=failed and song.path.stem != "a")

    outcomes = {outcome.path.stem: outcome for outcome in retried(SONGS, attempt, retries)}
    assert [outcomes[name].status for name in "abc"] == statuses
    assert [outcomes[name].tries for name in "abc"] == tries
    assert rounds[:2] == [(False, ["a", "b", "c"]), (True, ["b", "c"])][: retries + 1]
    assert waits == expected_waits


def raised(error: Exception, cause: Exception) -> Exception:
    try:
        raise error from cause
    except Exception as e:
        return e


def output_error(number: int) -> Exception:
    try:
        with output_errors(Path("out")):
            raise OSError(number, "it failed")
    except OutputError as e:
        return e


def memory_error() -> Exception:
    try:
        with enough_memory("a song"):
            raise MemoryError
    except EstimateError as e:
        return e


@pytest.mark.parametrize(
    "error, expected",
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (output_error(errno.ESTALE), True),
        (output_error(errno.ETIMEDOUT), True),
        (TimeoutError("the store does not answer"), True),
        (ConnectionResetError(), True),
        (output_error(errno.ENOSPC), False),
        (output_error(errno.EACCES), False),
        (memory_error(), True),
        (raised(EstimateError("it does not fit"), torch.OutOfMemoryError("CUDA out of memory.")), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (DownloadError("it broke off"), True),
        (EstimateError("the model gave NaN"), False),
        (OutputError("is not ours"), False),
        (InputError("no such stem"), False),
        (RuntimeError("shapes differ"), False),
    ],
    ids=str,
)
def test_whether_a_failure_may_pass(error: Exception, expected: bool) -> None:
    assert may_pass(error, Path("missing.wav")) == expected


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux, where reading that file fails with EIO")
def test_a_song_that_cannot_be_decoded_may_pass_if_it_cannot_be_read_either(tmp_path: Path) -> None:
    (tmp_path / "words.mp3").write_text("words")
    assert not may_pass(AudioError("is not audio"), tmp_path / "words.mp3")
    assert may_pass(AudioError("is cut short"), Path("/proc/self/mem"))


def test_the_command_tries_again_and_says_how_often(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    write_songs(tmp_path / "music", "1.wav", "2.wav")
    (tmp_path / "music" / "bad.mp3").write_text("words")
    stale, decoded = {"1.wav": 1, "2.wav": 9}, one_song.Separator.separate_file

    def separate_file(self: Any, path: Path, *arguments: Any, **options: Any) -> Any:
        stale[path.name] = stale.get(path.name, 0) - 1
        if stale[path.name] >= 0:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return decoded(self, path, *arguments, **options)

    monkeypatch.setattr(one_song.Separator, "separate_file", separate_file)
    assert separate(tmp_path / "music", "-o", tmp_path / "out", "--json", "--retries", "1") == 2
    captured = capsys.readouterr()
    lines = {Path(line["song"]).name: line for line in json_lines(captured.out)}
    assert {name: (line["status"], line["tries"]) for name, line in lines.items()} == {
        "bad.mp3": ("failed", 1),
        "1.wav": ("done", 2),
        "2.wav": ("failed", 2),
    }
    assert "Stale file handle" in lines["2.wav"]["error"] and waits == [retry.BACKOFF_SECONDS]
    assert captured.err.splitlines()[-1] == "3 songs: 1 done, 2 failed"
