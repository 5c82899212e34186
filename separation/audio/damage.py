"""What of a song is missing or in doubt, gathered while it is decoded, and the line between going on and refusing."""

import logging

from separation.errors import AudioError

MAX_MISSING_SHARE = 0.1  # of a song; with more missing it is refused
MIN_MISSING_SECONDS = 0.05  # less is never told

_MAX_PLACES = 4  # named in a message

logger = logging.getLogger("separation")


class Damage:
    """Findings on one song. `judge` turns them into one warning, or into an error where too much is missing.

    All times are in seconds from the song's start. With `accept` nothing is refused.
    """

    def __init__(self, name: str, *, accept: bool = False) -> None:
        self.name = name
        self.accept = accept
        self.offset = 0.0  # seconds before the part of the song that is read now
        self.holes: list[tuple[float, float]] = []  # where, and how long: silence is in their place
        self.cut_seconds = 0.0  # missing at the end
        self._notes: list[str] = []
        self._doubts: list[str] = []

    def __bool__(self) -> bool:
        return bool(self.holes or self.cut_seconds or self._notes or self._doubts)

    @property
    def missing_seconds(self) -> float:
        return sum(seconds for _, seconds in self.holes) + self.cut_seconds

    def hole(self, at: float, seconds: float) -> None:
        """So much is missing there, and silent now. Holes that touch are one."""
        at += self.offset
        if self.holes and at <= sum(self.holes[-1]) + 1e-3:
            start, before = self.holes.pop()
            self.holes.append((start, before + seconds))
        else:
            self.holes.append((at, seconds))

    def cut(self, seconds: float) -> None:
        """So much is missing at the end."""
        self.cut_seconds += seconds

    def note(self, fault: str) -> None:
        """A fault by which nothing is missing, as far as can be told."""
        self._notes.append(fault)

    def doubt(self, fault: str) -> None:
        """A fault by which nobody knows how much is missing."""
        self._doubts.append(fault)

    def judge(self, seconds: float) -> None:
        """Warn of a song of which `seconds` were decoded, holes included, or raise `AudioError` that refuses it."""
        whole = seconds + self.cut_seconds
        refused = bool(self._doubts) or self.missing_seconds > MAX_MISSING_SHARE * whole
        if refused and not self.accept:
            raise AudioError(
                f"{self.name} {self._faults(whole)}; get the file again, or take what is there with --accept-damaged "
                "(in Python accept_damaged=True)."
            )
        if self:
            logger.warning("%s %s", self.name, self._faults(whole))

    def _faults(self, whole: float) -> str:
        """The end of a sentence that begins with the song, which lasts `whole` seconds with all that is missing."""
        parts, damages = [], [*self._doubts, *self._notes]
        if self.cut_seconds:
            at = whole - self.cut_seconds
            missing = f"the last {_seconds(self.cut_seconds)} of {whole:.2f} s are missing, from {at:.2f} s on"
            parts.append(f"is cut short: {missing}")
        if len(damages) > _MAX_PLACES:
            damages[_MAX_PLACES:] = [f"{len(damages) - _MAX_PLACES} other faults"]
        if self.holes:
            total = sum(seconds for _, seconds in self.holes)
            places = [f"{_seconds(length)} at {at:.2f} s" for at, length in self.holes[:_MAX_PLACES]]
            more = f" and {len(self.holes) - _MAX_PLACES} more" if len(self.holes) > _MAX_PLACES else ""
            where = f"{', '.join(places)}{more}"
            damages.insert(0, f"{_seconds(total)} of {whole:.2f} s are missing and silent instead ({where})")
        if damages:
            parts.append(f"is damaged: {', '.join(damages)}")
        return ", and ".join(parts)


def number(n: int, what: str) -> str:
    """`1 page`, `2 pages`."""
    return f"{n:,} {what}" + ("s" if n != 1 else "")


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.01 else f"{1000 * seconds:.1f} ms"
