"""A part of a song: from one time to another, or its loudest half minute."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from separation.errors import InputError

if TYPE_CHECKING:
    from separation.audio.waveform import Waveform

PREVIEW_SECONDS = 30


@dataclass(frozen=True)
class Excerpt:
    """A part of a song.

    Args:
        start_seconds: where it starts.
        end_seconds: where it ends; None, or a time after the song's end, means the song's end.
        is_preview: it is the loudest 30 seconds instead, which start at a whole second, or the whole of a shorter song.

    Raises:
        InputError: it is empty, starts before the song, or is a preview with times.
    """

    start_seconds: float = 0.0
    end_seconds: float | None = None
    is_preview: bool = False

    def __post_init__(self) -> None:
        start, end = self.start_seconds, math.inf if self.end_seconds is None else self.end_seconds
        if self.is_preview and (start, end) != (0.0, math.inf):
            raise InputError("a preview chooses its part of the song: leave out its start and end")
        if not (math.isfinite(start) and start >= 0):
            raise InputError(f"a part of a song cannot start at {start} s: choose a time from 0 on")
        if not end > start:
            raise InputError(f"a part from {_clock(start)} to {_clock(end)} is empty: choose an end after its start")

    def __str__(self) -> str:
        """As in the names of folders, such as `1m20s-1m50s`, `1m20s-end` or `preview`."""
        if self.is_preview:
            return "preview"
        end = "end" if self.end_seconds is None else _clock(self.end_seconds)
        return f"{_clock(self.start_seconds)}-{end}"

    def as_json(self) -> list[float | None] | str:
        """Its start and end in seconds, or "preview", as in JSON."""
        return "preview" if self.is_preview else [self.start_seconds, self.end_seconds]

    def seconds(self, mixture: "Waveform") -> tuple[float, float]:
        """Its start and end in a song, in seconds.

        Raises InputError if the song is over before it starts.
        """
        duration = mixture.n_samples / mixture.sample_rate
        if self.is_preview:
            start = loudest(mixture, PREVIEW_SECONDS)
            return float(start), min(duration, float(start + PREVIEW_SECONDS))
        if round(self.start_seconds * mixture.sample_rate) >= mixture.n_samples:
            raise InputError(
                f"a part from {_clock(self.start_seconds)} starts after the song's end at {_clock(duration)}: choose "
                "an earlier start"
            )
        return self.start_seconds, duration if self.end_seconds is None else min(self.end_seconds, duration)

    def samples(self, mixture: "Waveform") -> tuple[int, int]:
        """The samples `[start, stop)` of a song that it has, at least one.

        Raises InputError if the song is over before it starts.
        """
        start, stop = (round(seconds * mixture.sample_rate) for seconds in self.seconds(mixture))
        return start, max(stop, start + 1)


def loudest(wave: "Waveform", seconds: int) -> int:
    """The second at which the loudest `seconds` of a song start: the first of them, if several are equally loud."""
    energies = [_energy(wave, second) for second in range(-(-wave.n_samples // wave.sample_rate))]
    starts = range(max(1, wave.n_samples // wave.sample_rate - seconds + 1))
    return max(starts, key=lambda start: math.fsum(energies[start : start + seconds]))


def _energy(wave: "Waveform", second: int) -> float:
    start = second * wave.sample_rate
    samples: Any = wave.interleaved(start, min(start + wave.sample_rate, wave.n_samples)).astype("float64")
    return float((samples * samples).sum())


def _clock(seconds: float) -> str:
    """Seconds as minutes and seconds, such as 1m20s, 1m02.5s or 20s."""
    if not math.isfinite(seconds):
        return f"{seconds} s"
    minutes, rest = divmod(round(seconds, 3), 60)
    text = f"{rest:06.3f}".rstrip("0").rstrip(".") if rest % 1 else f"{rest:02.0f}"
    return f"{minutes:.0f}m{text}s" if minutes else f"{text.removeprefix('0')}s"
