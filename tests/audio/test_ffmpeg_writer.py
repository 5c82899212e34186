"""Running ffmpeg to write a file, and its failures in words."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.common import needs_ffmpeg
from separation.audio.ffmpeg_writer import check_installed, run_ffmpeg
from separation.errors import InputError

PCM = ("-f", "f32le", "-ar", "44100", "-ac", "1", "-i", "pipe:0")


@needs_ffmpeg
def test_blocks_become_a_file(tmp_path: Path) -> None:
    run_ffmpeg([*PCM, "-c:a", "pcm_f32le", "-f", "f32le", str(tmp_path / "x")], [b"abcd", b"efgh" * 3], what="x")
    assert (tmp_path / "x").read_bytes() == b"abcd" + b"efgh" * 3


@needs_ffmpeg
def test_an_error_in_the_blocks_stops_ffmpeg_and_is_raised(tmp_path: Path) -> None:
    def blocks() -> Iterator[bytes]:
        yield bytes(40)
        raise KeyError

    with pytest.raises(KeyError):
        run_ffmpeg([*PCM, "-f", "f32le", str(tmp_path / "x")], blocks(), what="x")


@needs_ffmpeg
def test_a_failure_of_ffmpeg_is_an_os_error_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file or directory") as caught:
        run_ffmpeg([*PCM, "-f", "f32le", str(tmp_path / "missing" / "x")], [bytes(400_000)] * 10, what="x")
    assert caught.value.errno == errno.EIO


@needs_ffmpeg
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_has_its_errno() -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        run_ffmpeg([*PCM, "-f", "f32le", "/dev/full"], [bytes(400_000)] * 10, what="x")
    assert caught.value.errno == errno.ENOSPC


@needs_ffmpeg
def test_an_encoder_that_this_ffmpeg_lacks_is_named() -> None:
    with pytest.raises(InputError, match=r"format y needs an ffmpeg with more encoders \(.*libnone.*\): install"):
        run_ffmpeg([*PCM, "-c:a", "libnone", "-f", "null", "-"], what="format y")


def test_without_ffmpeg_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="format opus needs ffmpeg: install it, or choose wav, flac or mp3"):
        check_installed("format opus")
