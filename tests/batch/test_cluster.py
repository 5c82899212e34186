"""Each song is separated once on a Ray cluster, even if a node dies in the middle of one."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import common
from helpers.common import PROJECT, below, read, started
from helpers.served_process import children
from separation.cli.main import main
from separation.system.record import RECORD

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the package ray"),
]
N_SONGS = 5


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Nodes:
    """Nodes of a cluster, each a process of `ray start`; the first offers no CPU."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{free_port()}"
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, *options: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *options]
        command += ["--object-store-memory", "100000000"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1"}
        log = self.folder / f"{len(self.running)}.log"
        with open(log, "wb") as stream:
            node = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=stream, stderr=stream)
        self.running.append(node)
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert time.monotonic() < deadline and node.poll() is None, log.read_text()
            time.sleep(0.1)

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """Kill all processes of a node at once, as if its machine lost power."""
        family = [node.pid]
        for process in family:
            family += children(process)
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, so that none sees another die
            for process in family:
                with suppress(ProcessLookupError):
                    os.kill(process, number)
        node.wait()
        self.running.remove(node)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # short, because Ray's sockets are below it
    nodes = Nodes(folder)
    host, port = nodes.address.split(":")
    try:
        nodes.start(
            "--head",
            "--num-cpus",
            "0",
            "--node-ip-address",
            host,
            "--port",
            port,
            "--include-dashboard",
            "false",
            "--temp-dir",
            str(folder),
        )
        for _ in range(2):
            nodes.start("--num-cpus", "1", "--address", nodes.address)
        yield nodes
    finally:
        for node in reversed(nodes.running.copy()):
            nodes.kill(node)
        shutil.rmtree(folder)


def command(*arguments: str | Path) -> list[str]:
    return ["separate", *map(str, arguments), "--recipe", "demo", "--device", "cpu", "--precision", "fp32"]


def separating(*arguments: str | Path) -> AbstractContextManager[subprocess.Popen[str]]:
    return started(*command(*arguments))


def in_progress(out: Path) -> set[Path]:
    """The folders of the songs in progress."""
    return {path.parent.parent for path in below(out, "waveform-*")}


def wait_for(n: int, out: Path, run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(in_progress(out)) < n:
        assert time.monotonic() < deadline and run.poll() is None, run.communicate()
        time.sleep(0.02)


def lines(text: str) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    songs = {Path(line["song"]).stem: line for line in found}
    assert len(songs) == len(found)  # each was printed once
    return songs


def test_a_killed_nodes_songs_move_to_another_and_a_cancelled_run_resumes(nodes: Nodes, tmp_path: Path) -> None:
    music, out = tmp_path / "music", tmp_path / "out"
    (music / "a").mkdir(parents=True)
    for index in range(N_SONGS):
        (music / "a" / f"{index}.wav").write_bytes(common.song(20, gain=1 - index / 100))
    (music / "bad.flac").write_text("words")
    options = [music, "-o", out, "--ray", nodes.address, "--json"]

    with separating(*options) as run:  # cancelled while two songs are in progress
        wait_for(2, out, run)
        run.send_signal(signal.SIGINT)
        printed, told = run.communicate(timeout=120)
    assert run.returncode == 130, told
    before = {path.parent.name: path.stat().st_mtime_ns for path in out.rglob(RECORD)}
    assert not list(out.rglob(".separating-*")) and len(before) < N_SONGS
    assert {path.name for path in (out / "a").glob("*")} == set(before) or not before

    with separating(*options) as run:  # one of two nodes is killed while two songs are in progress
        wait_for(2, out, run)
        nodes.kill(nodes.running[1])
        printed, told = run.communicate(timeout=300)
    assert run.returncode == 2, told
    songs = lines(printed)
    assert songs.pop("bad")["status"] == "failed"
    expected = {f"{index}": "skipped" if f"{index}" in before else "done" for index in range(N_SONGS)}
    assert {song: line["status"] for song, line in songs.items()} == expected
    assert "a worker died on " in told and "bad.flac: 'bad.flac' is " in told
    assert not list(out.rglob(".separating-*"))
    after = {path.parent.name: path.stat().st_mtime_ns for path in out.rglob(RECORD)}
    assert set(after) == set(expected) and before.items() <= after.items()

    assert main(command(music / "a" / "0.wav", "-o", tmp_path / "alone")) == 0
    for stem in ("vocals", "instrumental"):
        alone, together = (read(folder / "0" / f"{stem}.wav") for folder in (tmp_path / "alone", out / "a"))
        assert np.abs(alone - together).max() <= 1e-5


GPU_CODE = """
import os, sys
from pathlib import Path
from separation.batch import cluster
from separation.batch.job import AnySong, Job
from separation.batch.urls import Url
from separation.errors import SeparationError

def load():
    raise SeparationError("it sees GPU " + os.environ.get("CUDA_VISIBLE_DEVICES", "of all"))

song = AnySong(Url("s3", "bucket", "1.wav"), Path("out").absolute())
try:
    list(cluster.run([song], Job({}), load, sys.argv[1]))
except SeparationError as e:
    print(e)
"""


def test_each_worker_of_a_node_with_several_gpus_sees_one_of_them(nodes: Nodes) -> None:
    """Ray believes what a node says of its GPUs, so none is needed. The other two nodes have none."""
    nodes.start("--num-cpus", "4", "--num-gpus", "2", "--address", nodes.address)
    command = [sys.executable, "-c", GPU_CODE, nodes.address]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    ran = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=200)
    seen = sorted(line.partition("it sees GPU ")[2].partition(" (on")[0] for line in ran.stderr.splitlines())
    assert [gpu for gpu in seen if gpu.isdecimal()] == ["0", "1"], ran.stderr
    assert ran.stdout.startswith("the Ray cluster has no worker left (it sees GPU ")


def test_one_gpu_of_a_node_cannot_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "1.wav").write_bytes(common.song(0.3))
    arguments = ["separate", str(tmp_path / "1.wav"), "-o", str(tmp_path / "out"), "--ray", "auto"]
    assert main([*arguments, "--device", "cuda:1"]) == 2
    assert "--ray gives each worker a GPU of its own, not cuda:1: choose --device cuda" in capsys.readouterr().err


def test_a_missing_cluster_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "1.wav").write_bytes(common.song(0.3))
    with separating(tmp_path / "1.wav", "-o", tmp_path / "out", "--ray", f"127.0.0.1:{free_port()}") as run:
        _, told = run.communicate(timeout=120)
    assert run.returncode == 2, told
    assert told.splitlines()[-1].startswith("error: no Ray cluster answers at '127.0.0.1:")
    assert not (tmp_path / "out").exists()
