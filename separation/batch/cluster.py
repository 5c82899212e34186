"""Separates songs on the machines of a Ray cluster, with a worker for each GPU and for each node without one.

Every machine needs this package, the weights or a way to download them, and a shared file system with the songs and the
output folder under the same paths. If a worker dies, another one separates its song. The records beside the stems say
which songs are done, so finished songs are never separated again.
"""

import logging
import os
import socket
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from separation.batch.job import AnySong, Job, Outcome
from separation.batch.run import cancellable
from separation.batch.staged import separate_anywhere
from separation.device import works
from separation.engine.separator import Separator
from separation.errors import InputError, SeparationError
from separation.progress import Progress

MAX_DEATHS = 3  # after this many dead workers, their song or their place in the cluster is given up
CONNECT_SECONDS = 10.0
POLL_SECONDS = 2.0  # how often to look for new nodes
STOP_SECONDS = 60.0  # how long workers may take to finish a chunk and remove their files

logger: logging.Logger = logging.getLogger("separation")

Place = tuple[str, int]  # where a worker runs: a node, and the index of one of its GPUs


class Worker:
    """A process on one of the machines, with its own models."""

    def __init__(self, load: Callable[[], Separator]) -> None:
        self._load = load
        self._stopped = threading.Event()

    @cached_property
    def _separator(self) -> Separator:
        return self._load()

    def load(self) -> str:
        """Load the models. Returns the error message, or an empty string."""
        try:
            self._separator  # noqa: B018
        except SeparationError as e:
            return f"{e} (on {socket.gethostname()})"
        return ""

    def separate(self, song: AnySong, job: Job) -> Outcome:
        """Separate a song."""
        if isinstance(song.path, Path) and not song.path.exists():
            host = socket.gethostname()
            error = (
                f"{song.path.name!r} does not exist on {host}: give --ray songs in a store or on a shared file system"
            )
            return Outcome(song.path, "failed", error)
        outcome = separate_anywhere(song, job, self._separator, cancellable(Progress(), self._stopped))
        if outcome.may_pass and not works(self._separator.device):  # it would fail every further song
            os._exit(1)  # another worker, which starts here, separates the song
        return outcome

    def stop(self) -> None:
        """Cancel the current song."""
        self._stopped.set()


def run(songs: Sequence[AnySong], job: Job, load: Callable[[], Separator], address: str) -> Iterator[Outcome]:
    """Separate the songs on a cluster and yield each outcome as soon as it is known.

    Nodes may join at any time. If the iterator is closed, the songs in progress are cancelled and leave no file behind.
    While it runs, `sys.stdout` is stderr, because Ray prints messages.

    Args:
        songs: songs with absolute paths.
        job: what to do with each.
        load: makes a worker's separator; it is pickled.
        address: the cluster's address, or `auto`.

    Raises:
        InputError: no cluster answers.
        SeparationError: no worker is left, or none can load the models.
    """
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal() and "/" not in host:
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()  # Ray retries for minutes
        ray.init(address, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as e:
        reason = str(e).strip().partition("\n")[0]
        raise InputError(f"no Ray cluster answers at {address!r} ({reason}): check the address") from e
    cluster = _Cluster(load)
    with redirect_stdout(sys.stderr):  # Ray prints messages from a thread
        try:
            yield from cluster.run(deque(songs), job)
        finally:
            cluster.stop()
            ray.shutdown()


class _Cluster:
    """The workers, and what each of them is doing."""

    def __init__(self, load: Callable[[], Separator]) -> None:
        self._load = load
        self._workers: dict[Place, Any] = {}
        self._idle: list[Place] = []
        self._busy: dict[Any, tuple[Place, AnySong | None]] = {}  # by Ray's reference; no song while models load
        self._deaths: Counter[Place | AnySong] = Counter()
        self._given_up: dict[Place, str] = {}  # places that get no more workers, and why

    def run(self, waiting: deque[AnySong], job: Job) -> Iterator[Outcome]:
        while waiting or any(song for _, song in self._busy.values()):
            self._start_workers()
            while waiting and self._idle:
                place, song = self._idle.pop(), waiting.popleft()
                self._busy[self._workers[place].separate.remote(song, job)] = place, song
            if not self._busy:
                why = next(iter(self._given_up.values()), "no node has a free CPU or GPU")
                raise SeparationError(f"the Ray cluster has no worker left ({why}): check its nodes")
            for reference in ray.wait(list(self._busy), timeout=POLL_SECONDS)[0]:
                place, current = self._busy.pop(reference)
                try:
                    answer = ray.get(reference)
                except RayTaskError:  # a bug in our own code, which surfaces as it would without a cluster
                    raise
                except RayError as e:
                    error = self._remove_dead(place, current, e)
                    if current and error:
                        yield Outcome(current.path, "failed", error)
                    elif current:
                        waiting.appendleft(current)
                    continue
                if current:
                    yield answer
                elif answer:
                    logger.warning("a worker is left out: %s", answer)
                    self._given_up[place] = answer
                    ray.kill(self._workers.pop(place))
                    continue
                self._idle.append(place)

    def _start_workers(self) -> None:
        """Start a worker at every place that has none."""
        list_nodes: Callable[[], list[dict[str, Any]]] = ray.nodes  # which Ray has not typed
        for node in list_nodes():
            resources = node["Resources"]
            n_cpus, n_gpus = resources.get("CPU", 0), int(resources.get("GPU", 0))
            for index in range(n_gpus or int(n_cpus > 0)):
                place = node["NodeID"], index
                if not node["Alive"] or place in self._workers or place in self._given_up:
                    continue
                self._workers[place] = (
                    ray.remote(Worker)
                    .options(
                        num_cpus=n_cpus / max(1, n_gpus),
                        num_gpus=int(n_gpus > 0),
                        max_concurrency=2,  # so that `stop` runs during `separate`
                        scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
                    )
                    .remote(self._load)
                )
                self._busy[self._workers[place].load.remote()] = place, None

    def _remove_dead(self, place: Place, song: AnySong | None, error: RayError) -> str:
        """Remove a worker that died. Returns an error if its song is given up."""
        # Idle workers on the same node may be dead too. Each of them would count as another death of the song.
        for lost in [place, *(idle for idle in self._idle if idle[0] == place[0])]:
            ray.kill(self._workers.pop(lost))  # it may only be unreachable
        self._idle = [idle for idle in self._idle if idle in self._workers]
        reason = str(error).strip().partition("\n")[0]
        logger.warning("a worker died%s: %s", f" on {song.path.name}" if song else "", reason)
        cause = song or place
        self._deaths[cause] += 1
        if self._deaths[cause] < MAX_DEATHS:
            return ""
        if song is None:
            self._given_up[place] = f"{MAX_DEATHS} workers died while loading the models, the last with: {reason}"
            return ""
        name = repr(song.path.name)
        return f"{MAX_DEATHS} workers died while separating {name} ({reason}): separate it alone to see why"

    def stop(self) -> None:
        """Have every worker cancel its song and remove its files."""
        separating = {reference: place for reference, (place, song) in self._busy.items() if song}
        for place in separating.values():
            self._workers[place].stop.remote()
        if separating:
            ray.wait(list(separating), num_returns=len(separating), timeout=STOP_SECONDS)
