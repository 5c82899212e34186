"""Progress: parts of a job report shares of the whole."""

import pytest

from separation.progress import Progress


def test_a_part_reports_its_share_of_the_whole_and_its_stage() -> None:
    seen: list[tuple[float, str]] = []
    whole = Progress(lambda share, stage: seen.append((share, stage)))
    half = whole.part(0.5, 1.0, "second")
    half(0.5)
    half.part(0.0, 0.5)(1.0, "named")
    whole(1.0, "done")
    assert seen == [(0.75, "second"), (0.75, "named"), (1.0, "done")]


def test_without_a_listener_nothing_is_reported() -> None:
    Progress().part(0.2, 0.4)(0.5, "stage")


def test_an_exception_of_the_listener_reaches_the_job() -> None:
    def cancel(share: float, stage: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Progress(cancel).part(0.0, 0.5)(1.0)
