"""Separates many short songs on a simulated Ray cluster, with failures, from and to a local S3 server.

    python tests/bench/cluster.py --songs 1000 --nodes 20 --kills 20
    python tests/bench/cluster.py --songs 60 --nodes 4 --kills 3      # in two minutes

Nodes are processes of this machine with one CPU each, so the throughput is that of the machine: what counts are the
seconds of work and the requests for each song. Meanwhile workers are killed in the middle of songs, two nodes are
removed, one is added, and the server stops twice. Afterwards each song must have one record, whose checksums are those
of the stems that are there, and some songs are separated again here and compared byte by byte.

Needs the packages ray, s3fs and moto[server]. Prints one JSON object.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

PROJECT = Path(__file__).parents[2]
RATE = 44100
HELD_STILL = 8  # seconds for which the server does not listen

SERVER = """
import sys, threading
sys.path.insert(0, "tests")
from helpers.s3_server import Server
server = Server()
print(server.port, flush=True)
for line in sys.stdin:
    server.stop() if line.strip() == "stop" else server.start()
    print("ok", flush=True)
"""


class S3Process:
    """A local S3 server in a process of its own, which can stop listening for a while."""

    def __init__(self) -> None:
        from helpers.s3_server import CREDENTIALS

        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | CREDENTIALS,
            text=True,
        )
        self.port = int(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def tell(self, what: str) -> None:
        """`stop` or `start` to listen."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def song(number: int) -> bytes:
    """Half a second of the demo song, from another place and at another level for each number, as FLAC."""
    from io import BytesIO

    start = number * 611 % (14 * RATE)
    samples = soundfile.read(
        PROJECT / "weights" / "demo" / "song.flac", dtype="float32", frames=RATE // 2, start=start
    )[0]
    target = BytesIO()
    soundfile.write(target, samples * np.float32(1 - number % 97 / 200), RATE, format="FLAC", subtype="PCM_24")
    return target.getvalue()


def workers() -> list[int]:
    """The processes on this machine that are separating a song now."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and b"ray::Worker.separate" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def resident_mib() -> float:
    """The memory of all workers together, in MiB, without what they share."""
    total = 0.0
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and b"ray::Worker" in (entry / "cmdline").read_bytes():
                fields = (entry / "statm").read_text().split()
                total += (int(fields[1]) - int(fields[2])) * 4096 / 2**20
    return total


class Failures:
    """Kills workers and nodes and stops the server, spread over a run by the number of songs that are done."""

    def __init__(self, cluster: Any, server: S3Process, n_songs: int, n_kills: int, nodes: list[Any]) -> None:
        self._cluster, self._server, self._nodes = cluster, server, nodes
        steps = [(n_songs * (index + 1) // (n_kills + 1), "kill") for index in range(n_kills)]
        steps += [(n_songs * share // 100, what) for share, what in ((25, "remove"), (40, "stop"), (50, "remove"))]
        steps += [(n_songs * share // 100, what) for share, what in ((60, "add"), (75, "stop"))]
        self._steps = sorted(steps)
        self.happened: Counter[str] = Counter()
        self._random = random.Random(17)
        self._threads: list[threading.Thread] = []

    def after(self, n_done: int) -> None:
        while self._steps and self._steps[0][0] <= n_done:
            step = getattr(self, f"_{self._steps.pop(0)[1]}")
            if step in (self._add, self._remove):  # Ray sets a signal handler, which only this thread may
                step()
                continue
            thread = threading.Thread(target=step)
            thread.start()
            self._threads.append(thread)

    def wait(self) -> None:
        for thread in self._threads:
            thread.join()

    def _kill(self) -> None:
        for _ in range(200):
            if separating := workers():
                with suppress(ProcessLookupError):
                    os.kill(self._random.choice(separating), signal.SIGKILL)
                    self.happened["workers killed"] += 1
                    return
            time.sleep(0.05)

    def _remove(self) -> None:
        self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)
        self.happened["nodes removed"] += 1

    def _add(self) -> None:
        self._nodes.append(self._cluster.add_node(num_cpus=1))
        self.happened["nodes added"] += 1

    def _stop(self) -> None:
        self._server.tell("stop")
        time.sleep(HELD_STILL)
        self._server.tell("start")
        self.happened["server stopped"] += 1


@contextmanager
def cluster_of(n_nodes: int) -> Iterator[tuple[Any, list[Any]]]:
    """A cluster with a head that does no work, and its nodes."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield cluster, [cluster.add_node(num_cpus=1, wait=False) for _ in range(n_nodes)]
    finally:
        cluster.shutdown()


def separated(address: str, bucket: str, on_outcome: Any) -> dict[str, Any]:
    """Run the command and return its last JSON object for each song."""
    command = [sys.executable, "-m", "separation", "separate", f"s3://{bucket}/music", "-o", f"s3://{bucket}/stems"]
    command += ["--recipe", "demo", "--device", "cpu", "--precision", "fp32", "--chunk-size", "4", "--overlap", "1"]
    command += ["--ray", address, "--retries", "2", "--json"]
    with tempfile.TemporaryFile("w+") as told:
        run = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=told, text=True)
        assert run.stdout is not None
        lines = {}
        for text in run.stdout:
            line = json.loads(text)
            assert line["song"] not in lines, f"{line['song']} was told twice"
            lines[line["song"]] = line
            on_outcome(len(lines))
        code = run.wait()
        told.seek(0)
        assert code == 0, told.read()[-3000:]
    return lines


def check_store(files: Any, bucket: str, n_songs: int) -> int:
    """Check that each song has one record, which describes the stems that are there; returns the number of objects."""
    objects = {
        name.partition("/")[2]: facts["ETag"].strip('"')
        for name, facts in files.find(f"{bucket}/stems", detail=True).items()
    }
    assert len(objects) == 3 * n_songs, len(objects)
    for number in range(n_songs):
        folder = f"stems/{number:04}"
        record = json.loads(files.cat_file(f"{bucket}/{folder}/.separation.json"))
        (run,) = record["runs"]
        assert run["source"]["path"] == f"s3://{bucket}/music/{number:04}.flac"
        assert run["objects"].keys() == {"vocals.wav", "instrumental.wav"}
        assert all(objects[f"{folder}/{name}"] == tag for name, tag in run["objects"].items())
    return len(objects)


def check_stems(files: Any, bucket: str, numbers: list[int]) -> None:
    """Separate some songs here and compare the stems byte by byte."""
    from separation import EngineOptions, Separator

    separator = Separator(
        "demo", options=EngineOptions("cpu", precision="fp32", chunk_seconds=4, overlap_seconds=1), cache=None
    )
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            path = Path(folder) / f"{number:04}.flac"
            path.write_bytes(song(number))
            for stem, written in separator.separate_file(path, Path(folder) / "out").items():
                there = files.cat_file(f"{bucket}/stems/{number:04}/{stem}.wav")
                assert there == written.read_bytes(), (number, stem)


def measure(n_songs: int, n_nodes: int, n_kills: int) -> dict[str, Any]:
    """Run it all; raises AssertionError if a song is missing, twice or wrong."""
    import fsspec

    from helpers.s3_server import CREDENTIALS

    server = S3Process()
    os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=f"http://127.0.0.1:{server.port}", no_proxy="127.0.0.1")
    os.environ.update(OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0", SEPARATION_CACHE="off")
    os.environ.update({"RAY_health_check_timeout_ms": "10000", "RAY_health_check_period_ms": "10000"})
    try:
        files = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
        files.mkdir(bucket := "songs")
        for number in range(n_songs):
            files.pipe_file(f"{bucket}/music/{number:04}.flac", song(number))
        with cluster_of(n_nodes) as (cluster, nodes):
            failures = Failures(cluster, server, n_songs, n_kills, nodes)
            peak, times = [0.0], [time.monotonic()]

            def on_outcome(n_done: int) -> None:
                failures.after(n_done)
                times.append(time.monotonic())
                if n_done % 10 == 0:
                    peak[0] = max(peak[0], resident_mib())

            lines = separated(cluster.address, bucket, on_outcome)
            failures.wait()
        counts = Counter(line["status"] for line in lines.values())
        # A song is skipped if its worker was killed after it had written the record.
        assert counts.keys() <= {"done", "skipped"} and counts["skipped"] <= failures.happened["workers killed"] + 2
        n_objects = check_store(files, bucket, n_songs)
        check_stems(files, bucket, sorted(random.Random(5).sample(range(n_songs), min(20, n_songs))))
    finally:
        server.close()
    seconds = times[-1] - times[1]
    return {
        "songs": n_songs,
        "nodes": n_nodes,
        **failures.happened,
        "objects": n_objects,
        "done before the worker died": counts["skipped"],
        "tried again": sum(line["tries"] > 1 for line in lines.values()),
        "seconds from the first song to the last": round(seconds, 1),
        "seconds to the first song": round(times[1] - times[0], 1),
        "songs a second": round((n_songs - 1) / seconds, 2),
        "seconds of separation a song": round(sum(line["elapsed_seconds"] for line in lines.values()) / n_songs, 3),
        "MiB of all workers": round(peak[0]),
    }


if __name__ == "__main__":
    sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--songs", type=int, default=1000)
    parser.add_argument("--nodes", type=int, default=20)
    parser.add_argument("--kills", type=int, default=20)
    args = parser.parse_args()
    print(json.dumps(measure(args.songs, args.nodes, args.kills), indent=1))
