"""Audio files to waveforms on disk and back: decode, resample, encode. Memory does not grow with the song.

libsndfile reads and writes WAV, FLAC, OGG and MP3 in process; anything else is read by ffmpeg, through a pipe. What a
file is, is judged by its content; its name is never looked at.
"""

import contextlib
import errno
import io
import json
import logging
import math
import os
import secrets
import select
import shutil
import stat
import subprocess
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchaudio.transforms import Resample

from separation.errors import AudioError, InputError, OutputError
from separation.integrity import MP3_EXTRA_SAMPLES, after_id3v2, check_chunks, check_length, check_mp3, check_ogg

SAMPLE_RATE = 44100  # hertz, of the models and of a Waveform after decode
FORMATS = ("wav", "mp3", "flac")
MP3_BITRATES = (128, 160, 192, 224, 256, 320)  # kbit/s
MP3_SAMPLE_RATES = (32000, 44100, 48000)  # hertz: those of MPEG-1, which alone has these bitrates
WAV_DEPTHS = {"16": "PCM_16", "24": "PCM_24", "32f": "FLOAT"}  # bits of integers, or of floats, and libsndfile's name
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 8000, 192000  # hertz, of the input

_BLOCK_SAMPLES = 65536  # per channel: what is in memory at once
_RAW_BYTES = 2**20
_TAGS = ("title", "artist", "album")
_WAV_LIMIT_BYTES = 2**32 - 2**20  # WAV sizes have 32 bits; leaves 1 MiB for the header and the tags
_SAMPLE_BYTES = {"PCM_U8": 1, "ULAW": 1, "ALAW": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}

logger = logging.getLogger("separation")


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
        try:
            descriptor, name = tempfile.mkstemp(prefix="waveform-", suffix=".f32", dir=folder)
        except OSError as e:
            raise _output_error("a temporary file", Path(folder), e) from e
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
        try:
            with self._changed:
                self._file.seek(self._there * self.channels * 4)
                _write_all(self._file.write, interleaved.data.cast("B"))
        except OSError as e:
            raise _output_error("a temporary file", self._path.parent, e) from e
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


def decode(
    path: Path | str,
    folder: Path,
    *,
    sample_rate: int | None = SAMPLE_RATE,
    max_seconds: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> Waveform:
    """The first audio stream of a file as a stereo waveform at `sample_rate`, in a temporary file in `folder`.

    8 to 192 kHz, 1 to 8 channels. Mono is duplicated; more than two channels are mixed down (see `_LAYOUTS`), and a
    warning says so. Where the rate differs the folder holds the waveform twice for a while; None keeps the file's own.
    Title, artist and album come with it. `progress` is called with the share that is done, first with 0 and then after
    each block; raise from it to cancel. Reading stops after `max_seconds`, whatever the file says of its length.

    Raises `AudioError` if the file is missing, not audio, empty, damaged or cut short, holds NaN or Inf, or is longer
    than `max_seconds`; `OutputError` if `folder` cannot be written to.
    """
    path = Path(path)
    name = repr(path.name)
    if progress:
        progress(0.0)
    _check_is_file(path, name)
    with contextlib.ExitStack() as stack:
        source = _open_libsndfile(path, name, stack, max_seconds) or _open_ffmpeg(path, name, stack, max_seconds)
        if not MIN_SAMPLE_RATE <= source.sample_rate <= MAX_SAMPLE_RATE:
            raise AudioError(
                f"{name} has a sample rate of {source.sample_rate} Hz; convert it to one of {MIN_SAMPLE_RATE} to "
                f"{MAX_SAMPLE_RATE} Hz."
            )
        to_stereo = _stereo_matrix(source.layout)
        is_stereo = np.array_equal(to_stereo, np.eye(2))
        if len(to_stereo) > 2:
            logger.warning(
                "%s has %d channels (%s): mixed down to stereo, centre and surround 3 dB lower, LFE left out",
                name,
                len(to_stereo),
                source.layout,
            )
        with contextlib.ExitStack() as on_error:
            native = on_error.enter_context(Waveform(folder, sample_rate=source.sample_rate))
            native.tags = source.tags
            resampled = sample_rate is not None and source.sample_rate != sample_rate
            reading = 0.5 if resampled else 1.0  # the share of the job

            def resampling(share: float) -> None:
                if progress:
                    progress(reading + (1 - reading) * share)

            for block in source.blocks:
                check_length(native.n_samples + len(block), source.sample_rate, max_seconds, name)
                finite = np.isfinite(block)
                if not finite.all():
                    seconds = (native.n_samples + int(finite.all(axis=1).argmin())) / source.sample_rate
                    raise AudioError(f"{name} holds NaN or Inf at {seconds:.3f} s; export it again without.")
                native.append(torch.from_numpy(block if is_stereo else block @ to_stereo).T)
                if progress:
                    progress(reading * min(native.n_samples / (source.expected_samples or math.inf), 1.0))
            if native.n_samples == 0:
                raise AudioError(f"{name} holds no samples of audio; choose another file.")
            decoded = native
            if sample_rate is not None and resampled:
                decoded = resample(native, sample_rate, folder, progress=resampling)
                native.close()
            decoded.source_rate, decoded.source_samples = native.sample_rate, native.n_samples
            on_error.pop_all()
            return decoded


def check_output(format: str, mp3_bitrate: int, wav_depth: str) -> None:
    """Raise `InputError` unless `encode` knows the format and its bitrate (kbit/s) or depth."""
    if format not in FORMATS:
        raise InputError(f"The output format {format!r} is unknown; choose one of {', '.join(FORMATS)}.")
    if format == "mp3" and mp3_bitrate not in MP3_BITRATES:
        raise InputError(f"MP3 cannot have {mp3_bitrate} kbit/s; choose one of {', '.join(map(str, MP3_BITRATES))}.")
    if wav_depth not in WAV_DEPTHS:
        raise InputError(f"The WAV depth {wav_depth!r} is unknown; choose one of {', '.join(map(repr, WAV_DEPTHS))}.")


def check_rate(format: str, sample_rate: int) -> None:
    """Raise `InputError` unless the format can have this rate (hertz)."""
    if format == "mp3" and sample_rate not in MP3_SAMPLE_RATES:
        rates = ", ".join(map(str, MP3_SAMPLE_RATES))
        raise InputError(f"MP3 cannot have {sample_rate} Hz, only {rates}; choose another sample rate or format.")
    if format == "flac" and sample_rate > 65535 and sample_rate % 10:
        raise InputError(f"FLAC cannot have {sample_rate} Hz, only tens above 65535; choose another rate or format.")


def _integer_bits(format: str, wav_depth: str) -> int | None:
    """The bits of a sample, where samples are integers and so cannot go beyond full scale; None for floats."""
    if format == "wav":
        return None if wav_depth == "32f" else int(wav_depth)
    return 24 if format == "flac" else None


def encode(
    waveform: Waveform,
    path: Path,
    *,
    format: str,
    gain: float | Callable[[], float] = 1.0,
    mp3_bitrate: int = 320,
    wav_depth: str = "32f",
) -> None:
    """Write `gain` times the waveform, with its tags: WAV of `wav_depth`, 24-bit FLAC, or MP3 at `mp3_bitrate` kbit/s.

    Only float WAV can hold samples beyond full scale: others are clipped, so give a gain that leaves none. Where `gain`
    is a function, it is asked once the samples of each block have come; raise from it to stop. 16 bits are dithered, in
    the same way each time for the same name. WAV over 4 GB becomes RF64. The file appears under its name
    when it is complete. Raises `InputError` for an unknown format, bitrate, depth or rate, `OutputError` if the folder
    is full or cannot be written to; no partial file stays behind.
    """
    check_output(format, mp3_bitrate, wav_depth)
    check_rate(format, waveform.sample_rate)
    bits = _integer_bits(format, wav_depth)
    dither = np.random.default_rng(zlib.crc32(path.stem.encode())) if bits == 16 else None
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with _RecordingFile(partial, "x") as file:
            with soundfile.SoundFile(
                file,
                "w",
                waveform.sample_rate,
                waveform.channels,
                **_sound_file_options(waveform, format, mp3_bitrate, wav_depth),
            ) as sound:
                for tag in _TAGS:
                    # What libsndfile can take: an empty text, to it one that begins with NUL, is an error.
                    if value := waveform.tags.get(tag, "").encode(errors="replace").partition(b"\0")[0]:
                        setattr(sound, tag, value.decode())
                for start in range(0, waveform.n_samples, _BLOCK_SAMPLES):
                    stop = min(start + _BLOCK_SAMPLES, waveform.n_samples)
                    block = waveform.interleaved(start, stop)
                    factor = gain() if callable(gain) else gain
                    if factor != 1.0:
                        block *= np.float32(factor)
                    if bits is not None:
                        sound.write(_integers(block, bits, dither))
                    else:
                        sound.write(block.clip(-1, 1) if format == "mp3" else block)
                    file.check()
            file.check()  # closing writes too: the encoder's last frames and the header
        os.replace(partial, path)
    except BaseException as e:
        with contextlib.suppress(OSError):  # it may not exist; the first error is the one to tell
            partial.unlink()
        if isinstance(e, OSError):
            raise _output_error(repr(path.name), path.parent, e) from e
        raise


def _integers(block: NDArray[np.float32], bits: int, dither: np.random.Generator | None) -> NDArray[np.int32]:
    """Samples of full scale 1, rounded to so many bits and clipped: the upper bits of integers.

    Dither is of triangular density, two steps wide (Lipshitz, Wannamaker and Vanderkooy 1992): it makes the rounding
    error a steady noise that does not depend on the music. Zeros stay zeros, so silence stays silent.
    """
    scale = 2 ** (bits - 1)
    samples = block * np.float64(scale)
    if dither is not None:
        samples += (dither.random(samples.shape) - dither.random(samples.shape)) * (samples != 0)
    return np.rint(samples).clip(-scale, scale - 1).astype(np.int32) << (32 - bits)


def is_rf64(waveform: Waveform, wav_depth: str) -> bool:
    """Whether the waveform as WAV of that depth would have more than 4 GB, so that `encode` writes RF64."""
    return waveform.n_samples * waveform.channels * _SAMPLE_BYTES[WAV_DEPTHS[wav_depth]] > _WAV_LIMIT_BYTES


def _sound_file_options(waveform: Waveform, format: str, mp3_bitrate: int, wav_depth: str) -> dict[str, str | float]:
    if format == "flac":
        return {"format": "FLAC", "subtype": "PCM_24"}
    if format == "mp3":
        # libsndfile turns the level into 320 - 288 * level kbit/s, of which LAME takes the nearest that exists.
        level = (320 - mp3_bitrate) / (320 - 32)
        return {
            "format": "MP3",
            "subtype": "MPEG_LAYER_III",
            "compression_level": level,
            "bitrate_mode": "CONSTANT",
        }
    return {"format": "RF64" if is_rf64(waveform, wav_depth) else "WAV", "subtype": WAV_DEPTHS[wav_depth]}


class _RecordingFile(io.FileIO):
    """A file that keeps its first error for `check`, since one raised in libsndfile's callback would be lost."""

    _error: OSError | None = None

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self._error is None:
            try:
                _write_all(super().write, data)
            except OSError as e:
                self._error = e
        return len(data)

    def check(self) -> None:
        if self._error is not None:
            raise self._error


def _write_all(write: Callable[[memoryview], int], data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:  # a disk that fills up takes a part of the data first and gives the error next
        rest = rest[write(rest) :]


def _output_error(what: str, folder: Path, error: OSError) -> OutputError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    action = "free some space there or choose another folder" if full else "choose a folder that you may write to"
    return OutputError(f"Cannot write {what} in {folder} ({error.strerror}); {action}.")


# --- resampling


_LOWPASS_ZEROS = 64  # zero crossings of the sinc on either side
_ROLLOFF = 0.9475937167399596  # of the lower Nyquist frequency
_KAISER_BETA = 14.769656459379492
_KERNEL_LIMIT = 2**22  # taps of torchaudio's kernel: 16 MiB; the usual rates need at most a fifth of a million


class Readable(Protocol):
    """What samples can be read from at random, `[C, T]`."""

    @property
    def n_samples(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor: ...


def resample(
    waveform: Waveform,
    sample_rate: int,
    folder: Path,
    *,
    max_samples: int | None = None,
    progress: Callable[[float], None] | None = None,
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
            if progress:
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
    block_samples = max(1, _BLOCK_SAMPLES // max(old, new)) * new  # a block starts on a sample of both rates
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
        for part in torch.arange(start, stop).split(4096):
            before = part * old // new  # the input sample at or before each output sample
            first, last = int(before[0]), int(before[-1])
            samples = read_padded(source, first - width, last + width + 2)
            windows = samples.unfold(1, 2 * width + 2, 1)[:, before - first]
            parts.append(torch.einsum("cnt,nt->cn", windows, kernel[part % new]))
        return torch.cat(parts, dim=1)

    return convert


def read_padded(source: Readable, start: int, stop: int) -> Tensor:
    """As `Waveform.read`, with zeros before the first and after the last sample."""
    first, last = min(max(start, 0), source.n_samples), min(max(stop, 0), source.n_samples)
    return torch.nn.functional.pad(source.read(first, last), (first - start, stop - last))


# --- reading files


@dataclass(frozen=True)
class _Source:
    """An open file: blocks `[n, C]` of float32 at `sample_rate`, the C channels in the order of `layout`."""

    sample_rate: int
    layout: str
    tags: dict[str, str]
    expected_samples: float  # per channel; an estimate, and 0 where the file tells nothing
    blocks: Iterator[NDArray[np.float32]]


# Channels by their number: L, R, C(entre), LFE, Ls and Rs (surround), Lb and Rb (back), S (one back surround). As WAV,
# FLAC and AIFF order them, and ffmpeg whatever it reads.
_LAYOUTS = {
    1: "C",
    2: "L R",
    3: "L R C",
    4: "L R Ls Rs",
    5: "L R C Ls Rs",
    6: "L R C LFE Ls Rs",
    7: "L R C LFE S Ls Rs",
    8: "L R C LFE Lb Rb Ls Rs",
}
_OGG_LAYOUTS = _LAYOUTS | {  # Vorbis I specification, 4.3.9; Opus has the same
    3: "L C R",
    5: "L C R Ls Rs",
    6: "L C R Ls Rs LFE",
    7: "L C R Ls Rs S LFE",
    8: "L C R Ls Rs Lb Rb LFE",
}
_FFMPEG_LAYOUTS = {  # ffmpeg's names of those that differ from the usual one with as many channels
    "2.1": "L R LFE",
    "3.0(back)": "L R S",
    "3.1": "L R C LFE",
    "4.0": "L R C S",
    "4.1": "L R C LFE S",
    "6.0": "L R C S Ls Rs",
    "6.1(back)": "L R C LFE Ls Rs S",
    "7.0": "L R C Lb Rb Ls Rs",
}
# What each channel gives to the left output, mirrored for the right (ITU-R BS.775, annex 4). LFE is dropped.
_TO_LEFT = {
    "L": 1.0,
    "R": 0.0,
    "C": 0.5**0.5,
    "LFE": 0.0,
    "Ls": 0.5**0.5,
    "Rs": 0.0,
    "Lb": 0.5**0.5,
    "Rb": 0.0,
    "S": 0.5,
}


def _stereo_matrix(layout: str) -> NDArray[np.float32]:
    """`[C, 2]` float32. Each output's coefficients sum to 1, as ffmpeg has it, so that no input exceeds full scale."""
    mirror = str.maketrans("LR", "RL")
    left = [_TO_LEFT[channel] for channel in layout.split()]
    right = [_TO_LEFT[channel if channel == "LFE" else channel.translate(mirror)] for channel in layout.split()]
    matrix = np.array([left, right]).T
    return (matrix / matrix.sum(axis=0)).astype(np.float32)


def _check_is_file(path: Path, name: str) -> None:
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            path.open("rb").close()
    except FileNotFoundError as e:
        raise AudioError(f"{name} does not exist; check the path.") from e
    except (OSError, ValueError) as e:  # ValueError: a NUL in the path
        raise AudioError(f"{name} cannot be read ({getattr(e, 'strerror', None) or e}); check the path.") from e
    if not stat.S_ISREG(status.st_mode):
        raise AudioError(f"{name} is not a file; give the path of an audio file.")
    if status.st_size == 0:
        raise AudioError(f"{name} is empty (0 bytes); get the file again.")


def _layout(layouts: dict[int, str], channels: int, name: str) -> str:
    if channels not in layouts:
        raise AudioError(f"{name} has {channels} channels; mix it down to 8 or fewer.")
    return layouts[channels]


def _damaged(name: str, seconds: float) -> AudioError:
    return AudioError(f"{name} is damaged or cut short after {seconds:.1f} s; get the file again.")


_UNKNOWN_SAMPLES = 2**62  # or more is how libsndfile says that a file does not tell its length


class _SequentialSoundFile(soundfile.SoundFile):
    """Without the seek after each read, which is inexact in some MP3 files and fails in FLAC of unknown length."""

    def seekable(self) -> bool:
        return False


class _FileFrom(io.FileIO):
    """A file as if it began at byte `start`."""

    def __init__(self, path: Path, start: int) -> None:
        super().__init__(path)
        self._start = start
        self.seek(0)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return super().seek(offset + (self._start if whence == os.SEEK_SET else 0), whence) - self._start

    def tell(self) -> int:
        return super().tell() - self._start


def _open_libsndfile(path: Path, name: str, stack: contextlib.ExitStack, max_seconds: float | None) -> _Source | None:
    """None if libsndfile cannot read the file, or not all of it."""
    file = stack.enter_context(path.open("rb", buffering=0))  # unbuffered: libsndfile starts at the descriptor's offset
    audio_bytes = check_chunks(file, name)
    if not check_ogg(file, name):
        return None
    file.seek(after_id3v2(file))
    if file.read(3) == b"ID3":
        return None  # so many tags that libsndfile, which nothing can interrupt, would be busy with them
    file.seek(0)
    try:
        # By descriptor, for libsndfile guesses from the names of some headerless formats.
        sound = stack.enter_context(_SequentialSoundFile(file.fileno(), closefd=False))
    except soundfile.LibsndfileError:
        return None
    tags = {tag: value for tag in _TAGS if (value := getattr(sound, tag))}
    limit = sound.frames
    if audio_bytes is not None:
        # libsndfile takes the header at its word, which here is wrong: the same samples again, without a header.
        if sound.subtype not in _SAMPLE_BYTES:
            return None
        limit = audio_bytes[1] // (_SAMPLE_BYTES[sound.subtype] * sound.channels)
        sound = stack.enter_context(
            _SequentialSoundFile(
                stack.enter_context(_FileFrom(path, audio_bytes[0])),
                samplerate=sound.samplerate,
                channels=sound.channels,
                subtype=sound.subtype,
                endian=sound.endian,
                format="RAW",
            )
        )
    if sound.format == "MP3" and sound.subtype != "MPEG_LAYER_II":
        # Not beyond the last frame: some padding there is an error to libsndfile.
        limit = check_mp3(path, name, max_seconds)
        # Not Layer III after all (UTF-16 text passes for Layer I), or without a header that counts the samples, so that
        # libsndfile guesses them from the bitrate and stops there. It leaves out what the encoder adds.
        if not 0 < limit <= sound.frames + MP3_EXTRA_SAMPLES:
            return None
    layouts = _OGG_LAYOUTS if sound.format == "OGG" else _LAYOUTS

    def blocks() -> Iterator[NDArray[np.float32]]:
        if sound.format != "MP3" and limit < _UNKNOWN_SAMPLES:  # the disk need not fill up for what is too long
            check_length(limit, sound.samplerate, max_seconds, name)
        n_samples = 0
        try:
            while len(block := sound.read(min(_BLOCK_SAMPLES, limit - n_samples), dtype="float32", always_2d=True)):
                n_samples += len(block)
                yield block
        except soundfile.LibsndfileError as e:
            raise _damaged(name, n_samples / sound.samplerate) from e
        if sound.format == "FLAC" and n_samples < sound.frames < _UNKNOWN_SAMPLES:
            raise _damaged(name, n_samples / sound.samplerate)

    return _Source(sound.samplerate, _layout(layouts, sound.channels, name), tags, limit, blocks())


# Those that hold audio and recognise it by its content. No playlists (hls, concat, dash), which can name other files.
_DEMUXERS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dts,dtshd,eac3,flac,flv,iff,loas,matroska,mlp,mov,mp3,mpc,mpc8,mpeg,mpegts,"
    "mxf,nut,ogg,oma,rm,tak,truehd,tta,voc,w64,wav,wtv,wv,xwma"
)


_PATIENCE_SECONDS = 30.0  # for a word from ffprobe and for each next block from ffmpeg


def _open_ffmpeg(path: Path, name: str, stack: contextlib.ExitStack, max_seconds: float | None) -> _Source:
    ffmpeg, ffprobe = shutil.which("ffmpeg"), shutil.which("ffprobe")
    if ffmpeg is None or ffprobe is None:
        raise AudioError(f"{name} is not audio that libsndfile reads; install ffmpeg for M4A, AAC, video and others.")
    # `file:` before the absolute path: no name is taken for an option or for another protocol.
    guarded_input = ["-v", "error", "-protocol_whitelist", "file,pipe", "-format_whitelist", _DEMUXERS]
    guarded_input += ["-i", f"file:{path.absolute()}"]
    entries = "format=format_name,duration:format_tags:stream=sample_rate,channels,channel_layout,duration:stream_tags"
    try:
        probe = subprocess.run(
            [ffprobe, *guarded_input, "-select_streams", "a:0", "-show_entries", entries, "-of", "json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_PATIENCE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as e:
        raise AudioError(
            f"{name} is damaged: ffmpeg cannot tell what is in it within {e.timeout:g} s; get the file again."
        ) from e
    if probe.returncode != 0:
        raise AudioError(f"{name} is not audio that libsndfile or ffmpeg can read; choose an audio file.")
    answer = json.loads(probe.stdout.decode(errors="replace"))
    if not answer["streams"]:
        raise AudioError(f"{name} holds no audio stream; choose a file with sound.")
    stream, container = answer["streams"][0], answer["format"]["format_name"].split(",")
    sample_rate, channels = int(stream.get("sample_rate", 0)), int(stream.get("channels", 0))
    if sample_rate == 0 or channels == 0:
        raise AudioError(f"{name} is damaged: ffmpeg finds no sample rate or channels in it; get the file again.")
    if "mp3" in container:
        check_mp3(path, name, max_seconds)
    tags = {key.lower(): value for tags in (stream, answer["format"]) for key, value in tags.get("tags", {}).items()}
    seconds = float(stream.get("duration", 0)) if {"mov", "flac"} & set(container) else 0.0
    layout = _FFMPEG_LAYOUTS.get(stream.get("channel_layout", "")) or _layout(_LAYOUTS, channels, name)
    output = ["-map", "0:a:0", "-f", "f32le", "-ar", str(sample_rate), "-ac", str(channels), "pipe:1"]

    def blocks() -> Iterator[NDArray[np.float32]]:
        process = stack.enter_context(
            subprocess.Popen(
                [ffmpeg, "-nostdin", *guarded_input, *output],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )
        )
        stack.callback(process.kill)  # does nothing once it has ended; runs before the wait for its end
        n_samples = 0
        while data := _read_output(process, _BLOCK_SAMPLES * channels * 4):
            block = np.frombuffer(data[: len(data) // (channels * 4) * channels * 4], dtype="<f4")
            n_samples += len(block) // channels
            yield block.reshape(-1, channels).copy()
        # MP4 and FLAC announce the stream's own duration; of other containers ffmpeg gives at most an estimate.
        if process.wait() != 0 or n_samples / sample_rate < seconds - 0.5:
            raise _damaged(name, n_samples / sample_rate)

    expected_samples = float(answer["format"].get("duration", 0)) * sample_rate
    tags = {tag: tags[tag] for tag in _TAGS if tags.get(tag)}
    return _Source(sample_rate, layout, tags, expected_samples, blocks())


def _read_output(process: subprocess.Popen[bytes], n_bytes: int) -> bytes:
    """The next bytes that a program writes, fewer only at the end. One that falls silent is ended."""
    pipe = process.stdout
    assert pipe is not None
    data = bytearray()
    while len(data) < n_bytes:
        if not select.select([pipe], [], [], _PATIENCE_SECONDS)[0]:
            process.kill()
        part = pipe.read(n_bytes - len(data))
        if not part:
            break
        data += part
    return bytes(data)
