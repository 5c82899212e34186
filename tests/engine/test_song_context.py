"""song_context: warnings and errors name their song, each warning is logged once, and a full disk is a clear error."""

import errno
import json
import logging
import os
import pty
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from helpers import common
from helpers.command_line import DEMO
from helpers.common import below, quick_first
from helpers.house import modules
from separation import EstimateError, InputError, OutputError, Separator
from separation.batch.job import Job, Song
from separation.batch.separate import separate_song
from separation.cli.main import main
from separation.engine.cache import Cache
from separation.engine.options import EngineOptions
from separation.engine.song_context import song_context
from separation.progress import Progress
from separation.system.record import RECORD
from separation.system.threads import Threads

logger = logging.getLogger("separation")


def test_a_warning_in_the_context_names_its_song_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with song_context("a 100%.wav") as warnings:
        logger.warning("is %s", "loud")
        logger.warning("'a 100%.wav' is damaged")
        with song_context("other.wav") as inner:
            logger.warning("is loud")
            assert inner is warnings
        logger.info("of no concern")
    logger.warning("is loud")
    told = ["'a 100%.wav': is loud", "'a 100%.wav' is damaged"]
    assert warnings == told
    assert caplog.messages == [*told, "of no concern", "is loud"]


def test_a_thread_names_the_song_of_the_caller_that_submitted_the_job() -> None:
    with Threads(max_workers=1) as threads:
        found = {}
        for name in "ab":
            with song_context(name) as warnings:
                threads.submit(logger.warning, "from %s's thread", name).result()
                list(threads.map(logger.warning, [f"again {name}"]))
            found[name] = warnings
        threads.submit(logger.warning, "of nobody").result()
    assert found == {name: [f"'{name}': from {name}'s thread", f"'{name}': again {name}"] for name in "ab"}


def test_only_the_loading_of_weights_uses_threads_that_do_not_know_their_song() -> None:
    users = {name for name, path in modules().items() if "ThreadPoolExecutor" in path.read_text(encoding="utf-8")}
    assert users == {
        "separation.system.threads",
        "separation.checkpoints.state_dict",
    }  # the latter reads weights, before any song


@pytest.mark.parametrize("kind", [OutputError, EstimateError])
def test_errors_about_disks_and_models_name_the_song(kind: type[Exception]) -> None:
    with pytest.raises(kind) as raised, song_context("a.wav"):
        raise kind("the disk is full")
    assert str(raised.value) == "'a.wav': the disk is full"
    with pytest.raises(kind) as raised, song_context("a.wav"):
        raise kind("no room for 'a.wav'")
    assert str(raised.value) == "no room for 'a.wav'"
    with pytest.raises(InputError, match=r"^wrong$"), song_context("a.wav"):
        raise InputError("wrong")


def write_songs(folder: Path) -> dict[str, list[str]]:
    """Write songs, some of which cause warnings; returns words of the expected warnings by the songs' names."""
    samples = common.read(common.song(0.1))
    loud = samples / np.abs(samples).max() * 8
    folder.mkdir()
    expected: dict[str, list[str]] = {}
    for index in range(2):
        soundfile.write(folder / f"plain {index}.wav", samples, 44100, subtype="FLOAT")
        soundfile.write(folder / f"loud {index}.wav", loud * (1 + index), 44100, subtype="FLOAT")
        soundfile.write(folder / f"wide {index}.wav", np.tile(loud, 3), 44100, subtype="FLOAT")
        expected |= {f"plain {index}.wav": [], f"loud {index}.wav": ["peaks at"]}
        expected |= {f"wide {index}.wav": ["has 6 channels", "peaks at"]}
    return expected


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "3"])
def test_the_json_of_a_song_has_its_warnings_and_each_is_printed_once(
    workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    expected = write_songs(tmp_path / "music")
    arguments = ["separate", str(tmp_path / "music"), "-o", str(tmp_path / "out"), *DEMO, "--json"]
    arguments += ["--format", "flac", "--workers", workers, *(["--report"] if workers == "1" else [])]
    for status in ("done", "skipped"):
        caplog.clear()
        assert main(arguments) == 0
        found = {Path(line["song"]).name: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
        assert found.keys() == expected.keys()
        for name, words in expected.items():
            assert found[name]["status"] == status
            assert len(found[name]["warnings"]) == len(words)
            for warning, part in zip(found[name]["warnings"], words, strict=True):
                assert warning.startswith(repr(name)) and part in warning
            page = found[name].get("page")
            assert page == (str(tmp_path / "out" / Path(name).stem / "stems.html") if workers == "1" else None)
        told = sorted(warning for line in found.values() for warning in line["warnings"])
        assert sorted(caplog.messages) == (told if status == "done" else [])


def test_a_failed_song_has_its_warnings_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = np.zeros((1000, 6), dtype=np.float32)
    samples[500] = np.nan
    soundfile.write(tmp_path / "song.wav", samples, 44100, subtype="FLOAT")
    arguments = ["separate", str(tmp_path / "song.wav"), "-o", str(tmp_path / "out"), "--recipe", "demo", "--json"]
    assert main(arguments) == 2
    line = json.loads(capsys.readouterr().out)
    assert line["status"] == "failed" and "NaN" in line["error"]
    assert [warning[:26] for warning in line["warnings"]] == ["'song.wav' has 6 channels "]


@pytest.mark.slow
def test_warnings_are_printed_above_the_progress_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write_songs(tmp_path / "music")
    terminal, ours = pty.openpty()
    seen = bytearray()

    def look() -> None:
        while b"6 songs: 6 done" not in seen:
            seen.extend(os.read(terminal, 4096))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    root, handlers = logging.getLogger(), logging.getLogger().handlers[:]
    for handler in handlers:  # pytest's, beside which the command line sets up no log
        root.removeHandler(handler)
    try:
        with open(ours, "w", encoding="utf-8") as stream:
            monkeypatch.setattr(sys, "stderr", stream)
            arguments = ["separate", str(tmp_path / "music"), "-o", str(tmp_path / "out"), "--recipe", "demo"]
            assert main([*arguments, "--format", "flac", "--workers", "2"]) == 0
            thread.join(60)
    finally:
        root.handlers[:] = handlers
    os.close(terminal)
    lines = bytes(seen).decode().replace("\x1b[A", "").replace("\r", "\n").split("\n")
    for name, words in expected.items():
        told = [line for line in lines if line.startswith(repr(name))]
        assert len(told) == len(words) and all(any(part in line for line in told) for part in words)


# ---------------------------------------------------------------------------------------------------------------------
# Full disks


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """Limits the size of files: a larger one is an error, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def separator() -> Separator:
    return Separator("demo", options=EngineOptions(device="cpu"))


SAMPLES_BYTES = 4410 * 2 * 4  # of the song below, without a header
FULL: dict[str, tuple[int, str, Any]] = {
    "a temporary file": (SAMPLES_BYTES - 1, "cannot write to ", []),
    "a stem": (SAMPLES_BYTES, "cannot write ", []),
    "the record": (SAMPLES_BYTES + 10_000, "cannot write ", [RECORD]),
    "the page": (SAMPLES_BYTES + 10_000, "stems.html", [RECORD, "instrumental.wav", "vocals.wav"]),
}


@pytest.mark.parametrize("what", quick_first(FULL, 2))
def test_a_full_disk_is_an_error_that_names_the_song_and_the_folder(
    what: str, separator: Separator, tmp_path: Path
) -> None:
    n_bytes, words, left = FULL[what]
    (tmp_path / "song.wav").write_bytes(common.song(0.1))
    song, job = Song(tmp_path / "song.wav", tmp_path / "out"), Job({}, report=what == "the page")
    if what == "the record":  # a large one
        song.folder.mkdir()
        run = {"source": {}, "settings": {"x": "x" * n_bytes}, "stems": {}, "duration_seconds": 1}
        run |= {"elapsed_seconds": 1, "gain": 1}
        (song.folder / RECORD).write_text(json.dumps({"version": 1, "runs": [run], "files": []}))
    with largest_file(n_bytes):
        outcome = separate_song(song, job, separator, Progress())
    assert outcome.status == "failed"
    assert outcome.error.startswith("'song.wav': ") and words in outcome.error and str(song.folder) in outcome.error
    assert os.strerror(errno.EFBIG) in outcome.error and outcome.error.isprintable()
    assert sorted(path.name for path in below(tmp_path, "*") if path.parent == song.folder) == left
    assert song.folder.exists() == bool(left)
    assert bool(outcome.stems) == (what == "the page")


def test_a_cache_on_a_full_disk_is_a_warning_that_names_the_song(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    with song_context("song.wav") as warnings, largest_file(1000):
        cache.put({"a": 1}, [bytes(5000)], 5000, {})
    reason = os.strerror(errno.EFBIG)
    cache_warning = f"the cache in {tmp_path / 'cache'} cannot be used ({reason}): continuing without it"
    assert warnings == [f"'song.wav': {cache_warning}"]
    assert not below(tmp_path / "cache", "*.part") and not below(tmp_path / "cache", "*.f32")
