"""Ensembles: several waveforms are combined sample by sample, or bin by bin of their spectrograms.

The rules are those of audio-separator and of Music-Source-Separation-Training, which work on whole songs:

    median            the median of the samples
    min, max          the sample with the smallest or largest magnitude
    median_fft        the median of the real parts and that of the imaginary parts, as in audio-separator
    median_fft_msst   the value whose real part is the median, as in Music-Source-Separation-Training
    min_fft, max_fft  the value with the smallest or largest magnitude; also Min Spec and Max Spec of UVR

Of equal magnitudes, the first counts. Of an even number, medians are the mean of the two in the middle. Spectrograms
have Hann windows of 2048 samples with a hop of 1024, centred, with silence around the song. After the song's last
sample there is one more frame than there, so that the last samples lie in two frames as all others do: with one, they
are divided by a window that goes to zero.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from separation.audio.waveform import BLOCK_SAMPLES, Readable, read_padded
from separation.models.stft import make_window

HOP_LENGTH = 1024
N_FFT = 2 * HOP_LENGTH

Rule = Callable[[Tensor], Tensor]  # [P, ...] of P parts to [...]


def combined(rule: str, parts: Sequence[Readable]) -> Iterator[Tensor]:
    """The ensemble of waveforms of the same length, in blocks `[2, n]` of BLOCK_SAMPLES.

    Reads up to HOP_LENGTH samples beyond a block. Each block, and each frame in it, is computed alone, so that the
    samples do not depend on what has been read before.

    Args:
        rule: one of `recipe_lines.RULES`.
    """
    combine = RULES[rule]
    by_bins = rule in _BY_BINS
    for start in range(0, parts[0].n_samples, BLOCK_SAMPLES):
        stop = min(start + BLOCK_SAMPLES, parts[0].n_samples)
        if by_bins:
            yield _combined_by_bins(combine, parts, start, stop)
        else:
            yield combine(torch.stack([part.read(start, stop) for part in parts]))


def _combined_by_bins(combine: Rule, parts: Sequence[Readable], start: int, stop: int) -> Tensor:
    """Samples `[start, stop)`; start is a multiple of the hop."""
    n_hops = -(-(stop - start) // HOP_LENGTH)
    first, last = start - HOP_LENGTH, start + (n_hops + 1) * HOP_LENGTH
    audio = torch.stack([read_padded(part, first, last) for part in parts])
    window = make_window("hann", N_FFT, audio.device)
    bins = torch.fft.rfft(audio.unfold(-1, N_FFT, HOP_LENGTH) * window)  # [P, 2, n_hops + 1, F]
    frames = torch.fft.irfft(combine(bins)) * window
    first_half, second_half = frames.unflatten(-1, (2, HOP_LENGTH)).unbind(-2)
    squares = window.square().unflatten(-1, (2, HOP_LENGTH)).sum(0)
    samples: Tensor = ((second_half[:, :-1] + first_half[:, 1:]) / squares).flatten(1)[:, : stop - start]
    return samples


def _smallest(parts: Tensor) -> Tensor:
    return _first_of(parts, torch.lt)


def _largest(parts: Tensor) -> Tensor:
    return _first_of(parts, torch.gt)


def _first_of(parts: Tensor, is_better: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    chosen, others = parts[0], parts[1:]
    magnitude = chosen.abs()
    for part in others:
        better = is_better(part.abs(), magnitude)
        chosen = torch.where(better, part, chosen)
        magnitude = torch.where(better, part.abs(), magnitude)
    return chosen


def _median(parts: Tensor) -> Tensor:
    return _middle(parts.sort(dim=0).values)


def _middle(in_order: Tensor) -> Tensor:
    return (in_order[(len(in_order) - 1) // 2] + in_order[len(in_order) // 2]) / 2


def _median_of_both_parts(parts: Tensor) -> Tensor:
    return torch.view_as_complex(_median(torch.view_as_real(parts)))


def _median_by_real_part(parts: Tensor) -> Tensor:
    by_imaginary = parts.gather(0, parts.imag.argsort(dim=0))
    return _middle(by_imaginary.gather(0, by_imaginary.real.argsort(dim=0, stable=True)))


_BY_SAMPLES: dict[str, Rule] = {"median": _median, "min": _smallest, "max": _largest}
_BY_BINS: dict[str, Rule] = {
    "median_fft": _median_of_both_parts,
    "median_fft_msst": _median_by_real_part,
    "min_fft": _smallest,
    "max_fft": _largest,
}
RULES = _BY_SAMPLES | _BY_BINS
