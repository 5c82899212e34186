import os
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor

from helpers.common import needs_ffmpeg, quick_first
from helpers.sounds import TAGS, disk_full_after, noise, samples_of, waveform_of
from separation.audio.decode import decode
from separation.audio.encode import encode
from separation.audio.options import BITRATES, FFMPEG_FORMATS, LOSSLESS, SNDFILE_FORMATS, OutputOptions
from separation.audio.waveform import SAMPLE_RATE, Waveform
from separation.errors import InputError, OutputError


@pytest.mark.parametrize("format", SNDFILE_FORMATS)
def test_tags_are_copied_from_song_to_stem(format: str, tmp_path: Path) -> None:
    with waveform_of(noise(5000), tmp_path, tags=TAGS) as waveform:
        encode(waveform, tmp_path / "first", OutputOptions(format=format))
    with decode(tmp_path / "first", tmp_path, sample_rate=48000) as waveform:
        assert waveform.tags == TAGS
        encode(waveform, tmp_path / "second", OutputOptions(format=format))
    with soundfile.SoundFile(tmp_path / "second") as sound:
        assert {tag: getattr(sound, tag) for tag in TAGS} == TAGS


@pytest.mark.parametrize("format", SNDFILE_FORMATS)
def test_an_enormous_tag_leaves_the_file_intact(format: str, tmp_path: Path) -> None:
    with waveform_of(noise(5000), tmp_path) as waveform:
        encode(waveform, tmp_path / "song", OutputOptions(format=format), tags={"title": "x" * 200_000})
    assert samples_of(tmp_path / "song", tmp_path).shape == (2, 5000)


@pytest.mark.parametrize("format", SNDFILE_FORMATS)
@pytest.mark.parametrize("sample_rate", [44100, 48000])
@pytest.mark.parametrize("n_samples", [1, 4410, 70_001, 200_000])
def test_encoded_files_have_the_exact_length(format: str, sample_rate: int, n_samples: int, tmp_path: Path) -> None:
    with waveform_of(noise(n_samples), tmp_path, sample_rate) as waveform:
        encode(waveform, tmp_path / "song", OutputOptions(format=format))
    samples, rate = soundfile.read(tmp_path / "song", always_2d=True)
    assert (samples.shape, rate) == ((n_samples, 2), sample_rate)
    assert [path.name for path in tmp_path.iterdir()] == ["song"]


def test_wav_is_float_by_default_and_lossless_even_beyond_full_scale(tmp_path: Path) -> None:
    loud = noise(70_000, level=0.2) * 3
    with waveform_of(loud, tmp_path) as waveform:
        encode(waveform, tmp_path / "song.wav", OutputOptions(format="wav"))
    assert soundfile.info(tmp_path / "song.wav").subtype == "FLOAT"
    assert torch.equal(samples_of(tmp_path / "song.wav", tmp_path), loud)


@pytest.mark.parametrize(
    "options",
    [
        *({"format": "wav", "wav_depth": depth} for depth in ("32f", "24", "16")),
        {"format": "wav", "wav_depth": "32f", "rf64": True},
        *({"format": format} for format in ("flac", "mp3")),
    ],
)
def test_the_same_samples_and_tags_give_the_same_bytes_without_a_timestamp(
    options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "rf64" in options:
        options = {key: value for key, value in options.items() if key != "rf64"}
        monkeypatch.setattr("separation.audio.encode._WAV_LIMIT_BYTES", 1000)
    found = set()
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        with waveform_of(noise(70_000, level=0.2), folder, tags=TAGS) as waveform:
            encode(waveform, folder / "song", OutputOptions(**options))
        found.add((folder / "song").read_bytes())
    (content,) = found
    if (place := content[:4096].find(b"PEAK")) > 0:  # the chunk in which libsndfile keeps the time
        assert content[place + 12 : place + 16] == bytes(4)
        assert "wav" in options.values()


def test_flac_is_24_bit_by_default(tmp_path: Path) -> None:
    with waveform_of(noise(70_000), tmp_path) as waveform:
        encode(waveform, tmp_path / "song.flac", OutputOptions(format="flac"))
    assert soundfile.info(tmp_path / "song.flac").subtype == "PCM_24"
    assert (samples_of(tmp_path / "song.flac", tmp_path) - noise(70_000)).abs().max() < 2.0**-22


@pytest.mark.parametrize("format", SNDFILE_FORMATS)
def test_the_gain_scales_the_samples(format: str, tmp_path: Path) -> None:
    tone = 1.5 * torch.sin(torch.arange(50_000) * 0.05).expand(2, -1)
    with waveform_of(tone, tmp_path) as waveform:
        encode(waveform, tmp_path / "song", OutputOptions(format=format), gain=0.5)
    difference = samples_of(tmp_path / "song", tmp_path) - 0.5 * tone
    assert difference.square().mean().sqrt() < (0.01 if format == "mp3" else 1e-6)


@pytest.mark.parametrize("format", ["flac", "mp3"])
def test_samples_beyond_full_scale_are_clipped_and_do_not_wrap_around(format: str, tmp_path: Path) -> None:
    tone = 3 * torch.sin(torch.arange(50_000) * 0.05).expand(2, -1)
    with waveform_of(tone, tmp_path) as waveform:
        encode(waveform, tmp_path / "song", OutputOptions(format=format))
    difference = samples_of(tmp_path / "song", tmp_path) - tone.clamp(-1, 1)
    assert difference.abs().max() < (0.3 if format == "mp3" else 1e-6)


@pytest.mark.parametrize("bitrate", BITRATES)
@pytest.mark.parametrize("sample_rate", [32000, 44100, 48000])
def test_every_frame_of_an_mp3_has_the_requested_bitrate(bitrate: int, sample_rate: int, tmp_path: Path) -> None:
    path = tmp_path / "song.mp3"
    with waveform_of(noise(sample_rate), tmp_path, sample_rate) as waveform:
        encode(waveform, path, OutputOptions(format="mp3", bitrate=bitrate))
    table = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
    content, bitrates = path.read_bytes(), []
    position = content.index(b"\xff\xfb")
    while position < len(content):
        assert content[position : position + 2] == b"\xff\xfb"
        bitrates.append(table[content[position + 2] >> 4])
        position += 144 * bitrates[-1] * 1000 // sample_rate + (content[position + 2] >> 1 & 1)
    assert set(bitrates[1:]) == {bitrate}  # the first holds the Xing header
    assert len(bitrates) > 25


def test_a_sample_rate_that_mp3_does_not_support_is_refused(tmp_path: Path) -> None:
    with waveform_of(noise(10), tmp_path, 96000) as waveform, pytest.raises(InputError, match="96000 Hz"):
        encode(waveform, tmp_path / "song.mp3", OutputOptions(format="mp3"))


def written(samples: Tensor, path: Path, sample_rate: int = SAMPLE_RATE, **options: str) -> NDArray[np.int32]:
    """The samples of an encoded file, `[n, C]` as 32-bit integers."""
    with waveform_of(samples, path.parent, sample_rate) as waveform:
        encode(waveform, path, OutputOptions(**options))
    return soundfile.read(path, dtype="int32", always_2d=True)[0]


@pytest.mark.parametrize("depth, subtype", [("16", "PCM_16"), ("24", "PCM_24"), ("32f", "FLOAT")])
def test_wav_has_the_requested_depth(depth: str, subtype: str, tmp_path: Path) -> None:
    written(noise(10), tmp_path / "song.wav", format="wav", wav_depth=depth)
    assert soundfile.info(tmp_path / "song.wav").subtype == subtype


@pytest.mark.parametrize("depth, subtype", [("16", "PCM_16"), ("24", "PCM_24")])
def test_flac_has_the_requested_depth(depth: str, subtype: str, tmp_path: Path) -> None:
    written(noise(10), tmp_path / "song.flac", format="flac", flac_depth=depth)
    assert soundfile.info(tmp_path / "song.flac").subtype == subtype


def test_16_bit_flac_and_16_bit_wav_hold_the_same_samples(tmp_path: Path) -> None:
    samples = noise(70_000)
    wav = written(samples, tmp_path / "song.wav", format="wav", wav_depth="16")
    assert np.array_equal(written(samples, tmp_path / "song.flac", format="flac", flac_depth="16"), wav)


@pytest.mark.parametrize("options", [{"format": "wav", "wav_depth": "24"}, {"format": "flac"}])
def test_24_bits_are_rounded_to_the_nearest_step_so_16_bit_music_is_unchanged(
    options: dict[str, str], tmp_path: Path
) -> None:
    samples = noise(70_000)
    steps = written(samples, tmp_path / "song", **options) / 2**8
    assert np.abs(steps - samples.T.numpy().astype(np.float64) * 2**23).max() <= 0.5
    sixteen = torch.arange(-(2**15), 2**15).expand(2, -1)
    assert np.array_equal(written(sixteen / 2**15, tmp_path / "16", **options) >> 16, sixteen.T)


def test_16_bits_are_dithered_so_that_the_error_is_a_steady_noise_independent_of_the_music(tmp_path: Path) -> None:
    time = torch.arange(400_000)
    tone = 0.4 * torch.sin(time * 0.05)  # in steps: rounding alone would leave silence
    music = torch.stack([tone, 1000 * torch.sin(time * 0.03)])
    steps = written(music / 2**15, tmp_path / "song.wav", format="wav", wav_depth="16").T / 2**16
    error = steps - music.numpy()
    assert abs(error.mean(axis=1)).max() < 0.005
    assert error.std(axis=1) == pytest.approx(0.5, rel=0.01)  # 1/12 of rounding and 2/12 of dither, squared steps
    assert (error @ music.T.numpy() / (music.norm(dim=1).numpy() ** 2)).diagonal() == pytest.approx(0, abs=0.01)
    for one, other in ((error[0, 1:], error[0, :-1]), (error[0], error[1]), (error[0] ** 2, np.abs(music[0].numpy()))):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.01


def test_dither_is_the_same_each_time_and_differs_between_stems(tmp_path: Path) -> None:
    samples = noise(200_000)
    (tmp_path / "again").mkdir()
    for path in (tmp_path / "vocals.wav", tmp_path / "again" / "vocals.wav", tmp_path / "drums.wav"):
        written(samples, path, format="wav", wav_depth="16")
    vocals = (tmp_path / "vocals.wav").read_bytes()
    assert (tmp_path / "again" / "vocals.wav").read_bytes() == vocals
    assert (tmp_path / "drums.wav").read_bytes() != vocals


def test_silence_stays_silent_at_16_bits(tmp_path: Path) -> None:
    assert not written(torch.zeros(2, 70_000), tmp_path / "song.wav", format="wav", wav_depth="16").any()


@pytest.mark.parametrize(
    "options",
    [
        {"format": "wav", "wav_depth": "16"},
        {"format": "wav", "wav_depth": "24"},
        {"format": "flac", "flac_depth": "16"},
    ],
)
def test_integers_are_clipped_at_full_scale_and_do_not_wrap_around(options: dict[str, str], tmp_path: Path) -> None:
    steps = written(torch.tensor([[1.0, -1, 3, -3]]).expand(2, -1), tmp_path / "song.wav", **options) / 2.0**31
    assert steps[:, 0] == pytest.approx([1, -1, 1, -1], abs=2**-14)


@pytest.mark.parametrize("sample_rate", [8000, 11127, 22050, 65535, 96000, 176410, 192000])
@pytest.mark.parametrize("format", ["wav", "flac"])
def test_wav_and_flac_take_the_rates_of_songs(format: str, sample_rate: int, tmp_path: Path) -> None:
    samples = noise(70_001)
    written(samples, tmp_path / "song", sample_rate, format=format)
    got, rate = soundfile.read(tmp_path / "song")
    assert (got.shape, rate) == ((70_001, 2), sample_rate)
    assert np.abs(got - samples.T.numpy()).max() < 1e-6


def test_a_sample_rate_that_flac_does_not_support_is_refused(tmp_path: Path) -> None:
    with waveform_of(noise(10), tmp_path, 176_401) as waveform:
        with pytest.raises(InputError, match="FLAC does not support 176401 Hz"):
            encode(waveform, tmp_path / "song.flac", OutputOptions(format="flac"))
        encode(waveform, tmp_path / "song.wav", OutputOptions(format="wav"))


def test_a_wav_that_is_too_large_for_32_bit_sizes_becomes_rf64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("separation.audio.encode._WAV_LIMIT_BYTES", 70_000 * 8 - 1)
    with waveform_of(noise(70_000), tmp_path, tags=TAGS) as waveform:
        encode(waveform, tmp_path / "song.wav", OutputOptions(format="wav"))
    assert soundfile.info(tmp_path / "song.wav").format == "RF64"
    with decode(tmp_path / "song.wav", tmp_path) as waveform:
        assert torch.equal(waveform.read(0, 70_000), noise(70_000))
        assert waveform.tags == TAGS


@pytest.mark.slow
def test_a_wav_over_4_gb_is_an_rf64_with_every_sample(tmp_path: Path) -> None:
    n_samples, tone = 2**29 + 100, 0.5 * torch.sin(torch.arange(1000) * 0.05).expand(2, -1)
    with Waveform(tmp_path) as waveform:
        waveform._file.truncate((n_samples - 1000) * 8)  # sparse: silence
        waveform._there = n_samples - 1000
        waveform.append(tone)
        encode(waveform, tmp_path / "song.wav", OutputOptions(format="wav"))
    with soundfile.SoundFile(tmp_path / "song.wav") as sound:
        assert (sound.format, sound.frames) == ("RF64", n_samples)
        sound.seek(n_samples - 1500)
        end = sound.read(dtype="float32")
    assert not end[:500].any() and np.array_equal(end[500:], tone.T.numpy())


@pytest.mark.parametrize("format", SNDFILE_FORMATS)
def test_on_a_full_disk_no_partial_file_is_left_and_the_old_file_is_untouched(format: str, tmp_path: Path) -> None:
    target = tmp_path / "song"
    target.write_bytes(b"old")
    with waveform_of(noise(200_000), tmp_path) as waveform:
        encode(waveform, tmp_path / "whole", OutputOptions(format=format))
        size = (tmp_path / "whole").stat().st_size
        for n_bytes in (0, 10, size // 2, size - 1):  # at the header, in the middle, and only when it is closed
            with disk_full_after(n_bytes), pytest.raises(OutputError, match="free space there") as caught:
                encode(waveform, target, OutputOptions(format=format))
            assert str(tmp_path) in str(caught.value)
    assert target.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["song", "whole"]


@pytest.mark.parametrize("folder", ["missing", "a_file", "read_only"])
def test_an_unwritable_folder_is_an_error_that_names_it(folder: str, tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    (tmp_path / "read_only").mkdir(mode=0o555)
    if folder == "read_only" and os.access(tmp_path / folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    with waveform_of(noise(10), tmp_path) as waveform:
        with pytest.raises(OutputError, match="choose another folder") as caught:
            encode(waveform, tmp_path / folder / "song.wav", OutputOptions(format="wav"))
        assert str(tmp_path / folder) in str(caught.value)


def test_a_folder_in_place_of_the_file_is_an_error_and_no_partial_file_is_left(tmp_path: Path) -> None:
    (tmp_path / "song.wav").mkdir()
    with waveform_of(noise(10), tmp_path) as waveform, pytest.raises(OutputError, match=r"song\.wav"):
        encode(waveform, tmp_path / "song.wav", OutputOptions(format="wav"))
    assert [path.name for path in tmp_path.iterdir()] == ["song.wav"]


def test_an_exception_while_encoding_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with waveform_of(noise(10), tmp_path) as waveform:

        def interrupt(start: int, stop: int) -> Tensor:
            raise KeyboardInterrupt

        monkeypatch.setattr(waveform, "interleaved", interrupt)
        with pytest.raises(KeyboardInterrupt):
            encode(waveform, tmp_path / "song.wav", OutputOptions(format="wav"))
    assert not list(tmp_path.iterdir())


@needs_ffmpeg
@pytest.mark.parametrize("format", SNDFILE_FORMATS)
def test_ffmpeg_reads_the_same_samples_from_encoded_files(format: str, tmp_path: Path) -> None:
    with waveform_of(noise(70_000), tmp_path) as waveform:
        encode(waveform, tmp_path / "song", OutputOptions(format=format))
    options = ["-v", "error", "-i", str(tmp_path / "song"), "-f", "f32le", "pipe:1"]
    raw = subprocess.run(["ffmpeg", "-nostdin", *options], check=True, capture_output=True).stdout
    theirs = torch.from_numpy(np.frombuffer(raw, dtype="<f4").reshape(-1, 2).copy()).T
    ours = samples_of(tmp_path / "song", tmp_path)
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# With ffmpeg


def rate_of(format: str) -> int:
    return 48000 if format == "opus" else 44100


def lag(one: Tensor, other: Tensor) -> int:
    """By how many samples `other` is late, from the peak of the cross-correlation."""
    n = one.shape[-1]
    spectra = [torch.fft.rfft(samples.double(), 2 * n) for samples in (other, one)]
    peak = int(torch.fft.irfft(spectra[0] * spectra[1].conj(), 2 * n).sum(dim=0).argmax())
    return peak if peak < n else peak - 2 * n


ENCODINGS: list[dict[str, Any]] = [{"format": format} for format in FFMPEG_FORMATS]
ENCODINGS += [{"format": "m4a", "bitrate": LOSSLESS}]


@needs_ffmpeg
@pytest.mark.parametrize("channels", quick_first(["stereo", "mono"], 1))
@pytest.mark.parametrize("n_samples", quick_first([1, 4410, 70_001], 2))
@pytest.mark.parametrize("options", ENCODINGS)
def test_formats_of_ffmpeg_keep_length_and_alignment(
    options: dict[str, Any], n_samples: int, channels: str, tmp_path: Path
) -> None:
    samples, rate = noise(n_samples), rate_of(options["format"])
    with waveform_of(samples, tmp_path, rate) as waveform:
        encode(waveform, tmp_path / "song", OutputOptions(**options, channels=channels))
    expected = samples.mean(dim=0).expand(2, -1) if channels == "mono" else samples
    decoded = samples_of(tmp_path / "song", tmp_path, sample_rate=rate)
    assert decoded.shape == expected.shape
    assert [path.name for path in tmp_path.iterdir()] == ["song"]
    if "bitrate" in options:
        assert (decoded - expected).abs().max() <= 2.0**-24
    if n_samples == 70_001:
        assert lag(expected, decoded) == 0


@needs_ffmpeg
def test_an_m4a_announces_its_exact_length_and_the_encoders_delay(tmp_path: Path) -> None:
    with waveform_of(noise(70_001), tmp_path) as waveform:
        encode(waveform, tmp_path / "song.m4a", OutputOptions("m4a"))
    content = (tmp_path / "song.m4a").read_bytes()
    place = content.index(b"elst") + 12
    assert struct.unpack(">II", content[place : place + 8]) == (70_001, 1024)  # length in samples, delay
    assert content.index(b"moov") < content.index(b"mdat")  # so that it plays before it is downloaded


@needs_ffmpeg
@pytest.mark.parametrize("format", quick_first(FFMPEG_FORMATS, 1))
def test_formats_of_ffmpeg_give_the_same_bytes_each_time(format: str, tmp_path: Path) -> None:
    found = set()
    for _ in range(2):
        with waveform_of(noise(70_000), tmp_path, rate_of(format), tags=TAGS) as waveform:
            encode(waveform, tmp_path / "song", OutputOptions(format))
        found.add((tmp_path / "song").read_bytes())
    assert len(found) == 1


@needs_ffmpeg
@pytest.mark.parametrize("format", quick_first(FFMPEG_FORMATS, 1))
def test_more_kilobits_make_larger_files_of_ffmpeg(format: str, tmp_path: Path) -> None:
    sizes = []
    for bitrate in (128, 192, 320):
        with waveform_of(noise(96_000), tmp_path, rate_of(format)) as waveform:
            encode(waveform, tmp_path / "song", OutputOptions(format, bitrate=bitrate))
        sizes.append((tmp_path / "song").stat().st_size)
    assert sizes == sorted(set(sizes))


@needs_ffmpeg
@pytest.mark.parametrize("format", FFMPEG_FORMATS)
def test_an_exception_while_ffmpeg_encodes_leaves_no_partial_file(format: str, tmp_path: Path) -> None:
    def cancel() -> float:
        raise KeyboardInterrupt

    with waveform_of(noise(10), tmp_path, rate_of(format)) as waveform, pytest.raises(KeyboardInterrupt):
        encode(waveform, tmp_path / "song", OutputOptions(format), gain=cancel)
    assert not list(tmp_path.iterdir())


def test_without_ffmpeg_its_formats_are_refused_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    words = "format m4a needs ffmpeg: install it, or choose wav, flac or mp3"
    with waveform_of(noise(10), tmp_path) as waveform, pytest.raises(InputError, match=words):
        encode(waveform, tmp_path / "song", OutputOptions("m4a"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format, rate", [("m4a", 176400), ("opus", 44100)])
def test_a_sample_rate_that_a_format_of_ffmpeg_lacks_is_refused(format: str, rate: int, tmp_path: Path) -> None:
    with waveform_of(noise(10), tmp_path, rate) as waveform, pytest.raises(InputError, match=f"{rate} Hz"):
        encode(waveform, tmp_path / "song", OutputOptions(format))


@pytest.mark.parametrize("format", SNDFILE_FORMATS)
def test_mono_is_the_mean_of_the_channels(format: str, tmp_path: Path) -> None:
    samples = noise(50_000)
    with waveform_of(samples, tmp_path) as waveform:
        encode(waveform, tmp_path / "song", OutputOptions(format, channels="mono"))
    got, _ = soundfile.read(tmp_path / "song", always_2d=True)
    assert got.shape == (50_000, 1)
    assert np.abs(got[:, 0] - samples.mean(dim=0).numpy()).max() < (0.4 if format == "mp3" else 1e-6)
