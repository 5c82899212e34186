"""A cold start is measured in a process of its own; its stages cover it without gaps."""

import json
import time
from pathlib import Path

import pytest

from helpers.common import PROJECT, slow
from separation.cli.main import main

STAGES = ["interpreter", "imports", "read weights", "to device", "warm-up", "first stem"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads would only wait for each other while tests run in parallel."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def bench(*options: str) -> int:
    return main(["bench", "--cold-start", "--device", "cpu", "--precision", "fp32", *options])


@pytest.mark.slow
def test_the_stages_of_a_cold_start_add_up_to_less_than_the_whole_command(
    capfd: pytest.CaptureFixture[str],
) -> None:
    started = time.monotonic()
    assert bench("--recipe", "demo", "--json") == 0
    elapsed = time.monotonic() - started
    found = json.loads(capfd.readouterr().out)
    stages = found["stages_seconds"]
    assert list(stages) == STAGES
    assert min(stages.values()) >= 0 and all(stages[stage] > 0 for stage in STAGES if stage != "to device")
    assert found["total_seconds"] == pytest.approx(sum(stages.values()), abs=1e-3)
    assert elapsed / 2 < found["total_seconds"] < elapsed
    assert found["weight_bytes"] == (PROJECT / "weights" / "demo" / "demo.safetensors").stat().st_size
    assert found["read_weights_per_plain_read"] > 1
    assert "device cpu (requested), precision fp32" in found["device"]


@pytest.mark.slow
def test_a_cold_start_with_other_weights_is_shown_as_a_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "own.safetensors"
    weights.symlink_to(PROJECT / "weights" / "demo" / "demo.safetensors")
    assert bench("--model-name", "demo", "--model-path", str(weights)) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split() == ["stage", "seconds", "share"]
    assert [line[:14].strip() for line in lines[1:8]] == [*STAGES, "first stem by"]
    assert sum(int(line.split()[-1].removesuffix("%")) for line in lines[1:7]) in range(97, 104)


@pytest.mark.parametrize(
    "options, words",
    [
        (("--model-path", "x.ckpt"), "there is no file 'x.ckpt'"),
        (("--model-name", "demo", "--model-path", "nothing.ckpt"), "there is no file 'nothing.ckpt'"),
        (("--model-name", "nonsense"), "unknown model 'nonsense'"),
        (("--recipe", "nonsense"), "unknown recipe 'nonsense'"),
        slow((("--recipe", "demo", "--device", "abacus"), "unknown device 'abacus'")),  # raised in the fresh process
    ],
)
def test_an_impossible_cold_start_is_a_one_line_error(
    options: tuple[str, ...], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert bench(*options) == 2
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and words in captured.err
