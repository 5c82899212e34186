import math
import subprocess
from pathlib import Path

import pytest
import torch

from helpers.common import needs_ffmpeg, quick_first
from helpers.sounds import TAGS, assert_refused, ffmpeg, noise, samples_of, write
from separation.audio.decode import decode
from separation.audio.waveform import SAMPLE_RATE


@needs_ffmpeg
@pytest.mark.parametrize(
    "suffix, options, tolerance_samples",
    quick_first(
        [
            (".m4a", ("-c:a", "aac", "-b:a", "192k"), 1024),
            (".aac", ("-c:a", "aac", "-b:a", "192k"), 3072),
            (".opus", ("-c:a", "libopus"), 0),
            (".mka", ("-c:a", "flac"), 0),
            (".webm", ("-c:a", "libopus"), 960),
            (".mp2", (), 3000),
            (".ac3", (), 3000),
            (".wma", (), 5000),
            (".oga", ("-c:a", "flac"), 0),
        ],
        5,
    ),
)
def test_other_formats_decode_through_ffmpeg(
    suffix: str, options: tuple[str, ...], tolerance_samples: int, tmp_path: Path
) -> None:
    tone = 0.5 * torch.sin(torch.arange(88_200) * 0.05).expand(2, -1)
    path = ffmpeg(write(tmp_path / "source.wav", tone), tmp_path / f"song{suffix}", *options)
    decoded = samples_of(path, tmp_path)
    assert abs(decoded.shape[1] - 88_200) <= tolerance_samples
    assert decoded[:, 5000:80_000].square().mean().sqrt() == pytest.approx(0.5 / math.sqrt(2), rel=0.02)


@needs_ffmpeg
def test_the_sound_of_a_video_is_decoded(tmp_path: Path) -> None:
    source = write(tmp_path / "source.wav", noise(SAMPLE_RATE))
    path = tmp_path / "clip.mp4"
    video = ("-f", "lavfi", "-i", "color=c=blue:s=64x64:r=5:d=1", "-c:v", "mpeg4", "-c:a", "aac", "-shortest")
    ffmpeg(source, path, *video)
    assert abs(samples_of(path, tmp_path).shape[1] - SAMPLE_RATE) <= 1024


@needs_ffmpeg
@pytest.mark.parametrize(
    "format", quick_first(["wav", "flac", "ogg", "mp3", "aiff", "w64", "caf", "matroska", "webm", "asf"], 4)
)
def test_files_written_to_a_pipe_are_read_whole(format: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source.wav", noise(200_000))
    options = ["-nostdin", "-v", "error", "-i", str(source), "-f", format, "pipe:1"]
    path = tmp_path / "piped"
    path.write_bytes(subprocess.run(["ffmpeg", *options], check=True, capture_output=True).stdout)
    least = 200_000 - 2047 * (format == "asf")  # ffmpeg's WMA encoder drops an incomplete last frame
    assert least <= samples_of(path, tmp_path).shape[1] < 200_000 + 2 * 1152


@needs_ffmpeg
@pytest.mark.parametrize(
    "suffix, options",
    quick_first(
        [(".mkv", ("-c:a", "flac")), (".webm", ("-c:a", "libopus")), (".wma", ()), (".caf", ("-c:a", "alac"))], 1
    ),
)
def test_files_for_ffmpeg_are_refused_if_cut_short(suffix: str, options: tuple[str, ...], tmp_path: Path) -> None:
    path = ffmpeg(write(tmp_path / "source.wav", noise(200_000)), tmp_path / f"whole{suffix}", *options)
    assert samples_of(path, tmp_path).shape[1] >= 190_000
    content = path.read_bytes()
    for share in (0.3, 0.6):
        path.write_bytes(content[: int(len(content) * share)])
        assert_refused(path, tmp_path, "cut short")


@needs_ffmpeg
def test_a_video_without_sound_is_refused(tmp_path: Path) -> None:
    options = ["-v", "error", "-f", "lavfi", "-i", "color=c=blue:s=64x64:r=5:d=1", "-c:v", "mpeg4"]
    subprocess.run(["ffmpeg", *options, str(tmp_path / "clip.mp4")], check=True)
    assert_refused(tmp_path / "clip.mp4", tmp_path, "no audio stream")


@needs_ffmpeg
@pytest.mark.parametrize("suffix, codec", quick_first([(".m4a", "aac"), (".mka", "aac"), (".oga", "flac")], 1))
def test_ffmpegs_tags_are_read(suffix: str, codec: str, tmp_path: Path) -> None:
    options = [option for tag, value in TAGS.items() for option in ("-metadata", f"{tag}={value}")]
    path = ffmpeg(write(tmp_path / "source.wav", noise(5000)), tmp_path / f"song{suffix}", "-c:a", codec, *options)
    with decode(path, tmp_path) as waveform:
        assert waveform.tags == TAGS
