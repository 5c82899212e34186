import random
from pathlib import Path

import pytest

from helpers.common import needs_ffmpeg
from helpers.sounds import ffmpeg, noise, write, write_mp3
from separation.audio import frames
from separation.audio.frames import CODECS, MPEG, Codec, Gap, Part, find_parts

RATE = 44100


@pytest.fixture
def mp3(tmp_path: Path) -> Path:
    return write_mp3(tmp_path / "song.mp3", noise(RATE))


def only_part(path: Path, codec: Codec = MPEG) -> Part:
    (part,) = find_parts(path, codec)
    return part


@pytest.mark.parametrize(
    "header, expected",
    [
        ("fffb9064", ((3, 1, 44100, False), 44100, 417, 1152)),  # MPEG-1 layer III, 128 kbit/s
        ("fffb92c4", ((3, 1, 44100, True), 44100, 418, 1152)),  # padded, mono
        ("fffd8404", ((3, 2, 48000, False), 48000, 384, 1152)),  # layer II
        ("ffff1004", ((3, 3, 44100, False), 44100, 32, 384)),  # layer I
        ("fff38064", ((2, 1, 22050, False), 22050, 208, 576)),  # MPEG-2
        ("ffe328c4", ((0, 1, 8000, True), 8000, 144, 576)),  # MPEG-2.5
    ],
)
def test_the_header_of_an_mpeg_frame_is_parsed(header: str, expected: tuple[object, ...]) -> None:
    assert MPEG.parse(bytes.fromhex(header)) == expected


@pytest.mark.parametrize(
    "header", ["fffb9064"[:6], "fefb9064", "ffeb9064", "fff99064", "fffbf064", "fffb0064", "fffb9c64"]
)
def test_what_is_not_a_header_of_an_mpeg_frame_is_refused(header: str) -> None:
    assert MPEG.parse(bytes.fromhex(header)) is None


def test_an_mp3_is_one_part_with_its_count_of_frames(mp3: Path) -> None:
    part = only_part(mp3)
    assert part.is_layer_iii and part.is_cbr and part.has_no_gaps and part.is_info_intact and not part.is_mono
    assert part.announced == part.n_frames
    assert part.song_samples == RATE
    assert part.runs == [(part.info[1], mp3.stat().st_size)] if part.info else False


def test_a_gap_is_noted_with_its_place_and_size(mp3: Path) -> None:
    whole = only_part(mp3)
    content = mp3.read_bytes()
    at = whole.runs[0][0]
    for _ in range(10):
        header = MPEG.parse(content[at:])
        assert header is not None
        at += header.n_bytes
    mp3.write_bytes(content[:at] + bytes(500) + content[at:])
    part = only_part(mp3)
    assert part.gaps == [Gap(10, 500)]
    assert part.runs == [(whole.runs[0][0], at), (at + 500, len(content) + 500)]
    assert part.n_frames == whole.n_frames and not part.has_no_gaps


def test_joined_files_are_two_parts(mp3: Path, tmp_path: Path) -> None:
    other = write_mp3(tmp_path / "other.mp3", noise(24_000, channels=1), 48000)
    (tmp_path / "both.mp3").write_bytes(mp3.read_bytes() + mp3.read_bytes() + other.read_bytes())
    parts = find_parts(tmp_path / "both.mp3", MPEG)
    assert [part.header.sample_rate for part in parts] == [44100, 44100, 48000]
    assert [part.is_mono for part in parts] == [False, False, True]


def test_a_file_that_ends_within_a_frame_is_cut(mp3: Path) -> None:
    whole = only_part(mp3)
    mp3.write_bytes(mp3.read_bytes()[:-100])
    part = only_part(mp3)
    assert part.is_cut and part.n_frames == whole.n_frames - 1


def test_bytes_before_and_after_the_frames_are_counted_without_tags_and_zeros(mp3: Path) -> None:
    content = mp3.read_bytes()
    mp3.write_bytes(b"\1" * 700 + content + bytes(50) + b"\1" * 300 + b"TAG" + bytes(125))
    part = only_part(mp3)
    assert (part.n_lead, part.n_extra) == (700, 300)
    mp3.write_bytes(b"ID3\4\0\0\0\0\0\7" + b"\1" * 7 + content + bytes(50) + b"TAG" + bytes(125))
    part = only_part(mp3)
    assert (part.n_lead, part.n_extra) == (0, 0)


def test_a_damaged_info_header_is_noticed(mp3: Path) -> None:
    content = bytearray(mp3.read_bytes())
    at = content.index(b"Info")
    for position in (at + 10, at):  # in its count of frames, and in the mark
        damaged = content.copy()
        damaged[position] ^= 1
        mp3.write_bytes(damaged)
        assert not only_part(mp3).is_info_intact


def test_a_hostile_file_has_no_parts(mp3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "_MAX_FALSE_HEADERS", 100)
    mp3.write_bytes(mp3.read_bytes() + b"\xff\xfb\xf0\x64" * 1000)
    assert find_parts(mp3, MPEG) == []


def test_noise_has_no_parts(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(random.Random(0).randbytes(100_000))
    for codec in CODECS.values():
        assert find_parts(tmp_path / "noise", codec) == []


def test_the_check_can_stop_the_search(mp3: Path) -> None:
    def check(part: Part) -> None:
        if part.n_frames == 5:
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        find_parts(mp3, MPEG, check)


@needs_ffmpeg
@pytest.mark.parametrize("codec, samples", [("aac", 1024), ("ac3", 1536), ("eac3", 1536)])
def test_the_frames_of_other_codecs_are_found(codec: str, samples: int, tmp_path: Path) -> None:
    path = ffmpeg(write(tmp_path / "song.wav", noise(RATE)), tmp_path / f"song.{codec}", "-c:a", codec)
    part = only_part(path, CODECS[codec])
    assert part.header.n_samples == samples and part.header.sample_rate == RATE
    assert part.runs == [(0, path.stat().st_size)] and part.has_no_gaps
    assert RATE <= part.n_samples < RATE + 3 * samples
