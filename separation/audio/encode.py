"""Waveforms to audio files: WAV, FLAC and MP3, by libsndfile."""

import contextlib
import io
import os
import secrets
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from separation.audio.options import MP3_BITRATE, OutputOptions
from separation.audio.waveform import BLOCK_SAMPLES, TAGS, Waveform, write_all
from separation.errors import InputError
from separation.system.os_errors import output_errors

MP3_SAMPLE_RATES = (32000, 44100, 48000)  # hertz: those of MPEG-1, which alone has these bitrates
_SUBTYPES = {"16": "PCM_16", "24": "PCM_24", "32f": "FLOAT"}  # by depth, libsndfile's names

_WAV_LIMIT_BYTES = 2**32 - 2**20  # WAV sizes have 32 bits; leaves 1 MiB for the header and the tags
_SAMPLE_BYTES = {"PCM_16": 2, "PCM_24": 3, "FLOAT": 4}
_INTEGER_BITS = {"PCM_16": 16, "PCM_24": 24}


def check_rate(format: str, sample_rate: int) -> None:
    """Raise `InputError` unless the format can have this rate (hertz)."""
    if format == "mp3" and sample_rate not in MP3_SAMPLE_RATES:
        rates = ", ".join(map(str, MP3_SAMPLE_RATES))
        raise InputError(f"MP3 cannot have {sample_rate} Hz, only {rates}; choose another sample rate or format.")
    if format == "flac" and sample_rate > 65535 and sample_rate % 10:
        raise InputError(f"FLAC cannot have {sample_rate} Hz, only tens above 65535; choose another rate or format.")


def _subtype(options: OutputOptions) -> str:
    """libsndfile's name of the kind of samples in the file."""
    if options.format == "mp3":
        return "MPEG_LAYER_III"
    (depth,) = options.encoding.values()
    return _SUBTYPES[str(depth)]


def encode(waveform: Waveform, path: Path, options: OutputOptions, *, gain: float | Callable[[], float] = 1.0) -> None:
    """Write `gain` times the waveform, with its tags, in its own sample rate.

    Only float WAV can hold samples beyond full scale: others are clipped, so give a gain that leaves none. Where `gain`
    is a function, it is asked once the samples of each block have come; raise from it to stop. 16 bits are dithered, in
    the same way each time for the same name. WAV over 4 GB becomes RF64. The file appears under its name when it is
    complete.

    Raises InputError if the format cannot have the waveform's rate, and OutputError if the folder is full or cannot be
    written to; no partial file stays behind.
    """
    check_rate(options.format, waveform.sample_rate)
    subtype = _subtype(options)
    bits = _INTEGER_BITS.get(subtype)
    dither = np.random.default_rng(zlib.crc32(path.stem.encode())) if bits == 16 else None
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    with output_errors(path), _removed_on_error(partial):
        with _RecordingFile(partial, "x+") as file:
            with soundfile.SoundFile(
                file,
                "w",
                waveform.sample_rate,
                waveform.channels,
                subtype=subtype,
                **_sound_file_options(waveform, options),
            ) as sound:
                for tag in TAGS:
                    # What libsndfile can take: an empty text, to it one that begins with NUL, is an error.
                    if value := waveform.tags.get(tag, "").encode(errors="replace").partition(b"\0")[0]:
                        setattr(sound, tag, value.decode())
                for start in range(0, waveform.n_samples, BLOCK_SAMPLES):
                    stop = min(start + BLOCK_SAMPLES, waveform.n_samples)
                    block = waveform.interleaved(start, stop)
                    factor = gain() if callable(gain) else gain
                    if factor != 1.0:
                        block *= np.float32(factor)
                    if bits is not None:
                        sound.write(_integers(block, bits, dither))
                    else:
                        sound.write(block.clip(-1, 1) if options.format == "mp3" else block)
                    file.check()
            file.check()  # closing writes too: the encoder's last frames and the header
            if options.format == "wav":
                _zero_time(file)
                file.check()
        os.replace(partial, path)


@contextlib.contextmanager
def _removed_on_error(partial: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it may not exist; the first error is the one to tell
            partial.unlink()
        raise


def _zero_time(file: "_RecordingFile") -> None:
    """Zero the time in the PEAK chunk of a WAV or RF64 of floats: the same samples shall give the same file."""
    file.seek(12)  # behind RIFF, its size, WAVE
    while len(head := file.read(8)) == 8 and head[:4] != b"data":
        n_bytes = int.from_bytes(head[4:], "little")
        if head[:4] == b"PEAK":
            file.seek(4, os.SEEK_CUR)  # its version
            file.write(bytes(4))
            return
        file.seek(n_bytes + n_bytes % 2, os.SEEK_CUR)


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


def is_rf64(waveform: Waveform, options: OutputOptions) -> bool:
    """Whether the waveform as WAV would have more than 4 GB, so that `encode` writes RF64."""
    sample_bytes = _SAMPLE_BYTES[_subtype(options)]
    return waveform.n_samples * waveform.channels * sample_bytes > _WAV_LIMIT_BYTES


def _sound_file_options(waveform: Waveform, options: OutputOptions) -> dict[str, str | float]:
    if options.format == "mp3":
        # libsndfile turns the level into 320 - 288 * level kbit/s, of which LAME takes the nearest that exists.
        level = (320 - (options.mp3_bitrate or MP3_BITRATE)) / (320 - 32)
        return {"format": "MP3", "compression_level": level, "bitrate_mode": "CONSTANT"}
    is_large = options.format == "wav" and is_rf64(waveform, options)
    return {"format": "RF64" if is_large else options.format.upper()}


class _RecordingFile(io.FileIO):
    """A file that keeps its first error for `check`, since one raised in libsndfile's callback would be lost."""

    _error: OSError | None = None

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self._error is None:
            try:
                write_all(super().write, data)
            except OSError as e:
                self._error = e
        return len(data)

    def check(self) -> None:
        if self._error is not None:
            raise self._error
