"""log-WMSE: the logarithm of the squared error, weighted by frequency and relative to the mixture.

By Iver Jordal, 2023: nomonosound/log-wmse-audio-quality. Unlike an SDR, it is defined for a silent reference.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from separation.evaluation.weighting import hearing_taps

Read = Callable[[int, int], Tensor]  # samples [start, stop) of all channels, [C, stop - start]

INAUDIBLE = 10 ** (-68 / 20)  # a weighted error below this, where the weighted mixture has an RMS of 1, counts as none
_SCALE = -4.0  # makes differences about as large as those of an SDR
_LEAST_ERROR = 1e-8
_LEAST_LEVEL = 1e-8
_BLOCK_SAMPLES = 2**17 - 2**12  # filtered at once, with room for the taps in a fast transform


def log_wmse(mixture: Read, reference: Read, estimate: Read, n_samples: int) -> float:
    """log-WMSE of an estimate in a mixture; higher is better, and 73.7 is perfect.

    As in torch-log-wmse 0.3.1 the way that Music-Source-Separation-Training calls it: the mean over each channel of the
    error relative to each channel of the mixture. Memory does not grow with the song.
    """
    mixture_energy = torch.stack([part.square().sum(dim=1) for part in _weighted(mixture, n_samples)]).sum(dim=0)
    levels = (mixture_energy / n_samples).sqrt() + _LEAST_LEVEL  # [C]
    error_energy = torch.zeros(len(levels), len(levels), dtype=torch.float64)  # [C of the mixture, C]
    for difference in _weighted(lambda start, stop: estimate(start, stop) - reference(start, stop), n_samples):
        relative = difference / levels[:, None, None]
        relative[relative.abs() < INAUDIBLE] = 0
        error_energy += relative.square().sum(dim=-1)
    return float((error_energy / n_samples + _LEAST_ERROR).log().mean()) * _SCALE


def _weighted(read: Read, n_samples: int) -> Iterator[Tensor]:
    """The music weighted by frequency, in blocks `[C, n]` in float64, as long as the music."""
    taps = hearing_taps()
    centre = (len(taps) - 1) // 2  # the tap for no delay
    for start in range(0, n_samples, _BLOCK_SAMPLES):
        stop = min(start + _BLOCK_SAMPLES, n_samples)
        first, last = start - (len(taps) - 1 - centre), stop + centre
        inside = read(max(first, 0), min(last, n_samples)).double()
        samples = pad(inside, (max(-first, 0), max(last - n_samples, 0)))
        n_fft = 2 ** math.ceil(math.log2(samples.shape[1]))
        spectrum = torch.fft.rfft(samples, n_fft) * torch.fft.rfft(taps, n_fft)
        yield torch.fft.irfft(spectrum, n_fft)[:, len(taps) - 1 : len(taps) - 1 + stop - start]
