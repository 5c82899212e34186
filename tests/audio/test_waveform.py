"""A waveform's temporary file, and what is said of a disk that takes no more."""

import errno
import os
from pathlib import Path

import pytest

from separation.audio.waveform import output_error


@pytest.mark.parametrize(
    "number, advice",
    [
        (errno.ENOSPC, "free some space there or choose another folder"),
        (errno.EDQUOT, "free some space there or choose another folder"),
        (errno.EFBIG, "free some space there or choose another folder"),
        (errno.EACCES, "choose a folder that you may write to"),
        (errno.EROFS, "choose a folder that you may write to"),
    ],
)
def test_a_full_disk_a_used_up_quota_and_a_limit_get_one_advice_and_a_closed_folder_another(
    number: int, advice: str
) -> None:
    reason = os.strerror(number)
    error = output_error("'vocals.wav'", Path("out/.stems-1"), OSError(number, reason))
    assert str(error) == f"cannot write 'vocals.wav' in 'out' ({reason}): {advice}"
