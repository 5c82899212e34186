"""beside_work.py measures with and without a busy process."""

import sys
from pathlib import Path

import pytest

import beside_work
from separation.engine.chunk_plan import ChunkPlan

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the state of a process from /proc")


def state(pid: int) -> str:
    """R for running, T for stopped."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]


def test_the_process_is_busy_in_every_second_run_and_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    started, states = beside_work.subprocess.Popen, []
    processes = []

    def start(command: list[str]) -> object:
        processes.append(started(command))
        return processes[0]

    monkeypatch.setattr(beside_work.subprocess, "Popen", start)

    def job() -> None:
        for _ in range(1000):  # a signal takes a moment
            found = state(processes[0].pid)
            if (found == "T") == (len(states) % 2 == 0):
                break
        states.append(found)

    alone, beside = beside_work.seconds_alone_and_beside(job, 3)
    assert [each == "T" for each in states] == [True, False] * 3
    assert alone > 0 and beside > 0
    assert processes[0].poll() is not None


@pytest.mark.parametrize("reflects_border", [True, False])
@pytest.mark.parametrize("n_chunks", [2, 3, 6])
def test_the_noise_has_as_many_chunks_as_asked_for(n_chunks: int, reflects_border: bool) -> None:
    plan = ChunkPlan(1000, 500, reflects_border)
    assert len(plan.starts(beside_work.noise_of(plan, n_chunks).shape[1])) == n_chunks


@pytest.mark.slow
def test_a_row_for_each_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["beside_work.py", "demo", "demo", "--chunks", "2", "--rounds", "1"])
    beside_work.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("| `demo` | ") and line.count("|") == 5 for line in lines[2:])
