"""Short-time Fourier transform and its inverse, in float32, with cached windows."""

from functools import cache

import torch
from torch import Tensor


@cache
def hann_window(win_length: int, device: torch.device) -> Tensor:
    """Periodic Hann window `[win_length]`, made once for each length and device."""
    with torch.inference_mode(False):  # a window made inside inference mode could not be used in training later
        return torch.hann_window(win_length, device=device)


def stft(audio: Tensor, *, n_fft: int, hop_length: int, win_length: int, normalized: bool = False) -> Tensor:
    """Waveforms `[..., T]` to a complex spectrogram `[..., F, N]`, `F = n_fft // 2 + 1`, `N = T // hop_length + 1`.

    Frames are centred: the ends are reflected by `n_fft // 2` samples, so `T` must exceed `n_fft // 2`.
    """
    spectrum = torch.stft(
        audio.reshape(-1, audio.shape[-1]),
        n_fft,
        hop_length,
        win_length,
        window=hann_window(win_length, audio.device),
        normalized=normalized,
        return_complex=True,
    )
    return spectrum.reshape(*audio.shape[:-1], *spectrum.shape[-2:])


def istft(
    spectrum: Tensor, *, n_fft: int, hop_length: int, win_length: int, length: int, normalized: bool = False
) -> Tensor:
    """Inverse of `stft`: `[..., F, N]` to waveforms `[..., length]`.

    The length is not optional: without it the last partial frame is lost.
    """
    audio = torch.istft(
        spectrum.reshape(-1, *spectrum.shape[-2:]),
        n_fft,
        hop_length,
        win_length,
        window=hann_window(win_length, spectrum.device),
        normalized=normalized,
        length=length,
    )
    return audio.reshape(*spectrum.shape[:-2], length)
