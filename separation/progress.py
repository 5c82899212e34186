"""Progress of a job, reported to a callback."""

from collections.abc import Callable
from dataclasses import dataclass, replace

Report = Callable[[float, str], None]  # (share of the job done, 0 to 1; stage)

WAIT = 25  # logging level between INFO and WARNING: why somebody at a terminal has to wait


@dataclass(frozen=True)
class Progress:
    """Reports the progress of a job, or of the part of a larger job between two shares.

    Call it with the share of this part that is done, 0 to 1, and the stage. An exception that `report` raises cancels
    the job.

    Args:
        report: called with the share of the whole job that is done, 0 to 1, and the stage; None reports nothing.
        start, stop: the shares of the whole job at which this part starts and stops.
        stage: the default stage.
    """

    report: Report | None = None
    start: float = 0.0
    stop: float = 1.0
    stage: str = ""

    def __call__(self, share: float, stage: str = "") -> None:
        if self.report is not None:
            self.report(self.start + (self.stop - self.start) * share, stage or self.stage)

    def part(self, start: float, stop: float, stage: str = "") -> "Progress":
        """The progress of a part of this job, between two shares of it; `stage` is the part's default stage."""
        width = self.stop - self.start
        return replace(
            self, start=self.start + width * start, stop=self.start + width * stop, stage=stage or self.stage
        )
