"""A video is written again with other sound: the same picture, in time."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.common import needs_ffmpeg, quick_first
from helpers.sounds import noise, samples_of, write
from helpers.videos import PICTURES, picture, video
from separation.audio.beside import suffix_of
from separation.audio.video import check_picture, write_video
from separation.errors import InputError

N_SAMPLES = 88_200


def lag(one: Tensor, other: Tensor) -> int:
    n = one.shape[-1]
    spectra = [np.fft.rfft(samples[0].numpy(), 2 * n) for samples in (other, one)]
    peak = int(np.fft.irfft(spectra[0] * spectra[1].conj()).argmax())
    return peak if peak < n else peak - 2 * n


@needs_ffmpeg
@pytest.mark.parametrize("suffix", quick_first(PICTURES, 1))
def test_the_picture_is_copied_and_the_sum_of_the_sounds_is_in_time(suffix: str, tmp_path: Path) -> None:
    waves = {"a": noise(N_SAMPLES), "b": noise(2 * N_SAMPLES)[:, :N_SAMPLES]}
    files = {name: write(tmp_path / f"{name}.wav", samples) for name, samples in waves.items()}
    clip = video(tmp_path / f"clip.{suffix}", files["a"])
    check_picture(clip)
    target = tmp_path / f"new.{suffix_of(clip)}"
    write_video(clip, files, target)
    assert [line.split(b",")[4:] for line in picture(target).splitlines() if line[:1] != b"#"] == [
        line.split(b",")[4:] for line in picture(clip).splitlines() if line[:1] != b"#"
    ]
    sound, expected = samples_of(target, tmp_path), waves["a"] + waves["b"]
    n_samples = min(sound.shape[1], N_SAMPLES)
    assert n_samples >= N_SAMPLES - 1024
    assert lag(expected[:, :n_samples], sound[:, :n_samples]) == 0
    error = sound[:, :n_samples] - expected[:, :n_samples]
    if suffix in ("mp4", "mov"):
        assert error.square().mean() < 0.5 * expected.square().mean()


@pytest.mark.slow
@needs_ffmpeg
def test_one_sound_keeps_its_level(tmp_path: Path) -> None:
    tone = 0.5 * torch.sin(torch.arange(N_SAMPLES) * 0.05).expand(2, -1)
    sound = write(tmp_path / "a.wav", tone)
    clip = video(tmp_path / "clip.mp4", sound)
    write_video(clip, {"a": sound}, tmp_path / "new.mp4")
    found = samples_of(tmp_path / "new.mp4", tmp_path)
    assert found[:, 5000:80_000].square().mean().sqrt() == pytest.approx(0.5 / 2**0.5, rel=0.01)


SUBTITLES = "1\n00:00:00,200 --> 00:00:01,000\nfirst line\n\n2\n00:00:01,200 --> 00:00:01,900\nsecond line\n"


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize("suffix, codec", [("mp4", "mov_text"), ("mov", "mov_text"), ("mkv", "srt")])
def test_subtitles_stay_with_their_language(suffix: str, codec: str, tmp_path: Path) -> None:
    sound = write(tmp_path / "a.wav", noise(N_SAMPLES))
    (tmp_path / "lyrics.srt").write_text(SUBTITLES)
    inputs = ["-i", str(video(tmp_path / "plain.mp4", sound)), "-i", str(tmp_path / "lyrics.srt")]
    clip = tmp_path / f"clip.{suffix}"
    copied = ["-map", "0", "-map", "1", "-c", "copy", "-c:s", codec, "-metadata:s:s:0", "language=jpn"]
    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", *inputs, *copied, str(clip)], check=True)
    write_video(clip, {"a": sound}, tmp_path / f"new.{suffix}")
    assert subtitles(tmp_path / f"new.{suffix}") == pytest.approx(subtitles(clip), abs=0.01)


def subtitles(path: Path) -> dict[str, float]:
    """The Japanese subtitles of a video, each with the seconds between the picture's first frame and its start."""
    options = ["-map", "0:s:m:language:jpn", "-f", "srt", "-"]
    command = ["ffmpeg", "-nostdin", "-v", "error", "-copyts", "-i", str(path), *options]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    starts = ["ffprobe", "-v", "error", "-select_streams", "v", "-show_entries", "stream=start_time", "-of", "csv=p=0"]
    picture_start = float(subprocess.run([*starts, str(path)], check=True, capture_output=True, text=True).stdout)
    found = re.findall(r"00:00:(\d\d),(\d\d\d) --> .*\n(.+)", text)
    assert [words for _, _, words in found] == ["first line", "second line"]
    return {words: int(whole) + int(rest) / 1000 - picture_start for whole, rest, words in found}


@needs_ffmpeg
def test_a_song_without_a_picture_is_refused(tmp_path: Path) -> None:
    song = write(tmp_path / "song.wav", noise(1000))
    with pytest.raises(InputError, match=r"'song.wav' has no picture: leave the video out"):
        check_picture(song)


def test_without_ffmpeg_there_is_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="a video needs ffmpeg"):
        check_picture(tmp_path / "clip.mp4")
