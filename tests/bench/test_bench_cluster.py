"""cluster.py loses no song on a cluster with failures."""

import json
import subprocess
import sys

import pytest

from helpers.common import PROJECT

pytestmark = pytest.mark.slow


def test_each_song_is_done_once_although_workers_nodes_and_the_store_fail() -> None:
    for package in ("ray", "s3fs", "moto.server", "flask"):
        pytest.importorskip(package)
    script = PROJECT / "tests" / "bench" / "cluster.py"
    command = [sys.executable, "-W", "ignore", script, "--songs", "30", "--nodes", "3", "--kills", "2"]
    run = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    figures = json.loads(run.stdout)
    assert (figures["songs"], figures["objects"]) == (30, 90)
    assert (figures["workers killed"], figures["nodes removed"], figures["nodes added"]) == (2, 2, 1)
