"""Tags and cover art, written in the form of each format and read back by ffmpeg."""

import io
import struct
import subprocess
from pathlib import Path
from typing import BinaryIO

import pytest
import soundfile
import torch

from helpers.common import needs_ffmpeg, quick_first
from helpers.sounds import noise, samples_of, waveform_of, write, write_mp3
from separation.audio.encode import encode
from separation.audio.metadata import (
    MAX_COVER_BYTES,
    Metadata,
    add_to_flac,
    add_to_wav,
    ffmetadata,
    id3_tag,
    m4a_tags,
    picture_block,
    read_metadata,
    tags_for,
)
from separation.audio.mp4 import Atom, atoms, find_atom
from separation.audio.options import FORMATS, LOSSLESS, STEM_FILE, OutputOptions

TAGS = {
    "title": "Title",
    "artist": "Ärtist = ; # \\ Second",
    "album": "Album",
    "album_artist": "Album Artist",
    "track": "3/12",
    "disc": "1/2",
    "genre": "Rock",
    "date": "1999-02-03",
    "comment": "two\nlines",
    "composer": "Composer",
    "lyrics": "la\nla",
    "copyright": "somebody",
}
UNKNOWN = {"bpm": "120", "isrc": "DE1234567890", "MY_OWN": "value"}


@pytest.fixture
def covers(tmp_path: Path) -> dict[str, bytes]:
    found = {}
    for suffix in ("png", "jpg"):
        path = tmp_path / f"cover.{suffix}"
        options = ["-f", "lavfi", "-i", "color=red:size=32x32", "-frames:v", "1", str(path)]
        subprocess.run(["ffmpeg", "-nostdin", "-v", "error", *options], check=True)
        found[suffix] = path.read_bytes()
    return found


@needs_ffmpeg
@pytest.mark.parametrize("format", quick_first([format for format in FORMATS if format != STEM_FILE], 2))
def test_all_tags_and_the_cover_survive_every_format(format: str, covers: dict[str, bytes], tmp_path: Path) -> None:
    samples, rate = noise(5000), 48000
    for cover in covers.values():
        with waveform_of(samples, tmp_path, rate) as waveform:
            encode(waveform, tmp_path / "song", OutputOptions(format), tags=TAGS | UNKNOWN, cover=cover)
        assert read_metadata(tmp_path / "song") == Metadata(TAGS | UNKNOWN, cover)
        assert samples_of(tmp_path / "song", tmp_path, sample_rate=rate).shape == (2, 5000)


@needs_ffmpeg
def test_of_several_pictures_the_front_cover_counts(covers: dict[str, bytes], tmp_path: Path) -> None:
    write_mp3(tmp_path / "plain.mp3", noise(5000))
    inputs, maps = ["-i", str(tmp_path / "plain.mp3")], ["-map", "0"]
    for number, (suffix, kind) in enumerate([("jpg", "Artist/performer"), ("png", "Cover (front)")]):
        inputs += ["-i", str(tmp_path / f"cover.{suffix}")]
        maps += ["-map", str(number + 1), f"-metadata:s:v:{number}", f"comment={kind}"]
    command = ["ffmpeg", "-nostdin", "-v", "error", *inputs, *maps, "-c", "copy", str(tmp_path / "song.mp3")]
    subprocess.run(command, check=True)
    assert read_metadata(tmp_path / "song.mp3").cover == covers["png"]


@needs_ffmpeg
@pytest.mark.parametrize("format", ["AIFF", "WAV", "FLAC"])
def test_a_name_takes_the_tags_of_every_format(format: str, tmp_path: Path) -> None:
    write(tmp_path / "plain.wav", noise(5000))
    tags = ["-metadata", "artist=Ärtist", "-metadata", "album=Album", "-metadata", "track=3/12", "-write_id3v2", "1"]
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", str(tmp_path / "plain.wav")]
    song = tmp_path / f"song.{format.lower()}"
    subprocess.run([*command, *(tags if format == "AIFF" else tags[:-2]), str(song)], check=True)
    assert (
        tags_for("{artist}/{album}/{track} {stem}.{ext}", song).items()
        >= {
            "artist": "Ärtist",
            "album": "Album",
            "track": "3/12",
        }.items()
    )


@needs_ffmpeg
def test_tags_about_the_file_and_its_loudness_are_left_behind(tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(5000))
    tags = {
        "artist": "A",
        "encoder": "E",
        "REPLAYGAIN_TRACK_GAIN": "-3 dB",
        "iTunNORM": "0",
        "TLEN": "5",
        "my own": "x",
    }
    options = [part for tag, text in tags.items() for part in ("-metadata", f"{tag}={text}")]
    command = [
        "ffmpeg",
        "-nostdin",
        "-v",
        "error",
        "-i",
        str(tmp_path / "song.wav"),
        *options,
        str(tmp_path / "song.flac"),
    ]
    subprocess.run(command, check=True)
    assert read_metadata(tmp_path / "song.flac").tags == {"artist": "A", "my own": "x"}


def test_without_ffmpeg_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "song.wav", noise(10))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_metadata(tmp_path / "song.wav") == Metadata()


@needs_ffmpeg
def test_a_song_that_ffmpeg_cannot_read_keeps_few_tags_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "song.wav").write_bytes(b"not a song")
    assert read_metadata(tmp_path / "song.wav") == Metadata()
    assert "its tags are copied only in part" in caplog.text


@pytest.mark.parametrize("content", [b"junk" * 100, b""])
def test_a_name_takes_no_tags_from_a_broken_song_and_says_nothing(
    content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    song = tmp_path / "song.mp3"
    song.write_bytes(content)
    assert tags_for("{artist}/{stem}.{ext}", song) == {}
    assert tags_for("{artist}/{stem}.{ext}", tmp_path / "missing.mp3") == {}
    assert capfd.readouterr() == ("", "") and caplog.messages == []


def test_an_id3_tag_announces_its_size_and_each_frames(tmp_path: Path) -> None:
    tag = id3_tag(Metadata({"title": "x" * 1000, "other": "value", "comment": "c"}, b"\xff\xd8\xff cover"))
    assert tag[:6] == b"ID3\4\0\0"
    size = lambda four: sum(byte << shift for byte, shift in zip(four, (21, 14, 7, 0), strict=True))  # noqa: E731
    assert size(tag[6:10]) == len(tag) - 10
    frames, place = {}, 10
    while place < len(tag):
        n_bytes = size(tag[place + 4 : place + 8])
        frames[tag[place : place + 4]] = tag[place + 10 : place + 10 + n_bytes]
        place += 10 + n_bytes
    assert frames == {
        b"TIT2": b"\3" + b"x" * 1000,
        b"TXXX": b"\3other\0value",
        b"COMM": b"\3und\0c",
        b"APIC": b"\3image/jpeg\0\3\0\xff\xd8\xff cover",
    }


def test_no_tags_make_no_id3_tag() -> None:
    assert id3_tag(Metadata({"title": ""})) == b""


def test_an_id3_chunk_goes_behind_the_samples_and_into_the_size_of_the_wav(tmp_path: Path) -> None:
    file = io.BytesIO()
    soundfile.write(file, noise(1001, 1)[0].numpy(), 44100, format="WAV", subtype="PCM_24")
    n_before = len(file.getvalue())
    add_to_wav(file, Metadata({"title": "T"}))
    content = file.getvalue()
    assert struct.unpack("<I", content[4:8]) == (len(content) - 8,)
    assert content[n_before + n_before % 2 :][:4] == b"id3 "
    assert soundfile.info(io.BytesIO(content)).frames == 1001


def test_an_id3_chunk_goes_into_the_size_of_an_rf64() -> None:
    file = io.BytesIO()
    soundfile.write(file, noise(1000).T.numpy(), 44100, format="RF64", subtype="FLOAT")
    add_to_wav(file, Metadata({"title": "T"}))
    content = file.getvalue()
    assert struct.unpack("<Q", content[20:28]) == (len(content) - 8,)
    assert soundfile.info(io.BytesIO(content)).frames == 1000


def test_a_flac_with_other_tags_has_the_same_frames_and_is_complete() -> None:
    plain, tagged = io.BytesIO(), io.BytesIO()
    soundfile.write(plain, noise(50_000).T.numpy(), 44100, format="FLAC", subtype="PCM_24")
    add_to_flac(plain, tagged, Metadata({"title": "T", "my=own": "x"}, b"\x89PNG picture"))
    content = tagged.getvalue()
    assert b"TITLE=T" in content and b"my_own=x" in content and picture_block(b"\x89PNG picture") in content
    frames = plain.getvalue().index(b"\xff\xf8")
    assert content.endswith(plain.getvalue()[frames:])
    assert soundfile.info(io.BytesIO(content)).frames == 50_000


def test_ffmpegs_file_of_tags_escapes_what_it_must() -> None:
    text = ffmetadata({"a=b": "c;d#e\\f\ng\0h", "empty": ""})
    assert text == b";FFMETADATA1\na\\=b=c\\;d\\#e\\\\f\\\ng\n"


@needs_ffmpeg
def test_an_m4a_with_free_form_tags_has_the_same_samples_and_both_forms_of_the_tempo(
    covers: dict[str, bytes], tmp_path: Path
) -> None:
    samples = noise(100_000).mul(2**23).round().div(2**23)
    tags = {"bpm": "127.6", "initialkey": "F#m", "publisher": "Label", "description": "told once"}
    with waveform_of(samples, tmp_path) as waveform:
        encode(waveform, tmp_path / "song.m4a", OutputOptions("m4a", bitrate=LOSSLESS), tags=tags, cover=covers["jpg"])
    assert torch.equal(samples_of(tmp_path / "song.m4a", tmp_path, sample_rate=44100), samples)
    content = (tmp_path / "song.m4a").read_bytes()
    assert content[content.index(b"tmpo") :][4:22] == b"\0\0\0\x12data\0\0\0\x15" + bytes(4) + b"\0\x80"
    assert content.count(b"told once") == 1
    with (tmp_path / "song.m4a").open("rb") as file:
        items = find_atom(file, b"moov", b"udta", b"meta", b"ilst")
        found = [free_form(file, one) for one in atoms(file, items.content, items.end) if one.kind == b"----"]
    assert found == [("BPM", "127.6"), ("initialkey", "F#m"), ("LABEL", "Label")]
    assert read_metadata(tmp_path / "song.m4a").cover == covers["jpg"]


def free_form(file: BinaryIO, item: Atom) -> tuple[str, str]:
    """The name and the text of a free-form item of iTunes."""
    parts = {}
    for part in atoms(file, item.content, item.end):
        file.seek(part.content)
        parts[part.kind] = file.read(part.end - part.content)
    assert parts[b"mean"] == bytes(4) + b"com.apple.iTunes" and parts[b"data"][:8] == b"\0\0\0\1" + bytes(4)
    return parts[b"name"][4:].decode(), parts[b"data"][8:].decode()


@pytest.mark.parametrize("bpm, whole", [("128", "128"), (" 99.5 ", "100"), ("fast", None), ("", None), ("1e3", None)])
def test_itunes_has_whole_beats_per_minute(bpm: str, whole: str | None) -> None:
    assert m4a_tags(Metadata({"bpm": bpm})).get("tmpo") == whole


@needs_ffmpeg
def test_a_cover_that_no_flac_could_hold_is_left_out(covers: dict[str, bytes], tmp_path: Path) -> None:
    cover = covers["jpg"] + bytes(MAX_COVER_BYTES)
    with waveform_of(noise(5000), tmp_path) as waveform:
        encode(waveform, tmp_path / "song.mp3", OutputOptions("mp3"), cover=cover)
    assert read_metadata(tmp_path / "song.mp3").cover == b""
