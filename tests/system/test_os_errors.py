"""A failed write is an OutputError that names the place, the reason and the way out."""

import errno
import os
from pathlib import Path

import pytest

from separation.errors import OutputError
from separation.system.os_errors import output_errors, staging


def message(error: Exception, target: Path = Path("/out/song.wav"), **options: str) -> str:
    with pytest.raises(OutputError) as caught, output_errors(target, RuntimeError, **options):
        raise error
    assert caught.value.__cause__ is error
    return str(caught.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_asks_for_free_space_first(number: int) -> None:
    reason = os.strerror(number)
    expected = f"cannot write to '/out/song.wav' ({reason}): free space there, or choose another folder"
    assert message(OSError(number, reason)) == expected


def test_any_other_failure_asks_for_another_folder() -> None:
    expected = "cannot write to '/out/song.wav' (Permission denied): choose another folder"
    assert message(PermissionError(errno.EACCES, "Permission denied")) == expected


def test_a_name_that_is_too_long_is_not_blamed_on_the_folder() -> None:
    expected = "cannot write to '/out/song.wav' (File name too long): give the song a shorter name"
    assert message(OSError(errno.ENAMETOOLONG, "File name too long")) == expected


def test_the_caller_says_what_it_was_doing_and_where_to_go_instead() -> None:
    options = {"doing": "read the cache in", "elsewhere": "set CACHE"}
    assert (
        message(OSError(5, "I/O error"), Path("/c"), **options)
        == "cannot read the cache in '/c' (I/O error): set CACHE"
    )


def test_the_hidden_work_folder_is_not_named() -> None:
    assert "'/out/song.wav'" in message(OSError(5, "I/O error"), Path("/out/.separating-x1/song.wav"))


def test_a_temporary_folder_is_named_as_such_with_its_variable() -> None:
    work, full = Path("/tmp/.separating-x1"), OSError(errno.ENOSPC, "No space left on device")
    with staging(work):
        assert message(full, work / "stems" / ".separating-x2" / "vocals.wav") == (
            "cannot write to the temporary folder '/tmp' (No space left on device): free space there, or set TMPDIR to "
            "another folder"
        )
        assert "'/tmp/stems/vocals.wav'" in message(full, Path("/tmp/stems/vocals.wav"))
    assert "'/tmp/song'" in message(full, work / "song")


def test_an_error_of_another_kind_gives_its_first_line() -> None:
    assert "(the header is broken): choose" in message(RuntimeError("the header is broken\nat line 3"))


def test_other_exceptions_pass_through() -> None:
    with pytest.raises(ValueError, match="mine"), output_errors(Path("/out")):
        raise ValueError("mine")
