"""What a server tells a stranger of an error."""

import pytest

from separation.errors import (
    AudioError,
    CheckpointError,
    EstimateError,
    InputError,
    OutputError,
    SeparationError,
)
from separation.web.public import errors_without_paths


@pytest.mark.parametrize("kind", [InputError, AudioError, EstimateError])
def test_what_is_wrong_with_the_callers_own_song_is_told_as_it_is(
    kind: type[SeparationError], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(kind) as caught, errors_without_paths():
        raise kind("'song.mp3' is empty: send another")
    assert str(caught.value) == "'song.mp3' is empty: send another"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "error, kind, reason",
    [
        (OutputError("cannot write to '/srv/stems'"), OutputError, "OutputError"),
        (CheckpointError("/srv/weights/x.ckpt is damaged"), CheckpointError, "CheckpointError"),
        (OSError(28, "No space left on device", "/srv/stems"), SeparationError, "No space left on device"),
        (KeyError("/srv/secret"), SeparationError, "KeyError"),
    ],
)
def test_what_is_wrong_with_the_server_is_told_without_paths_and_in_full_to_its_operator(
    error: Exception, kind: type[SeparationError], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SeparationError) as caught, errors_without_paths():
        raise error
    assert type(caught.value) is kind
    assert f"({reason})" in str(caught.value) and "/srv" not in str(caught.value)
    assert "/srv" in capfd.readouterr().err


def test_the_reason_is_that_of_the_system_where_an_error_of_ours_has_one() -> None:
    with pytest.raises(OutputError, match=r"\(No space left on device\)"), errors_without_paths():
        raise OutputError("cannot write to '/srv/stems'") from OSError(28, "No space left on device", "/srv/stems")
