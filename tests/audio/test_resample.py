import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchaudio.functional import resample as torchaudio_resample

from helpers.common import quick_first
from helpers.sounds import disk_full_after, noise, waveform_of
from separation.audio.resample import ResampledView, resample, resampled, resampled_as_it_comes, resampled_length
from separation.engine.song_waveforms import Samples
from separation.errors import OutputError

QUALITY = {
    "resampling_method": "sinc_interp_kaiser",
    "lowpass_filter_width": 64,
    "rolloff": 0.9475937167399596,
    "beta": 14.769656459379492,
}


@pytest.mark.parametrize(
    "old, new",
    quick_first(
        [
            (48000, 44100),
            (8000, 44100),
            (192000, 44100),
            (11025, 44100),
            (22050, 44100),
            (96000, 44100),
            (44100, 48000),
            (11127, 44100),  # 3709 to 14700, where torchaudio's kernel would be too large
        ],
        5,
    ),
)
def test_resampling_in_blocks_equals_one_call_for_the_whole(
    old: int, new: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("separation.audio.resample.BLOCK_SAMPLES", 4000)
    whole = noise(601) if old == 11127 else noise(old // 4 + 1)
    for n_samples in (1, 2, 100, whole.shape[1]):
        samples = whole[:, :n_samples]
        if old == 11127:  # torchaudio would need 2 GB, so the reference is the definition of the sinc
            expected = sinc_interpolated(samples.double(), old, new)
        else:
            expected = torchaudio_resample(samples.double(), old, new, **QUALITY)
        with waveform_of(samples, tmp_path, old) as waveform, resample(waveform, new, tmp_path) as resampled:
            assert resampled.sample_rate == new
            assert resampled.n_samples == math.ceil(n_samples * new / old) == expected.shape[1]
            assert (resampled.read(0, resampled.n_samples) - expected).abs().max() < 2e-6
    assert not list(tmp_path.iterdir())


RATES = pytest.mark.parametrize("old, new", [(44100, 48000), (48000, 44100), (44100, 16000), (11127, 44100)])


@RATES
def test_a_view_gives_the_same_samples_wherever_it_is_read(old: int, new: int) -> None:
    samples = noise(2003)
    view = ResampledView(Samples.of(samples), old, new)
    whole = torch.cat(list(resampled(Samples.of(samples), old, new, view.n_samples)), dim=1)
    assert view.n_samples == math.ceil(2003 * new / old) == whole.shape[1]
    for start, stop in [
        (0, 0),
        (0, view.n_samples),
        (1, 2),
        (160, 161),
        (333, 700),
        (view.n_samples - 1, view.n_samples),
    ]:
        assert (view.read(start, stop) - whole[:, start:stop]).abs().sum() <= 1e-6 * (stop - start)


@RATES
@pytest.mark.parametrize("sizes", [[2003], [1] * 50 + [1953], [0, 700, 3, 1300]])
def test_blocks_are_resampled_as_they_come(old: int, new: int, sizes: list[int]) -> None:
    samples = torch.stack([noise(2003), -noise(2003)])  # [S, C, T]
    n_samples = resampled_length(2003, old, new) - 1
    expected = torch.cat(list(resampled(Samples.of(noise(2003)), old, new, n_samples)), dim=1)
    blocks = list(resampled_as_it_comes(samples.split(sizes, dim=2), old, new, n_samples))
    got = torch.cat(blocks, dim=2)
    assert len(blocks) <= len(sizes) + 1
    assert got.shape == (2, 2, n_samples)
    assert (got - torch.stack([expected, -expected])).abs().max() <= 1e-6


def sinc_interpolated(samples: Tensor, old: int, new: int) -> Tensor:
    cutoff = min(old, new) * QUALITY["rolloff"] / old  # crossings of the sinc in an old sample
    times = torch.arange(math.ceil(samples.shape[1] * new / old), dtype=torch.float64)[:, None] * old / new
    outputs = []
    for part in times.split(1000):
        crossings = (part - torch.arange(samples.shape[1])) * cutoff
        inside = (crossings.abs() < 64).double()
        window = torch.special.i0(QUALITY["beta"] * (1 - (crossings / 64).square().clamp(max=1)).sqrt())
        window /= torch.special.i0(torch.tensor(QUALITY["beta"], dtype=torch.float64))
        outputs.append(samples @ (torch.sinc(crossings) * window * inside * cutoff).T)
    return torch.cat(outputs, dim=1)


def test_resampling_by_phases_equals_resampling_by_torchaudio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("separation.audio.resample.BLOCK_SAMPLES", 4000)
    with waveform_of(noise(20_000), tmp_path, 48000) as waveform:
        with resample(waveform, 44100, tmp_path) as fast:
            expected = fast.read(0, fast.n_samples)
        monkeypatch.setattr("separation.audio.resample._MAX_KERNEL", 0)
        with resample(waveform, 44100, tmp_path) as slow:
            assert (slow.read(0, slow.n_samples) - expected).abs().max() < 2e-6


def test_resampling_keeps_a_tone_its_tags_and_its_level(tmp_path: Path) -> None:
    old = torch.sin(2 * math.pi * 1000 * torch.arange(48000, dtype=torch.float64) / 48000)
    new = torch.sin(2 * math.pi * 1000 * torch.arange(44100, dtype=torch.float64) / 44100)
    with (
        waveform_of(old.float().expand(2, -1), tmp_path, 48000, tags={"title": "A tone"}) as waveform,
        resample(waveform, 44100, tmp_path) as resampled,
    ):
        middle = resampled.read(2000, 42000)
        assert resampled.tags == {"title": "A tone"}
        assert (resampled.source_rate, resampled.source_samples) == (48000, 48000)
    assert (middle - new[2000:42000]).abs().max() < 1e-5


@pytest.mark.parametrize("old", [48000, 11127])
def test_resampling_does_not_depend_on_the_number_of_threads(old: int, tmp_path: Path) -> None:
    n_threads, outputs = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            with (
                waveform_of(noise(20_000), tmp_path, old) as waveform,
                resample(waveform, 44100, tmp_path) as resampled,
            ):
                outputs.append((resampled.read(0, resampled.n_samples), resampled.mean, resampled.std, resampled.peak))
    finally:
        torch.set_num_threads(n_threads)
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert outputs[0][1:] == outputs[1][1:]


def test_resampling_on_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    with waveform_of(noise(20_000), tmp_path, 22050) as waveform:
        with disk_full_after(200_000), pytest.raises(OutputError, match="free space there"):
            resample(waveform, 44100, tmp_path)
        assert len(list(tmp_path.iterdir())) == 1
