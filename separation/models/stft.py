"""The short-time Fourier transform and its inverse, in float32, with cached windows."""

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import torch
from torch import Tensor

Window = Literal["hann", "hamming", "rectangular"]


@cache
def make_window(shape: Window, win_length: int, device: torch.device) -> Tensor:
    """A periodic Hann or Hamming window or ones, `[win_length]`, cached for each length and device."""
    with torch.inference_mode(False):  # a window made in inference mode could not be used in training later
        if shape == "hamming":
            return torch.hamming_window(win_length, device=device)
        make = torch.hann_window if shape == "hann" else torch.ones
        return make(win_length, device=device)


@dataclass(frozen=True, kw_only=True)
class Stft:
    """A short-time Fourier transform. Lengths are in samples; `hop_length` is at most half of `n_fft`.

    Frames are centred: the ends of the audio are extended by `n_fft // 2` samples, which are its reflection or zeros.
    `normalized` divides the spectrogram by sqrt(n_fft).
    """

    n_fft: int
    hop_length: int
    win_length: int
    normalized: bool = False
    window: Window = "hann"
    padding_mode: Literal["reflect", "constant"] = "reflect"

    def spectrogram(self, audio: Tensor) -> Tensor:
        """Waveforms `[..., T]` to the complex `[..., F, N]`; T > n_fft // 2 if the ends are reflected.

        F is `n_fft // 2 + 1`, N is `T // hop_length + 1`.
        """
        spectrum = torch.stft(
            audio.reshape(-1, audio.shape[-1]),
            self.n_fft,
            self.hop_length,
            self.win_length,
            window=make_window(self.window, self.win_length, audio.device),
            pad_mode=self.padding_mode,
            normalized=self.normalized,
            return_complex=True,
        )
        return spectrum.reshape(*audio.shape[:-1], *spectrum.shape[-2:])

    def waveform(self, spectrum: Tensor, length: int) -> Tensor:
        """The inverse: complex `[..., F, N]` to waveforms `[..., length]`.

        Missing bins at the top count as zeros. The imaginary parts of the first and the middle bin are ignored, since
        no real waveform has any. The length must be given, or the last partial frame would be lost.

        Does what torch.istft does, but several times faster on a CPU, where torch.istft adds the frames sample by
        sample through index tables.
        """
        if spectrum.is_cuda:
            spectrum = hermitian(spectrum, self.n_fft)
        frames = torch.fft.irfft(
            spectrum.transpose(-1, -2), self.n_fft, norm="ortho" if self.normalized else "backward"
        )
        window = _padded_window(self, spectrum.device)
        kept = slice(self.n_fft // 2, self.n_fft // 2 + length)
        envelope = _envelope(self, frames.shape[-2], spectrum.device)
        return _overlap_add(frames, window, self.hop_length)[..., kept] / envelope[kept]


def hermitian(spectrum: Tensor, n_fft: int) -> Tensor:
    """A copy of the spectrogram `[..., F, N]` whose first and middle bins are real, as cuFFT's inverse needs it.

    A CPU ignores the imaginary parts there. cuFFT ignores them only when there are few frames, so its result would
    depend on the batch size.
    """
    parts = torch.view_as_real(spectrum).clone()
    parts[..., 0, :, 1] = 0
    if spectrum.shape[-2] - 1 == n_fft / 2:  # an odd n_fft has no middle bin
        parts[..., -1, :, 1] = 0
    return torch.view_as_complex(parts)


def _padded_window(stft: Stft, device: torch.device) -> Tensor:
    """The window in the middle of `[n_fft]` zeros."""
    before = (stft.n_fft - stft.win_length) // 2
    after = stft.n_fft - stft.win_length - before
    return torch.nn.functional.pad(make_window(stft.window, stft.win_length, device), (before, after))


@lru_cache(maxsize=8)
def _envelope(stft: Stft, n_frames: int, device: torch.device) -> Tensor:
    """The sum of the squared windows of all frames, by which their sum must be divided."""
    with torch.inference_mode(False):
        window = _padded_window(stft, device)
        return _overlap_add(window.expand(n_frames, -1), window, stft.hop_length)


def _overlap_add(frames: Tensor, window: Tensor, hop_length: int) -> Tensor:
    """The sum of the windowed frames, `[..., N, n_fft]` and `[n_fft]`, each `hop_length` after the one before."""
    *batch, n_frames, n = frames.shape
    period = -(-n // hop_length)  # every `period`th frame does not overlap, so those are added at once
    audio = frames.new_zeros(*batch, (n_frames + period - 1) * hop_length)
    for first in range(min(period, n_frames)):
        part = frames[..., first::period, :]
        stretch = audio[..., first * hop_length :][..., : part.shape[-2] * period * hop_length]
        stretch.unflatten(-1, (-1, period * hop_length))[..., :n].addcmul_(part, window)
    return audio
