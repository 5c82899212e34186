"""Audio files to waveforms on disk.

libsndfile reads WAV, FLAC, OGG and MP3 in process; ffmpeg reads anything else, through a pipe. What a
file is, is judged by its content; its name is never looked at.
"""

import contextlib
import io
import logging
import math
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from separation import tracks
from separation.channels import (
    FFMPEG_LAYOUTS,
    MASK_COMMENT,
    Layout,
    layout_by_ffmpeg,
    layout_by_mask,
    layout_of_file,
    layout_of_mov,
)
from separation.damage import MIN_MISSING_SECONDS, Damage
from separation.errors import AudioError
from separation.ffmpeg import Decoding, probe
from separation.holes import Timeline, placed, silent
from separation.integrity import MP3_EXTRA_SAMPLES, after_id3v2, check_chunks, check_length, check_mp3, check_ogg
from separation.resample import resample
from separation.waveform import BLOCK_SAMPLES, MAX_SAMPLE, SAMPLE_RATE, TAGS, Waveform, sample_fault

MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 8000, 192000  # hertz, of the input

_SAMPLE_BYTES = {"PCM_U8": 1, "ULAW": 1, "ALAW": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}

logger = logging.getLogger("separation")


def decode(
    path: Path | str,
    folder: Path,
    *,
    sample_rate: int | None = SAMPLE_RATE,
    max_seconds: float | None = None,
    progress: Callable[[float], None] | None = None,
    accept_damaged: bool = False,
) -> Waveform:
    """The song in a file as a stereo waveform at `sample_rate`, in a temporary file in `folder`.

    8 to 192 kHz, 1 to 8 channels. Mono is duplicated; more than two channels are mixed down by what the file tells of
    them (see `channels`), and a warning says so. Where the rate differs the folder holds the waveform twice for a
    while; None keeps the file's own. Title, artist and album come with it. `progress` is called with the share that is
    done, first with 0 and then after each block; raise from it to cancel. Reading stops after `max_seconds`, whatever
    the file says of its length.

    Raises `AudioError` if the file is missing, not audio, empty, damaged or cut short, holds NaN, Inf or samples beyond
    `MAX_SAMPLE`, or is longer than `max_seconds`; `OutputError` if `folder` cannot be written to.
    """
    path = Path(path)
    name = repr(path.name)
    if progress:
        progress(0.0)
    _check_is_file(path, name)
    damage = Damage(name, accept=accept_damaged)
    with contextlib.ExitStack() as stack:
        source = _open_libsndfile(path, name, stack, max_seconds) or _open_ffmpeg(path, stack, max_seconds, damage)
        if not MIN_SAMPLE_RATE <= source.sample_rate <= MAX_SAMPLE_RATE:
            raise AudioError(
                f"{name} has a sample rate of {source.sample_rate} Hz; convert it to one of {MIN_SAMPLE_RATE} to "
                f"{MAX_SAMPLE_RATE} Hz."
            )
        to_stereo = source.layout.to_stereo()
        is_stereo = np.array_equal(to_stereo, np.eye(2))
        if not is_stereo and len(to_stereo) > 1:
            logger.warning(
                "%s has %d channels (%s): mixed down to stereo, centre and surround 3 dB lower, LFE left out",
                name,
                len(to_stereo),
                f"taken as {source.layout}, since it does not say" if source.layout.is_guessed else source.layout,
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
                sound = np.abs(block) <= MAX_SAMPLE  # which NaN is not
                if not sound.all():
                    place = int(sound.all(axis=1).argmin())
                    fault = sample_fault(block[place][~sound[place]][0])
                    seconds = (native.n_samples + place) / source.sample_rate
                    raise AudioError(f"{name} holds {fault} at {seconds:.3f} s; export it again without.")
                native.append(torch.from_numpy(block if is_stereo else block @ to_stereo).T)
                if progress:
                    progress(reading * min(native.n_samples / (source.expected_samples or math.inf), 1.0))
            damage.judge(native.n_samples / native.sample_rate)
            if native.n_samples == 0:
                raise AudioError(f"{name} holds no samples of audio; choose another file.")
            decoded = native
            if sample_rate is not None and resampled:
                decoded = resample(native, sample_rate, folder, progress=resampling)
                native.close()
            decoded.source_rate, decoded.source_samples = native.sample_rate, native.n_samples
            on_error.pop_all()
            return decoded


@dataclass(frozen=True)
class _Source:
    """An open file: blocks `[n, C]` of float32 at `sample_rate`, the C channels in the order of `layout`."""

    sample_rate: int
    layout: Layout
    tags: dict[str, str]
    expected_samples: float  # per channel; an estimate, and 0 where the file tells nothing
    blocks: Iterator[NDArray[np.float32]]


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
    tags = {tag: value for tag in TAGS if (value := getattr(sound, tag))}
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
    with path.open("rb") as head:  # not `file`, whose place is libsndfile's
        layout = layout_of_file(head, sound.channels, name)

    def blocks() -> Iterator[NDArray[np.float32]]:
        if sound.format != "MP3" and limit < _UNKNOWN_SAMPLES:  # the disk need not fill up for what is too long
            check_length(limit, sound.samplerate, max_seconds, name)
        n_samples = 0
        try:
            while len(block := sound.read(min(BLOCK_SAMPLES, limit - n_samples), dtype="float32", always_2d=True)):
                n_samples += len(block)
                yield block
        except soundfile.LibsndfileError as e:
            raise _damaged(name, n_samples / sound.samplerate) from e
        if sound.format == "FLAC" and n_samples < sound.frames < _UNKNOWN_SAMPLES:
            raise _damaged(name, n_samples / sound.samplerate)

    return _Source(sound.samplerate, layout, tags, limit, blocks())


_ENTRIES = f"format=format_name,duration:format_tags:stream_tags:{tracks.ENTRIES}"


def _open_ffmpeg(path: Path, stack: contextlib.ExitStack, max_seconds: float | None, damage: Damage) -> _Source:
    name = damage.name
    answer = probe(path, name, "-show_entries", _ENTRIES)
    container = answer["format"]["format_name"].split(",")
    sound = tracks.sound_of(answer["streams"], container, name)
    stream, channels = sound.tracks[0], sound.n_channels
    sample_rate = int(stream["sample_rate"])
    if "mp3" in container:
        check_mp3(path, name, max_seconds)
    tags = {key.lower(): value for tags in (stream, answer["format"]) for key, value in tags.get("tags", {}).items()}
    layout = layout_by_ffmpeg(sound.layout, channels, name)
    if stream.get("codec_name") == "flac":  # of Ogg's comments, ffmpeg passes over this one
        layout = layout_by_mask(tags.get(MASK_COMMENT, ""), channels) or layout
    if "mov" in container and stream.get("codec_name", "").startswith("pcm_") and not sound.joining:
        with path.open("rb") as file:
            layout = layout_of_mov(file, int(stream["id"], 16), channels) or layout
    announced = min(_announced_seconds(track, container) for track in sound.tracks)
    lead_samples = round(_lead_seconds(path, name, sound) * sample_rate)

    def blocks() -> Iterator[NDArray[np.float32]]:
        options, filters = _same_channels(sound.layout, channels)
        if not sound.joining:
            options += ["-map", f"0:{stream['index']}"]
        block_bytes = BLOCK_SAMPLES * channels * 4
        decoding = stack.enter_context(
            Decoding(
                path,
                name,
                options,
                sample_rate=sample_rate,
                block_bytes=block_bytes,
                filters=filters,
                joining=sound.joining,
            )
        )
        yield from silent(lead_samples, channels)
        timeline, n_samples = Timeline(decoding, sample_rate, announced, damage), 0
        for block in placed(decoding, channels, timeline):
            n_samples += len(block)
            yield block
        failed, seconds = decoding.wait() != 0, n_samples / sample_rate
        if announced - seconds > MIN_MISSING_SECONDS:
            damage.cut(announced - seconds)
        words = f"ffmpeg reports {_number(decoding.n_errors, 'error')}" if decoding.n_errors else "ffmpeg gives up"
        words += f', "{decoding.errors[0]}"' if decoding.errors else ""
        if failed and not announced:
            damage.doubt(words)
        elif failed or decoding.n_errors:
            damage.note(words)

    expected_samples = float(answer["format"].get("duration", 0)) * sample_rate
    tags = {tag: tags[tag] for tag in TAGS if tags.get(tag)}
    return _Source(sample_rate, layout, tags, expected_samples, blocks())


def _lead_seconds(path: Path, name: str, sound: tracks.Sound) -> float:
    """The silence that belongs before the sound of a video, so that it begins with the picture."""
    if sound.picture_start is None:
        return 0.0
    # Of the first frame that is heard, since encoders put samples before the song that decoders take away.
    first = ["-select_streams", str(sound.tracks[0]["index"]), "-read_intervals", "%+#8"]
    frames = probe(path, name, *first, "-show_entries", "frame=best_effort_timestamp_time").get("frames", [])
    times = [frame["best_effort_timestamp_time"] for frame in frames if "best_effort_timestamp_time" in frame]
    return sound.lead_seconds(float(times[0]) if times else None, name)


def _same_channels(layout: str, channels: int) -> tuple[list[str], tuple[str, ...]]:
    """Options and filters that keep ffmpeg to the channels that ffprobe named, also where a stream changes them.

    A number of channels alone would have it mix a layout into its usual one with as many: quad into L R C S.
    """
    if layout in FFMPEG_LAYOUTS:
        return [], (f"aformat=channel_layouts={layout}",)
    return ([] if "+" in layout or "ambisonic" in layout else ["-ac", str(channels)]), ()


def _announced_seconds(stream: dict[str, Any], container: list[str]) -> float:
    """How long the stream is by the file; 0 where it does not say, or ffmpeg gives no more than an estimate."""
    return float(stream.get("duration", 0)) if {"mov", "flac"} & set(container) else 0.0


def _number(n: int, what: str) -> str:
    return f"{n} {what}" + ("s" if n != 1 else "")
