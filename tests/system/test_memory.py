"""Too little memory is one clear error, and the other songs are still separated."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import common
from helpers.command_line import DEMO
from helpers.common import PROJECT, slow
from separation import EstimateError, Separator
from separation.cli.main import main
from separation.engine.options import EngineOptions
from separation.errors import AudioError
from separation.models.bs_roformer import BSRoFormer
from separation.system import memory
from separation.system.memory import enough_memory, lacks_memory, release_memory, total_memory_bytes

HUGE = 2**60


def fail_in_onednn() -> None:
    raise RuntimeError("could not create a primitive")


SHORTAGES: dict[str, Callable[[], Any]] = {
    "PyTorch": lambda: torch.empty(HUGE, dtype=torch.uint8),
    "numpy": lambda: np.empty(HUGE, dtype=np.uint8),
    "Python": lambda: bytes(HUGE),
    "oneDNN": fail_in_onednn,
}


@pytest.mark.parametrize("kind", SHORTAGES)
def test_out_of_memory_errors_of_libraries_are_recognised(kind: str) -> None:
    with (
        pytest.raises(EstimateError, match=r"^'song\.wav' needs more memory than") as raised,
        enough_memory("'song.wav'"),
    ):
        SHORTAGES[kind]()
    assert str(raised.value).isprintable() and lacks_memory(raised.value.__cause__)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 3875040 bytes."),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
        RuntimeError("bad allocation"),
    ],
)
def test_out_of_memory_errors_of_other_systems_are_recognised(error: Exception) -> None:
    assert lacks_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(28, "No space left on device"),
        AudioError("'can't allocate memory.wav' does not exist: check the path"),
    ],
)
def test_other_errors_pass_through(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, enough_memory("'song.wav'"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("kind", ["PyTorch", slow("oneDNN")])
def test_a_song_that_needs_too_much_memory_does_not_stop_the_others(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("1.wav", "2.wav", "3.wav"):
        (tmp_path / name).write_bytes(common.song(0.3))
    forward, calls = BSRoFormer.forward, []

    def short(model: BSRoFormer, chunks: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        if len(calls) == 2:  # the second song, since each has one chunk
            SHORTAGES[kind]()
        return forward(model, chunks)

    monkeypatch.setattr(BSRoFormer, "forward", short)
    songs = [str(tmp_path / name) for name in ("1.wav", "2.wav", "3.wav")]
    assert main(["separate", *songs, "-o", str(tmp_path / "out"), *DEMO, "--retries", "0", "--json"]) == 2
    captured = capsys.readouterr()
    outcomes = {Path(line["song"]).name: line for line in map(json.loads, captured.out.splitlines())}
    assert [outcomes[f"{n}.wav"]["status"] for n in (1, 2, 3)] == ["done", "failed", "done"]
    assert outcomes["2.wav"]["error"].startswith("'2.wav' needs more memory than this computer has free (")
    assert len(captured.err.splitlines()) == 2 and not (tmp_path / "out" / "2").exists()


def test_a_mixture_that_needs_too_much_memory_is_an_estimate_error(monkeypatch: pytest.MonkeyPatch) -> None:
    separator = Separator("demo", options=EngineOptions(device="cpu"))
    monkeypatch.setattr(BSRoFormer, "forward", lambda *_: SHORTAGES["PyTorch"]())
    with pytest.raises(EstimateError, match="the mixture needs more memory"):
        separator.separate(torch.ones(2, 1000))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of a process's memory that counts libraries")
def test_too_little_memory_to_import_pytorch_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "song.wav").write_bytes(common.song(0.3))
    command = [sys.executable, "-m", "separation", "separate", tmp_path / "song.wav", "-o", tmp_path / "out"]
    run = subprocess.run(
        ["bash", "-c", 'ulimit -v 300000; exec "$@"', "bash", *command, "--recipe", "demo"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: the program needs more memory than this computer has free (")
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/meminfo")
def test_the_memory_is_the_computers_or_its_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kib = int(Path("/proc/meminfo").read_text().splitlines()[0].split()[1])
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CONTAINER_LIMITS", (limit, tmp_path / "missing"))
    assert total_memory_bytes() == kib * 1024
    for text, expected in (("max", kib * 1024), (str(2**63), kib * 1024), ("123456789", 123456789)):
        limit.write_text(text + "\n")
        assert total_memory_bytes() == expected


def test_the_memory_of_a_system_that_does_not_report_it_is_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf_names", {}, raising=False)
    assert total_memory_bytes() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the memory in use")
def test_released_memory_is_returned_to_the_system() -> None:
    code = """
import gc, os
from separation.system.memory import release_memory
def used(): return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
kept = [bytes(100_000) for _ in range(2000)]  # 200 MB in small pieces, then something behind them
behind = bytes(100_000)
del kept
before = used()
release_memory()
print(before - used())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    assert int(run.stdout) > 100e6


def test_memory_is_released_on_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    release_memory()
