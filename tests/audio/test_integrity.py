"""What a file's header announces beside what is there."""

import pytest

from separation.audio.integrity import Audio


@pytest.mark.parametrize(
    "n_announced, n_there, share", [(100, 100, 0.0), (150, 100, 0.5), (400, 100, 3.0), (None, 100, 0.0), (50, 100, 0.0)]
)
def test_what_is_missing_is_a_share_of_what_is_there(n_announced: int | None, n_there: int, share: float) -> None:
    assert Audio(0, n_announced, n_there, is_wave=False).missing_share == share
