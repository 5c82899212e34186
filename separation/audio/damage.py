"""Collects what is missing from a song while it is decoded, and decides whether the song is refused."""

import logging

from separation.errors import AudioError

MAX_MISSING_SHARE = 0.1  # a song is refused if a larger part of it is missing
MIN_MISSING_SECONDS = 0.05  # shorter losses are not reported

_MAX_LISTED = 4  # a message lists this many places and faults, and counts the rest

logger: logging.Logger = logging.getLogger("separation")


class DamagedError(AudioError):
    """Too much of a song is missing. The argument says what."""

    def __str__(self) -> str:
        remedy = "get the file again, or use what is there with --accept-damaged (in Python accept_damaged=True)"
        return f"{self.args[0]}: {remedy}"


class Damage:
    """The damage found in one song. After decoding, `judge` turns it into one warning, or refuses the song.

    All times are in seconds from the start of the song.

    Args:
        name: the song's name in quotes, for messages.
        accept: never refuse the song.
    """

    def __init__(self, name: str, *, accept: bool = False) -> None:
        self.name = name
        self.accept = accept
        self.holes: list[tuple[float, float]] = []  # start and length; filled with silence
        self.cut_seconds: float = 0.0  # missing at the end
        self._part_start = 0.0  # the song may be decoded in parts
        self._notes: list[str] = []
        self._doubts: list[str] = []
        self._unknown_cuts: list[str] = []

    def __bool__(self) -> bool:
        return bool(self.missing_seconds or self._notes or self._doubts or self._unknown_cuts)

    @property
    def missing_seconds(self) -> float:
        return sum(seconds for _, seconds in self.holes) + self.cut_seconds

    def start_part(self, start: float) -> None:
        """From now on, times that are passed to the other methods count from `start`."""
        self._part_start = start

    def time_in_song(self, time_in_part: float) -> float:
        return self._part_start + time_in_part

    def add_hole(self, start: float, seconds: float) -> None:
        """Samples are missing and replaced by silence. Adjacent holes are merged."""
        start = self.time_in_song(start)
        if self.holes and start <= sum(self.holes[-1]) + 1e-3:
            last_start, last_seconds = self.holes.pop()
            self.holes.append((last_start, last_seconds + seconds))
        else:
            self.holes.append((start, seconds))

    def add_cut(self, seconds: float) -> None:
        """Samples are missing at the end."""
        self.cut_seconds += seconds

    def add_unknown_cut(self, fault: str) -> None:
        """An unknown number of samples is missing at the end."""
        self._unknown_cuts.append(f"{fault}, and how much is missing is unknown")

    def add_note(self, fault: str) -> None:
        """There is a fault, but as far as is known no samples are missing."""
        self._notes.append(fault)

    def add_doubt(self, fault: str) -> None:
        """There is a fault, and an unknown number of samples is missing."""
        self._doubts.append(fault)

    def judge(self, decoded_seconds: float) -> None:
        """Log a warning if anything is wrong. Raises DamagedError if too much is missing, or an unknown amount.

        `decoded_seconds` include the silence in the holes.
        """
        whole = decoded_seconds + self.cut_seconds
        is_refused = bool(self._doubts or self._unknown_cuts) or self.missing_seconds > MAX_MISSING_SHARE * whole
        if is_refused and not self.accept:
            raise DamagedError(self._description(whole))
        if self:
            logger.warning("%s", self._description(whole))

    def _description(self, whole: float) -> str:
        """What is wrong with the song, which would last `whole` seconds if nothing were missing."""
        cuts, faults = self._cuts(whole), self._faults(whole)
        parts = [f"is cut short ({'; '.join(cuts)})"] if cuts else []
        if faults:
            parts.append(f"is damaged ({'; '.join(faults)})")
        return f"{self.name} {' and '.join(parts)}"

    def _cuts(self, whole: float) -> list[str]:
        if not self.cut_seconds:
            return self._unknown_cuts
        missing = f"the last {_seconds(self.cut_seconds)} of {whole:.2f} s are missing"
        return [f"{missing}, from {whole - self.cut_seconds:.2f} s on", *self._unknown_cuts]

    def _faults(self, whole: float) -> list[str]:
        faults = [*self._doubts, *self._notes]
        if len(faults) > _MAX_LISTED:
            faults[_MAX_LISTED:] = [f"{len(faults) - _MAX_LISTED} other faults"]
        return [self._missing(whole), *faults] if self.holes else faults

    def _missing(self, whole: float) -> str:
        """The holes, in words."""
        missing = f"{_seconds(sum(seconds for _, seconds in self.holes))} of {whole:.2f} s are missing"
        if len(self.holes) == 1:
            return f"{missing} at {self.holes[0][0]:.2f} s and replaced by silence"
        places = [f"{_seconds(seconds)} at {start:.2f} s" for start, seconds in self.holes[:_MAX_LISTED]]
        if len(self.holes) > _MAX_LISTED:
            places.append(f"{len(self.holes) - _MAX_LISTED} more")
        return f"{missing} and replaced by silence: {', '.join(places)}"


def counted(n: int, noun: str) -> str:
    """`1 page`, `2 pages`."""
    return f"{n:,} {noun}" + ("s" if n != 1 else "")


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.01 else f"{1000 * seconds:.1f} ms"
