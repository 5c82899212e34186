"""How long the steps of a start take."""

import os
import time
from pathlib import Path


class Stopwatch:
    """Names steps with the seconds that each took."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def step(self, what: str) -> str:
        """A line with the time since the previous step, or since the start."""
        now, last = time.monotonic(), self._last
        self._last = now
        return f"{what}: {now - last:.1f} s"


def process_seconds() -> float:
    """For how long this process has run; on systems other than Linux, its CPU time."""
    status, uptime = Path("/proc/self/stat"), Path("/proc/uptime")
    if not status.exists():
        return time.process_time()
    started_ticks = int(status.read_text(encoding="ascii").rpartition(")")[2].split()[19])
    return float(uptime.read_text(encoding="ascii").split()[0]) - started_ticks / os.sysconf("SC_CLK_TCK")
