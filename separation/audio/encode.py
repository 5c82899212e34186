"""Encodes waveforms: as WAV, FLAC or MP3 with libsndfile, as M4A, Opus or Ogg Vorbis with ffmpeg."""

import contextlib
import io
import os
import secrets
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from separation.audio.ffmpeg_writer import run_ffmpeg
from separation.audio.metadata import (
    Metadata,
    add_to_flac,
    add_to_m4a,
    add_to_mp3,
    add_to_wav,
    ffmetadata,
    free_form_items,
    m4a_tags,
    ogg_tags,
)
from separation.audio.options import FFMPEG_FORMATS, LOSSLESS, OPUS_SAMPLE_RATE, OutputOptions
from separation.audio.waveform import BLOCK_SAMPLES, TAGS, Waveform, write_all
from separation.errors import InputError
from separation.system.os_errors import output_errors

MP3_SAMPLE_RATES = (32000, 44100, 48000)  # hertz, of MPEG-1; other versions do not have all the bitrates
AAC_SAMPLE_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
MAX_OPUS_KBPS = 256  # for a channel
_SUBTYPES = {"16": "PCM_16", "24": "PCM_24", "32f": "FLOAT"}  # libsndfile's names, by depth

_WAV_LIMIT_BYTES = 2**32 - 2**20  # WAV has 32-bit sizes; 1 MiB is left for the header and the tags
_SAMPLE_BYTES = {"PCM_16": 2, "PCM_24": 3, "FLOAT": 4}
_INTEGER_BITS = {"PCM_16": 16, "PCM_24": 24}
_INFO_TAGS = {"track": "tracknumber"} | {tag: tag for tag in ("comment", "date", "genre", "copyright")}  # of WAV
_VORBIS_QUALITIES = {128: 4, 160: 5, 192: 6, 224: 7, 256: 8, 320: 9}  # by the kbit/s that they give on average
_MUXERS = {"m4a": "ipod", "opus": "opus", "ogg": "ogg"}


def check_rate(format: str, sample_rate: int) -> None:
    """Raise `InputError` unless the format supports this rate (hertz)."""
    if format == "mp3" and sample_rate not in MP3_SAMPLE_RATES:
        rates = ", ".join(map(str, MP3_SAMPLE_RATES))
        raise InputError(f"MP3 does not support {sample_rate} Hz, only {rates}: choose another sample rate or format")
    if format == "m4a" and sample_rate not in AAC_SAMPLE_RATES:
        raise InputError(f"M4A does not support {sample_rate} Hz: choose another sample rate or format")
    if format == "opus" and sample_rate != OPUS_SAMPLE_RATE:
        raise InputError(f"Opus does not support {sample_rate} Hz, only {OPUS_SAMPLE_RATE}: choose another format")
    if format == "flac" and sample_rate > 65535 and sample_rate % 10:
        raise InputError(
            f"FLAC does not support {sample_rate} Hz (above 65535 Hz, only multiples of 10): "
            "choose another sample rate or format"
        )


def is_rf64(waveform: Waveform, options: OutputOptions) -> bool:
    """Whether the waveform as WAV would exceed 4 GB, so that `encode` writes RF64."""
    sample_bytes = _SAMPLE_BYTES[_subtype(options)]
    return waveform.n_samples * _n_channels(waveform, options) * sample_bytes > _WAV_LIMIT_BYTES


def _n_channels(waveform: Waveform, options: OutputOptions) -> int:
    return 1 if options.channels == "mono" else waveform.channels


def encode(
    waveform: Waveform,
    path: Path,
    options: OutputOptions,
    *,
    tags: Mapping[str, str] | None = None,
    cover: bytes = b"",
    gain: float | Callable[[], float] = 1.0,
) -> None:
    """Write a waveform at its own sample rate. The file appears under its name when it is complete.

    The same samples, tags and file name give the same bytes. 16-bit samples are dithered. WAV over 4 GB becomes RF64.

    Args:
        options: of `channels`, `source` counts as `stereo`: only the caller knows the song's own.
        tags: see `Metadata`; None means those of the waveform.
        cover: a JPEG or PNG file.
        gain: a factor for all samples. All formats but float WAV are clipped at full scale, so the gain should keep the
            samples within. A function is called for each block, as soon as the block's samples are there; it may raise
            to cancel.

    Raises:
        InputError: the format does not support the waveform's sample rate, or needs ffmpeg, which is missing.
        OutputError: the folder is full or cannot be written to. No partial file is left after.
    """
    check_rate(options.format, waveform.sample_rate)
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    metadata = Metadata(waveform.tags if tags is None else tags, cover)
    blocks = _blocks(waveform, options, gain, seed=zlib.crc32(path.stem.encode()))
    with output_errors(path), _removed_on_error(partial):
        if options.format in FFMPEG_FORMATS:
            _write_with_ffmpeg(partial, waveform, options, metadata, blocks)
        else:
            _write_with_libsndfile(partial, waveform, options, metadata, blocks)
        os.replace(partial, path)


def _write_with_libsndfile(
    partial: Path, waveform: Waveform, options: OutputOptions, metadata: Metadata, blocks: Iterator[NDArray[Any]]
) -> None:
    # libsndfile writes these tags only; the others need a second pass.
    is_simple = not metadata.cover and metadata.tags.keys() <= set(TAGS)
    with _RecordingFile(partial, "x+") as file:
        with _open(file, waveform, options) as sound:
            if is_simple or options.format == "wav":
                _write_tags(sound, metadata.tags)
            for block in blocks:
                sound.write(block)
                file.check()
        file.check()  # closing writes the encoder's last frames and the header
        if options.format == "wav":
            _zero_time(file)
            file.check()
    if not is_simple:
        _add_metadata(partial, options.format, metadata)


def _add_metadata(partial: Path, format: str, metadata: Metadata) -> None:
    if format == "wav":
        with partial.open("r+b") as file:
            add_to_wav(file, metadata)
        return
    tagged = partial.with_suffix(".tagged")
    with _removed_on_error(tagged):
        with partial.open("rb") as source, tagged.open("xb") as target:
            add = {"flac": add_to_flac, "m4a": add_to_m4a, "mp3": add_to_mp3}[format]
            add(source, target, metadata)
        os.replace(tagged, partial)


def _write_with_ffmpeg(
    partial: Path, waveform: Waveform, options: OutputOptions, metadata: Metadata, blocks: Iterator[NDArray[Any]]
) -> None:
    is_m4a, channels = options.format == "m4a", _n_channels(waveform, options)
    kind = "s32le" if options.bitrate == LOSSLESS else "f32le"
    rate = str(waveform.sample_rate)
    with tempfile.TemporaryDirectory(prefix=".", suffix=".partial", dir=partial.parent) as folder:
        tags, cover = Path(folder, "tags"), Path(folder, "cover")
        tags.write_bytes(ffmetadata(m4a_tags(metadata) if is_m4a else ogg_tags(metadata)))
        inputs = ["-f", kind, "-ar", rate, "-ac", str(channels), "-i", "pipe:0", "-f", "ffmetadata", "-i", str(tags)]
        pictures = []
        if is_m4a and metadata.cover:
            cover.write_bytes(metadata.cover)
            inputs += ["-f", "image2pipe", "-i", str(cover)]
            pictures = ["-map", "2:v:0", "-c:v", "copy", "-disposition:v:0", "attached_pic"]
        # Without the exact time scale, M4A would round its length to milliseconds.
        container = ["-movie_timescale", rate, "-movflags", "+faststart"] if is_m4a else []
        run_ffmpeg(
            [
                *inputs,
                *("-map", "0:a:0", *pictures, "-map_metadata", "1"),
                *_codec(options, channels),
                *("-fflags", "+bitexact", "-flags:a", "+bitexact", *container, "-f", _MUXERS[options.format]),
                f"file:{partial.absolute()}",
            ],
            (block.tobytes() for block in blocks),
            what=f"format {options.format}",
        )
    if is_m4a and free_form_items(metadata.tags):
        _add_metadata(partial, options.format, metadata)


def _codec(options: OutputOptions, channels: int) -> list[str]:
    """ffmpeg's options for the encoder."""
    if options.bitrate == LOSSLESS:
        return ["-c:a", "alac"]
    kbps = options.kbps or 0
    if options.format == "ogg":  # a quality: with a fixed bitrate, Vorbis sounds worse
        return ["-c:a", "libvorbis", "-q:a", str(_VORBIS_QUALITIES[kbps])]
    if options.format == "opus":
        return ["-c:a", "libopus", "-b:a", f"{min(kbps, MAX_OPUS_KBPS * channels)}k"]
    return ["-c:a", "aac", "-b:a", f"{kbps}k"]


def _subtype(options: OutputOptions) -> str:
    """libsndfile's name of the kind of samples in the file; empty for lossy formats of ffmpeg."""
    if options.format == "mp3":
        return "MPEG_LAYER_III"
    if options.format in FFMPEG_FORMATS:
        return "PCM_24" if options.bitrate == LOSSLESS else ""
    (depth,) = options.encoding.values()
    return _SUBTYPES[str(depth)]


def _open(file: "_RecordingFile", waveform: Waveform, options: OutputOptions) -> Any:
    """An open `SoundFile` for the waveform."""
    kind: dict[str, str | float]
    if options.format == "mp3":
        # libsndfile turns the level into 320 - 288 * level kbit/s, and LAME takes the nearest bitrate.
        level = (320 - (options.kbps or 0)) / (320 - 32)
        kind = {"format": "MP3", "compression_level": level, "bitrate_mode": "CONSTANT"}
    else:
        is_large = options.format == "wav" and is_rf64(waveform, options)
        kind = {"format": "RF64" if is_large else options.format.upper()}
    channels = _n_channels(waveform, options)
    return soundfile.SoundFile(file, "w", waveform.sample_rate, channels, subtype=_subtype(options), **kind)


def _write_tags(sound: Any, tags: Mapping[str, str]) -> None:
    for tag, attribute in {**dict(zip(TAGS, TAGS, strict=True)), **_INFO_TAGS}.items():
        # libsndfile takes text up to the first NUL, and refuses an empty text.
        if value := tags.get(tag, "").encode(errors="replace").partition(b"\0")[0]:
            setattr(sound, attribute, value.decode())


def _blocks(
    waveform: Waveform, options: OutputOptions, gain: float | Callable[[], float], seed: int
) -> Iterator[NDArray[Any]]:
    """The samples `[n, C]` as libsndfile gets them. `seed` is for the dither."""
    bits = _INTEGER_BITS.get(_subtype(options))
    dither = np.random.default_rng(seed) if bits == 16 else None
    for start in range(0, waveform.n_samples, BLOCK_SAMPLES):
        block = waveform.interleaved(start, min(start + BLOCK_SAMPLES, waveform.n_samples))
        factor = gain() if callable(gain) else gain
        if factor != 1.0:
            block *= np.float32(factor)
        if options.channels == "mono":
            block = block.mean(axis=1, keepdims=True)
        if bits is not None:
            yield _integers(block, bits, dither)
        else:
            yield block if options.format == "wav" else block.clip(-1, 1)


def _integers(block: NDArray[np.float32], bits: int, dither: np.random.Generator | None) -> NDArray[np.int32]:
    """Samples rounded to `bits` and clipped, in the upper bits of integers.

    The dither has a triangular density, two steps wide (Lipshitz, Wannamaker and Vanderkooy 1992). With it, the
    rounding error is a steady noise that does not depend on the music. Zeros get none, so silence stays silent.
    """
    scale = 2 ** (bits - 1)
    samples = block * np.float64(scale)
    if dither is not None:
        samples += (dither.random(samples.shape) - dither.random(samples.shape)) * (samples != 0)
    integers: NDArray[np.int32] = np.rint(samples).clip(-scale, scale - 1).astype(np.int32) << (32 - bits)
    return integers


@contextlib.contextmanager
def _removed_on_error(partial: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it may not exist, and the first error is the one to report
            partial.unlink()
        raise


def _zero_time(file: "_RecordingFile") -> None:
    """Zero the time in the PEAK chunk of a float WAV or RF64, so that the same samples give the same file."""
    file.seek(12)  # after RIFF, the size and WAVE
    while len(head := file.read(8)) == 8 and head[:4] != b"data":
        n_bytes = int.from_bytes(head[4:], "little")
        if head[:4] == b"PEAK":
            file.seek(4, os.SEEK_CUR)  # the chunk's version
            file.write(bytes(4))
            return
        file.seek(n_bytes + n_bytes % 2, os.SEEK_CUR)


class _RecordingFile(io.FileIO):
    """A file that keeps its first error for `check`, because an error in libsndfile's callback would be lost."""

    _error: OSError | None = None

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self._error is None:
            try:
                write_all(super().write, data)
            except OSError as e:
                self._error = e
        return len(data)

    def check(self) -> None:
        """Raise the first error, if there was one."""
        if self._error is not None:
            raise self._error
