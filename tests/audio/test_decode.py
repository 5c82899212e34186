import math
import os
import random
import shutil
from pathlib import Path

import pytest
import soundfile
import torch

from helpers.common import needs_ffmpeg, quick_first
from helpers.sounds import assert_refused, ffmpeg, noise, samples_of, waveform_of, write
from separation.audio.decode import decode
from separation.audio.encode import encode
from separation.audio.options import OutputOptions
from separation.progress import Progress


def test_mono_is_duplicated(tmp_path: Path) -> None:
    mono = noise(3000, channels=1)
    stereo = samples_of(write(tmp_path / "mono.wav", mono, subtype="FLOAT"), tmp_path)
    assert torch.equal(stereo, mono.expand(2, -1))


@pytest.mark.parametrize("channels", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("container", ["WAV", "FLAC"])
def test_more_channels_are_mixed_down_by_the_standard_coefficients(
    channels: int, container: str, tmp_path: Path
) -> None:
    # The gains for the left and the right output, in the order of the file's channels.
    coefficients = {
        3: ([1, 0, 0.7071], [0, 1, 0.7071]),
        4: ([1, 0, 0.7071, 0], [0, 1, 0, 0.7071]),
        5: ([1, 0, 0.7071, 0.7071, 0], [0, 1, 0.7071, 0, 0.7071]),
        6: ([1, 0, 0.7071, 0, 0.7071, 0], [0, 1, 0.7071, 0, 0, 0.7071]),
        7: ([1, 0, 0.7071, 0, 0.5, 0.7071, 0], [0, 1, 0.7071, 0, 0.5, 0, 0.7071]),
        8: ([1, 0, 0.7071, 0, 0.7071, 0, 0.7071, 0], [0, 1, 0.7071, 0, 0, 0.7071, 0, 0.7071]),
    }
    matrix = torch.tensor(coefficients[channels])
    matrix = matrix / matrix.sum(dim=1, keepdim=True)
    samples = noise(2000, channels)
    path = write(tmp_path / "surround", samples, format=container, subtype="PCM_24")
    assert (samples_of(path, tmp_path) - matrix @ samples).abs().max() < 1e-4


def test_full_scale_in_every_channel_stays_within_full_scale(tmp_path: Path) -> None:
    path = write(tmp_path / "loud.wav", torch.ones(6, 100), subtype="FLOAT")
    assert samples_of(path, tmp_path).max() == pytest.approx(1, abs=1e-6)


@needs_ffmpeg
@pytest.mark.parametrize("codec", quick_first(["flac", "libvorbis", "libopus", "aac"], 2))
def test_the_same_surround_file_mixes_down_the_same_in_every_format(codec: str, tmp_path: Path) -> None:
    # A tone in L, R, C, LFE, Ls, Rs, one after the other, so that the levels on both sides tell the order.
    samples = torch.zeros(6, 6 * 8000)
    for channel in range(6):
        samples[channel, channel * 8000 : (channel + 1) * 8000] = 0.5 * torch.sin(torch.arange(8000) * 0.05)
    source = write(tmp_path / "5.1.wav", samples, 48000)
    suffix, options = {
        "flac": (".flac", ()),
        "libvorbis": (".ogg", ("-q:a", "8")),
        "libopus": (".opus", ("-mapping_family", "1", "-b:a", "512k")),
        "aac": (".m4a", ("-b:a", "512k")),
    }[codec]
    path = ffmpeg(source, tmp_path / f"song{suffix}", "-c:a", codec, *options)
    decoded = samples_of(path, tmp_path, sample_rate=48000)[:, : 6 * 8000]
    levels = decoded.unflatten(1, (6, 8000))[..., 2000:6000].square().mean(dim=-1).sqrt() / (0.5 / math.sqrt(2))
    expected = torch.tensor([[1, 0, 0.7071, 0, 0.7071, 0], [0, 1, 0.7071, 0, 0, 0.7071]]) / 2.4142
    assert (levels - expected).abs().max() < 0.02


@pytest.mark.parametrize("n_samples", [1, 2, 4410])
@pytest.mark.parametrize("container", ["WAV", "FLAC", "MP3"])
def test_short_files_keep_their_length(n_samples: int, container: str, tmp_path: Path) -> None:
    path = write(tmp_path / "short", noise(n_samples), format=container)
    assert samples_of(path, tmp_path).shape == (2, n_samples)


def test_digital_silence_stays_digital_silence(tmp_path: Path) -> None:
    path = write(tmp_path / "silence.wav", torch.zeros(2, 9000), 48000)
    with decode(path, tmp_path) as waveform:
        assert not waveform.read(0, waveform.n_samples).any()
        assert (waveform.peak, waveform.mean, waveform.std) == (0, 0, 0)


def test_a_quiet_file_keeps_its_level(tmp_path: Path) -> None:
    quiet = noise(50_000) / 100  # about -60 dBFS
    assert torch.equal(samples_of(write(tmp_path / "q.wav", quiet, subtype="FLOAT"), tmp_path), quiet)


def test_samples_beyond_full_scale_are_kept(tmp_path: Path) -> None:
    loud = noise(1000, level=0.2) * 10
    assert torch.equal(samples_of(write(tmp_path / "loud.wav", loud, subtype="FLOAT"), tmp_path), loud)


@pytest.mark.parametrize("sample_rate", [8000, 11025, 16000, 22050, 32000, 48000, 88200, 96000, 176400, 192000])
def test_every_rate_is_resampled_to_the_requested_rate_with_the_exact_length(sample_rate: int, tmp_path: Path) -> None:
    n_samples = sample_rate // 3 + 1
    path = write(tmp_path / "song.wav", noise(n_samples), sample_rate)
    assert samples_of(path, tmp_path).shape == (2, math.ceil(n_samples * 44100 / sample_rate))
    assert samples_of(path, tmp_path, sample_rate=48000).shape == (2, math.ceil(n_samples * 48000 / sample_rate))


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg", pytest.param("m4a", marks=needs_ffmpeg)])
def test_progress_rises_from_0_to_1_while_a_file_is_decoded(suffix: str, tmp_path: Path) -> None:
    song = tmp_path / f"song.{suffix}"
    if suffix == "m4a":
        ffmpeg(write(tmp_path / "song.wav", noise(500_000)), song)
    else:
        write(song, noise(500_000))
    shares: list[float] = []
    decode(song, tmp_path, progress=Progress(lambda share, stage: shares.append(share))).close()
    assert shares[0] == 0 and shares[-1] == pytest.approx(1, abs=0.01) and max(shares) <= 1
    assert shares == sorted(shares)
    assert len(set(shares)) > 5


def test_progress_continues_while_a_song_is_resampled_and_can_cancel(tmp_path: Path) -> None:
    song = write(tmp_path / "song.wav", noise(2_000_000), 48000)
    shares: list[float] = []
    decode(song, tmp_path, progress=Progress(lambda share, stage: shares.append(share))).close()
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    assert len({share for share in shares if share > 0.5}) > 3

    def cancel(share: float, stage: str) -> None:
        if share > 0.6:
            raise KeyError("cancelled")

    with pytest.raises(KeyError, match="cancelled"):
        decode(song, tmp_path, progress=Progress(cancel))
    assert list(tmp_path.iterdir()) == [song]


@pytest.mark.parametrize("suffix", ["wav", pytest.param("m4a", marks=needs_ffmpeg)])
def test_an_exception_from_progress_cancels_and_leaves_no_file(suffix: str, tmp_path: Path) -> None:
    song = write(tmp_path / "song.wav", noise(500_000))
    if suffix == "m4a":
        song = ffmpeg(song, tmp_path / "song.m4a")
    before = set(tmp_path.iterdir())
    shares: list[float] = []

    def cancel(share: float, stage: str) -> None:
        shares.append(share)
        if share > 0:
            raise KeyError("cancelled")

    with pytest.raises(KeyError, match="cancelled"):
        decode(song, tmp_path, progress=Progress(cancel))
    assert len(shares) == 2
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["song.mp3", "song.txt", "song.raw", "song.au", "song", "song.m4a"])
def test_a_misleading_suffix_does_not_matter(name: str, tmp_path: Path) -> None:
    samples = noise(5000)
    path = write(tmp_path / name, samples, format="WAV", subtype="FLOAT")
    assert torch.equal(samples_of(path, tmp_path), samples)


@pytest.mark.parametrize(
    "name",
    quick_first(
        ["two words.x", "-i.x", 'it\'s "quoted".x', "🎵 Füße.x", "a:b?c*%d&|;$(x).x", "new\nline.x", "file:x", "..x"], 3
    ),
)
@pytest.mark.parametrize("format", ["wav", pytest.param("m4a", marks=needs_ffmpeg)])
def test_odd_file_names_work(name: str, format: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, noise(5000), format="WAV")
    if format == "m4a":
        ffmpeg(path.rename(tmp_path / "source.wav"), tmp_path / "target.m4a", "-c:a", "aac").rename(path)
    assert abs(samples_of(path, tmp_path).shape[1] - 5000) <= 1024
    written = tmp_path / f"out {name}"
    with waveform_of(noise(100), tmp_path) as waveform:
        encode(waveform, written, OutputOptions(format="flac"))
    assert samples_of(written, tmp_path).shape == (2, 100)


def test_a_relative_path_as_a_string_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "-song.wav", noise(10))
    monkeypatch.chdir(tmp_path)
    assert samples_of("-song.wav", tmp_path).shape == (2, 10)  # type: ignore[arg-type]


@needs_ffmpeg
def test_joined_ogg_songs_are_read_whole(tmp_path: Path) -> None:
    first = write(tmp_path / "first", noise(70_000), format="OGG").read_bytes()
    second = write(tmp_path / "second", noise(50_000), format="OGG").read_bytes()
    (tmp_path / "both.ogg").write_bytes(first + second)
    assert samples_of(tmp_path / "both.ogg", tmp_path).shape[1] == pytest.approx(120_000, abs=2000)


def test_memory_does_not_grow_with_the_song(tmp_path: Path) -> None:
    """Two minutes of stereo take 42 MB. No step may hold more than a few blocks."""
    minute = noise(60 * 48000)
    with soundfile.SoundFile(tmp_path / "long.wav", "w", 48000, 2, subtype="PCM_16") as sound:
        for _ in range(2):
            sound.write(minute.T.numpy())
    del minute
    samples_of(write(tmp_path / "warm.wav", noise(300_000), 48000), tmp_path)
    before = resident_peak_bytes(reset=True)
    with decode(tmp_path / "long.wav", tmp_path) as waveform:
        encode(waveform, tmp_path / "out.wav", OutputOptions(format="wav"))
    assert resident_peak_bytes() - before < 20e6


def resident_peak_bytes(*, reset: bool = False) -> int:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak memory of a part of a program can be read on Linux only")
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "missing.mp3", tmp_path, "does not exist")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert_refused(tmp_path / "folder", tmp_path, "not a file")


def test_a_device_is_refused(tmp_path: Path) -> None:
    assert_refused("/dev/zero", tmp_path, "not a file")


@pytest.mark.parametrize("name", ["x" * 300, "nul\0byte"])
def test_an_impossible_name_is_refused(name: str, tmp_path: Path) -> None:
    assert_refused(tmp_path / name, tmp_path, "cannot be read")


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "song.wav", noise(10))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert_refused(path, tmp_path, "cannot be read")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    assert_refused(tmp_path / "empty.wav", tmp_path, "empty (0 bytes)")


@pytest.mark.parametrize(
    "content",
    [
        b"These are words, not sound.\n" * 200,
        b"x",
        "Diese Wörter sind kein Klang.\n".encode("utf-16") * 200,
        bytes(10_000),
        b"RIFF\x00\x10\x00\x00WAVE",
        b"ID3\x04\x00\x00\x00\x00\x00\x00" + b"text " * 500,
        random.Random(1).randbytes(50_000),
        b"\xff\xfb\x90\x64" + random.Random(2).randbytes(50),
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n",
        b"ffconcat version 1.0\nfile 'source.wav'\n",
    ],
    ids=["text", "byte", "utf16", "zeros", "riff", "id3", "random", "mp3-header", "hls", "concat"],
)
@pytest.mark.parametrize("name", quick_first(["song.mp3", "song.m3u8", "song.wav", "song.au"], 1))
def test_what_is_not_audio_is_refused(content: bytes, name: str, tmp_path: Path) -> None:
    write(tmp_path / "source.wav", noise(1000))
    (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path / name, tmp_path, "not audio")


@pytest.mark.parametrize("tagged", [False, True])
def test_a_file_without_samples_is_refused(tagged: bool, tmp_path: Path) -> None:
    with soundfile.SoundFile(tmp_path / "none.wav", "w", 44100, 2) as sound:
        if tagged:
            sound.title = "Nothing"
    assert_refused(tmp_path / "none.wav", tmp_path, "no samples")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused_with_their_place(value: float, tmp_path: Path) -> None:
    samples = noise(100_000)
    samples[1, 88_200] = value
    path = write(tmp_path / "song.wav", samples, subtype="FLOAT")
    assert_refused(path, tmp_path, "NaN or Inf at 2.000 s")


def test_nine_channels_are_refused(tmp_path: Path) -> None:
    assert_refused(write(tmp_path / "song.wav", noise(100, 9)), tmp_path, "9 channels")


@pytest.mark.parametrize("sample_rate", [1, 7999, 192_001, 2_000_000])
def test_rates_out_of_range_are_refused(sample_rate: int, tmp_path: Path) -> None:
    assert_refused(write(tmp_path / "song.wav", noise(100), sample_rate), tmp_path, f"{sample_rate} Hz")


@pytest.mark.parametrize("container", ["WAV", "WAVEX", "RF64", "W64", "AIFF", "CAF", "AU", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("part", [0.3, 0.6])
def test_a_file_that_is_cut_short_is_refused(container: str, part: float, tmp_path: Path) -> None:
    if container == "CAF" and shutil.which("ffmpeg") is None:
        pytest.skip("libsndfile reads no CAF that is cut short, and ffmpeg is not installed")
    content = write(tmp_path / "whole", noise(200_000), format=container).read_bytes()
    (tmp_path / "cut").write_bytes(content[: int(len(content) * part)])
    assert_refused(tmp_path / "cut", tmp_path, "cut short")


def test_a_file_without_tags_has_none(tmp_path: Path) -> None:
    with decode(write(tmp_path / "song.flac", noise(10)), tmp_path) as waveform:
        assert waveform.tags == {}
