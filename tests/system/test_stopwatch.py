"""Steps have their own seconds."""

import re
import subprocess
import sys
import time

import pytest

from helpers.common import PROJECT
from separation.system import stopwatch
from separation.system.stopwatch import Stopwatch, process_seconds


def test_each_step_has_the_time_since_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 101.5, 104.0])
    monkeypatch.setattr(stopwatch.time, "monotonic", lambda: next(times))
    watch = Stopwatch()
    assert watch.step("loading") == "loading: 1.5 s"
    assert watch.step("warm-up") == "warm-up: 2.5 s"


def test_the_seconds_of_a_process_count_from_its_start() -> None:
    code = "import time; time.sleep(0.3); from separation.system.stopwatch import *; print(process_seconds())"
    before = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d+\.\d+", run.stdout.strip())
    if sys.platform == "linux":
        assert 0.3 <= float(run.stdout) <= time.monotonic() - before + 0.1
        assert process_seconds() > float(run.stdout)
