"""The command that measures a GPU: a dry run on the CPU, a step that crashes, and the tables."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import measure
import names
from results import REASONS, Results, read, tables
from steps import STEPS, BatchSizes

COMMAND = Path(measure.__file__)
NEEDS_GPU = {"small_memory", "kernels"}
SONGS_NEED_GPU = {f"{name}, how busy the GPU is" for name in (names.VIPERX, names.HTDEMUCS)}


def results(folder: Path) -> Results:
    return Results(folder / "results.jsonl", device="a card", started=time.monotonic(), clock=time.monotonic)


def run_of(folder: Path, **changes: Any) -> measure.Run:
    values: dict[str, Any] = {"device": "cpu", "tiny": True, "folder": folder, "weights": folder, "only": ()}
    now = time.monotonic()
    return measure.Run(**values | {"started": now, "until": now + 60} | changes)


@pytest.mark.slow
def test_a_dry_run_gives_a_row_for_every_step_and_no_error(tmp_path: Path) -> None:
    command = [sys.executable, str(COMMAND), "--tiny", "--device", "cpu"]
    command += ["--run", str(tmp_path / "run"), "--weights", str(tmp_path / "weights")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    rows = read(tmp_path / "run" / "results.jsonl")
    assert [row for row in rows if "error" in row] == []
    assert {row["device"] for row in rows} == {measure.device_name("cpu")}
    measured = [row for row in rows if not any(reason in row for reason in REASONS)]
    steps = {"tests", "environment", "correctness", "settled", "song", "network", "bar", "cold_start"}
    assert steps <= {row["step"] for row in measured}
    skipped = {row["step"] if row["step"] in NEEDS_GPU else row["what"] for row in rows if "skipped" in row}
    assert skipped == NEEDS_GPU | SONGS_NEED_GPU
    ours = {row["model"] for row in measured if row["step"] == "song"}
    assert ours == {names.VIPERX, names.HTDEMUCS, names.HTDEMUCS_FT, names.SW, names.KIM, names.MDX23C, names.SCNET_XL}
    for row in measured:
        if row["step"] == "network" and row["program"].startswith(("pymss", "bs-roformer-infer")):
            assert float(row["sdr_db"]) > 100  # same weights, same estimates
    missing = {row["what"] for row in rows if "missing" in row}
    peers_seen = {row["program"].split()[0] for row in measured if row["step"] in ("song", "network")}
    for distribution, what in (
        ("unblend", f"unblend, {names.UNBLEND_BATCH_SIZES[0]} chunks at once"),
        ("audio-separator", "audio-separator"),
        ("bs-roformer-infer", "msst"),
        ("pymss-core", "viperx beside pymss"),
    ):
        assert (distribution in peers_seen) != (what in missing)
    assert "### The bars" in (tmp_path / "run" / "tables.md").read_text(encoding="utf-8")


def test_the_names_of_the_steps_are_those_of_the_functions_in_their_order() -> None:
    assert tuple(STEPS) == names.STEPS


def test_rows_are_complete_lines_at_once_and_what_was_cut_off_is_left_out(tmp_path: Path) -> None:
    made = results(tmp_path)
    made.add("song", seconds=[1.23456, 2.0], times_realtime=float("inf"), peak_mib=None)
    with made.path.open("a", encoding="utf-8") as file:
        file.write('{"step": "cut')
    (row,) = made.rows()
    assert row == {"step": "song", "at": 0.0, "device": "a card", "seconds": [1.235, 2.0], "times_realtime": "inf"}


def test_the_tables_hold_figures_and_the_reasons_for_those_that_are_missing(tmp_path: Path) -> None:
    made = results(tmp_path)
    made.add("bar", work="viperx", ours=12.0, theirs=18.0, beside="pymss", ratio=1.5, bar="at least 1.2", met=True)
    made.add("song", what="unblend", missing="it is not installed")
    made.add("cold", what="the whole step", skipped="the time was up")
    made.add("viperx", what="the | step", error="RuntimeError: a kernel failed")
    lines = list(tables(made.rows()))
    assert "| viperx | 12.00 | pymss | 18.00 |  | 1.50 | at least 1.2 | yes |" in lines
    absent = lines[lines.index("### Not measured") :]
    assert "| song | unblend | it is not installed |" in absent
    assert "| cold | the whole step | the time was up |" in absent
    assert "| viperx | the \\| step | RuntimeError: a kernel failed |" in absent


def test_batch_sizes_are_noted_on_a_copy_of_the_model_too() -> None:
    import copy

    model = nn.Identity()
    sizes = BatchSizes(model)
    model(torch.zeros(1, 2))
    other = copy.deepcopy(model)
    for size in (3, 3, 2):
        other(torch.zeros(size, 2))
    assert sizes.usual() == 3
    model(torch.zeros(7, 2))
    assert sizes.usual() == 3


STEP_THAT_DIES = """
import os, sys
from pathlib import Path
steps = sys.argv[sys.argv.index("--steps") + 1 :]
folder = Path(sys.argv[sys.argv.index("--run") + 1])
for name in steps:
    with (folder / "begun").open("a") as file:
        file.write(name + "\\n")
    if name == "viperx":
        os.abort()
"""


def test_the_steps_behind_one_that_takes_the_process_down_still_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "measure.py").write_text(STEP_THAT_DIES, encoding="utf-8")
    monkeypatch.setattr(measure, "HERE", tmp_path)
    made = results(tmp_path)
    measure.supervise(run_of(tmp_path), made, [])
    assert (tmp_path / "begun").read_text().split() == list(names.STEPS)
    (row,) = made.rows()
    assert (row["step"], row["error"]) == ("viperx", "the process ended with -6")


@pytest.mark.slow
def test_a_step_that_hangs_is_ended_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = STEP_THAT_DIES.replace("os.abort()", "import time; time.sleep(600)")
    (tmp_path / "measure.py").write_text(hangs, encoding="utf-8")
    monkeypatch.setattr(measure, "HERE", tmp_path)
    monkeypatch.setattr(measure, "SILENT_SECONDS", 2)
    made = results(tmp_path)
    measure.supervise(run_of(tmp_path), made, [])
    (row,) = made.rows()
    assert (row["step"], row["error"]) == ("viperx", "no new figure for 2 s: it hung")
    assert (tmp_path / "begun").read_text().split() == list(names.STEPS)


def test_the_tables_of_an_earlier_run_can_be_printed_again(tmp_path: Path) -> None:
    results(tmp_path).add("kernel", kernel="a_kernel", launches=1200, milliseconds=2.5)
    command = [sys.executable, str(COMMAND), "--tables", str(tmp_path / "results.jsonl")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| `a_kernel` | 1,200 | 2.500 |" in ran.stdout.splitlines()
    assert json.loads((tmp_path / "results.jsonl").read_text())["device"] == "a card"
