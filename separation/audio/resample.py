"""Resamples waveforms, block by block."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torchaudio.transforms import Resample

from separation.audio.waveform import BLOCK_SAMPLES, Readable, Waveform, read_padded
from separation.progress import Progress

_LOWPASS_ZEROS = 64  # zero crossings of the sinc on each side
_ROLLOFF = 0.9475937167399596  # cutoff, as a share of the lower Nyquist frequency
_KAISER_BETA = 14.769656459379492
_MAX_KERNEL = 2**22  # taps of torchaudio's kernel, 16 MiB; the usual rates need at most 200,000
_PART_SAMPLES = 4096  # computed at once by `_by_phases`

# (source, start, stop) -> samples [start, stop) at the new rate, as `[C, stop - start]`
Converter = Callable[[Readable, int, int], Tensor]


def resample(waveform: Waveform, sample_rate: int, folder: Path, *, progress: Progress = Progress()) -> Waveform:
    """The waveform at another sample rate, in a temporary file in `folder`.

    `progress` is called after each block; it may raise to cancel. Raises `OutputError` if the folder is full or cannot
    be written to.
    """
    n_samples = resampled_length(waveform.n_samples, waveform.sample_rate, sample_rate)
    done = 0
    with contextlib.ExitStack() as on_error:
        output = on_error.enter_context(
            Waveform(folder, sample_rate=sample_rate, channels=waveform.channels, tags=waveform.tags, source=waveform)
        )
        for block in resampled(waveform, waveform.sample_rate, sample_rate, n_samples):
            output.append(block)
            done += block.shape[1]
            progress(done / n_samples)
        on_error.pop_all()
    return output


def resampled_length(n_samples: int, sample_rate: int, new_rate: int) -> int:
    """How many samples there are at the new rate: ceil(n_samples * new_rate / sample_rate)."""
    return -(-n_samples * new_rate // sample_rate)


def resampled(source: Readable, sample_rate: int, new_rate: int, n_samples: int) -> Iterator[Tensor]:
    """The first `n_samples` of the source at the new rate, in blocks `[C, n]`. Rates are in hertz.

    They equal one call of torchaudio's resampler for the whole source, with a windowed sinc as long and as steep as
    librosa's kaiser_best.
    """
    common = math.gcd(sample_rate, new_rate)
    old, new = sample_rate // common, new_rate // common
    width = math.ceil(_LOWPASS_ZEROS * old / (min(old, new) * _ROLLOFF))  # old samples that the filter reaches
    convert = (_by_torchaudio if new * (old + 2 * width) <= _MAX_KERNEL else _by_phases)(old, new, width)
    block_samples = max(1, BLOCK_SAMPLES // max(old, new)) * new  # a block starts on a sample of both rates
    for start in range(0, n_samples, block_samples):
        yield convert(source, start, min(start + block_samples, n_samples))


def _by_torchaudio(old: int, new: int, width: int) -> Converter:
    """A converter for blocks that start at a multiple of `new`."""
    convolve = Resample(
        old,
        new,
        resampling_method="sinc_interp_kaiser",
        lowpass_filter_width=_LOWPASS_ZEROS,
        rolloff=_ROLLOFF,
        beta=_KAISER_BETA,
        dtype=torch.float64,  # in float32, inexact times in the kernel cause errors of 1e-5, or 1e-4 for odd rates
    ).float()
    context = -(-width // old)  # in periods of the two rates: `old` samples in, `new` samples out

    def convert(source: Readable, start: int, stop: int) -> Tensor:
        first, last = start // new, -(-stop // new)
        samples = read_padded(source, (first - context) * old, (last + context) * old)
        converted: Tensor = convolve(samples)
        return converted[:, context * new :][:, : stop - start]

    return convert


def _by_phases(old: int, new: int, width: int) -> Converter:
    """A slower converter with a smaller kernel, for any two rates.

    Each output sample is a dot product with the part of the sinc at its phase. The kernel has new * (2 * width + 2)
    taps; that of `_by_torchaudio` has new * (old + 2 * width), which takes 31 GB for 44101 to 44100 Hz.
    """
    position = torch.arange(-width, width + 2) - (torch.arange(new) * old % new / new).double()[:, None]
    zeros = position * min(old, new) * _ROLLOFF / old  # in zero crossings of the sinc
    beta = torch.tensor(_KAISER_BETA, dtype=torch.float64)
    arch = (1 - (zeros / _LOWPASS_ZEROS).square().clamp(max=1)).sqrt()
    window = torch.special.i0(beta * arch) / torch.special.i0(beta)
    inside = zeros.abs() < _LOWPASS_ZEROS
    kernel = (torch.sinc(zeros) * window * inside * (min(old, new) * _ROLLOFF / old)).float()  # [new, 2 * width + 2]

    def convert(source: Readable, start: int, stop: int) -> Tensor:
        parts = []
        for part_start in range(start, stop, _PART_SAMPLES):
            numbers = torch.arange(part_start, min(part_start + _PART_SAMPLES, stop))
            before = numbers * old // new  # the input sample at or before each output sample
            first, last = int(before[0]), int(before[-1])
            samples = read_padded(source, first - width, last + width + 2)
            windows = samples.unfold(1, 2 * width + 2, 1)[:, before - first]
            parts.append(torch.einsum("cnt,nt->cn", windows, kernel[numbers % new]))
        return torch.cat(parts, dim=1)

    return convert
