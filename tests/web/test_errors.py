"""Clients see errors without paths on the server; its log has them in full."""

import pytest

from separation.audio.damage import DamagedError
from separation.errors import (
    AudioError,
    CheckpointError,
    DownloadError,
    EstimateError,
    InputError,
    OutputError,
    SeparationError,
)
from separation.web.errors import errors_as_failures, errors_without_paths


@pytest.mark.parametrize("kind", [InputError, AudioError, EstimateError])
def test_errors_about_the_clients_own_song_pass_unchanged(
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
        (OSError(5, "Input/output error", "/srv/stems"), SeparationError, "Input/output error"),
        (KeyError("/srv/secret"), SeparationError, "KeyError"),
    ],
)
def test_errors_of_the_server_hide_paths_and_are_logged_in_full(
    error: Exception, kind: type[SeparationError], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SeparationError) as caught, errors_without_paths():
        raise error
    assert type(caught.value) is kind
    assert f"({reason})" in str(caught.value) and "/srv" not in str(caught.value)
    assert "/srv" in capfd.readouterr().err


def test_weights_that_cannot_be_downloaded_are_told_apart(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DownloadError) as caught, errors_without_paths():
        raise DownloadError("x.ckpt is not in /srv/weights and could not be downloaded")
    assert str(caught.value).startswith("the server could not download the models' weights: ")
    assert "/srv/weights" in capfd.readouterr().err


def test_the_reason_is_the_operating_systems_if_it_caused_the_error() -> None:
    with pytest.raises(OutputError, match=r"\(Input/output error\)"), errors_without_paths():
        raise OutputError("cannot write to '/srv/stems'") from OSError(5, "Input/output error", "/srv/stems")


def test_a_full_disk_is_told_with_what_to_do(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OutputError) as caught, errors_without_paths():
        raise OutputError("cannot write to '/srv/stems'") from OSError(28, "No space left on device", "/srv/stems")
    assert str(caught.value).startswith("the server's disk is full: free some space there")
    assert "/srv/stems" in capfd.readouterr().err


def test_no_error_has_a_word_that_cog_takes_for_a_cancellation() -> None:
    with pytest.raises(AudioError, match=r"^'canceled\.wav' and 'CanceledError' are empty$"), errors_as_failures():
        raise AudioError("'cancelled.wav' and 'CancelledError' are empty")


def test_a_damaged_song_is_refused_without_an_option_of_the_command_line() -> None:
    with pytest.raises(AudioError, match=r"^'song\.mp3' is cut short: get the file again$"), errors_without_paths():
        raise DamagedError("'song.mp3' is cut short")
