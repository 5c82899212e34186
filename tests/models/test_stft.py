"""The STFT and its inverse."""

import pytest
import torch

from separation.models.stft import Stft, Window, hermitian


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("n_fft, hop_length, win_length", [(2048, 441, 2048), (2048, 512, 1024), (1024, 512, 1024)])
@pytest.mark.parametrize("length", [2000, 44_100, 44_111])
@pytest.mark.parametrize("window", ["hann", "rectangular"])
def test_the_inverse_restores_the_audio(
    window: Window, length: int, n_fft: int, hop_length: int, win_length: int, normalized: bool
) -> None:
    torch.manual_seed(0)
    sizes = {"n_fft": n_fft, "hop_length": hop_length, "win_length": win_length}
    stft = Stft(**sizes, normalized=normalized, window=window)
    audio = torch.randn(2, 3, length)
    spectrum = stft.spectrogram(audio)
    assert spectrum.shape == (2, 3, n_fft // 2 + 1, length // hop_length + 1)
    result = stft.waveform(spectrum, length)
    assert (result - audio).abs().max() <= 5e-5  # the window is almost zero at the last samples


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("n_fft, hop_length, win_length", [(2048, 441, 2048), (2048, 1024, 2048), (1024, 300, 801)])
@pytest.mark.parametrize("length", [1100, 44_100, 44_111])
@pytest.mark.parametrize("window", ["hann", "rectangular"])
def test_the_inverse_equals_torchs(
    window: Window, length: int, n_fft: int, hop_length: int, win_length: int, normalized: bool
) -> None:
    sizes = {"n_fft": n_fft, "hop_length": hop_length, "win_length": win_length, "normalized": normalized}
    frames = length // hop_length + 1
    spectrum = torch.randn(2, 3, n_fft // 2 + 1, frames, dtype=torch.complex64)
    ones_or_hann = torch.hann_window(win_length) if window == "hann" else torch.ones(win_length)
    expected = torch.istft(spectrum.flatten(0, 1), **sizes, window=ones_or_hann, length=length).unflatten(0, (2, 3))
    got = Stft(**sizes, window=window).waveform(spectrum, length)
    assert got.shape == expected.shape
    inside = slice(0, length - hop_length)  # at the end both divide by windows close to zero, which amplifies rounding
    assert (got - expected)[..., inside].abs().max() <= 1e-5 * expected.abs().max()
    assert (got - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("n_fft, bins", [(16, 9), (15, 8), (16, 7)])
def test_a_hermitian_spectrum_has_the_same_inverse_on_a_cpu(n_fft: int, bins: int) -> None:
    spectrum = torch.randn(2, bins, 5, dtype=torch.complex64)
    given = hermitian(spectrum, n_fft)
    assert not given[:, 0].imag.any() and given[:, -1].imag.any() == (bins != n_fft / 2 + 1)
    expected, got = (torch.fft.irfft(each, n_fft, dim=1) for each in (spectrum, given))
    assert (got - expected).abs().max() <= 1e-6


def test_a_window_made_in_inference_mode_can_be_used_in_training() -> None:
    stft = Stft(n_fft=256, hop_length=64, win_length=250)
    with torch.inference_mode():
        stft.waveform(stft.spectrogram(torch.randn(1, 1000)), 1000)
    audio = torch.randn(1, 1000, requires_grad=True)
    stft.waveform(stft.spectrogram(audio), 1000).abs().sum().backward()
    assert audio.grad is not None
