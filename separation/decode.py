"""Audio files to waveforms on disk.

libsndfile reads WAV, FLAC, OGG and MP3 in process; ffmpeg reads anything else, through a pipe. What a
file is, is judged by its content; its name is never looked at.
"""

import contextlib
import io
import json
import logging
import math
import os
import select
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from separation.channels import (
    FFMPEG_LAYOUTS,
    MASK_COMMENT,
    Layout,
    layout_by_ffmpeg,
    layout_by_mask,
    layout_of_file,
)
from separation.errors import AudioError
from separation.integrity import MP3_EXTRA_SAMPLES, after_id3v2, check_chunks, check_length, check_mp3, check_ogg
from separation.resample import resample
from separation.waveform import BLOCK_SAMPLES, SAMPLE_RATE, TAGS, Waveform

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
) -> Waveform:
    """The first audio stream of a file as a stereo waveform at `sample_rate`, in a temporary file in `folder`.

    8 to 192 kHz, 1 to 8 channels. Mono is duplicated; more than two channels are mixed down by what the file tells of
    them (see `channels`), and a warning says so. Where the rate differs the folder holds the waveform twice for a
    while; None keeps the file's own. Title, artist and album come with it. `progress` is called with the share that is
    done, first with 0 and then after each block; raise from it to cancel. Reading stops after `max_seconds`, whatever
    the file says of its length.

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
    entries = "format=format_name,duration:format_tags:stream_tags:"
    entries += "stream=codec_name,sample_rate,channels,channel_layout,duration"
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
    layout = layout_by_ffmpeg(stream.get("channel_layout", ""), channels, name)
    if stream.get("codec_name") == "flac":  # of Ogg's comments, ffmpeg passes over this one
        layout = layout_by_mask(tags.get(MASK_COMMENT, ""), channels) or layout
    output = ["-map", "0:a:0", "-f", "f32le", "-ar", str(sample_rate)]
    output += _same_channels(stream.get("channel_layout", ""), channels)

    def blocks() -> Iterator[NDArray[np.float32]]:
        process = stack.enter_context(
            subprocess.Popen(
                [ffmpeg, "-nostdin", *guarded_input, *output, "pipe:1"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )
        )
        stack.callback(process.kill)  # does nothing once it has ended; runs before the wait for its end
        n_samples = 0
        while data := _read_output(process, BLOCK_SAMPLES * channels * 4):
            block = np.frombuffer(data[: len(data) // (channels * 4) * channels * 4], dtype="<f4")
            n_samples += len(block) // channels
            yield block.reshape(-1, channels).copy()
        # MP4 and FLAC announce the stream's own duration; of other containers ffmpeg gives at most an estimate.
        if process.wait() != 0 or n_samples / sample_rate < seconds - 0.5:
            raise _damaged(name, n_samples / sample_rate)

    expected_samples = float(answer["format"].get("duration", 0)) * sample_rate
    tags = {tag: tags[tag] for tag in TAGS if tags.get(tag)}
    return _Source(sample_rate, layout, tags, expected_samples, blocks())


def _same_channels(layout: str, channels: int) -> list[str]:
    """Options that keep ffmpeg to the channels that ffprobe named, also where a stream changes them.

    A number of channels alone would have it mix a layout into its usual one with as many: quad into L R C S.
    """
    if layout in FFMPEG_LAYOUTS:
        return ["-af", f"aformat=channel_layouts={layout}"]
    return [] if "+" in layout or "ambisonic" in layout else ["-ac", str(channels)]


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
