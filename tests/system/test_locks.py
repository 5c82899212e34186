"""One holder at a time has a lock, also between processes."""

import subprocess
import sys
from pathlib import Path

import pytest

from helpers.common import PROJECT
from separation.system.locks import lock

HOLD = """
import sys, time
from pathlib import Path
from separation.system.locks import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_that_is_held_is_refused_without_waiting(tmp_path: Path) -> None:
    with lock(tmp_path / "lock"), pytest.raises(TimeoutError), lock(tmp_path / "lock", wait=False):
        pass
    with lock(tmp_path / "lock", wait=False):
        assert (tmp_path / "lock").exists()


def test_the_lock_of_a_killed_process_is_released(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, path], cwd=PROJECT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(TimeoutError), lock(path, wait=False):
            pass
        holder.kill()
    with lock(path):
        assert path.exists()


def test_a_lock_whose_file_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), lock(tmp_path / "file" / "lock"):
        pass
