"""The songs of a file that libsndfile decodes (WAV, FLAC, Ogg, MP3, …): as the file is, or with its damage mended."""

import contextlib
import io
import os
from pathlib import Path
from typing import IO

import soundfile

from separation.audio import flac, ogg
from separation.audio.channels import Layout, layout_of_file
from separation.audio.chatter import Chatter
from separation.audio.damage import MIN_MISSING_SECONDS, counted
from separation.audio.frames import EXTRA_SAMPLES, MPEG, Part, find_parts
from separation.audio.integrity import Audio, check_length, find_audio
from separation.audio.mend import find_holes, whole_frames, with_silence
from separation.audio.pieces import Pieces
from separation.audio.reader import ByteReader
from separation.audio.source import Blocks, DecoderError, Job, Source
from separation.audio.tags import after_id3v2
from separation.audio.waveform import BLOCK_SAMPLES, TAGS, silent

_SAMPLE_BYTES = {"PCM_S8": 1, "PCM_U8": 1, "ULAW": 1, "ALAW": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4}
_SAMPLE_BYTES |= {"FLOAT": 4, "DOUBLE": 8}
_UNKNOWN_SAMPLES = 2**62  # this number of samples or more means that libsndfile does not know the length
_MAX_HOLE_SECONDS = 24 * 3600


class _Sound(soundfile.SoundFile):
    """A SoundFile that does not seek after each read. Seeking is inexact in some MP3s, and fails in some FLACs."""

    def seekable(self) -> bool:
        return False


class _FileFrom(io.FileIO):
    """A file without its first `start` bytes."""

    def __init__(self, path: Path, start: int) -> None:
        super().__init__(path)
        self._start = start
        self.seek(0)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return super().seek(offset + (self._start if whence == os.SEEK_SET else 0), whence) - self._start

    def tell(self) -> int:
        return super().tell() - self._start


def _open(file: int | IO[bytes] | Pieces, chatter: Chatter) -> _Sound | None:
    """None if libsndfile cannot read the file. A file that is given as a descriptor stays open.

    A path would not do: libsndfile guesses the format of some files without a header from their names.
    """
    with chatter.caught():
        try:
            return _Sound(file, closefd=False)
        except soundfile.LibsndfileError:
            return None


def _blocks(sound: _Sound, limit: int, chatter: Chatter | None = None) -> Blocks:
    """Blocks of at most `limit` samples in all. Raises `DecoderError` where libsndfile cannot go on."""
    n_samples = 0
    while n_samples < limit:
        with chatter.caught() if chatter else contextlib.nullcontext():
            try:
                block = sound.read(min(BLOCK_SAMPLES, limit - n_samples), dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as e:
                raise DecoderError(str(e)) from e
        if not len(block):
            return
        n_samples += len(block)
        yield block


def _tags(sound: _Sound) -> dict[str, str]:
    return {tag: value for tag in TAGS if (value := getattr(sound, tag))}


def _layout(job: Job, channels: int) -> Layout:
    with ByteReader.open(job.path) as reader:
        return layout_of_file(reader, channels, job.name)


def open_whole(job: Job, stack: contextlib.ExitStack) -> list[Source]:
    """The file as it is, or as several songs joined. Empty if libsndfile cannot read all of it."""
    file = stack.enter_context(job.path.open("rb", buffering=0))
    reader = ByteReader(file)
    audio = find_audio(reader, job.name)
    if reader.get(after_id3v2(reader), 3) == b"ID3":
        return []  # libsndfile cannot be interrupted, and so many tags would keep it busy
    file.seek(0)  # libsndfile starts at the descriptor's position
    chatter = Chatter()
    sound = _open(file.fileno(), chatter)
    if sound is None:
        return []
    stack.enter_context(sound)
    tags = _tags(sound)
    if sound.format == "MP3":
        return _open_mp3(job, sound, tags, chatter)
    limit = sound.frames
    if audio is not None and _must_ignore_header(job, sound, audio):
        if sound.subtype not in _SAMPLE_BYTES:
            return []
        limit = audio.n_there // (_SAMPLE_BYTES[sound.subtype] * sound.channels)
        sound = _open_raw(job, sound, audio, stack)
    return [Source(sound.samplerate, _layout(job, sound.channels), limit, _all_blocks(job, sound, limit), tags)]


def _open_raw(job: Job, sound: _Sound, audio: Audio, stack: contextlib.ExitStack) -> _Sound:
    """Opens the samples of a file as raw audio, so that libsndfile ignores the header's sizes."""
    file = stack.enter_context(_FileFrom(job.path, audio.start))
    raw = _Sound(
        file,
        samplerate=sound.samplerate,
        channels=sound.channels,
        subtype=sound.subtype,
        endian=sound.endian,
        format="RAW",
    )
    stack.enter_context(raw)
    return raw


def _all_blocks(job: Job, sound: _Sound, limit: int) -> Blocks:
    n_samples = 0
    if limit < _UNKNOWN_SAMPLES:  # refuse a song that is too long before it is written to disk
        check_length(limit, sound.samplerate, job.max_seconds, job.name)
    for block in _blocks(sound, limit):
        n_samples += len(block)
        yield block
    if sound.format == "FLAC" and n_samples < sound.frames < _UNKNOWN_SAMPLES:
        raise DecoderError(f"{n_samples} of {sound.frames} samples")


def _must_ignore_header(job: Job, sound: _Sound, audio: Audio) -> bool:
    """Whether the header announces a wrong length. Reports the announced samples that are missing."""
    frame_bytes = _SAMPLE_BYTES.get(sound.subtype, 0) * sound.channels
    missing = 0 if audio.n_announced is None else audio.n_announced - audio.n_there
    if frame_bytes:
        seconds = abs(missing) / frame_bytes / sound.samplerate
        if missing > frame_bytes:
            job.damage.add_cut(seconds)
        if missing < 0 and seconds > MIN_MISSING_SECONDS:
            fault = f"its header announces {seconds:.2f} s less than there is"
            if audio.is_wave:
                job.damage.add_note(fault)
            else:
                job.damage.add_doubt(fault)
        elif missing < 0:
            job.damage.add_note(f"{-missing} bytes after its audio do not belong there")
            return False
    elif missing > 0:
        job.damage.add_unknown_cut("it ends within its audio")
    return audio.is_wave and (audio.n_announced is None or missing != 0)


# MPEG audio


def _open_mp3(job: Job, sound: _Sound, tags: dict[str, str], chatter: Chatter) -> list[Source]:
    parts = find_mpeg_parts(job)
    if not parts:
        return []
    if len(parts) > 1 or not parts[0].has_no_gaps:
        if not all(part.is_layer_iii for part in parts):
            return []
        return [
            Source(part.header.sample_rate, _mp3_layout(part), part.n_samples, _mended_mp3(job, part), tags)
            for part in parts
        ]
    (part,) = parts
    # Padding after the last frame would be an error to libsndfile, so reading stops at the last frame.
    limit = part.n_samples if part.is_layer_iii else sound.frames
    # If no header counts the samples, libsndfile guesses their number from the bitrate, and stops there. Its number
    # leaves out the samples that the encoder added.
    if not 0 < limit <= sound.frames + EXTRA_SAMPLES:
        return []
    blocks = _all_mp3_blocks(job, part, _blocks(sound, limit, chatter), chatter)
    return [Source(sound.samplerate, _layout(job, sound.channels), limit, blocks, tags)]


def _all_mp3_blocks(job: Job, part: Part, blocks: Blocks, chatter: Chatter) -> Blocks:
    find_holes(part, job.damage)
    n_samples = 0
    for block in blocks:
        n_samples += len(block)
        yield block
    if part.is_layer_iii and n_samples < part.least_samples:
        raise DecoderError(f"{n_samples} of {part.least_samples} samples")
    _report(job, chatter)


def _mp3_layout(part: Part) -> Layout:
    return Layout(("C",)) if part.is_mono else Layout(("L", "R"))


def find_mpeg_parts(job: Job) -> list[Part]:
    """The parts of an MPEG audio file. Raises `AudioError` if it is too long."""

    def check(part: Part) -> None:
        n_samples = part.n_samples - EXTRA_SAMPLES
        check_length(n_samples, part.header.sample_rate, job.max_seconds, job.name)

    return find_parts(job.path, MPEG, check)


def _mended_mp3(job: Job, part: Part) -> Blocks:
    """A part of an MP3 with silence in its holes."""
    holes, chatter = find_holes(part, job.damage), Chatter()
    rate, n_samples = part.header.sample_rate, 0

    def counted_blocks(sound: _Sound) -> Blocks:
        nonlocal n_samples
        for block in _blocks(sound, part.n_samples, chatter):
            n_samples += len(block)
            yield block

    with contextlib.ExitStack() as stack:
        sound = _open(stack.enter_context(whole_frames(part, job.path)), chatter)
        if sound is None:
            raise DecoderError("libsndfile cannot read the whole frames")
        stack.enter_context(sound)
        yield from with_silence(counted_blocks(sound), part, holes, rate, job.damage)
    if n_samples < part.least_samples:
        job.damage.add_cut((part.least_samples - n_samples) / rate)
    _report(job, chatter)


def _report(job: Job, chatter: Chatter) -> None:
    if chatter.n_lines:
        times = f", {chatter.n_lines} times" if chatter.n_lines > 1 else ""
        job.damage.add_note(f'libmpg123 reports "{chatter.lines[0]}"{times}')


# FLAC


def open_flac(job: Job, songs: list[flac.FlacSong], stack: contextlib.ExitStack) -> list[Source]:
    """The songs of a FLAC file with their intact frames alone, each at its place."""
    first = open_whole(job, stack)
    tags = first[0].tags if first else {}
    return [
        Source(song.sample_rate, _layout(job, song.channels), song.total_samples, _mended_flac(job, song), tags)
        for song in songs
    ]


def _mended_flac(job: Job, song: flac.FlacSong) -> Blocks:
    rate, n_samples = song.sample_rate, 0
    runs = flac.find_runs(job.path, song, job.name)
    for run in runs:
        yield from _hole(job, n_samples, run.sample, rate, song.channels)
        yield from _padded_blocks(job, Pieces(job.path, flac.file_of(song, run)), run.n_samples, song.channels)
        n_samples = run.sample + run.n_samples
    if song.total_samples > n_samples:
        job.damage.add_cut((song.total_samples - n_samples) / rate)
    n_extra = flac.n_extra_bytes(job.path, song, runs)
    if n_extra and not song.total_samples:
        job.damage.add_doubt(f"{n_extra} bytes at its end are not audio, and how much is missing is unknown")


def _hole(job: Job, n_samples: int, due: int, rate: int, channels: int) -> Blocks:
    """Silence from sample `n_samples` up to the sample that is due, reported as a hole."""
    if due > n_samples:
        seconds = (due - n_samples) / rate
        if seconds > _MAX_HOLE_SECONDS:
            raise DecoderError(f"a hole of {seconds:.0f} s")
        job.damage.add_hole(n_samples / rate, seconds)
        yield from silent(due - n_samples, channels)


def _padded_blocks(job: Job, pieces: Pieces, n_samples: int, channels: int) -> Blocks:
    """`n_samples` samples of a file, with silence at the end if libsndfile returns fewer."""
    done = 0
    with pieces, contextlib.suppress(DecoderError):
        sound = _open(pieces, Chatter())
        if sound is not None:
            with sound:
                for block in _blocks(sound, n_samples):
                    done += len(block)
                    yield block
    if done < n_samples:
        job.damage.add_note("libsndfile cannot read all of its frames")
        yield from silent(n_samples - done, channels)


# Ogg


def open_ogg(job: Job, chain: ogg.Chain) -> list[Source]:
    """The songs of an Ogg file with their intact pages alone, each at its place. Empty if one cannot be read."""
    sources = []
    for link in chain.links:
        if not (link.runs and link.has_all_headers):
            return []
        with Pieces(job.path, link.file_of(link.runs[0], job.path)) as pieces:
            sound = _open(pieces, Chatter())
            if sound is None:
                return []
            with sound:
                layout, rate, tags = _layout(job, sound.channels), sound.samplerate, _tags(sound)
        sources.append(Source(rate, layout, 0, _mended_ogg(job, chain, link, rate), tags))
    return sources


def _mended_ogg(job: Job, chain: ogg.Chain, link: ogg.Link, rate: int) -> Blocks:
    scale = rate / link.sample_rate
    origin = 0  # the number of the song's first sample, by the granule positions
    n_samples = 0  # per channel, so far
    for i, run in enumerate(link.runs):
        is_start = i == 0 and link.starts_whole
        start = n_samples
        if not is_start:  # the granule position is that of the run's end, so count its samples first
            n_in_run = sum(map(len, _ogg_blocks(job, link, run)))
            start = max(n_samples, round((link.n_samples(run.granule) - origin) * scale) - n_in_run)
        is_first_block = True
        for block in _ogg_blocks(job, link, run):
            if is_first_block:
                yield from _hole(job, n_samples, start, rate, block.shape[1])
                n_samples, is_first_block = start, False
            n_samples += len(block)
            yield block
        if is_start and len(link.runs) > 1:
            origin = link.n_samples(run.granule) - round(n_samples / scale)
    _report_end(job, chain, link)
    if link.n_bad_pages:
        job.damage.add_note(counted(link.n_bad_pages, "broken Ogg page"))


def _report_end(job: Job, chain: ogg.Chain, link: ogg.Link) -> None:
    """Report what may be missing at the end of an Ogg song."""
    if link.end_granule >= 0:
        job.damage.add_cut((link.end_granule - link.runs[-1].granule) / link.sample_rate)
    if not link.is_ended:
        is_last = link is chain.links[-1]
        if is_last and (chain.is_cut or chain.n_extra):
            job.damage.add_unknown_cut("it ends within a page")
        else:
            job.damage.add_note("its last page is not marked as the last one, so its end may be missing")


def _ogg_blocks(job: Job, link: ogg.Link, run: ogg.PageRun) -> Blocks:
    with Pieces(job.path, link.file_of(run, job.path)) as pieces:
        sound = _open(pieces, Chatter())
        if sound is not None:
            with sound:
                yield from _blocks(sound, _UNKNOWN_SAMPLES)
