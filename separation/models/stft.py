"""Short-time Fourier transform and its inverse, in float32, with cached windows."""

from functools import cache, lru_cache
from typing import Literal

import torch
from torch import Tensor

Window = Literal["hann", "rectangular"]


@cache
def make_window(shape: Window, win_length: int, device: torch.device) -> Tensor:
    """Periodic Hann window or ones, `[win_length]`, made once for each length and device."""
    with torch.inference_mode(False):  # a window made inside inference mode could not be used in training later
        make = torch.hann_window if shape == "hann" else torch.ones
        return make(win_length, device=device)


def stft(
    audio: Tensor,
    *,
    n_fft: int,
    hop_length: int,
    win_length: int,
    normalized: bool = False,
    window: Window = "hann",
) -> Tensor:
    """Waveforms `[..., T]` to a complex spectrogram `[..., F, N]`, `F = n_fft // 2 + 1`, `N = T // hop_length + 1`.

    Frames are centred: the ends are reflected by `n_fft // 2` samples, so `T` must exceed `n_fft // 2`.
    """
    spectrum = torch.stft(
        audio.reshape(-1, audio.shape[-1]),
        n_fft,
        hop_length,
        win_length,
        window=make_window(window, win_length, audio.device),
        normalized=normalized,
        return_complex=True,
    )
    return spectrum.reshape(*audio.shape[:-1], *spectrum.shape[-2:])


def istft(
    spectrum: Tensor,
    *,
    n_fft: int,
    hop_length: int,
    win_length: int,
    length: int,
    normalized: bool = False,
    window: Window = "hann",
) -> Tensor:
    """Inverse of `stft`: `[..., F, N]` to waveforms `[..., length]`; `hop_length` is half of `n_fft` at most.

    Bins that are missing at the top are taken as zeros. The imaginary parts of the first and the middle bin, which no
    real waveform has, count for nothing.

    The length is not optional: without it the last partial frame is lost. As torch.istft, which adds the frames up
    sample by sample through tables of indices, at several times the cost on a CPU.
    """
    if spectrum.is_cuda:
        spectrum = hermitian(spectrum, n_fft)
    frames = torch.fft.irfft(spectrum.transpose(-1, -2), n_fft, norm="ortho" if normalized else "backward")
    padded = _padded_window(window, n_fft, win_length, spectrum.device)
    kept = slice(n_fft // 2, n_fft // 2 + length)
    envelope = _envelope(frames.shape[-2], n_fft, hop_length, win_length, window, spectrum.device)
    return _overlap_add(frames, padded, hop_length)[..., kept] / envelope[kept]


def hermitian(spectrum: Tensor, n_fft: int) -> Tensor:
    """The spectrogram `[..., F, N]` with real first and middle bins, as cuFFT needs it.

    A CPU ignores their imaginary parts. cuFFT does so for few frames and adds them for many, so that the inverse would
    depend on the batch.
    """
    parts = torch.view_as_real(spectrum).clone()
    parts[..., 0, :, 1] = 0
    if spectrum.shape[-2] - 1 == n_fft / 2:  # an odd n_fft has no middle bin
        parts[..., -1, :, 1] = 0
    return torch.view_as_complex(parts)


def _padded_window(shape: Window, n_fft: int, win_length: int, device: torch.device) -> Tensor:
    """The window in the middle of `[n_fft]`."""
    before = (n_fft - win_length) // 2
    return torch.nn.functional.pad(make_window(shape, win_length, device), (before, n_fft - win_length - before))


@lru_cache(maxsize=8)
def _envelope(
    n_frames: int, n_fft: int, hop_length: int, win_length: int, shape: Window, device: torch.device
) -> Tensor:
    """The sum of the frames' squared windows, by which overlapping frames are too loud."""
    with torch.inference_mode(False):
        window = _padded_window(shape, n_fft, win_length, device)
        return _overlap_add(window.expand(n_frames, -1), window, hop_length)


def _overlap_add(frames: Tensor, window: Tensor, hop_length: int) -> Tensor:
    """Frames `[..., N, n]`, each times the window `[n]` and `hop_length` after the one before, summed up."""
    *batch, n_frames, n = frames.shape
    apart = -(-n // hop_length)  # frames so many apart do not overlap: all of them are added at once
    audio = frames.new_zeros(*batch, (n_frames + apart - 1) * hop_length)
    for first in range(min(apart, n_frames)):
        part = frames[..., first::apart, :]
        stretch = audio[..., first * hop_length :][..., : part.shape[-2] * apart * hop_length]
        stretch.unflatten(-1, (-1, apart * hop_length))[..., :n].addcmul_(part, window)
    return audio
