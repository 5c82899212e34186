"""Songs are separated and the exit code is right, even if a stream is closed or full, or a signal arrives."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import common
from helpers.command_line import DEMO
from helpers.common import PROJECT, below, quick_first, slow
from separation.cli.main import main
from separation.system.record import RECORD

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
FULL = Path("/dev/full")

needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two songs, music/1.wav and music/2.wav, and their stems in out."""
    folder = tmp_path_factory.mktemp("done")
    (folder / "music").mkdir()
    for name in ("1.wav", "2.wav"):
        (folder / "music" / name).write_bytes(common.song(0.3))
    assert main(["separate", str(folder / "music"), "-o", str(folder / "out"), *DEMO]) == 0
    return folder


def shell(folder: Path, redirections: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `separate` on the folder's songs in a shell, with redirections or a pipe."""
    command = [sys.executable, "-m", "separation", "separate", str(folder / "music"), "-o", str(folder / "out")]
    line = f"{shlex.join([*command, *DEMO])} {redirections}"
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        cwd=PROJECT,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
    )


NO_SPACE = "error: cannot write to the standard output: No space left on device"


@needs_full
@pytest.mark.parametrize(
    "redirections, code, out, err",
    quick_first(
        [
            ("", 0, 2, ["2 songs: 2 skipped"]),
            (">&-", 0, 0, ["2 songs: 2 skipped"]),
            ("2>&-", 0, 2, []),
            ("<&- >&- 2>&-", 0, 0, []),
            (">/dev/full", 1, 0, ["2 songs: 2 skipped", NO_SPACE]),
            ("2>/dev/full", 0, 2, []),
            (">/dev/full 2>/dev/full", 1, 0, []),
            (">/dev/full 2>&-", 1, 0, []),
            (">&- 2>/dev/full", 0, 0, []),
            ("| head -0", 1, 0, ["2 songs: 2 skipped"]),
            ("2>&1 >/dev/null | head -0", 0, 0, []),
            ("2>&1 | head -0", 1, 0, []),
        ],
        4,
    ),
)
def test_closed_and_full_streams_change_only_the_exit_code(
    redirections: str, code: int, out: int, err: list[str], done: Path
) -> None:
    run = shell(done, redirections)
    assert run.stderr.splitlines() == err
    assert (run.returncode, len(run.stdout.splitlines())) == (code, out)


@needs_full
@pytest.mark.slow
@pytest.mark.parametrize("redirections", [">&- 2>&-", ">/dev/full 2>/dev/full", "| head -0"])
def test_all_songs_are_separated_even_if_nothing_can_be_printed(redirections: str, done: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(done / "music", tmp_path / "music")).parent
    (copy / "music" / "0.wav").write_text("words")
    run = shell(copy, redirections)
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    assert [path.parent.name for path in sorted(below(copy / "out", RECORD))] == ["1", "2"]
    assert not below(copy, ".separating-*")


@needs_full
def test_help_that_cannot_be_printed_is_exit_code_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "separation", "--help"]
    with FULL.open("w") as full:
        run = subprocess.run(command, cwd=PROJECT, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (run.returncode, run.stderr) == (1, f"{NO_SPACE}\n")


def test_a_non_blocking_pipe_gets_every_line(done: Path) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    command = [sys.executable, "-m", "separation", "models", "list", "--json"]
    with subprocess.Popen(command, cwd=PROJECT, stdout=writing, env=ENVIRONMENT) as run:
        os.close(writing)
        time.sleep(0.5)  # the pipe is full by then, unless it holds everything
        with open(reading, encoding="utf-8") as pipe:
            lines = pipe.read().splitlines()
    assert run.returncode == 0
    assert {json.loads(line)["name"] for line in lines} >= {"demo", "htdemucs"}


@pytest.mark.parametrize(
    "number, module",
    [
        (signal.SIGINT, "separation.cli.start"),
        (signal.SIGINT, "argparse"),
        (signal.SIGINT, "separation.checkpoints.catalogue"),
        slow((signal.SIGINT, "numpy.linalg")),
        slow((signal.SIGINT, "torch._C")),
        (signal.SIGTERM, "argparse"),
        slow((signal.SIGTERM, "numpy.linalg")),
    ],
)
def test_a_signal_during_the_imports_ends_the_program_without_a_traceback(
    number: signal.Signals, module: str, tmp_path: Path
) -> None:
    (tmp_path / "song.wav").write_bytes(common.song(60))
    command = [sys.executable, "-X", "importtime", "-m", "separation", "separate", tmp_path / "song.wav"]
    with subprocess.Popen(
        [*command, "-o", tmp_path / "out", "--recipe", "demo"],
        cwd=PROJECT,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:
        assert run.stderr is not None
        while not run.stderr.readline().endswith(f" {module}\n"):  # a line for each module that is imported
            assert run.poll() is None
        run.send_signal(number)
        told = [line for line in run.stderr.read().splitlines() if not line.startswith("import time:")]
    assert run.returncode in (128 + number, -number)  # the same to a shell
    assert told in ([], ["cancelled"])
    assert [path.name for path in tmp_path.iterdir()] == ["song.wav"]


@pytest.mark.parametrize("number", quick_first([signal.SIGINT, signal.SIGHUP], 1))
def test_signals_that_the_parent_process_ignores_stay_ignored(number: signal.Signals, done: Path) -> None:
    command = [sys.executable, "-m", "separation", "separate", done / "music", "-o", done / "out", *DEMO]
    with subprocess.Popen(
        command,
        cwd=PROJECT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_IGN),
    ) as run:
        for _ in range(30):
            time.sleep(0.02)
            run.send_signal(number)
        _, err = run.communicate(timeout=60)
    assert (run.returncode, err.splitlines()) == (0, ["2 songs: 2 skipped"])


def test_a_reader_that_goes_away_causes_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "separation", "models", "list"]
    run = subprocess.run(command, cwd=PROJECT, env=ENVIRONMENT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (run.stderr, run.returncode) == ("", 1)
