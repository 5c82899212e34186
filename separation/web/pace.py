"""How long songs take: estimated from what has been measured, in this song and in those before it.

A song has two phases. In the first, models run; its pace is that of the chunks that are done. In the second, stems and
the listening page are written; until some of the page is done, only the songs before tell how long that takes.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

REST = 0.03  # seconds of the second phase, for a second of a track; an assumption until a song has been measured
TELLING = 0.15  # share of the page that must be done before its pace counts
STEPS = 3  # batches that must be done before the pace of a song counts
LATEST = 5  # songs that count for the next one

Clock = Callable[[], float]


@dataclass
class Paces:
    """What songs before took, for each choice of models: seconds for a second of music.

    The slowest of the latest songs counts, because a song whose estimates were cached says nothing about the next.
    """

    _models: dict[str, deque[float]] = field(default_factory=dict)
    _rest: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST))  # for a second of each track

    def models(self, choice: str, seconds: float) -> float | None:
        """How long the models take for so much music; None if no such song has been measured."""
        measured = self._models.get(choice)
        return max(measured) * seconds if measured else None

    def rest(self, seconds: float, n_tracks: int) -> float:
        """How long everything after the models takes."""
        return (max(self._rest) if self._rest else REST) * seconds * n_tracks

    def total(self, choice: str, seconds: float, n_tracks: int) -> float | None:
        """How long a song takes; None if no such song has been measured."""
        models = self.models(choice, seconds)
        return None if models is None else models + self.rest(seconds, n_tracks)

    def add_models(self, choice: str, seconds: float, took: float) -> None:
        self._models.setdefault(choice, deque(maxlen=LATEST)).append(took / seconds)

    def add_rest(self, seconds: float, n_tracks: int, took: float) -> None:
        self._rest.append(took / seconds / n_tracks)


class SongPace:
    """The pace of one song.

    Args:
        paces: of the songs before; this one is added to them.
        choice: what is wanted of it.
        seconds: how much music it is, once its models begin.
        n_tracks: the song and its stems.
    """

    def __init__(
        self,
        paces: Paces,
        choice: str,
        seconds: Callable[[], float],
        n_tracks: int,
        clock: Clock = time.monotonic,
    ) -> None:
        self._paces, self._choice, self._get_seconds, self._n_tracks = paces, choice, seconds, n_tracks
        self._clock = clock
        self._began: float | None = None  # when the models began
        self._ended: float | None = None  # when they ended
        self._model, self._steps = "", list[tuple[float, float]]()  # time and share, while this model runs

    @property
    def _seconds(self) -> float:
        return max(self._get_seconds(), 0.1)

    def in_models(self, share: float, model: str) -> float | None:
        """The seconds that are left when this share of the models' work is done, 0 to 1; None if nothing tells."""
        now = self._clock()
        self._began = now if self._began is None else self._began
        if model != self._model:
            self._model, self._steps = model, []
        if not self._steps or share > self._steps[-1][1]:
            self._steps.append((now, share))
        rest = self._paces.rest(self._seconds, self._n_tracks)
        left = self._left_of_models(now, share)
        return None if left is None else left + rest

    def _left_of_models(self, now: float, share: float) -> float | None:
        (first, first_share), (last, last_share) = self._steps[0], self._steps[-1]
        if len(self._steps) > STEPS and last > first:
            left = (1 - last_share) * (last - first) / (last_share - first_share)
            return max(0.0, left - (now - last))
        expected = self._paces.models(self._choice, self._seconds)
        return None if expected is None else expected * (1 - share)

    def after_models(self, share: float = 0.0) -> float:
        """The seconds that are left while the files are written, and this share of the page is done."""
        now = self._clock()
        if self._ended is None:
            self._ended = now
            if self._began is not None:
                self._paces.add_models(self._choice, self._seconds, now - self._began)
        if share >= TELLING:
            return (now - self._ended) * (1 - share) / share
        return max(0.0, self._paces.rest(self._seconds, self._n_tracks) - (now - self._ended))

    def end(self) -> None:
        """Everything is written."""
        if self._ended is not None:
            self._paces.add_rest(self._seconds, self._n_tracks, self._clock() - self._ended)
