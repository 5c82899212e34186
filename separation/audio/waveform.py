"""A waveform on disk: one thread appends samples, others read them. Memory does not grow with the song."""

import io
import math
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from separation.errors import OutputError
from separation.system.os_errors import output_errors

SAMPLE_RATE = 44100  # hertz, of all models, and of `decode` by default
TAGS = ("title", "artist", "album")  # read from songs and written to stems
BLOCK_SAMPLES = 65536  # per channel, in memory at once
# The largest magnitude of a sample. Full scale is 1. 32-bit integers that are mistaken for floats reach 2**31; squares
# of more than 1e19 overflow in float32.
MAX_SAMPLE = 1e10

_RAW_BYTES = 2**20  # in a block of `raw`
_SAMPLE_BYTES = 4  # float32

Statistics = tuple[float, float, float]


def sample_fault(value: float) -> str:
    """Describes a sample whose magnitude is not at most `MAX_SAMPLE`."""
    if not math.isfinite(value):
        return "NaN or Inf"
    return f"a sample of {value:.2g} (full scale is 1)"


class Growing:
    """Counts samples that one thread appends, so that others can wait for them.

    Args:
        total_samples: per channel, how many there will be; None if unknown.
        n_there: per channel, how many are there already.
    """

    def __init__(self, total_samples: int | None, n_there: int = 0) -> None:
        self._total_samples = total_samples
        self._there = n_there
        self._is_closed = False
        self._changed = threading.Condition()  # its lock is held while samples are written or read

    @property
    def n_samples(self) -> int:
        """Per channel: how many there will be, or if that is unknown, how many are there."""
        return self._there if self._total_samples is None else self._total_samples

    def is_complete(self, timeout_seconds: float) -> bool:
        """Whether all samples are there. Waits for them until the waveform is closed or the time is up."""
        with self._changed:
            self._changed.wait_for(lambda: self._there >= self.n_samples or self._is_closed, timeout_seconds)
            return self._there >= self.n_samples

    def close(self) -> None:
        """Threads that wait for samples, or ask for them later, get a ValueError."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _wait(self, stop: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._there >= stop or self._is_closed)
            if self._is_closed:
                raise ValueError("the waveform is closed")

    def _grow(self, n_samples: int) -> None:
        with self._changed:
            self._there += n_samples
            self._changed.notify_all()


@dataclass(frozen=True)
class StoredSamples:
    """The samples of a stereo waveform at 44100 Hz that was stored before.

    Args:
        file: holds the waveform's `raw` samples. It is closed with the new waveform, but not deleted.
        n_samples: per channel.
        statistics: the waveform's `statistics`.
    """

    file: io.FileIO
    n_samples: int
    statistics: Statistics


class Waveform(Growing):
    """A float32 waveform in a file.

    With a folder, the file is a temporary one: samples are appended block by block, other threads may read meanwhile,
    and closing deletes the file. With `StoredSamples`, the waveform is complete and only read.

    `peak` is the largest magnitude. `mean` and `std` are of the mono mixture, the mean of the channels; `std` is
    unbiased, and 0 for fewer than two samples. All three describe the samples so far.

    Args:
        sample_rate: hertz.
        total_samples: per channel, how many will be appended. Then readers wait for samples that are still missing.
        tags: title, artist and album of the song.
        source: the waveform that this one is resampled from.

    Raises:
        OutputError: the folder is full or cannot be written to.
    """

    def __init__(
        self,
        place: Path | StoredSamples,
        *,
        sample_rate: int = SAMPLE_RATE,
        channels: int = 2,
        total_samples: int | None = None,
        tags: Mapping[str, str] | None = None,
        source: "Waveform | None" = None,
    ) -> None:
        self.sample_rate = sample_rate
        self.channels = channels
        self.tags: dict[str, str] = dict(tags or {})
        self._source = source
        self._is_mono = True
        if isinstance(place, StoredSamples):
            super().__init__(place.n_samples, place.n_samples)
            self._file, self._path, self._is_temporary = place.file, Path(str(place.file.name)), False
            peak, mean, squares = place.statistics
        else:
            super().__init__(total_samples)
            with output_errors(Path(place)):
                descriptor, name = tempfile.mkstemp(prefix="waveform-", suffix=".f32", dir=place)
            self._file, self._path, self._is_temporary = io.FileIO(descriptor, "r+"), Path(name), True
            peak, mean, squares = 0.0, 0.0, 0.0
        self.peak: float = peak  # the largest magnitude
        self.mean: float = mean  # of the mono mixture
        self._squares = squares  # the sum of its squared deviations from the mean

    @property
    def source_rate(self) -> int:
        """The sample rate of the decoded file, in hertz."""
        return self.sample_rate if self._source is None else self._source.sample_rate

    @property
    def source_samples(self) -> int:
        """The samples per channel of the decoded file, at its own rate."""
        return self.n_samples if self._source is None else self._source.n_samples

    @property
    def is_mono(self) -> bool:
        """Whether all channels of the decoded file are equal so far. Waveforms from `StoredSamples` do not know."""
        return self._is_mono if self._source is None else self._source.is_mono

    @property
    def std(self) -> float:
        return math.sqrt(self._squares / (self._there - 1)) if self._there > 1 else 0.0

    @property
    def statistics(self) -> Statistics:
        """What `StoredSamples` needs so that `peak`, `mean` and `std` are the same to the last bit."""
        return self.peak, self.mean, self._squares

    def append(self, block: Tensor) -> None:
        """Append `[C, n]` float32."""
        if block.ndim != 2 or block.shape[0] != self.channels:
            raise ValueError(f"a block has the shape {tuple(block.shape)}, the waveform has {self.channels} channels")
        if block.shape[1]:
            samples: NDArray[np.float32] = block.detach().to("cpu", torch.float32).numpy()
            self._write(samples)
            self._is_mono = self._is_mono and all(np.array_equal(samples[0], other) for other in samples[1:])
            self._update_statistics(samples)
            self._grow(samples.shape[1])

    def _write(self, samples: NDArray[np.float32]) -> None:
        interleaved = samples.T
        if not interleaved.flags.c_contiguous:
            interleaved = np.empty((samples.shape[1], self.channels), dtype=np.float32)
            for channel, of_channel in enumerate(samples):  # several times faster than one copy of the whole
                interleaved[:, channel] = of_channel
        with output_errors(self._path.parent), self._changed:
            self._file.seek(self._there * self.channels * _SAMPLE_BYTES)
            write_all(self._file.write, interleaved.data.cast("B"))

    def _update_statistics(self, samples: NDArray[np.float32]) -> None:
        self.peak = max(self.peak, float(samples.max()), -float(samples.min()))
        # Means and squared deviations of two sets merge without cancellation (Chan, Golub and LeVeque 1979). numpy is
        # used because torch's sums depend on the number of threads.
        mono = samples[0].astype(np.float64)
        for of_channel in samples[1:]:  # ten times faster than numpy's mean over the channels
            mono += of_channel
        mono /= self.channels
        mean = float(mono.mean())
        mono -= mean
        n = samples.shape[1]
        delta, total = mean - self.mean, self._there + n
        self._squares += float(np.square(mono, out=mono).sum()) + delta * delta * self._there * n / total
        self.mean += delta * n / total

    def read(self, start: int, stop: int) -> Tensor:
        """Samples `[start, stop)` as `[C, stop - start]` float32; 0 <= start <= stop <= n_samples."""
        return torch.from_numpy(np.ascontiguousarray(self.interleaved(start, stop).T))

    def interleaved(self, start: int, stop: int) -> NDArray[np.float32]:
        """As `read`, but `[stop - start, C]`, as the samples lie in the file."""
        if not 0 <= start <= stop <= self.n_samples:
            raise ValueError(f"samples {start} to {stop} are not within the {self.n_samples} of the waveform")
        self._wait(stop)
        # Plain reads, because the pages of a memory map would count as memory of this process.
        samples = np.empty((stop - start, self.channels), dtype=np.float32)
        view = samples.data.cast("B") if samples.size else memoryview(b"")
        with self._changed:
            self._file.seek(start * self.channels * _SAMPLE_BYTES)
            while view:
                n_bytes = self._file.readinto(view)
                if not n_bytes:
                    raise OutputError(f"{str(self._path)!r} was cut short by another program: run again")
                view = view[n_bytes:]
        return samples

    def raw(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Samples `[start, stop)`, or all, as they lie in the file, block by block: interleaved float32."""
        samples, stop = _RAW_BYTES // (self.channels * _SAMPLE_BYTES), self.n_samples if stop is None else stop
        for first in range(start, stop, samples):
            yield self.interleaved(first, min(first + samples, stop)).tobytes()

    def close(self) -> None:
        """Close the file, and delete it if it is temporary. A second call does nothing."""
        super().close()
        with self._changed:
            self._file.close()
        if self._is_temporary:
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Readable(Protocol):
    """Samples `[C, T]` with random access."""

    @property
    def n_samples(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor: ...


def read_padded(source: Readable, start: int, stop: int) -> Tensor:
    """As `Waveform.read`, with zeros before the first sample and after the last one."""
    first, last = min(max(start, 0), source.n_samples), min(max(stop, 0), source.n_samples)
    before = min(max(-start, 0), stop - start)
    return torch.nn.functional.pad(source.read(first, last), (before, stop - start - before - (last - first)))


def in_blocks(source: Readable, start: int, stop: int) -> Iterator[Tensor]:
    """Samples `[start, stop)` of a waveform, in blocks `[C, n]`."""
    for first in range(start, stop, BLOCK_SAMPLES):
        yield source.read(first, min(first + BLOCK_SAMPLES, stop))


def cut(wave: Waveform, start: int, stop: int, folder: Path) -> Waveform:
    """Samples `[start, stop)` as a waveform of their own, in a temporary file in `folder`."""
    part = Waveform(folder, sample_rate=wave.sample_rate, channels=wave.channels)
    try:
        for block in in_blocks(wave, start, stop):
            part.append(block)
    except BaseException:
        part.close()
        raise
    return part


def silent(n_samples: int, channels: int) -> Iterator[NDArray[np.float32]]:
    """Blocks `[n, channels]` of silence."""
    for start in range(0, n_samples, BLOCK_SAMPLES):
        yield np.zeros((min(BLOCK_SAMPLES, n_samples - start), channels), np.float32)


def write_all(write: Callable[[memoryview], int], data: bytes | memoryview) -> None:
    """Write all bytes. On a disk that fills up, a partial write succeeds first; only the next one fails."""
    rest = memoryview(data)
    while rest:
        rest = rest[write(rest) :]
