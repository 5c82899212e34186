"""A waveform on disk: samples that one thread appends and others read. Memory does not grow with the song."""

import io
import math
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from separation.errors import OutputError
from separation.system.os_errors import output_errors

SAMPLE_RATE = 44100  # hertz, of the models and of a Waveform after decode
TAGS = ("title", "artist", "album")
BLOCK_SAMPLES = 65536  # per channel: what is in memory at once
# The highest sample of a song. 1 is full scale, integers of 32 bits that are taken for floats reach 2**31, and squares
# of more than 10**19 overflow in float32.
MAX_SAMPLE = 1e10

_RAW_BYTES = 2**20


def sample_fault(value: float) -> str:
    """Describes a sample whose magnitude is not at most `MAX_SAMPLE`."""
    if not math.isfinite(value):
        return "NaN or Inf"
    return f"a sample of {value:.2g} (full scale is 1)"


class Growing:
    """Samples that one thread appends and others read, waiting for those that are still to come.

    `n_samples` (per channel) is how many there will be, where `total_samples` says so, else how many there are.
    """

    def __init__(self, total_samples: int | None) -> None:
        self._total_samples = total_samples
        self._there = 0  # samples that were appended
        self._is_closed = False
        self._changed = threading.Condition()  # its lock is held while samples are written or read

    @property
    def n_samples(self) -> int:
        return self._there if self._total_samples is None else self._total_samples

    def is_complete(self, timeout_seconds: float) -> bool:
        """Waits until all samples are there, so long at most and no longer once it is closed; whether they are."""
        with self._changed:
            self._changed.wait_for(lambda: self._there >= self.n_samples or self._is_closed, timeout_seconds)
            return self._there >= self.n_samples

    def close(self) -> None:
        """Whoever waits for samples, or asks for some from now on, gets a ValueError."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _wait(self, stop: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._there >= stop or self._is_closed)
            if self._is_closed:
                raise ValueError("the waveform is closed")

    def _grow(self, n_samples: int) -> None:
        """So many more are there."""
        with self._changed:
            self._there += n_samples
            self._changed.notify_all()


class Waveform(Growing):
    """A float32 waveform in a temporary file: appended block by block, read at random, gone when closed.

    Other threads may read while one appends; with `total_samples` they wait for what is still to come.
    `peak` is the largest magnitude; `mean` and `std` (unbiased, 0 below two samples) are of the mono mixture, that is
    the mean of the channels. All three describe what has been appended so far. `source_rate` (hertz) and
    `source_samples` (per channel) are of the file that it was decoded from. Raises `OutputError` if `folder` is full or
    cannot be written to.
    """

    def __init__(
        self, folder: Path, *, sample_rate: int = SAMPLE_RATE, channels: int = 2, total_samples: int | None = None
    ) -> None:
        super().__init__(total_samples)
        self.sample_rate = self.source_rate = sample_rate
        self.channels = channels
        self.source_samples = 0  # per channel
        self.peak = 0.0
        self.mean = 0.0
        self.tags: dict[str, str] = {}  # title, artist, album
        self._squares = 0.0  # sum of squared deviations from the mean
        with output_errors(Path(folder)):
            descriptor, name = tempfile.mkstemp(prefix="waveform-", suffix=".f32", dir=folder)
        self._path, self._is_temporary = Path(name), True
        self._file = io.FileIO(descriptor, "r+")

    @property
    def std(self) -> float:
        return math.sqrt(self._squares / (self._there - 1)) if self._there > 1 else 0.0

    def append(self, block: Tensor) -> None:
        """Append `[C, n]` float32."""
        if block.ndim != 2 or block.shape[0] != self.channels:
            raise ValueError(f"a block has the shape {tuple(block.shape)}, the waveform has {self.channels} channels")
        if block.shape[1]:
            self._append(block.detach().to("cpu", torch.float32).numpy())

    def _append(self, samples: NDArray[np.float32]) -> None:
        n = samples.shape[1]
        interleaved = samples.T
        if not interleaved.flags.c_contiguous:
            interleaved = np.empty((n, self.channels), dtype=np.float32)
            for channel, of_channel in enumerate(samples):  # several times faster than a copy of the whole
                interleaved[:, channel] = of_channel
        with output_errors(self._path.parent), self._changed:
            self._file.seek(self._there * self.channels * 4)
            write_all(self._file.write, interleaved.data.cast("B"))
        self.peak = max(self.peak, float(samples.max()), -float(samples.min()))
        # Two sets' means and squared deviations merge without cancellation (Chan, Golub and LeVeque 1979). In numpy,
        # for sums in torch depend on the number of threads.
        mono = samples[0].astype(np.float64)
        for of_channel in samples[1:]:  # numpy's mean over the channels is ten times slower
            mono += of_channel
        mono /= self.channels
        mean = float(mono.mean())
        mono -= mean
        delta, total = mean - self.mean, self._there + n
        self._squares += float(np.square(mono, out=mono).sum()) + delta * delta * self._there * n / total
        self.mean += delta * n / total
        self._grow(n)

    def read(self, start: int, stop: int) -> Tensor:
        """Samples `[start, stop)` as `[C, stop - start]` float32; 0 <= start <= stop <= n_samples."""
        return torch.from_numpy(np.ascontiguousarray(self.interleaved(start, stop).T))

    def interleaved(self, start: int, stop: int) -> NDArray[np.float32]:
        """As `read`, but `[stop - start, C]`, as they lie in the file."""
        if not 0 <= start <= stop <= self.n_samples:
            raise ValueError(f"samples {start} to {stop} are not within the {self.n_samples} of the waveform")
        self._wait(stop)
        # Plain reads: the pages of a memory map would count as this process's memory.
        samples = np.empty((stop - start, self.channels), dtype=np.float32)
        view = samples.data.cast("B") if samples.size else memoryview(b"")
        with self._changed:
            self._file.seek(start * self.channels * 4)
            while view:
                n_bytes = self._file.readinto(view)
                if not n_bytes:
                    raise self._cut_short()
                view = view[n_bytes:]
        return samples

    def _cut_short(self) -> OutputError:
        return OutputError(f"A temporary file in {self._path.parent} was cut short by something else; run again.")

    @classmethod
    def kept(cls, file: io.FileIO, n_samples: int, statistics: Sequence[float]) -> Self:
        """A stereo waveform at 44100 Hz over the `raw` samples of another one in a file, which is read and stays."""
        wave = cls.__new__(cls)
        Growing.__init__(wave, n_samples)
        wave._there = n_samples
        wave.sample_rate = wave.source_rate = SAMPLE_RATE
        wave.source_samples = n_samples
        wave.channels, wave.tags = 2, {}
        wave.peak, wave.mean, wave._squares = statistics
        wave._file, wave._path, wave._is_temporary = file, Path(str(file.name)), False
        return wave

    @property
    def statistics(self) -> tuple[float, float, float]:
        """What `kept` takes: with it `peak`, `mean` and `std` are the same to the last bit."""
        return self.peak, self.mean, self._squares

    def raw(self) -> Iterator[bytes]:
        """All samples as they lie in the file, block by block: float32, a sample's channels side by side."""
        samples = _RAW_BYTES // (self.channels * 4)
        for start in range(0, self.n_samples, samples):
            yield self.interleaved(start, min(start + samples, self.n_samples)).tobytes()

    def close(self) -> None:
        """Delete the file. A second call does nothing."""
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
    """What samples can be read from at random, `[C, T]`."""

    @property
    def n_samples(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor: ...


def read_padded(source: Readable, start: int, stop: int) -> Tensor:
    """As `Waveform.read`, with zeros before the first and after the last sample."""
    first, last = min(max(start, 0), source.n_samples), min(max(stop, 0), source.n_samples)
    return torch.nn.functional.pad(source.read(first, last), (first - start, stop - last))


def silent(n_samples: int, channels: int) -> Iterator[NDArray[np.float32]]:
    """Blocks `[n, channels]` of silence."""
    for start in range(0, n_samples, BLOCK_SAMPLES):
        yield np.zeros((min(BLOCK_SAMPLES, n_samples - start), channels), np.float32)


def write_all(write: Callable[[memoryview], int], data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:  # a disk that fills up takes a part of the data first and gives the error next
        rest = rest[write(rest) :]
