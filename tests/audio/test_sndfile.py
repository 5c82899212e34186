import struct
from pathlib import Path

import pytest

from helpers.common import needs_ffmpeg, quick_first
from helpers.sounds import assert_refused, ffmpeg, noise, samples_of, write, write_mp3
from separation.audio.waveform import SAMPLE_RATE


@pytest.mark.parametrize(
    "container, subtype, tolerance",
    [
        ("WAV", "PCM_U8", 1 / 128),
        ("WAV", "PCM_16", 1 / 32768),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "PCM_32", 1e-7),
        ("WAV", "FLOAT", 0),
        ("WAV", "DOUBLE", 0),
        ("WAV", "ALAW", 0.02),
        ("WAVEX", "FLOAT", 0),
        ("RF64", "FLOAT", 0),
        ("W64", "FLOAT", 0),
        ("AIFF", "PCM_24", 1e-6),
        ("CAF", "FLOAT", 0),
        ("FLAC", "PCM_16", 1 / 32768),
        ("FLAC", "PCM_24", 1e-6),
        ("OGG", "VORBIS", 0.5),
        ("MP3", "MPEG_LAYER_III", 0.5),
    ],
)
def test_libsndfile_formats_decode_to_their_samples(
    container: str, subtype: str, tolerance: float, tmp_path: Path
) -> None:
    samples = noise(70_000)
    path = write(tmp_path / "song", samples, format=container, subtype=subtype)
    decoded = samples_of(path, tmp_path)
    assert decoded.shape == samples.shape
    assert (decoded - samples).abs().max() <= tolerance


def id3v2(n_bytes: int) -> bytes:
    """A tag whose content looks like frame headers."""
    size = bytes(n_bytes >> shift & 127 for shift in (21, 14, 7, 0))
    return b"ID3\x04\x00\x00" + size + (b"\xff\xfb\x90\x64" * n_bytes)[:n_bytes]


MP3_OPTIONS = {
    "cbr": ("-b:a", "128k"),
    "cbr320": ("-b:a", "320k"),
    "cbr_without_xing": ("-b:a", "192k", "-write_xing", "0"),
    "vbr": ("-q:a", "2"),
    "vbr_without_xing": ("-q:a", "2", "-write_xing", "0"),
    "abr": ("-b:a", "160k", "-abr", "1"),
    "tagged": ("-metadata", "title=Words", "-write_id3v1", "1", "-id3v2_version", "3"),
    "untagged": ("-id3v2_version", "0"),
    "mono": ("-ac", "1"),
    "mpeg2": ("-ar", "22050", "-b:a", "64k"),
    "mpeg25": ("-ar", "8000", "-ac", "1", "-b:a", "16k"),
}


@needs_ffmpeg
@pytest.mark.parametrize("kind", quick_first(MP3_OPTIONS, 5))
def test_mp3s_by_ffmpeg_are_read_whole_and_refused_if_cut_short(kind: str, tmp_path: Path) -> None:
    samples = noise(SAMPLE_RATE)
    samples[:, : SAMPLE_RATE // 4] = 0  # so that the first frames of a VBR file have another bitrate than the rest
    path = ffmpeg(write(tmp_path / "source.wav", samples), tmp_path / "song.mp3", *MP3_OPTIONS[kind])
    check_mp3(path, tmp_path, SAMPLE_RATE, exact="without_xing" not in kind)


@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
@pytest.mark.parametrize("sample_rate", [16000, 44100, 48000])
def test_mp3s_by_libsndfile_are_read_whole_and_refused_if_cut_short(
    mode: str, sample_rate: int, tmp_path: Path
) -> None:
    path = write_mp3(tmp_path / "song.mp3", noise(sample_rate), sample_rate, mode=mode)
    check_mp3(path, tmp_path, SAMPLE_RATE, exact=True)


def check_mp3(path: Path, folder: Path, n_samples: int, *, exact: bool) -> None:
    content = path.read_bytes()
    id3v1 = b"TAG" + bytes(125)
    apev2 = b"APETAGEX" + struct.pack("<IIII8x", 2000, 32, 0, 0)
    variants = [
        content,
        id3v2(5000) + content,
        content + id3v1,
        content + bytes(1968) + apev2 + id3v1,
        content + bytes(5000),
    ]
    for variant in variants:
        path.write_bytes(variant)
        length = samples_of(path, folder).shape[1]
        assert length == n_samples if exact else n_samples <= length <= n_samples + 3 * 1152
    for n_bytes in (len(content) // 3, len(content) // 2) if exact else ():
        path.write_bytes(content[:n_bytes])
        assert_refused(path, folder, "cut short")
