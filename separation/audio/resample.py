"""Resamples waveforms, block by block."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
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
    ratio = _Ratio(sample_rate, new_rate)
    block_samples = max(1, BLOCK_SAMPLES // max(ratio.old, ratio.new)) * ratio.new  # starts on a sample of both rates
    for start in range(0, n_samples, block_samples):
        yield ratio.convert(source, start, min(start + block_samples, n_samples))


class ResampledView:
    """A source at another sample rate, `[C, T]`, resampled where it is read. Rates are in hertz."""

    def __init__(self, source: Readable, sample_rate: int, new_rate: int) -> None:
        self._source, self._ratio = source, _Ratio(sample_rate, new_rate)
        self.n_samples: int = resampled_length(source.n_samples, sample_rate, new_rate)

    def read(self, start: int, stop: int) -> Tensor:
        """Samples `[start, stop)`, `[C, stop - start]`."""
        if start == stop:
            return self._source.read(0, 0)
        aligned = start - start % self._ratio.new
        return self._ratio.convert(self._source, aligned, stop)[:, start - aligned :]


def resampled_as_it_comes(
    blocks: Iterable[Tensor], sample_rate: int, new_rate: int, n_samples: int
) -> Iterator[Tensor]:
    """The first `n_samples` of a waveform at the new rate, `[..., n]` a block. Rates are in hertz.

    `blocks`, `[..., n]`, are consecutive parts of the waveform. No more of them are kept than the filter reaches.
    """
    ratio = _Ratio(sample_rate, new_rate)
    recent: _Recent | None = None
    done = 0
    for block in blocks:
        recent = recent or _Recent(block[..., :0].flatten(0, -2))
        recent.append(block.flatten(0, -2))
        stop = min(max(done, (recent.n_samples // ratio.old - ratio.context) * ratio.new), n_samples)
        if stop > done:
            yield ratio.convert(recent, done, stop).unflatten(0, block.shape[:-1])
        done = stop
        recent.forget((done // ratio.new - ratio.context) * ratio.old)
    if recent is not None and done < n_samples:
        yield ratio.convert(recent, done, n_samples).unflatten(0, block.shape[:-1])


class _Recent:
    """The end of a waveform that grows: a Readable whose first samples are forgotten."""

    def __init__(self, empty: Tensor) -> None:
        self._kept = empty  # [C, 0]
        self._forgotten = 0

    @property
    def n_samples(self) -> int:
        return self._forgotten + self._kept.shape[1]

    def append(self, block: Tensor) -> None:
        self._kept = torch.cat([self._kept, block], dim=1)

    def forget(self, before: int) -> None:
        """Drop the samples before this one."""
        self._kept = self._kept[:, max(0, before - self._forgotten) :]
        self._forgotten = max(before, self._forgotten)

    def read(self, start: int, stop: int) -> Tensor:
        return self._kept[:, start - self._forgotten : stop - self._forgotten]


class _Ratio:
    """Two sample rates without their common divisor, and the filter between them.

    Attributes:
        old, new: samples in a period of both rates.
        context: how many periods the filter reaches, at most.
        convert: for blocks that start at a multiple of `new`.
    """

    def __init__(self, sample_rate: int, new_rate: int) -> None:
        common = math.gcd(sample_rate, new_rate)
        self.old, self.new = old, new = sample_rate // common, new_rate // common
        width = math.ceil(_LOWPASS_ZEROS * old / (min(old, new) * _ROLLOFF))  # old samples that the filter reaches
        self.context = -(-(width + 2) // old)
        make = _by_torchaudio if new * (old + 2 * width) <= _MAX_KERNEL else _by_phases
        self.convert: Converter = make(old, new, width)


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
