import shutil
import struct
from pathlib import Path

import pytest
import torch

from helpers.common import needs_ffmpeg
from helpers.sounds import assert_refused, ffmpeg, noise, samples_of, write
from separation.audio import integrity
from separation.audio.decode import decode
from separation.audio.reader import ByteReader
from separation.audio.waveform import SAMPLE_RATE
from separation.errors import AudioError


def with_size(song: Path, n_bytes: int, *, riff_bytes: int | None = None) -> Path:
    """The WAV with other sizes of its audio and of the whole file in the header."""
    content = bytearray(song.read_bytes())
    order = ">I" if content[:4] == b"RIFX" else "<I"
    at = content.index(b"data") + 4
    content[at : at + 4] = struct.pack(order, n_bytes)
    content[4:8] = struct.pack(order, n_bytes if riff_bytes is None else riff_bytes)
    song.write_bytes(content)
    return song


@pytest.mark.parametrize("data_bytes", [0, 0x7FFFF000, 2**31 - 1, 2**31, 2**32 - 48, 2**32 - 1])
@pytest.mark.parametrize(
    "options", [{"subtype": "FLOAT"}, {"subtype": "PCM_24"}, {"subtype": "FLOAT", "endian": "BIG"}, {"format": "WAVEX"}]
)
def test_a_wav_whose_header_has_a_placeholder_size_is_read_whole(
    data_bytes: int, options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)  # without ffmpeg
    song = write(tmp_path / "song.wav", noise(70_000), **options)
    expected = samples_of(song, tmp_path)
    assert torch.equal(samples_of(with_size(song, data_bytes), tmp_path), expected)


@pytest.mark.parametrize("after", [b"", b"LIST\x0c\0\0\0INFOINAM\0\0\0\0", b"TAG" + bytes(125)])
def test_a_wav_without_samples_is_not_mistaken_for_one_without_a_size(after: bytes, tmp_path: Path) -> None:
    song = write(tmp_path / "song.wav", noise(0), subtype="PCM_16")
    song.write_bytes(song.read_bytes() + after)
    assert_refused(with_size(song, 0, riff_bytes=36 + len(after)), tmp_path, "no samples")


def test_a_wav_with_an_unfinished_header_is_read_whole(tmp_path: Path) -> None:
    song = write(tmp_path / "song.wav", noise(70_000), subtype="FLOAT")
    expected = samples_of(song, tmp_path)
    assert torch.equal(samples_of(with_size(song, 0, riff_bytes=560_036), tmp_path), expected)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "FLOAT"])
@pytest.mark.parametrize("after", [b"", b"LIST\0\2\0\0" + bytes(512)], ids=["alone", "tags after it"])
def test_a_wav_too_large_for_its_header_is_read_whole_or_refused_if_cut_short(
    subtype: str, after: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like a WAV over 4 GB, but with 16-bit sizes instead of 32-bit ones."""
    song = write(tmp_path / "song.wav", noise(70_000), subtype=subtype)
    expected = samples_of(song, tmp_path)
    content = song.read_bytes() + after
    at = content.index(b"data") + 4
    n_bytes = struct.unpack("<I", content[at : at + 4])[0]
    monkeypatch.setattr(integrity, "_SIZE_LIMIT", 2**16)
    monkeypatch.setattr(integrity, "_MAX_BYTES_AFTER_AUDIO", 2**10)
    song.write_bytes(content)
    assert torch.equal(samples_of(with_size(song, n_bytes % 2**16), tmp_path), expected)
    for share in (0.6, 0.95):
        song.write_bytes(content[: int(len(content) * share)])
        assert_refused(with_size(song, n_bytes % 2**16), tmp_path, "cut short")


@pytest.mark.parametrize(
    "data_bytes, expected",
    [
        (5 * 10**9, 5 * 10**9),
        (10 * 10**9, 10 * 10**9),
        (2**32 - 1, None),  # to the end of the file
        (0x7FFFF000, None),
        (3 * 10**9, "cut short"),  # either 3 GB, or 2**32 bytes more
    ],
)
def test_the_audio_of_a_wav_over_4_gb_is_found_and_its_end_is_checked(
    data_bytes: int, expected: int | str | None, tmp_path: Path
) -> None:
    song = with_size(write(tmp_path / "song.wav", noise(100)), data_bytes % 2**32)
    size = 44 + (data_bytes if isinstance(expected, int) else 5 * 10**9)
    with song.open("r+b") as file:
        file.truncate(size)  # sparse: it takes no space
        if expected == "cut short":
            with pytest.raises(AudioError, match="cut short"):
                integrity.find_audio(ByteReader(file), "song.wav")
        else:
            assert integrity.find_audio(ByteReader(file), "song.wav") == integrity.Audio(44, None, size - 44, True)


@pytest.mark.slow
@pytest.mark.parametrize("container", ["wrapped WAV", "WAV of unknown size", "RF64", "W64"])
def test_files_over_4_gb_are_read_to_the_last_sample(container: str, tmp_path: Path) -> None:
    """Sparse files: eight channels of silence, with a tone in the last second."""
    n_samples, frame_bytes = 2**32 // 32 + 2 * SAMPLE_RATE, 32
    tone = 0.5 * torch.sin(torch.arange(SAMPLE_RATE) * 0.05).expand(8, -1)
    format = {"RF64": "RF64", "W64": "W64"}.get(container, "WAV")
    path = write(tmp_path / "song", tone, format=format, subtype="FLOAT")
    n_bytes, content = n_samples * frame_bytes, bytearray(path.read_bytes())
    start = len(content) - SAMPLE_RATE * frame_bytes
    if format == "W64":
        content[start - 8 : start] = struct.pack("<q", n_bytes + 24)
    elif format == "RF64":
        content[20:44] = struct.pack("<qqq", n_bytes + start - 8, n_bytes, n_samples)
    else:
        content[start - 4 : start] = struct.pack("<I", n_bytes % 2**32 if container == "wrapped WAV" else 2**32 - 1)
    with path.open("r+b") as file:
        file.write(content[:start])
        file.seek(start)
        file.write(bytes(SAMPLE_RATE * frame_bytes))
        file.seek(start + (n_samples - SAMPLE_RATE) * frame_bytes)
        file.write(content[start:])
    assert path.stat().st_size > 2**32
    with decode(path, tmp_path) as waveform:
        assert waveform.n_samples == n_samples
        assert not waveform.read(n_samples - 2 * SAMPLE_RATE, n_samples - SAMPLE_RATE).any()
        assert (waveform.read(n_samples - SAMPLE_RATE, n_samples) - tone[:2]).abs().max() <= 1e-6


@needs_ffmpeg
def test_an_mp4_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "source.wav", noise(5 * SAMPLE_RATE))
    whole = ffmpeg(source, tmp_path / "whole.m4a", "-c:a", "aac", "-movflags", "faststart").read_bytes()
    (tmp_path / "cut.m4a").write_bytes(whole[: len(whole) // 2])
    assert_refused(tmp_path / "cut.m4a", tmp_path, "cut short")


@needs_ffmpeg
def test_an_mp4_of_which_nothing_can_be_decoded_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "source.wav", noise(2 * SAMPLE_RATE))
    whole = ffmpeg(source, tmp_path / "whole.m4a", "-c:a", "aac", "-movflags", "faststart").read_bytes()
    start = whole.index(b"mdat") + 4
    (tmp_path / "overwritten.m4a").write_bytes(whole[:start] + b"\xff" * (len(whole) - start))
    assert_refused(tmp_path / "overwritten.m4a", tmp_path, "the last 2.00 s of 2.00 s are missing")


@pytest.mark.parametrize(
    "n_announced, n_there, share", [(100, 100, 0.0), (150, 100, 0.5), (400, 100, 3.0), (None, 100, 0.0), (50, 100, 0.0)]
)
def test_the_missing_part_is_a_share_of_what_is_there(n_announced: int | None, n_there: int, share: float) -> None:
    assert integrity.Audio(0, n_announced, n_there, is_wave=False).missing_share == share
