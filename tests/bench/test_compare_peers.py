"""The tables of the comparison with other programs; the programs themselves do not run here."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from compare_peers import Calls, tables


def run(name: str, calls: list[float], *, others: float = 0.0) -> dict[str, Any]:
    return {
        "name": name,
        "audio_seconds": 8,
        "call_seconds": calls,
        "separate_seconds": sum(calls) + 1,
        "peak_mib": 1000,
        "others_cores": others,
    }


def rows(folder: Path, results: list[dict[str, Any]]) -> dict[str, list[str]]:
    (folder / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results), encoding="utf-8")
    cells = [[cell.strip() for cell in line.split("|")] for line in tables(folder) if line.startswith("|")]
    return {f"{cell[1]} {cell[2]}": cell[3:-1] for cell in cells[2:]}


def test_the_hops_are_found_in_what_the_model_was_called_with() -> None:
    song = np.random.default_rng(0).normal(size=(1, 2, 3000)).astype(np.float32)
    calls = Calls()
    calls.inputs = [song[..., start : start + 1000] for start in (0, 400, 1000, 2000)]
    assert calls.hops() == [400, 600, None]  # the last two do not overlap


def test_the_table_is_of_medians_and_of_ratios_to_this_engine(tmp_path: Path) -> None:
    measured = [run("ours", [2.0, 2.0]), run("ours", [4.0, 4.0]), run("ours", [3.0, 3.0, 3.0])]
    measured += [run("pymss", [9.0, 12.0, 15.0]), {"name": "pymss", "sdr_db": 61.4}]
    found = rows(tmp_path, measured)
    assert found["this engine default"] == ["3.00", "1.00", "3", "9.0", "1.00", "1000", "3", ""]
    assert found["pymss==2.1.12 default"] == ["12.00", "4.00", "3", "37.0", "4.11", "1000", "1", "61"]


def test_runs_that_others_disturbed_are_left_out(tmp_path: Path) -> None:
    found = rows(tmp_path, [run("ours", [2.0]), run("ours", [8.0], others=0.5), run("pymss", [9.0], others=1)])
    assert list(found) == ["this engine default"]
    assert found["this engine default"][0] == "2.00"
    assert next(tables(tmp_path)).startswith("2 disturbed runs")
