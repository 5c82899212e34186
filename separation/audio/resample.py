"""A waveform at another sample rate, block by block."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torchaudio.transforms import Resample

from separation.audio.waveform import BLOCK_SAMPLES, Readable, Waveform, read_padded
from separation.progress import Progress

_LOWPASS_ZEROS = 64  # zero crossings of the sinc on either side
_ROLLOFF = 0.9475937167399596  # of the lower Nyquist frequency
_KAISER_BETA = 14.769656459379492
_PART_SAMPLES = 4096  # that are convolved at once by phases
_KERNEL_LIMIT = 2**22  # taps of torchaudio's kernel: 16 MiB; the usual rates need at most a fifth of a million


def resample(
    waveform: Waveform,
    sample_rate: int,
    folder: Path,
    *,
    max_samples: int | None = None,
    progress: Progress = Progress(),
) -> Waveform:
    """The waveform at `sample_rate`, in a temporary file in `folder`; see `resampled` for its samples.

    `max_samples` cuts it there: of a waveform that was resampled before, rounding up twice may have made it longer.
    `progress` is called with the share that is done, after each block; raise from it to cancel. Raises `OutputError` if
    `folder` is full or cannot be written to.
    """
    n_samples = resampled_length(waveform.n_samples, waveform.sample_rate, sample_rate)
    if max_samples is not None:
        n_samples = min(n_samples, max_samples)
    done = 0
    with contextlib.ExitStack() as on_error:
        output = on_error.enter_context(Waveform(folder, sample_rate=sample_rate, channels=waveform.channels))
        output.tags = dict(waveform.tags)
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
    """The first `n_samples` of the source, which has `sample_rate`, at the new rate: blocks `[C, n]`.

    Equals one call of torchaudio's resampling over the whole of it, with a windowed sinc as long and as steep as
    librosa's kaiser_best.
    """
    common = math.gcd(sample_rate, new_rate)
    old, new = sample_rate // common, new_rate // common
    width = math.ceil(_LOWPASS_ZEROS * old / (min(old, new) * _ROLLOFF))  # old samples that the filter reaches
    convert = (_by_torchaudio if new * (old + 2 * width) <= _KERNEL_LIMIT else _by_phases)(old, new, width)
    block_samples = max(1, BLOCK_SAMPLES // max(old, new)) * new  # a block starts on a sample of both rates
    for start in range(0, n_samples, block_samples):
        yield convert(source, start, min(start + block_samples, n_samples))


def _by_torchaudio(old: int, new: int, width: int) -> Callable[[Readable, int, int], Tensor]:
    """Output samples `[start, stop)` of a waveform, where `start` is a multiple of `new`."""
    convolve = Resample(
        old,
        new,
        resampling_method="sinc_interp_kaiser",
        lowpass_filter_width=_LOWPASS_ZEROS,
        rolloff=_ROLLOFF,
        beta=_KAISER_BETA,
        dtype=torch.float64,  # in float32 the kernel's times are inexact: errors of 1e-5 and, for odd rates, 1e-4
    ).float()
    context = -(-width // old)  # in periods of the two rates: `old` samples in, `new` samples out

    def convert(source: Readable, start: int, stop: int) -> Tensor:
        first, last = start // new, -(-stop // new)
        samples = read_padded(source, (first - context) * old, (last + context) * old)
        converted: Tensor = convolve(samples)
        return converted[:, context * new :][:, : stop - start]

    return convert


def _by_phases(old: int, new: int, width: int) -> Callable[[Readable, int, int], Tensor]:
    """As `_by_torchaudio`, whose kernel has new * (old + 2 * width) taps: 31 GB for 44101 to 44100 Hz.

    Here it has new * (2 * width + 2), and each output sample is its own dot product: slower, but for any two rates.
    """
    position = torch.arange(-width, width + 2) - (torch.arange(new) * old % new / new).double()[:, None]
    zeros = position * min(old, new) * _ROLLOFF / old  # in zero crossings of the sinc
    beta = torch.tensor(_KAISER_BETA, dtype=torch.float64)
    window = torch.special.i0(beta * (1 - (zeros / _LOWPASS_ZEROS).square().clamp(max=1)).sqrt()) / torch.special.i0(
        beta
    )
    inside = zeros.abs() < _LOWPASS_ZEROS
    kernel = (torch.sinc(zeros) * window * inside * (min(old, new) * _ROLLOFF / old)).float()  # [new, 2 * width + 2]

    def convert(source: Readable, start: int, stop: int) -> Tensor:
        parts = []
        for first_sample in range(start, stop, _PART_SAMPLES):
            part = torch.arange(first_sample, min(first_sample + _PART_SAMPLES, stop))
            before = part * old // new  # the input sample at or before each output sample
            first, last = int(before[0]), int(before[-1])
            samples = read_padded(source, first - width, last + width + 2)
            windows = samples.unfold(1, 2 * width + 2, 1)[:, before - first]
            parts.append(torch.einsum("cnt,nt->cn", windows, kernel[part % new]))
        return torch.cat(parts, dim=1)

    return convert
