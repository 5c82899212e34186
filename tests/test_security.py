"""What a hostile or broken file, name, URL or checkpoint cannot do."""

import contextlib
import functools
import http.client
import http.server
import json
import math
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import predict
from helpers.common import PROJECT, needs_ffmpeg, quick_first
from helpers.small_model import RunsCode
from separation.audio.decode import decode
from separation.audio.encode import encode
from separation.audio.options import SNDFILE_FORMATS, OutputOptions
from separation.audio.waveform import Waveform
from separation.checkpoints.load import load_model
from separation.errors import AudioError, CheckpointError

DEMO = PROJECT / "weights" / "demo"


def ffmpeg(source: Path, target: Path, *options: str) -> Path:
    command = ["ffmpeg", "-nostdin", "-y", "-v", "error", "-i", str(source), *options, str(target)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return target


def refusal(path: Path, folder: Path, **options: Any) -> str:
    """The error that refuses a file. Asserts that nothing is left in the folder."""
    before = set(folder.rglob("*"))
    with pytest.raises(AudioError) as caught:
        decode(path, folder, **options)
    assert set(folder.rglob("*")) == before
    sentence = str(caught.value)
    assert repr(path.name) in sentence and str(folder) not in sentence
    assert ": " in sentence and not sentence.endswith(".") and "\n" not in sentence
    return sentence


# Files that decode to hours


HOURS = 2
RATE = 8000  # hertz: the lowest that is taken, so that the files are made quickly


def silence(path: Path, minutes: int, **options: str) -> Path:
    """A small file with minutes of silence."""
    with soundfile.SoundFile(path, "w", RATE, 1, **options) as sound:
        minute = np.zeros(60 * RATE, dtype=np.int16)
        for _ in range(minutes):
            sound.write(minute)
    return path


@pytest.fixture(scope="module")
def flac_bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return silence(tmp_path_factory.mktemp("bomb") / "bomb.flac", HOURS * 60, format="FLAC", subtype="PCM_16")


@pytest.fixture
def appended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The samples of each block that is written to a temporary file."""
    blocks: list[int] = []
    append = Waveform.append

    def count(self: Waveform, block: torch.Tensor) -> None:
        blocks.append(block.shape[1])
        append(self, block)

    monkeypatch.setattr(Waveform, "append", count)
    return blocks


def assert_stopped(path: Path, folder: Path, appended: list[int]) -> None:
    """Asserts that decoding stops at the limit of a minute."""
    assert "is longer than 60 s" in refusal(path, folder, max_seconds=60)
    assert sum(appended) <= 60 * RATE


def test_a_small_flac_that_decodes_to_hours_is_refused_before_anything_is_written(
    flac_bomb: Path, tmp_path: Path, appended: list[int]
) -> None:
    assert flac_bomb.stat().st_size < 1e6
    assert_stopped(flac_bomb, tmp_path, appended)
    assert appended == []


def test_a_flac_that_hides_its_length_is_stopped_at_the_limit(
    flac_bomb: Path, tmp_path: Path, appended: list[int]
) -> None:
    content = bytearray(flac_bomb.read_bytes())
    content[21:26] = bytes([content[21] & 0xF0, 0, 0, 0, 0])  # STREAMINFO's number of samples: unknown
    (tmp_path / "bomb").write_bytes(content)
    assert_stopped(tmp_path / "bomb", tmp_path, appended)


def test_a_wav_of_nothing_but_a_hole_is_stopped_at_the_limit(tmp_path: Path, appended: list[int]) -> None:
    soundfile.write(tmp_path / "bomb.wav", np.zeros(1, dtype=np.int16), RATE)
    content = bytearray((tmp_path / "bomb.wav").read_bytes())
    content[content.index(b"data") + 4 :] = struct.pack("<I", 2**30)
    (tmp_path / "bomb.wav").write_bytes(content)
    os.truncate(tmp_path / "bomb.wav", len(content) + 2**30)
    assert_stopped(tmp_path / "bomb.wav", tmp_path, appended)


@pytest.mark.slow
@pytest.mark.parametrize("container, subtype", [("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")])
def test_a_long_silent_ogg_or_mp3_is_stopped_at_the_limit(
    container: str, subtype: str, tmp_path: Path, appended: list[int]
) -> None:
    assert_stopped(silence(tmp_path / "bomb", 15, format=container, subtype=subtype), tmp_path, appended)


@needs_ffmpeg
@pytest.mark.parametrize(
    "suffix, codec",
    quick_first([("m4a", "aac"), ("m4a", "alac"), ("mka", "flac"), ("opus", "libopus"), ("mp3", "libmp3lame")], 1),
)
def test_a_long_file_for_ffmpeg_is_stopped_at_the_limit_and_ffmpeg_is_killed(
    suffix: str, codec: str, flac_bomb: Path, tmp_path: Path, appended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = ffmpeg(flac_bomb, tmp_path / f"bomb.{suffix}", "-t", "600", "-c:a", codec)
    monkeypatch.setattr("separation.audio.sndfile.open_whole", lambda *_: [])
    started = record_processes(monkeypatch)
    assert "is longer than 60 s" in refusal(bomb, tmp_path, max_seconds=60)
    assert sum(appended) <= 60 * 48000
    assert all(process.returncode is not None for process in started)


def record_processes(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    started: list[subprocess.Popen[bytes]] = []
    initialise = subprocess.Popen.__init__

    def record(self: subprocess.Popen[bytes], *arguments: Any, **options: Any) -> None:
        started.append(self)
        initialise(self, *arguments, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", record)
    return started


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_file_may_be_as_long_as_the_limit_and_not_a_sample_longer(container: str, tmp_path: Path) -> None:
    for name, n_samples in (("whole", 2 * RATE), ("longer", 2 * RATE + 1)):
        soundfile.write(tmp_path / name, np.zeros((n_samples, 2)), RATE, format=container)
    with decode(tmp_path / "whole", tmp_path, max_seconds=2) as waveform:
        assert waveform.n_samples == 2 * 44100
    assert "'longer' is longer than 2 s, the limit here" in refusal(tmp_path / "longer", tmp_path, max_seconds=2)


@pytest.mark.slow
def test_without_a_limit_hours_are_decoded(flac_bomb: Path, tmp_path: Path) -> None:
    with decode(flac_bomb, tmp_path, sample_rate=RATE) as waveform:
        assert waveform.n_samples == HOURS * 3600 * RATE


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[predict.Predictor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
        patch.setenv("SEPARATION_RECIPE", "demo")
        patch.delenv("SEPARATION_MAX_SECONDS", raising=False)
        predictor = predict.Predictor()
        predictor.setup()
        yield predictor


QUICK = ("vocals_instrumental", "wav", 4, 1, 44100, 320, "none", "default")


def test_the_container_refuses_more_than_three_hours_and_leaves_no_file(
    predictor: predict.Predictor, tmp_path: Path, appended: list[int]
) -> None:
    bomb = silence(tmp_path / "bomb.flac", 181, format="FLAC", subtype="PCM_16")
    with pytest.raises(AudioError, match=r"'bomb\.flac' is longer than 10,800 s, the limit here"):
        predictor.predict(bomb, *QUICK)
    assert sum(appended) <= 10_800 * RATE
    assert not any(path.is_file() for path in Path(tempfile.gettempdir()).rglob("*"))


def test_the_containers_limit_can_be_set_by_an_environment_variable(
    predictor: predict.Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert predictor.max_seconds == 10_800
    monkeypatch.setenv("SEPARATION_MAX_SECONDS", "1.5")
    predictor.setup()
    soundfile.write(tmp_path / "song.wav", np.zeros((2 * 44100, 2)), 44100)
    with pytest.raises(AudioError, match=r"'song\.wav' is longer than 1\.5 s"):
        predictor.predict(tmp_path / "song.wav", *QUICK)


# Files that are made to keep the decoder busy


MEGABYTE = 2**20
WAV_START = b"RIFF\xff\xff\xff\x7fWAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 2, 44100, 176400, 4, 16)
MP3_FRAME = b"\xff\xfb\x90\x64" + bytes(413)
OGG_SONG = next((DEMO / "stems").glob("*.ogg")).read_bytes()
BUSY = {
    "wav_of_empty_chunks": WAV_START + b"junk\0\0\0\0" * (4 * MEGABYTE // 8) + b"data\x04\0\0\0\0\0\0\0",
    "aiff_of_empty_chunks": b"FORM\x7f\xff\xff\xffAIFF" + b"ANNO\0\0\0\0" * (32 * MEGABYTE // 8),
    "mp3_of_false_headers": 2 * MP3_FRAME + b"\xff\xfb\xf0\x64" * (16 * MEGABYTE // 4),
    "flac_of_empty_metadata": b"fLaC" + b"\x01\0\0\0" * (16 * MEGABYTE // 4),
    "mp3_of_id3_tags": b"ID3\x04\0\0\0\0\0\0" * 1_500_000 + 200 * MP3_FRAME,
    "ogg_of_false_pages": OGG_SONG[:5000] + b"OggS" * (16 * MEGABYTE // 4) + OGG_SONG[5000:],
    "ogg_of_empty_pages": b"OggS\0\0".ljust(27, b"\0") * (16 * MEGABYTE // 27),
    "mp4_of_empty_boxes": b"\0\0\0\x14ftypM4A \0\0\0\0M4A " + b"\0\0\0\x08free" * (4 * MEGABYTE // 8),
    "one_byte_repeated": b"\xff" * (16 * MEGABYTE),
}


@pytest.mark.timeout(60)  # seconds; without limits, each of these files would take minutes
@pytest.mark.parametrize("kind", quick_first(BUSY, 1))
def test_a_file_that_is_made_to_keep_the_decoder_busy_does_not(kind: str, tmp_path: Path) -> None:
    (tmp_path / kind).write_bytes(BUSY[kind])
    with contextlib.suppress(AudioError):
        decode(tmp_path / kind, tmp_path).close()
    assert [path.name for path in tmp_path.iterdir()] == [kind]


STREAM = {"index": 0, "codec_type": "audio", "sample_rate": "44100", "channels": 2}


@pytest.mark.parametrize("broken", ["ffprobe", "ffmpeg"])
@pytest.mark.parametrize(
    "script, why",
    [
        (
            "#!/bin/sh\necho 'libx.so.1: cannot open shared' >&2\nexit 127\n",
            "libx.so.1: cannot open shared",
        ),
        ("#!/no/such/interpreter\n", "No such file or directory"),
        ("no program\n", "Exec format error"),
    ],
    ids=["library", "interpreter", "format"],
)
def test_an_ffmpeg_that_cannot_run_gets_the_blame_and_not_the_song(
    broken: str, script: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, answer = tmp_path / "programs", {"streams": [STREAM]}
    programs.mkdir()
    (programs / "ffprobe").write_text(f"#!/bin/sh\necho '{json.dumps(answer | {'format': {'format_name': 'x'}})}'\n")
    (programs / "ffmpeg").write_text("#!/bin/sh\n")
    (programs / broken).write_text(script)
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    (tmp_path / "song").write_bytes(b"not of libsndfile")
    with pytest.raises(AudioError) as error:
        decode(tmp_path / "song", tmp_path)
    assert str(error.value).startswith(f"{programs / broken} cannot run ({why}")
    assert str(error.value).endswith("so 'song' was not read: install ffmpeg again")


@pytest.mark.timeout(50)  # seconds; the program sleeps for 60
@pytest.mark.parametrize("silent", quick_first(["ffprobe", "ffmpeg"], 1))
def test_an_ffmpeg_that_does_not_answer_is_killed(silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs, answer = tmp_path / "programs", {"streams": [STREAM]}
    programs.mkdir()
    (programs / "ffprobe").write_text(f"#!/bin/sh\necho '{json.dumps(answer | {'format': {'format_name': 'x'}})}'\n")
    (programs / "ffmpeg").write_text("#!/bin/sh\nhead -c 1000000 /dev/zero\n")
    (programs / silent).write_text("#!/bin/sh\nexec sleep 60\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setattr("separation.audio.ffmpeg.PATIENCE_SECONDS", 0.5)
    (tmp_path / "song").write_bytes(b"not of libsndfile")
    processes = record_processes(monkeypatch)
    assert "'song' is damaged" in refusal(tmp_path / "song", tmp_path)
    assert all(process.returncode is not None for process in processes)


# Files that name other files


class Canary(http.server.BaseHTTPRequestHandler):
    requested: list[str]

    def do_GET(self) -> None:
        self.requested.append(self.path)
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def canary() -> Iterator[tuple[str, list[str]]]:
    """The address of a web server, and the paths that are requested from it."""
    requested: list[str] = []
    handler = type("Handler", (Canary,), {"requested": requested})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", requested
        server.shutdown()
        thread.join()


HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
PLAYLISTS = {
    "m3u8": HLS,
    "m3u8 with a key": HLS.replace("#EXTINF", '#EXT-X-KEY:METHOD=AES-128,URI="{}"\n#EXTINF'),
    "m3u8 with a map": HLS.replace("#EXTINF", '#EXT-X-MAP:URI="{}"\n#EXTINF'),
    "m3u8 of subfiles": HLS.replace("{}", "subfile,,start,0,end,1000,,:{}"),
    "m3u8 of concat": HLS.replace("{}", "concat:{}|{}"),
    "m3u": "#EXTM3U\n{}\n",
    "ffconcat": "ffconcat version 1.0\nfile '{}'\n",
    "concat": "file '{}'\n",
    "mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" profiles="urn:mpeg:dash:'
    'profile:isoff-main:2011"><Period><AdaptationSet mimeType="audio/mp4"><Representation id="1" bandwidth="1">'
    "<BaseURL>{}</BaseURL><SegmentBase/></Representation></AdaptationSet></Period></MPD>",
    "mpd with an entity": '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "{}">]><MPD>&e;</MPD>',
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\na=control:{}\n",
    "smil": '<smil xmlns="http://www.w3.org/ns/SMIL"><body><audio src="{}"/></body></smil>',
    "asx": '<asx version="3.0"><entry><ref href="{}"/></entry></asx>',
    "asf reference": "[Reference]\nRef1={}\n",
    "pls": "[playlist]\nFile1={}\nNumberOfEntries=1\n",
    "xspf": '<playlist version="1" xmlns="http://xspf.org/ns/0/"><trackList><track><location>{}</location></track>'
    "</trackList></playlist>",
    "real media": "rtsp://127.0.0.1/\n{}\n",
    "imf": '<CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016"><Asset>{}</Asset>'
    "</CompositionPlaylist>",
    "avisynth": 'WavSource("{}")\n',
    "lavfi": "amovie={}\n",
}


@needs_ffmpeg
@pytest.mark.parametrize("kind", quick_first(PLAYLISTS, 1))
def test_a_playlist_reads_neither_other_files_nor_the_network(
    kind: str, tmp_path: Path, canary: tuple[str, list[str]]
) -> None:
    address, requested = canary
    soundfile.write(tmp_path / "secret.wav", np.full((44100, 2), 0.5), 44100)
    secret = ffmpeg(tmp_path / "secret.wav", tmp_path / "secret.ts", "-c:a", "aac")
    assert "m3u8" not in kind or can_ffmpeg_follow(tmp_path, PLAYLISTS["m3u8"], secret.name)
    for target in ("secret.ts", f"file://{secret}", f"{address}/secret.ts"):
        (tmp_path / "list.m3u8").write_text(PLAYLISTS[kind].replace("{}", target))
        assert "is not audio" in refusal(tmp_path / "list.m3u8", tmp_path)
    assert requested == []


@functools.cache
def can_ffmpeg_follow(folder: Path, playlist: str, target: str) -> bool:
    """Whether ffmpeg without our options follows the playlist. Only then does a refusal prove anything."""
    (folder / "list.m3u8").write_text(playlist.replace("{}", target))
    return subprocess.run(["ffprobe", "-v", "error", folder / "list.m3u8"], check=False).returncode == 0


def alias(target: str) -> bytes:
    """A QuickTime data reference (`dref`) with one Macintosh alias to a file in the same folder."""
    name = target.encode()
    record = bytes(10) + b"\0" + bytes(27) + bytes(12) + bytes([len(name)]) + name.ljust(63, b"\0") + bytes(16)
    record += struct.pack(">HH", 1, 1) + bytes(16)  # one level up from the alias, one down to the target
    path = b"/" + name + b"\0" * (1 - len(name) % 2)
    record += struct.pack(">HH", 2, len(path)) + path + struct.pack(">HH", 0xFFFF, 0)
    entry = b"alis" + bytes(4) + record
    entry = struct.pack(">I", len(entry) + 4) + entry
    return bytes(4) + struct.pack(">I", 1) + entry


@needs_ffmpeg
def test_a_quicktime_file_that_refers_to_another_file_does_not_read_it(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "song.wav", np.zeros((44100, 2)), 44100)
    content = bytearray(ffmpeg(tmp_path / "song.wav", tmp_path / "song.mov", "-c:a", "pcm_s16le").read_bytes())
    box = content.index(b"dref") - 4
    (old_bytes,) = struct.unpack_from(">I", content, box)
    new = b"dref" + alias("secret.raw")
    for parent in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
        at = content.rindex(parent, 0, box) - 4
        struct.pack_into(">I", content, at, struct.unpack_from(">I", content, at)[0] + len(new) + 4 - old_bytes)
    content[box : box + old_bytes] = struct.pack(">I", len(new) + 4) + new
    (tmp_path / "song.mov").write_bytes(content)
    (tmp_path / "secret.raw").write_bytes(b"\x12\x34" * 100_000)

    options = ["-v", "error", "-enable_drefs", "1", "-i", tmp_path / "song.mov", "-f", "s16le", "pipe:1"]
    followed = subprocess.run(["ffmpeg", "-nostdin", *options], check=True, capture_output=True).stdout
    assert b"\x12\x34" * 100 in followed  # ffmpeg can be told to follow it
    assert "secret" not in refusal(tmp_path / "song.mov", tmp_path)


@needs_ffmpeg
def test_a_matroska_attachment_is_not_written_anywhere(tmp_path: Path) -> None:
    inner, folder = tmp_path / "a" / "b", tmp_path / "a" / "b" / "work"
    folder.mkdir(parents=True)
    soundfile.write(inner / "song.wav", np.full((44100, 2), 0.25), 44100, subtype="FLOAT")
    (inner / "note.txt").write_text("attached")
    attach = ["-attach", str(inner / "note.txt"), "-metadata:s:1", "mimetype=text/plain"]
    path = ffmpeg(
        inner / "song.wav", inner / "song.mka", *attach, "-metadata:s:1", "filename=../../evil", "-c:a", "flac"
    )
    assert b"../../evil" in path.read_bytes()
    before = set(tmp_path.rglob("*"))
    with decode(path, folder) as waveform:
        assert waveform.n_samples == 44100
    assert set(tmp_path.rglob("*")) == before


# Tags


ODD_TAGS = {
    "a path": "../../../evil",
    "an absolute path": "/tmp/evil",
    "newlines": "one\ntwo\r\nthree",
    "a nul": "one\0two",
    "control characters": "\x1b[31mred\x07\x7f",
    "a megabyte": "x" * 2**20,
    "a megabyte of letters of four bytes": "🎵" * 2**18,
    "half a surrogate pair": "\ud800",
    "a format string": "%s%n{0}",
    "nothing": "",
}


@pytest.mark.parametrize("format", SNDFILE_FORMATS)
@pytest.mark.parametrize("kind", ODD_TAGS)
def test_no_tag_leads_out_of_the_folder_or_breaks_the_file(kind: str, format: str, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    with Waveform(folder) as waveform:
        waveform.append(torch.full((2, 5000), 0.25))
        tags = dict.fromkeys(("title", "artist", "album"), ODD_TAGS[kind])
        encode(waveform, folder / "song", OutputOptions(format=format), tags=tags)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [folder / "song"]
    with decode(folder / "song", folder) as waveform:
        assert waveform.n_samples == 5000


@needs_ffmpeg
@pytest.mark.parametrize("suffix", quick_first(["m4a", "mka", "mp3", "flac"], 2))
def test_odd_tags_are_copied_from_song_to_stem(suffix: str, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "source.wav", np.full((44100, 2), 0.25), 44100)
    tags = {"title": "../../evil\nsecond line", "artist": "a" * 100_000, "album": "\x01\x1b"}
    options = [option for tag, value in tags.items() for option in ("-metadata", f"{tag}={value}")]
    ffmpeg(tmp_path / "source.wav", tmp_path / f"song.{suffix}", *options)
    before = set(tmp_path.iterdir())
    with decode(tmp_path / f"song.{suffix}", tmp_path) as waveform:
        assert waveform.tags["title"].startswith("../../evil")
        for format in SNDFILE_FORMATS:
            encode(waveform, tmp_path / f"out.{format}", OutputOptions(format=format))
    assert {path.name for path in set(tmp_path.iterdir()) - before} == {f"out.{format}" for format in SNDFILE_FORMATS}


# Damaged files


N_DAMAGED, N_DAMAGED_QUICK = 500, 50
WITH_FFMPEG = {
    "aac.m4a": ("-c:a", "aac"),
    "faststart.m4a": ("-c:a", "aac", "-movflags", "faststart"),
    "alac.m4a": ("-c:a", "alac"),
    "opus": ("-c:a", "libopus"),
    "mkv": ("-c:a", "libvorbis"),
    "webm": ("-c:a", "libopus"),
    "aiff": (),
    "wma": (),
    "vbr.mp3": ("-q:a", "2"),
    "aac": (),
}
WITHOUT_FFMPEG = {
    "wav": {"format": "WAV", "subtype": "PCM_16"},
    "float.wav": {"format": "WAV", "subtype": "FLOAT"},
    "adpcm.wav": {"format": "WAV", "subtype": "IMA_ADPCM"},
    "flac": {"format": "FLAC", "subtype": "PCM_16"},
    "ogg": {"format": "OGG", "subtype": "VORBIS"},
    "mp3": {"format": "MP3", "subtype": "MPEG_LAYER_III"},
    "pcm.aiff": {"format": "AIFF", "subtype": "PCM_24"},
    "caf": {"format": "CAF", "subtype": "PCM_16"},
    "w64": {"format": "W64", "subtype": "PCM_16"},
}


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Three seconds of the demo song and its stems in many formats, with tags."""
    folder = tmp_path_factory.mktemp("whole")
    files = {}
    songs = [DEMO / "song.flac", *sorted((DEMO / "stems").glob("*.ogg"))]
    for index, (suffix, options) in enumerate((WITHOUT_FFMPEG | WITH_FFMPEG).items()):
        song = songs[index % len(songs)]
        samples, rate = soundfile.read(song, start=5 * 44100, frames=3 * 44100, always_2d=True)
        path = folder / f"song.{suffix}"
        if isinstance(options, dict):
            with soundfile.SoundFile(path, "w", rate, samples.shape[1], **options) as sound:
                if suffix not in ("adpcm.wav", "w64"):
                    sound.title, sound.artist = "A title", "An artist"
                sound.write(samples)
        elif shutil.which("ffmpeg"):
            soundfile.write(folder / "source.wav", samples, rate)
            ffmpeg(folder / "source.wav", path, *options, "-metadata", "title=A title")
        else:
            continue
        files[path.name] = path.read_bytes()
    return files


def damage(content: bytes, random: random.Random) -> bytes:
    """The content with one to three changes: bits flipped, bytes set, parts cut, swapped, doubled or replaced."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 3))):
        region = random.choice((64, 1024, len(data), len(data)))  # headers as often as sound
        a, b = sorted(random.randrange(1 + min(region, len(data))) for _ in range(2))
        part = data[a:b]
        match random.choice(("flip", "set", "cut", "end", "start", "swap", "double", "empty", "random", "size")):
            case "flip":
                for _ in range(random.choice((1, 10, 100))):
                    if data:
                        data[random.randrange(min(region, len(data)))] ^= 1 << random.randrange(8)
            case "set":
                for _ in range(random.choice((1, 10, 100))):
                    if data:
                        data[random.randrange(min(region, len(data)))] = random.choice((0, 1, 127, 128, 255))
            case "cut":
                del data[a:b]
            case "end":
                del data[random.randrange(1 + len(data)) :]
            case "start":
                del data[:a]
            case "swap":
                data[a:b] = part[len(part) // 2 :] + part[: len(part) // 2]
            case "double":
                data[a:b] = part + part
            case "empty":
                data[a:b] = bytes(len(part))
            case "random":
                data[a:b] = random.randbytes(len(part))
            case "size":
                for _ in range(random.choice((1, 4))):
                    at = random.randrange(1 + min(region, len(data)))
                    value = random.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(content)))
                    data[at : at + 4] = value.to_bytes(4, random.choice(("little", "big")))
    return bytes(data)


DECODE_ALL = """
import faulthandler, json, os, signal, sys
from pathlib import Path

from separation.audio.decode import decode
from separation.errors import AudioError
from separation.progress import Progress

faulthandler.enable()
folder, *paths = map(Path, sys.argv[1:])
for path in paths:
    signal.alarm(60)  # ends this process even if a library hangs
    shares = []
    try:
        with decode(path, folder, progress=Progress(lambda share, stage: shares.append(share))) as waveform:
            answer = f"{waveform.n_samples} samples, peak {waveform.peak}"
        assert min(shares) >= 0 and max(shares) <= 1, shares
    except AudioError as e:
        answer = f"refused: {e}"
    signal.alarm(0)
    print(json.dumps([path.name, answer, os.listdir(folder)]), flush=True)
"""


def check_damaged(numbers: range, whole_files: dict[str, bytes], folder: Path) -> None:
    """Asserts that damaged files are decoded, or refused in one line, and that no decoder hangs or crashes."""
    damaged = []
    for number in numbers:
        name = list(whole_files)[number % len(whole_files)]
        damaged.append(folder / f"{number}-{name}")
        damaged[-1].write_bytes(damage(whole_files[name], random.Random(number)))
    processes = []
    for worker in range(2):
        work = folder / f"work{worker}"
        work.mkdir()
        command = [sys.executable, "-c", DECODE_ALL, str(work), *map(str, damaged[worker::2])]
        environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        processes.append((process, damaged[worker::2]))
    answers = {}
    for process, paths in processes:
        output, errors = process.communicate()
        lines = [json.loads(line) for line in output.splitlines()]
        culprit = paths[len(lines)].name if len(lines) < len(paths) else "the end"
        died = {-signal.SIGALRM: "hung", -signal.SIGSEGV: "crashed"}.get(process.returncode, "failed")
        assert process.returncode == 0, f"{died} at {culprit}: {errors.decode()[-2000:]}"
        for name, answer, left in lines:
            assert left == [], name
            answers[name] = answer
    assert len(answers) == len(damaged)
    refused = {name: answer.removeprefix("refused: ") for name, answer in answers.items() if "refused: " in answer}
    for name, sentence in refused.items():
        assert repr(name) in sentence and str(folder) not in sentence
        assert ": " in sentence and not sentence.endswith(".") and "\n" not in sentence
    for name in set(answers) - set(refused):
        assert math.isfinite(float(answers[name].split()[-1]))
    assert len(damaged) / 10 < len(refused) < len(damaged) * 9 / 10


@pytest.mark.slow
def test_fifty_damaged_files_are_decoded_or_refused_in_one_line(whole_files: dict[str, bytes], tmp_path: Path) -> None:
    check_damaged(range(N_DAMAGED_QUICK), whole_files, tmp_path)


@pytest.mark.slow
def test_five_hundred_damaged_files_are_decoded_or_refused_in_one_line(
    whole_files: dict[str, bytes], tmp_path: Path
) -> None:
    check_damaged(range(N_DAMAGED), whole_files, tmp_path)


@pytest.mark.slow
def test_the_files_that_are_damaged_in_these_tests_are_intact(whole_files: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in whole_files.items():
        (tmp_path / name).write_bytes(content)
        with decode(tmp_path / name, tmp_path) as waveform:
            assert waveform.n_samples == pytest.approx(3 * 44100, abs=5000), name
            assert waveform.peak > 0.001, name


# Checkpoints


CONFIG = PROJECT / "configs" / "models" / "demo.yaml"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("form", ["pickle", "zip", "legacy"])
def test_no_pickle_runs_code(form: str, protocol: int, tmp_path: Path) -> None:
    path, ran = tmp_path / "x.ckpt", tmp_path / "ran"
    if form == "pickle":
        path.write_bytes(pickle.dumps(RunsCode(ran), protocol))
    else:
        weights = {"state_dict": {"a": torch.zeros(1)}, "extra": RunsCode(ran)}
        torch.save(weights, path, pickle_protocol=protocol, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"loading it would run code|is damaged, incomplete or not a"):
        load_model(CONFIG, checkpoint=path)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["other.pkl", "constants.pkl", "code/__torch__.py", "data.pkl.1"])
def test_other_members_of_an_archive_are_not_unpickled(name: str, tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "x.ckpt")
    with zipfile.ZipFile(tmp_path / "x.ckpt", "a") as archive:
        archive.writestr(f"x/{name}", pickle.dumps(RunsCode(tmp_path / "ran")))
    with pytest.raises(CheckpointError):
        load_model(CONFIG, checkpoint=tmp_path / "x.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_second_pickle_of_the_same_name_does_not_run_code(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "x.ckpt")
    with zipfile.ZipFile(tmp_path / "x.ckpt", "a") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(RunsCode(tmp_path / "ran"), 2))
    with pytest.raises(CheckpointError, match="would run code"):
        load_model(CONFIG, checkpoint=tmp_path / "x.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["npz", "npy", "tar", "safetensors", "whole module", "torchscript"])
def test_other_formats_named_like_a_checkpoint_are_refused(kind: str, tmp_path: Path) -> None:
    path, code = tmp_path / "x.ckpt", RunsCode(tmp_path / "ran")
    if kind == "npz":
        np.savez(tmp_path / "x.npz", a=np.array([code], dtype=object))
        (tmp_path / "x.npz").rename(path)
    elif kind == "npy":
        np.save(tmp_path / "x.npy", np.array([code], dtype=object), allow_pickle=True)
        (tmp_path / "x.npy").rename(path)
    elif kind == "tar":
        with tarfile.open(path, "w") as archive:
            for name in ("sys_info", "pickle", "storages", "tensors"):  # as PyTorch 0.1 wrote them
                (tmp_path / name).write_bytes(pickle.dumps(code, 2))
                archive.add(tmp_path / name, name)
    elif kind == "safetensors":
        path = tmp_path / "x.safetensors"
        path.write_bytes(pickle.dumps(code, 2))
    elif kind == "whole module":
        torch.save(torch.nn.Linear(1, 1), path)
    else:
        # Its member code/ holds source text that torch.jit.load would compile.
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", pickle.dumps(code, 2))
            archive.writestr("x/constants.pkl", pickle.dumps((code,), 2))
            archive.writestr("x/code/__torch__.py", "import os")
            archive.writestr("x/version", "3\n")
    with pytest.raises(CheckpointError, match=r"loading it would run code|is damaged, incomplete or not a"):
        load_model(CONFIG, checkpoint=path)
    assert not (tmp_path / "ran").exists()
