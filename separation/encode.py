"""Waveforms to audio files: WAV, FLAC and MP3, by libsndfile."""

import contextlib
import io
import os
import secrets
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from separation.errors import InputError
from separation.waveform import BLOCK_SAMPLES, TAGS, Waveform, output_error, write_all

FORMATS = ("wav", "mp3", "flac")
MP3_BITRATES = (128, 160, 192, 224, 256, 320)  # kbit/s
MP3_SAMPLE_RATES = (32000, 44100, 48000)  # hertz: those of MPEG-1, which alone has these bitrates
WAV_DEPTHS = {"16": "PCM_16", "24": "PCM_24", "32f": "FLOAT"}  # bits of integers, or of floats, and libsndfile's name

_WAV_LIMIT_BYTES = 2**32 - 2**20  # WAV sizes have 32 bits; leaves 1 MiB for the header and the tags
_SAMPLE_BYTES = {"PCM_16": 2, "PCM_24": 3, "FLOAT": 4}


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
                        sound.write(block.clip(-1, 1) if format == "mp3" else block)
                    file.check()
            file.check()  # closing writes too: the encoder's last frames and the header
        os.replace(partial, path)
    except BaseException as e:
        with contextlib.suppress(OSError):  # it may not exist; the first error is the one to tell
            partial.unlink()
        if isinstance(e, OSError):
            raise output_error(repr(path.name), path.parent, e) from e
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
                write_all(super().write, data)
            except OSError as e:
                self._error = e
        return len(data)

    def check(self) -> None:
        if self._error is not None:
            raise self._error
