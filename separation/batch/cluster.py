"""Songs over the machines of a Ray cluster: a worker for each GPU, or for a node without one, and a song at a time.

Every machine needs this package, the weights or a way to download them, and the songs and the output folder under the
same paths: a shared file system. What is done is told by the records beside the stems, not by the cluster: a song that
a worker had finished when it died is not done again, and one that it had not finished is done by another.
"""

import logging
import socket
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from separation.batch.songs import Job, Outcome, Song, separate_song, until
from separation.errors import InputError, SeparationError
from separation.progress import Progress

if TYPE_CHECKING:
    from separation.engine.separator import Separator

ATTEMPTS = 3  # a song, or a place for a worker, that so many workers died on is given up
CONNECT_SECONDS = 10.0
LOOK_SECONDS = 2.0  # how often new nodes are looked for
STOP_SECONDS = 60.0  # how long workers may take to reach a chunk's end and remove their files

logger = logging.getLogger("separation")

Place = tuple[str, int]  # a node, and the index of a GPU there


class Worker:
    """A process on some machine that holds the models."""

    def __init__(self, load: Callable[[], "Separator"]) -> None:
        self._load = load
        self._stopped = threading.Event()

    def load(self) -> str:
        """Load the models; returns what went wrong."""
        try:
            self._separator = self._load()
        except SeparationError as e:
            return f"{e} (on {socket.gethostname()})"
        return ""

    def separate(self, song: Song, job: Job) -> Outcome:
        if not song.path.exists():
            host = socket.gethostname()
            error = f"{song.path.name!r} is not there on {host}: --ray needs a file system that all machines share"
            return Outcome(song.path, "failed", error)
        progress = until(self._stopped, Progress())
        return separate_song(song, job, self._separator, progress)

    def stop(self) -> None:
        """Cancel the song at hand."""
        self._stopped.set()


def run(songs: Sequence[Song], job: Job, load: Callable[[], "Separator"], address: str) -> Iterator[Outcome]:
    """Do the songs, whose paths are absolute, on the cluster at that address; yields each when it is over.

    `load` makes a worker's separator. Nodes that come later take part. When the iterator is closed, the songs at hand
    are cancelled, and no file of them stays. Until then `sys.stdout` is stderr, for what Ray has to say.

    Raises InputError if no cluster answers, SeparationError if it has no worker, or no worker can load the models.
    """
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal() and "/" not in host:
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()  # Ray would try for minutes
        ray.init(address, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as e:
        reason = str(e).strip().partition("\n")[0]
        raise InputError(f"no Ray cluster can be used at {address!r}: {reason}") from e
    cluster = _Cluster(load)
    with redirect_stdout(sys.stderr):  # Ray's own messages, which it prints from a thread
        try:
            yield from cluster.run(deque(songs), job)
        finally:
            cluster.stop()
            ray.shutdown()


class _Cluster:
    def __init__(self, load: Callable[[], "Separator"]) -> None:
        self._load = load
        self._workers: dict[Place, Any] = {}
        self._idle: list[Place] = []
        self._busy: dict[Any, tuple[Place, Song | None]] = {}  # what is waited for; without a song: for the models
        self._deaths: Counter[Place | Song] = Counter()
        self._refused: dict[Place, str] = {}  # places that get no worker any more, and why

    def run(self, waiting: deque[Song], job: Job) -> Iterator[Outcome]:
        while waiting or any(song for _, song in self._busy.values()):
            self._start_workers()
            while waiting and self._idle:
                place, song = self._idle.pop(), waiting.popleft()
                self._busy[self._workers[place].separate.remote(song, job)] = place, song
            if not self._busy:
                why = next(iter(self._refused.values()), "it has no node with a CPU or a GPU for this")
                raise SeparationError(f"no worker of the Ray cluster is left: {why}")
            for reference in ray.wait(list(self._busy), timeout=LOOK_SECONDS)[0]:
                place, of = self._busy.pop(reference)
                try:
                    answer = ray.get(reference)
                except RayTaskError:  # raised by our own code: an error of ours, as it would be here
                    raise
                except RayError as e:
                    died_on = self._bury(place, of, e)
                    if of and died_on:
                        yield Outcome(of.path, "failed", died_on)
                    elif of:
                        waiting.appendleft(of)
                    continue
                if of:
                    yield answer
                elif answer:
                    logger.warning("a worker is left out: %s", answer)
                    self._refused[place] = answer
                    ray.kill(self._workers.pop(place))
                    continue
                self._idle.append(place)

    def _start_workers(self) -> None:
        """A worker for every place that has none."""
        for node in ray.nodes():
            resources = node["Resources"]
            n_cpus, n_gpus = resources.get("CPU", 0), int(resources.get("GPU", 0))
            for index in range(n_gpus or int(n_cpus > 0)):
                place = node["NodeID"], index
                if not node["Alive"] or place in self._workers or place in self._refused:
                    continue
                self._workers[place] = (
                    ray.remote(Worker)
                    .options(
                        num_cpus=n_cpus / max(1, n_gpus),
                        num_gpus=int(n_gpus > 0),
                        max_concurrency=2,  # `stop` beside `separate`
                        scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
                    )
                    .remote(self._load)
                )
                self._busy[self._workers[place].load.remote()] = place, None

    def _bury(self, place: Place, song: Song | None, error: RayError) -> str:
        """A worker died; returns why its song is given up, if it is."""
        # Those that are idle on its node may be gone as well, and would cost the song its attempts one after the other.
        for lost in [place, *(idle for idle in self._idle if idle[0] == place[0])]:
            ray.kill(self._workers.pop(lost))  # it may only have been out of reach
        self._idle = [idle for idle in self._idle if idle in self._workers]
        reason = str(error).strip().partition("\n")[0]
        logger.warning("a worker died%s: %s", f" on {song.path.name}" if song else "", reason)
        fallen = song or place
        self._deaths[fallen] += 1
        if self._deaths[fallen] < ATTEMPTS:
            return ""
        if song is None:
            self._refused[place] = f"{ATTEMPTS} workers died while they loaded the models, the last as {reason}"
        return f"{ATTEMPTS} workers died while they separated it, the last as {reason}: separate it alone to see why"

    def stop(self) -> None:
        """Let every worker cancel its song and remove its files."""
        at_work = {reference: place for reference, (place, song) in self._busy.items() if song}
        for place in at_work.values():
            self._workers[place].stop.remote()
        if at_work:
            ray.wait(list(at_work), num_returns=len(at_work), timeout=STOP_SECONDS)
