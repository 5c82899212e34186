"""Unusual but valid songs from file to stems: level, length, sum, and what is special about each kind."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchaudio.functional import resample

from helpers.command_line import DEMO
from helpers.common import SONG, quick_first
from separation import AudioError, InputError, ModelPool, Separator
from separation.audio.decode import decode
from separation.audio.options import OutputOptions
from separation.cli.main import main
from separation.engine.options import EngineOptions
from separation.evaluation.metrics import level_dbfs, sdr

RATE = 44100
SECONDS = 2
Samples = NDArray[np.float32]  # [n, C]


def music() -> Samples:
    return soundfile.read(SONG, dtype="float32", frames=SECONDS * RATE)[0]


def phone() -> Samples:
    return resample(torch.from_numpy(music().mean(axis=1)), RATE, 8000).numpy()[:, None]


def surround() -> Samples:
    """L and R are the music; the others are parts of it, and LFE is loud."""
    left, right = music().T
    return np.stack([left, right, 0.5 * (left + right), np.ones_like(left), 0.3 * left, 0.3 * right], axis=1)


def clicks() -> Samples:
    """One sample at full scale every half second."""
    samples = np.zeros((SECONDS * RATE, 2), np.float32)
    samples[RATE // 4 :: RATE // 2] = 1.0
    return samples


KINDS: dict[str, tuple[Callable[[], Samples], int]] = {
    "8 kHz mono": (phone, 8000),
    "5.1": (surround, RATE),
    "DC offset": (lambda: music() + np.float32(0.1), RATE),
    "-60 dBFS": (lambda: music() * np.float32(1e-3), RATE),
    "click train": (clicks, RATE),
    "0.1 s": (lambda: music()[RATE : RATE + RATE // 10], RATE),
    "one sample": (lambda: music()[RATE : RATE + 1], RATE),
    "silence": (lambda: np.zeros((RATE, 2), np.float32), RATE),
    "8 bit": (lambda: np.round(music() * 128) / 128, RATE),
    "96 kHz": (lambda: resample(torch.from_numpy(music().T), RATE, 96000).T.numpy()[:96_001], 96000),
    "192 kHz": (lambda: resample(torch.from_numpy(music().T), RATE, 192_000).T.numpy()[:192_001], 192_000),
    "7 channels": (lambda: np.tile(music()[:, :1], (1, 7)), RATE),
}
CENTRE = math.sqrt(0.5)


def stereo(kind: str, samples: Samples) -> Tensor:
    """The song in stereo, `[2, n]` at its own rate."""
    if kind == "5.1":
        left, right, centre, _, left_surround, right_surround = samples.T
        sides = (left + CENTRE * (centre + left_surround), right + CENTRE * (centre + right_surround))
        return torch.from_numpy(np.stack(sides) / (1 + 2 * CENTRE))
    return torch.from_numpy(samples[:, [0, -1]].T.copy())


def write(path: Path, kind: str) -> tuple[Path, Tensor, int]:
    """The song's file, its samples in stereo and its rate."""
    make, rate = KINDS[kind]
    samples = make()
    soundfile.write(path, samples, rate, subtype="PCM_U8" if kind == "8 bit" else "FLOAT")
    return path, stereo(kind, samples), rate


def read(path: Path) -> Tensor:
    return torch.from_numpy(soundfile.read(path, dtype="float32", always_2d=True)[0].T.copy())


@pytest.fixture(scope="module")
def pool() -> ModelPool:
    return ModelPool(EngineOptions(device="cpu", precision="fp32"))


def separator(pool: ModelPool) -> Separator:
    return Separator("demo", "all_4", options=EngineOptions(chunk_seconds=4, overlap_seconds=1), pool=pool)


@pytest.mark.parametrize("kind", quick_first(KINDS, 1))
def test_stems_are_finite_have_the_songs_length_and_sum_to_it(kind: str, pool: ModelPool, tmp_path: Path) -> None:
    song, mixture, rate = write(tmp_path / "song.wav", kind)
    files = separator(pool).separate_file(song, tmp_path / "out")
    got = [read(path) for path in files.values()]
    assert {soundfile.info(path).samplerate for path in files.values()} == {RATE}
    assert {tuple(stem.shape) for stem in got} == {(2, math.ceil(mixture.shape[1] * RATE / rate))}
    assert all(torch.isfinite(stem).all() for stem in got)
    assert (kind == "silence") == (not any(stem.any() for stem in got))
    total = torch.stack(got).sum(dim=0)
    if rate == RATE:
        assert (total - mixture).abs().max() <= 1e-6
    elif rate < RATE:
        assert level_dbfs(total) == pytest.approx(level_dbfs(mixture), abs=0.05)
    assert all(level_dbfs(stem) <= level_dbfs(mixture) + 1 for stem in got)


@pytest.mark.parametrize(
    "kind, options",
    quick_first(
        [
            *((kind, ("--format", "flac")) for kind in ("8 kHz mono", "click train", "192 kHz")),
            *((kind, ("--wav-depth", "16")) for kind in KINDS if kind not in ("silence", "8 bit", "7 channels")),
        ],
        1,
    ),
)
def test_stems_of_the_command_line_at_the_songs_own_rate_sum_to_it(
    kind: str, options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    song, mixture, rate = write(tmp_path / "song.wav", kind)
    arguments = ["--recipe", "demo", "--device", "cpu", "--chunk-size", "4", "--overlap", "1", "--json", *options]
    assert main(["separate", str(song), "-o", str(tmp_path / "out"), "--sample-rate", "source", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    got = [read(Path(path)) for path in report["stems"].values()]
    assert {soundfile.info(path).samplerate for path in report["stems"].values()} == {rate}
    assert {stem.shape for stem in got} == {mixture.shape}
    total = torch.stack(got).sum(dim=0) / report["gain"]
    steps = 2.0**-14 if "16" in options else 2.0**-22
    if rate == RATE:
        assert (total - mixture).abs().max() <= 2 * steps / report["gain"]
    else:  # only what both rates can hold, without the ends, where the filters lack context
        error = low(total - mixture, rate, 0.42 * min(rate, RATE))[:, rate // 100 : -rate // 100]
        assert error.abs().max() < 1e-4 * mixture.abs().max() + 4 * steps / report["gain"]


def low(samples: Tensor, rate: int, hertz: float) -> Tensor:
    """The samples without frequencies above `hertz`."""
    spectrum = torch.fft.rfft(samples.double())
    spectrum[:, torch.fft.rfftfreq(samples.shape[1], 1 / rate) > hertz] = 0
    return torch.fft.irfft(spectrum, samples.shape[1])


def separated(samples: Samples, pool: ModelPool, folder: Path) -> dict[str, Tensor]:
    soundfile.write(folder / "song.wav", samples, RATE, subtype="FLOAT")
    files = separator(pool).separate_file(folder / "song.wav", folder / "out")
    return {stem: read(path) for stem, path in files.items()}


@pytest.mark.parametrize("precision, least", quick_first([("fp32", 80), ("bf16", 40)], 1))
def test_music_that_is_60_db_quieter_gives_stems_that_are_60_db_quieter(
    precision: str, least: float, tmp_path: Path
) -> None:
    pool = ModelPool(EngineOptions(device="cpu", precision=precision))
    loud, quiet = (separated(music() * np.float32(gain), pool, tmp_path) for gain in (1, 1e-3))
    for stem in loud:
        assert sdr(loud[stem], quiet[stem] * 1e3) > least


def test_most_of_a_dc_offset_goes_to_other(pool: ModelPool, tmp_path: Path) -> None:
    plain, offset = (separated(music() + np.float32(offset), pool, tmp_path) for offset in (0, 0.1))
    for stem in plain:
        change = offset[stem].mean() - plain[stem].mean()
        assert (change > 0.07) if stem == "other" else (abs(change) < 0.03)


def test_stems_of_phone_audio_are_centred_and_have_no_higher_frequencies(pool: ModelPool, tmp_path: Path) -> None:
    samples = resample(torch.from_numpy(phone().T), 8000, RATE).T.numpy()
    mixture = level_dbfs(torch.from_numpy(samples))
    for stem in separated(samples, pool, tmp_path).values():
        assert level_dbfs(stem[:1]) == pytest.approx(level_dbfs(stem[1:]), abs=1)
        assert level_dbfs(stem - low(stem, RATE, 4200)) < mixture - 30


def test_clicks_stay_in_place(pool: ModelPool, tmp_path: Path) -> None:
    for stem in separated(clicks(), pool, tmp_path).values():
        for click in range(RATE // 4, SECONDS * RATE, RATE // 2):
            between = stem[:, click + RATE // 8 : click + RATE * 3 // 8]
            assert not between.any()


def test_a_warning_says_that_surround_is_mixed_down(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    song, mixture, _ = write(tmp_path / "song.wav", "5.1")
    with decode(song, tmp_path) as waveform:
        assert waveform.n_samples == mixture.shape[1]
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "'song.wav' has 6 channels (not named in the file, taken as L R C LFE Ls Rs), which are mixed down to stereo"
    )


@pytest.mark.parametrize("rate", quick_first([8000, 22050, 96000], 1))
def test_a_rate_that_mp3_does_not_support_is_refused_in_one_line_before_any_work(
    rate: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "song.wav", music()[:5000], rate)
    arguments = ["separate", str(tmp_path / "song.wav"), "-o", str(tmp_path / "out"), *DEMO]
    assert main([*arguments, "--format", "mp3", "--sample-rate", "source"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"error: MP3 does not support {rate} Hz, only 32000, 44100, 48000: choose another sample rate or format"
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rate", [22050, "nearest", None])
def test_a_rate_that_is_not_offered_is_refused(rate: object, pool: ModelPool, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"sample rate {rate!r} is not offered: choose 44100 or 48000 or source"):
        separator(pool).separate_file("song.wav", tmp_path, OutputOptions(sample_rate=rate))


@pytest.mark.parametrize("depth, gain", quick_first([("16", 0.5), ("24", 0.5), ("32f", 1)], 2))
def test_loud_stems_are_scaled_by_one_gain_in_integer_formats_only(
    depth: str, gain: float, pool: ModelPool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loud = music() / np.abs(music()).max()
    soundfile.write(tmp_path / "song.wav", loud * 4, RATE, subtype="FLOAT")
    files = separator(pool).separate_file(tmp_path / "song.wav", tmp_path / "out", OutputOptions(wav_depth=depth))
    stems = [read(path) for path in files.values()]
    assert (files.gain < gain) if depth != "32f" else files.gain == 1
    assert caplog.text.count("scaled by") == (depth != "32f")
    assert ((sum(stems) / files.gain).T - torch.from_numpy(loud * 4)).abs().max() <= 8 * 2.0**-15 / files.gain
    assert (max(stem.abs().max() for stem in stems) > 1) == (depth == "32f")


@pytest.mark.slow
def test_stems_that_are_too_large_for_wav_become_rf64_with_one_warning(
    pool: ModelPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    song, mixture, _ = write(tmp_path / "song.wav", "0.1 s")
    for limit, depth, format in ((4410 * 4, "32f", "RF64"), (4410 * 4, "16", "WAV"), (4410 * 4 - 1, "16", "RF64")):
        monkeypatch.setattr("separation.audio.encode._WAV_LIMIT_BYTES", limit)
        caplog.clear()
        files = separator(pool).separate_file(song, tmp_path / "out", OutputOptions(wav_depth=depth))
        assert {soundfile.info(path).format for path in files.values()} == {format}
        assert caplog.text.count("RF64") == (format == "RF64")
        assert (sum(read(path) for path in files.values()) - mixture).abs().max() <= 2.0**-12


@pytest.mark.parametrize(
    "gain, offset", quick_first([(1e-40, 0), (2.0**31, 0), (1.4e-45, 0), (1e-20, 0), (1, 1e6), (1e9, -1e9)], 2)
)
def test_extreme_levels_give_stems_that_sum_to_the_song(
    gain: float, offset: float, pool: ModelPool, tmp_path: Path
) -> None:
    mixture = (music()[:RATE].astype(np.float64) / np.abs(music()).max() * gain + offset).astype(np.float32)
    stems = separated(mixture, pool, tmp_path)
    error = sum(stem.double() for stem in stems.values()) - torch.from_numpy(mixture.T)
    assert error.abs().max() <= 1e-6 * np.abs(mixture).max()


SPIKES = {"3.4e38": 3.4e38, "-3.4e38": -3.4e38, "1e30": 1e30, "1e11": 1e11}


@pytest.mark.parametrize("spike", SPIKES)
@pytest.mark.parametrize("rate", quick_first([RATE, 48000], 1))
def test_a_song_with_an_extreme_sample_is_refused_and_other_songs_are_separated(
    spike: str, rate: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = music()[:5000]
    soundfile.write(tmp_path / "good.wav", samples, rate, subtype="FLOAT")
    samples[480, 1] = SPIKES[spike]
    soundfile.write(tmp_path / "bad.wav", samples, rate, subtype="FLOAT")
    songs = [str(tmp_path / "bad.wav"), *([str(tmp_path / "good.wav")] if spike == "3.4e38" else [])]
    assert main(["separate", *songs, "-o", str(tmp_path / "out"), *DEMO]) == 2
    captured = capsys.readouterr()
    error = captured.err.splitlines()[0]
    assert "'bad.wav' holds a sample of " in error and "full scale is 1" in error
    assert f" at {480 / rate:.3f} s" in error
    assert ("good.wav: " in captured.out) == (spike == "3.4e38")
    assert not (tmp_path / "out" / "bad").exists()


def test_an_extreme_sample_in_memory_is_an_error(pool: ModelPool) -> None:
    mixture = torch.zeros(2, 100)
    mixture[1, 7] = -3.4e38
    with pytest.raises(AudioError, match=r"^the mixture holds a sample of -3\.4e\+38 .* at sample 7"):
        separator(pool).separate(mixture)
