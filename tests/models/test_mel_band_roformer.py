"""MelBand-RoFormer's bands."""

import math
import subprocess
import sys
from pathlib import Path

import librosa
import pytest
import torch

from helpers.common import PROJECT
from helpers.small_model import identity
from separation.models.mel_band_roformer import MelBandRoFormer, MelBandRoFormerConfig, mel_bands


@pytest.mark.parametrize("num_bands, n_fft, sample_rate", [(60, 2048, 44100), (40, 1024, 44100), (48, 4096, 16000)])
def test_mel_bands_lie_between_the_edges_of_slaneys_scale(num_bands: int, n_fft: int, sample_rate: int) -> None:
    """The scale is linear up to 1 kHz (15 mels); above, it has 27 mels for each factor of 6.4."""
    highest = 15 + 27 * math.log(sample_rate / 2 / 1000, 6.4)
    mels = [highest * i / (num_bands + 1) for i in range(num_bands + 2)]
    hertz = [mel * 1000 / 15 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27) for mel in mels]
    edges = [frequency * n_fft / sample_rate for frequency in hertz]  # in bins
    first = [0, *(math.floor(edge) + 1 for edge in edges[1:num_bands])]
    stop = [*(math.ceil(edge) for edge in edges[2:-1]), n_fft // 2 + 1]
    assert mel_bands(num_bands, n_fft, sample_rate) == tuple(map(range, first, stop))


@pytest.mark.slow
def test_mel_bands_need_no_writable_folder_but_the_temporary_one(tmp_path: Path) -> None:
    packages = Path(librosa.__file__).parents[1]
    shut = "".join(
        f"mount --bind {path} {path} && mount -o remount,bind,ro {path} && " for path in (packages, tmp_path)
    )
    unshare = ["unshare", "-rnm", "sh", "-c"]
    if subprocess.run([*unshare, f"{shut} true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs unshare and mount without privileges")
    code = "from separation.models.mel_band_roformer import mel_bands; print(len(mel_bands(60, 2048, 44100)))"
    command = f"{shut} HOME={tmp_path} exec {sys.executable} -c '{code}'"
    ran = subprocess.run([*unshare, command], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert ran.stdout == "60\n", ran.stderr


def test_more_mel_bands_than_bins_can_fill_are_an_error_with_both_counts() -> None:
    with pytest.raises(ValueError, match=r"num_bands 500 is too many for stft_n_fft 2048"):
        MelBandRoFormerConfig(dim=8, depth=1, num_bands=500)


def test_the_mask_of_a_bin_is_the_mean_of_its_bands_masks() -> None:
    config = MelBandRoFormerConfig(dim=8, depth=1, heads=2, dim_head=4, num_bands=6, stft_n_fft=128, stereo=True)
    model = MelBandRoFormer(config, identity(("vocals",)))
    bands = mel_bands(6, 128, 44100)
    masks = [torch.randn(2, 3, len(band), 4) for band in bands]
    got = model._bins(torch.cat([mask.flatten(2) for mask in masks], dim=2))
    for k in range(65):
        of_bands = [mask[:, :, k - band.start] for band, mask in zip(bands, masks, strict=True) if k in band]
        assert (got[:, :, k] - torch.stack(of_bands).mean(dim=0)).abs().max() <= 1e-6
    bins = torch.randn(2, 3, 65, 4)
    expected = torch.cat([bins[:, :, band.start : band.stop].flatten(2) for band in bands], dim=2)
    assert torch.equal(model._bands(bins), expected)
