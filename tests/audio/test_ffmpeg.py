import itertools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.common import needs_ffmpeg
from helpers.sounds import assert_refused, ffmpeg, noise, samples_of, write
from separation.audio.ffmpeg import Decoder, Input, Output, UnreadableError, probe
from separation.audio.waveform import SAMPLE_RATE


@needs_ffmpeg
def test_a_misleading_suffix_does_not_matter_to_ffmpeg(tmp_path: Path) -> None:
    source = write(tmp_path / "source.wav", noise(SAMPLE_RATE))
    path = ffmpeg(source, tmp_path / "song.wav", "-f", "ipod", "-c:a", "aac")
    assert abs(samples_of(path, tmp_path).shape[1] - SAMPLE_RATE) <= 1024


@needs_ffmpeg
def test_a_playlist_cannot_name_other_files(tmp_path: Path) -> None:
    ffmpeg(write(tmp_path / "source.wav", noise(SAMPLE_RATE)), tmp_path / "part.ts", "-c:a", "aac")
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\npart.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    subprocess.run(["ffprobe", "-v", "error", tmp_path / "list.m3u8"], check=True)  # ffmpeg as such follows it
    assert_refused(tmp_path / "list.m3u8", tmp_path, "not audio")


def test_without_ffmpeg_the_error_says_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    (tmp_path / "song.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(1000))
    assert_refused(tmp_path / "song.m4a", tmp_path, "install ffmpeg")


@pytest.fixture
def song(tmp_path: Path) -> Path:
    return write(tmp_path / "song.wav", noise(100_000), 48000, subtype="FLOAT")


@needs_ffmpeg
def test_probe_returns_the_streams_and_the_errors_of_a_file(song: Path) -> None:
    answer = probe(song, "'song.wav'", "-show_entries", "stream=codec_name,sample_rate,channels")
    (stream,) = answer["streams"]
    assert (stream["codec_name"], stream["sample_rate"], stream["channels"]) == ("pcm_f32le", "48000", 2)
    assert answer["errors"] == []


@needs_ffmpeg
def test_a_file_that_ffprobe_cannot_read_is_an_unreadable_error(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("not audio")
    with pytest.raises(UnreadableError, match=r"'words' is not audio .*: choose an audio file"):
        probe(tmp_path / "words", "'words'")


OUTPUT = Output(48000, 2, ("-map", "0:a:0"))


def decoded(decoder: Decoder) -> Tensor:
    samples = np.frombuffer(b"".join(decoder.blocks()), "<f4").reshape(-1, 2)
    return torch.from_numpy(samples.T.copy())


@needs_ffmpeg
def test_ffmpeg_decodes_a_file_in_frames_with_timestamps(song: Path) -> None:
    with Decoder(Input(song), OUTPUT, "'song.wav'") as decoder:
        assert torch.equal(decoded(decoder), noise(100_000))
        first = decoder.take_frames(1)
        rest = decoder.take_frames(200_000)
        assert decoder.wait() == 0
    assert len(first) == 1 and first[0].start == 0
    frames = first + rest
    assert sum(frame.n_samples for frame in frames) == 100_000
    assert [frame.start for frame in frames[1:]] == list(np.cumsum([frame.n_samples for frame in frames[:-1]]))
    assert decoder.errors == [] and decoder.n_errors == 0


@needs_ffmpeg
def test_ffmpeg_decodes_a_stream_of_bytes(song: Path) -> None:
    content = song.read_bytes()
    parts = (content[start : start + 1000] for start in range(0, len(content), 1000))
    with Decoder(Input(song, "wav", parts), OUTPUT, "'song.wav'") as decoder:
        assert torch.equal(decoded(decoder), noise(100_000))


@needs_ffmpeg
def test_the_errors_of_ffmpeg_are_collected(song: Path, tmp_path: Path) -> None:
    path = ffmpeg(song, tmp_path / "song.mka", "-c:a", "flac")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with Decoder(Input(path), OUTPUT, "'song.mka'") as decoder:
        decoded(decoder)
        decoder.wait()
        assert decoder.n_errors == len(decoder.errors) > 0
    assert not any("[error]" in error for error in decoder.errors)


@needs_ffmpeg
def test_leaving_ends_ffmpeg_even_if_it_still_reads(song: Path) -> None:
    header = song.read_bytes()[: song.read_bytes().index(b"data")] + b"data\xff\xff\xff\xff"  # of unknown length
    endless = itertools.chain([header], itertools.repeat(bytes(100_000)))
    with Decoder(Input(song, "wav", endless), OUTPUT, "'song.wav'") as decoder:
        next(decoder.blocks())
    assert decoder.wait() != 0
