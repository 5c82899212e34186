"""How far a job has come, told to whoever asked for it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

Report = Callable[[float, str], None]  # (share of the job done, 0 to 1; stage)


@dataclass(frozen=True)
class Progress:
    """Reports how much of a job is done, or of the part of a larger job between two shares.

    Call it with the share of its own part, from 0 to 1, and the stage. An exception that `report` raises cancels the
    job. Without `report`, nothing is reported.
    """

    report: Report | None = None
    start: float = 0.0
    stop: float = 1.0
    stage: str = ""

    def __call__(self, share: float, stage: str = "") -> None:
        if self.report is not None:
            self.report(self.start + (self.stop - self.start) * share, stage or self.stage)

    def part(self, start: float, stop: float, stage: str = "") -> "Progress":
        """The progress of the part of this job between two shares, whose stage has that name unless it says another."""
        width = self.stop - self.start
        return replace(
            self, start=self.start + width * start, stop=self.start + width * stop, stage=stage or self.stage
        )
