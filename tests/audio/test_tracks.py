"""The right track of a video is decoded, in time with the picture."""

import json
import logging
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from helpers.common import quick_first
from separation.audio.decode import decode
from separation.audio.tracks import Sound, find_sound

RATE = 48000
TONE_SECONDS = 1.0
SILENT_SECONDS = 0.1  # before the tone

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")


def ffmpeg(*arguments: str | Path) -> None:
    command = ["ffmpeg", "-nostdin", "-y", "-v", "error", *map(str, arguments)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with picture.mp4 (2 s, silent), cover.jpg, and tone0.wav, tone1.wav, … of 440, 880, … Hz."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("ffmpeg is not installed")
    folder = tmp_path_factory.mktemp("made")
    ffmpeg("-f", "lavfi", "-i", "testsrc=s=64x48:r=25:d=2", "-c:v", "mpeg4", folder / "picture.mp4")
    ffmpeg("-i", folder / "picture.mp4", "-frames:v", "1", folder / "cover.jpg")
    time = np.arange(round(TONE_SECONDS * RATE)) / RATE
    for number in range(6):
        tone = 0.5 * np.cos(2 * np.pi * 440 * (number + 1) * time) * (time >= SILENT_SECONDS)
        soundfile.write(folder / f"tone{number}.wav", tone, RATE)
    return folder


def video(made: Path, path: Path, n_tracks: int, *options: str, offset: float = 0.0, picture: bool = True) -> Path:
    """A video whose audio tracks are tone0, tone1, … and begin `offset` seconds after the picture."""
    sources = [("-itsoffset", str(offset), "-i", str(made / f"tone{number}.wav")) for number in range(n_tracks)]
    pictures = ("-i", str(made / "picture.mp4")) if picture else ()
    maps = [("-map", str(number)) for number in range(n_tracks + picture)]
    ffmpeg(*(word for part in (pictures, *sources, *maps) for word in part), *options, path)
    return path


def decoded(path: Path) -> Tensor:
    with decode(path, path.parent, sample_rate=None) as waveform:
        assert waveform.sample_rate == RATE
        return waveform.read(0, waveform.n_samples)


def heard(path: Path) -> list[list[int]]:
    """The numbers of the tones that are heard on the left and on the right."""
    samples = decoded(path)[:, RATE // 4 : RATE // 4 * 3]
    spectrum = torch.fft.rfft(samples * torch.hann_window(samples.shape[1])).abs()
    bins = [round(440 * (number + 1) * samples.shape[1] / RATE) for number in range(6)]
    return [[number for number, at in enumerate(bins) if side[at] > 0.01 * samples.shape[1]] for side in spectrum]


def start_seconds(path: Path) -> float:
    """When the file's tone0.wav begins."""
    return int((decoded(path)[0].abs() > 0.2).nonzero()[0]) / RATE - SILENT_SECONDS


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


STEREO = ("-ac", "2", "-c:v", "copy")


# --- which track


@needs_ffmpeg
@pytest.mark.parametrize("suffix, codec", quick_first([(".mkv", "flac"), (".mp4", "aac"), (".mov", "pcm_s16le")], 1))
def test_the_default_track_is_decoded_and_a_warning_names_it(
    suffix: str, codec: str, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tags = ("-metadata:s:a:1", "language=deu", "-metadata:s:a:1", "title=Konzert")
    default = ("-disposition:a", "0", "-disposition:a:1", "default")
    path = video(made, tmp_path / f"film{suffix}", 3, *STEREO, "-c:a", codec, *tags, *default)
    assert heard(path) == [[1], [1]]
    (warning,) = warnings(caplog)
    tags = {".mkv": " (deu, Konzert)", ".mp4": " (deu)", ".mov": ""}[suffix]  # the tags that ffmpeg writes
    assert warning == f"'film{suffix}' has 3 audio tracks: number 2{tags}, the default, is taken"


@needs_ffmpeg
def test_without_a_default_track_the_first_is_decoded(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = video(made, tmp_path / "film.ts", 2, "-ac", "2", "-c:v", "mpeg2video", "-c:a", "mp2")
    assert heard(path) == [[0], [0]]
    assert warnings(caplog) == ["'film.ts' has 2 audio tracks: number 1, the first, is taken"]


@needs_ffmpeg
def test_a_commentary_is_not_decoded_if_there_is_another_track(made: Path, tmp_path: Path) -> None:
    kinds = ("-disposition:a:0", "comment", "-disposition:a:1", "0")
    path = video(made, tmp_path / "film.mkv", 2, *STEREO, "-c:a", "flac", *kinds)
    assert heard(path) == [[1], [1]]


@needs_ffmpeg
def test_a_single_track_gets_no_warning(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = video(made, tmp_path / "film.mp4", 1, *STEREO, "-c:a", "aac")
    assert heard(path) == [[0], [0]]
    assert not warnings(caplog)


# --- tracks of one channel


MPEG2 = ("-c:v", "mpeg2video", "-ac", "1")
ALL_ENABLED = ("-disposition:a", "default")


@needs_ffmpeg
@pytest.mark.parametrize(
    "suffix, options",
    quick_first(
        [
            (".mp4", ("-c:a", "aac", *ALL_ENABLED)),
            (".mxf", ("-c:a", "pcm_s16le")),
            (".mov", ("-c:a", "pcm_s16le")),
            (".mov", ("-c:a", "pcm_s24le", *ALL_ENABLED)),
        ],
        1,
    ),
)
def test_two_mono_tracks_are_left_and_right(
    suffix: str, options: tuple[str, ...], made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = video(made, tmp_path / f"camera{suffix}", 2, *MPEG2, *options)
    assert heard(path) == [[0], [1]]
    (warning,) = warnings(caplog)
    assert warning == (
        f"'camera{suffix}' has 2 audio tracks: 1 and 2 have one channel each and are taken as left and right"
    )


@needs_ffmpeg
def test_a_pair_of_mono_tracks_is_exact_to_the_sample(made: Path, tmp_path: Path) -> None:
    path = video(made, tmp_path / "camera.mov", 2, *MPEG2, "-c:a", "pcm_s16le")
    tones = [soundfile.read(made / f"tone{number}.wav", dtype="float32")[0] for number in range(2)]
    assert torch.equal(decoded(path), torch.from_numpy(np.stack(tones)))


@needs_ffmpeg
def test_the_first_two_of_several_unnamed_mono_tracks_are_left_and_right(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = video(made, tmp_path / "broadcast.mxf", 4, *MPEG2, "-c:a", "pcm_s16le")
    assert heard(path) == [[0], [1]]
    assert warnings(caplog)[0].endswith("are taken as left and right, and the others are left out")


@needs_ffmpeg
def test_mono_tracks_that_name_their_loudspeakers_are_joined(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sources = [word for number in range(6) for word in ("-i", made / f"tone{number}.wav")]
    names = ("FR", "FL", "FC", "LFE", "SL", "SR")  # not in the usual order
    graph = ";".join(
        f"[{number}]pan=1c|c0=c0,aformat=channel_layouts={name}[{name}]" for number, name in enumerate(names)
    )
    path = tmp_path / "studio.mov"
    ffmpeg(
        *sources,
        "-filter_complex",
        graph,
        *(w for name in names for w in ("-map", f"[{name}]")),
        "-c:a",
        "pcm_s16le",
        path,
    )
    assert heard(path) == [[1, 2, 4], [0, 2, 5]]
    chosen, mixed = warnings(caplog)
    assert "2, 1, 3, 4, 5, 6 have one channel each and are taken as the channels FL FR FC LFE SL SR" in chosen
    assert "6 channels (L R C LFE Ls Rs)" in mixed


@needs_ffmpeg
@pytest.mark.parametrize(
    "options",
    quick_first(
        [
            "-metadata:s:a:0 handler_name=Mono -metadata:s:a:1 handler_name=Commentary",
            "-metadata:s:a:0 language=eng -metadata:s:a:1 language=deu",
            "-filter:a:1 atrim=0:0.8",
        ],
        1,
    ),
)
def test_mono_tracks_that_differ_are_not_a_pair(
    options: str, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = video(made, tmp_path / "film.mov", 2, *MPEG2, "-c:a", "pcm_s16le", *options.split())
    assert heard(path) == [[0], [0]]
    assert "number 1" in warnings(caplog)[0]


def mono(index: int, **facts: Any) -> dict[str, Any]:
    return {"index": index, "codec_type": "audio", "channels": 1, "sample_rate": "48000", **facts}


@pytest.mark.parametrize(
    "other",
    [
        {"channels": 2},
        {"sample_rate": "44100"},
        {"codec_name": "aac"},
        {"start_time": "0.5"},
        {"duration": "9.0"},
        {"disposition": {"visual_impaired": 1}},
        {"tags": {"LANGUAGE": "fra"}},
        {"codec_type": "data"},
    ],
    ids=str,
)
def test_only_tracks_of_the_same_kind_are_a_pair(other: dict[str, Any]) -> None:
    assert find_sound([mono(0), mono(1)], ["mxf"], "'film.mxf'").channels == ("FL", "FR")
    assert find_sound([mono(0), mono(1, **other)], ["mxf"], "'film.mxf'").channels == ()


@pytest.mark.parametrize(
    "layouts, channels",
    [
        (("1 channels (FL)", "1 channels (FR)"), (0, 1)),
        (("1 channels (FR)", "1 channels (FL)"), (1, 0)),
        (("1 channels (FL)", "1 channels (FL)"), (0,)),
        (("mono", "mono"), (0,)),
    ],
)
def test_tracks_that_name_left_and_right_are_a_pair_in_any_container(
    layouts: tuple[str, str], channels: tuple[int, ...]
) -> None:
    streams = [mono(index, channel_layout=layout) for index, layout in enumerate(layouts)]
    sound = find_sound(streams, ["matroska", "webm"], "'film.mkv'")
    assert tuple(track["index"] for track in sound.tracks) == channels


@needs_ffmpeg
@pytest.mark.parametrize(
    "left, right", quick_first([("Left", "Right"), ("Channel 1", "Channel 2"), ("Audio L", "Audio R")], 1)
)
def test_titles_may_name_the_sides(left: str, right: str, made: Path, tmp_path: Path) -> None:
    named = ("-metadata:s:a:0", f"handler_name={left}", "-metadata:s:a:1", f"handler_name={right}")
    path = video(made, tmp_path / "camera.mov", 2, *MPEG2, "-c:a", "pcm_s16le", *named)
    assert heard(path) == [[0], [1]]


@needs_ffmpeg
def test_unnamed_mono_tracks_of_other_containers_are_not_a_pair(made: Path, tmp_path: Path) -> None:
    path = video(made, tmp_path / "film.mkv", 2, *MPEG2, "-c:a", "flac")
    assert heard(path) == [[0], [0]]


# --- in time with the picture

KINDS = {
    "aac.mp4": "-c:v copy -c:a aac",
    "aac.mkv": "-c:v copy -c:a aac",
    "aac.ts": "-c:v mpeg2video -c:a aac",
    "mp2.mpg": "-c:v mpeg2video -c:a mp2",
    "pcm.mov": "-c:v copy -c:a pcm_s16le",
    "flac.mkv": "-c:v copy -c:a flac",
    "vorbis.mkv": "-c:v copy -c:a libvorbis",
    "mp3.mkv": "-c:v copy -c:a libmp3lame",
    "opus.mp4": "-c:v copy -c:a libopus",
    "ac3.ts": "-c:v mpeg2video -c:a ac3",
    "wma.wmv": "-c:v wmv2 -c:a wmav2",
}


@needs_ffmpeg
@pytest.mark.parametrize("kind", quick_first(KINDS, 1))
def test_sound_that_begins_after_the_picture_gets_silence_before_it(
    kind: str, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"film.{kind.split('.')[1]}"
    try:
        video(made, path, 1, *KINDS[kind].split(), offset=0.7)
    except subprocess.CalledProcessError:
        pytest.skip(f"this ffmpeg writes no {kind}")
    assert start_seconds(path) == pytest.approx(0.7, abs=2e-3)  # containers' times are rounded to 1 ms
    (warning,) = warnings(caplog)
    assert warning.startswith(f"'{path.name}': the sound begins 0.")
    assert warning.endswith("s after the picture, so the stems begin with that much silence")


@needs_ffmpeg
@pytest.mark.parametrize("kind", quick_first(["pcm.mov", "flac.mkv", "aac.mp4"], 1))
def test_sound_that_begins_with_the_picture_gets_no_silence(
    kind: str, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = video(made, tmp_path / f"film.{kind.split('.')[1]}", 1, *KINDS[kind].split())
    assert start_seconds(path) == pytest.approx(0, abs=1 / RATE + (1e-3 if kind == "aac.mp4" else 0))
    assert not warnings(caplog)


@needs_ffmpeg
def test_sound_that_begins_before_the_picture_is_kept_whole(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = video(made, tmp_path / "film.mkv", 1, "-c:v", "copy", "-c:a", "flac", offset=-0.3)
    assert decoded(path).shape[1] == round(TONE_SECONDS * RATE)
    assert not warnings(caplog)


@needs_ffmpeg
@pytest.mark.parametrize("name, codec", quick_first([("song.m4a", "alac"), ("song.mka", "flac")], 1))
def test_a_late_start_without_a_picture_changes_nothing(name: str, codec: str, made: Path, tmp_path: Path) -> None:
    path = video(made, tmp_path / name, 1, "-c:a", codec, offset=0.7, picture=False)
    assert decoded(path).shape[1] == round(TONE_SECONDS * RATE)


@needs_ffmpeg
def test_a_cover_does_not_count_as_a_picture(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "song.m4a"
    cover = ("-i", made / "cover.jpg", "-map", "0", "-map", "1", "-c:v", "mjpeg", "-disposition:v", "attached_pic")
    ffmpeg("-itsoffset", "0.7", "-i", made / "tone0.wav", *cover, "-c:a", "alac", path)
    streams = probed_streams(path)
    assert [stream["codec_type"] for stream in streams] == ["audio", "video"]
    assert decoded(path).shape[1] == round(TONE_SECONDS * RATE)
    assert not warnings(caplog)


def probed_streams(path: Path) -> list[dict[str, Any]]:
    command = ["ffprobe", "-v", "error", "-show_streams", "-of", "json", str(path)]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return list(answer["streams"])


@needs_ffmpeg
def test_a_pair_of_mono_tracks_gets_silence_before_it_too(made: Path, tmp_path: Path) -> None:
    path = video(made, tmp_path / "camera.mov", 2, *MPEG2, "-c:a", "pcm_s16le", offset=0.7)
    assert start_seconds(path) == pytest.approx(0.7, abs=2e-3)
    assert decoded(path).shape[1] == pytest.approx((0.7 + TONE_SECONDS) * RATE, abs=0.002 * RATE)


def test_an_implausible_start_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    streams = [
        {"index": 0, "codec_type": "video", "start_time": "0.0"},
        {"index": 1, "codec_type": "audio", "channels": 2, "sample_rate": "44100", "start_time": "90000.0"},
    ]
    sound = find_sound(streams, ["mov"], "'film.mov'")
    assert sound.lead_seconds(90000.0, "'film.mov'") == 0
    assert "which is ignored" in caplog.text


def test_a_start_that_is_only_rounding_is_no_lead() -> None:
    sound = Sound(({"index": 0},), picture_start=0.0)
    assert sound.lead_seconds(0.001, "'film.mkv'") == 0
    assert sound.lead_seconds(None, "'film.mkv'") == 0
    assert sound.lead_seconds(0.04, "'film.mkv'") == 0.04
    assert Sound(({"index": 0},)).lead_seconds(5.0, "'song.m4a'") == 0
