"""libsndfile: WAV, FLAC, Ogg, MP3 and others in process, as they are or with their damage mended."""

import contextlib
import io
import os
from pathlib import Path
from typing import IO

import soundfile

from separation.audio import flac, ogg
from separation.audio.channels import Layout, layout_of_file
from separation.audio.chatter import Chatter
from separation.audio.damage import MIN_MISSING_SECONDS, number
from separation.audio.frames import EXTRA_SAMPLES, MPEG, Part, find_parts
from separation.audio.integrity import Audio, after_id3v2, check_length, find_audio
from separation.audio.mend import clean, find_holes, spliced
from separation.audio.pieces import Pieces
from separation.audio.source import Blocks, BrokenError, Job, Source
from separation.audio.waveform import BLOCK_SAMPLES, TAGS, silent

_SAMPLE_BYTES = {"PCM_S8": 1, "PCM_U8": 1, "ULAW": 1, "ALAW": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4}
_SAMPLE_BYTES |= {"FLOAT": 4, "DOUBLE": 8}
_UNKNOWN_SAMPLES = 2**62  # or more is how libsndfile says that a file does not tell its length


class _Sound(soundfile.SoundFile):
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


def _open(file: int | IO[bytes] | Pieces, chatter: Chatter) -> _Sound | None:
    """None if libsndfile cannot read it. A descriptor stays open."""
    with chatter.caught():
        try:
            # By descriptor or object, for libsndfile guesses from the names of some headerless formats.
            return _Sound(file, closefd=False)
        except soundfile.LibsndfileError:
            return None


def _read(sound: _Sound, limit: int, chatter: Chatter | None = None) -> Blocks:
    """Blocks up to so many samples. Raises `BrokenError` where libsndfile cannot go on."""
    n_samples = 0
    while n_samples < limit:
        with chatter.caught() if chatter else contextlib.nullcontext():
            try:
                block = sound.read(min(BLOCK_SAMPLES, limit - n_samples), dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as e:
                raise BrokenError(str(e)) from e
        if not len(block):
            return
        n_samples += len(block)
        yield block


def open_whole(job: Job, stack: contextlib.ExitStack) -> list[Source]:
    """The file as it is, or as several songs joined; empty if libsndfile cannot read it, or not all of it."""
    file = stack.enter_context(job.path.open("rb", buffering=0))  # libsndfile starts at the descriptor's offset
    audio = find_audio(file, job.name)
    file.seek(after_id3v2(file))
    if file.read(3) == b"ID3":
        return []  # so many tags that libsndfile, which nothing can interrupt, would be busy with them
    file.seek(0)
    chatter = Chatter()
    sound = _open(file.fileno(), chatter)
    if sound is None:
        return []
    stack.enter_context(sound)
    tags = {tag: value for tag in TAGS if (value := getattr(sound, tag))}
    if sound.format == "MP3":
        return _mpeg(job, sound, tags, chatter)
    limit = sound.frames
    if audio is not None:
        reread = _judge_audio(job, sound, audio)
        if reread:
            if sound.subtype not in _SAMPLE_BYTES:
                return []
            # libsndfile takes the header at its word, which here is wrong: the same samples again, without a header.
            limit = audio.n_there // (_SAMPLE_BYTES[sound.subtype] * sound.channels)
            sound = stack.enter_context(
                _Sound(
                    stack.enter_context(_FileFrom(job.path, audio.start)),
                    samplerate=sound.samplerate,
                    channels=sound.channels,
                    subtype=sound.subtype,
                    endian=sound.endian,
                    format="RAW",
                )
            )
    return [Source(sound.samplerate, _layout(job, sound), tags, limit, _whole(job, sound, limit))]


def _whole(job: Job, sound: _Sound, limit: int) -> Blocks:
    n_samples = 0
    if limit < _UNKNOWN_SAMPLES:  # the disk need not fill up for what is too long
        check_length(limit, sound.samplerate, job.max_seconds, job.name)
    for block in _read(sound, limit):
        n_samples += len(block)
        yield block
    if sound.format == "FLAC" and n_samples < sound.frames < _UNKNOWN_SAMPLES:
        raise BrokenError


def _layout(job: Job, sound: _Sound) -> Layout:
    with job.path.open("rb") as head:  # not the file whose place is libsndfile's
        return layout_of_file(head, sound.channels, job.name)


def _judge_audio(job: Job, sound: _Sound, audio: Audio) -> bool:
    """Tell what of the announced samples is not there; whether the header must not be taken at its word."""
    frame_bytes = _SAMPLE_BYTES.get(sound.subtype, 0) * sound.channels
    missing = 0 if audio.n_announced is None else audio.n_announced - audio.n_there
    if frame_bytes:
        seconds = abs(missing) / frame_bytes / sound.samplerate
        if missing > frame_bytes:
            job.damage.cut(seconds)
        if missing < 0 and seconds > MIN_MISSING_SECONDS:
            excess = f"its header announces {seconds:.2f} s less than there is"
            (job.damage.note if audio.is_wave else job.damage.doubt)(excess)
        elif missing < 0:
            job.damage.note(f"{-missing} bytes behind its audio are none that belongs there")
            return False
    elif missing > 0:
        job.damage.doubt("it is cut short: it ends before the audio that it announces")
    return audio.is_wave and (audio.n_announced is None or missing != 0)


# MPEG audio


def _mpeg(job: Job, sound: _Sound, tags: dict[str, str], chatter: Chatter) -> list[Source]:
    parts = find_mpeg_parts(job)
    if not parts:
        return []
    part = parts[0]
    if len(parts) > 1 or not part.is_plain:
        if not all(part.is_layer_iii for part in parts):
            return []
        layouts = [Layout(("C",)) if part.is_mono else Layout(("L", "R")) for part in parts]
        return [
            Source(part.header.sample_rate, layout, tags, part.n_samples, mended_mp3(job, part))
            for part, layout in zip(parts, layouts, strict=True)
        ]
    limit = part.n_samples if part.is_layer_iii else sound.frames
    # Without a header that counts the samples, libsndfile guesses them from the bitrate and stops there. It leaves out
    # what the encoder adds.
    if not 0 < limit <= sound.frames + EXTRA_SAMPLES:
        return []

    def blocks() -> Blocks:
        find_holes(part, job.damage)
        n_samples = 0
        for block in _read(sound, limit, chatter):
            n_samples += len(block)
            yield block
        if part.is_layer_iii and n_samples < part.least_samples:
            raise BrokenError
        _tell(job, chatter)

    # Not beyond the last frame: some padding there is an error to libsndfile.
    return [Source(sound.samplerate, _layout(job, sound), tags, limit, blocks())]


def find_mpeg_parts(job: Job) -> list[Part]:
    def check(part: Part) -> None:
        n_samples = part.n_samples - EXTRA_SAMPLES
        check_length(n_samples, part.header.sample_rate, job.max_seconds, job.name)

    return find_parts(job.path, MPEG, check)


def mended_mp3(job: Job, part: Part) -> Blocks:
    """A part of MP3 with silence in its holes."""
    holes, chatter = find_holes(part, job.damage), Chatter()
    with contextlib.ExitStack() as stack:
        sound = _open(stack.enter_context(clean(part, job.path, MPEG)), chatter)
        if sound is None:
            raise BrokenError
        stack.enter_context(sound)
        rate, n_samples = part.header.sample_rate, 0

        def blocks() -> Blocks:
            nonlocal n_samples
            for block in _read(sound, part.n_samples, chatter):
                n_samples += len(block)
                yield block

        yield from spliced(blocks(), part, holes, rate, job.damage)
        if n_samples < part.least_samples:
            job.damage.cut((part.least_samples - n_samples) / rate)
        _tell(job, chatter)


def _tell(job: Job, chatter: Chatter) -> None:
    if chatter.n_lines:
        times = f", {chatter.n_lines} times" if chatter.n_lines > 1 else ""
        job.damage.note(f'libmpg123 says "{chatter.lines[0]}"{times}')


# FLAC


def open_flac(job: Job, songs: list[flac.Song], stack: contextlib.ExitStack) -> list[Source]:
    """FLAC songs, one after the other, of which only the whole frames are taken, each where it belongs."""
    first = open_whole(job, stack)
    tags = first[0].tags if first else {}
    with job.path.open("rb") as head:
        layouts = [layout_of_file(head, song.channels, job.name) for song in songs]
    return [
        Source(song.sample_rate, layout, tags, song.total_samples, _mended_flac(job, song))
        for song, layout in zip(songs, layouts, strict=True)
    ]


def _mended_flac(job: Job, song: flac.Song) -> Blocks:
    rate, n_samples = song.sample_rate, 0
    runs = flac.find_runs(job.path, song, job.name)
    for run in runs:
        yield from _hole(job, n_samples, run.sample, rate, song.channels)
        n_samples = run.sample
        yield from _exactly(job, Pieces(job.path, flac.pieces(song, run)), run.n_samples, song.channels)
        n_samples += run.n_samples
    if song.total_samples > n_samples:
        job.damage.cut((song.total_samples - n_samples) / rate)
    n_extra = flac.n_extra_bytes(job.path, song, runs)
    if n_extra and not song.total_samples:
        job.damage.doubt(f"{n_extra} bytes at its end are no audio, and nothing tells how much is missing")


def _hole(job: Job, n_samples: int, due: int, rate: int, channels: int) -> Blocks:
    """Silence up to the sample that is due."""
    if due > n_samples:
        if (due - n_samples) / rate > 3600 * 24:
            raise BrokenError
        job.damage.hole(n_samples / rate, (due - n_samples) / rate)
        yield from silent(due - n_samples, channels)


def _exactly(job: Job, pieces: Pieces, n_samples: int, channels: int) -> Blocks:
    """So many samples of a file made of pieces, the last ones silent where libsndfile gives fewer."""
    done = 0
    with pieces, contextlib.suppress(BrokenError):
        sound = _open(pieces, Chatter())
        if sound is not None:
            with sound:
                for block in _read(sound, n_samples):
                    done += len(block)
                    yield block
    if done < n_samples:
        job.damage.note("libsndfile does not read all of its frames")
        yield from silent(n_samples - done, channels)


# Ogg


def open_ogg(job: Job, chain: ogg.Chain) -> list[Source]:
    """The songs of an Ogg file, whose whole pages are taken, each where it belongs; empty if libsndfile cannot."""
    sources = []
    for link in chain.links:
        if not (link.runs and link.are_headers_whole):
            return []
        with Pieces(job.path, link.pieces(link.runs[0], job.path)) as pieces:
            sound = _open(pieces, Chatter())
            if sound is None:
                return []
            with sound, job.path.open("rb") as head:
                layout = layout_of_file(head, sound.channels, job.name)
                tags = {tag: value for tag in TAGS if (value := getattr(sound, tag))}
                sources.append(
                    Source(sound.samplerate, layout, tags, 0, _mended_ogg(job, chain, link, sound.samplerate))
                )
    return sources


def _mended_ogg(job: Job, chain: ogg.Chain, link: ogg.Link, rate: int) -> Blocks:
    scale = rate / link.sample_rate
    origin, n_samples = 0, 0  # of the samples' numbers; samples per channel so far
    for i, run in enumerate(link.runs):
        start = n_samples
        n_run = 0
        if i or not link.starts_whole:
            n_run = sum(map(len, _of_pieces(job, link, run)))
            start = max(n_samples, round((link.samples(run.granule) - origin) * scale) - n_run)
        channels = 0
        for block in _of_pieces(job, link, run):
            if not channels:
                channels = block.shape[1]
                yield from _hole(job, n_samples, start, rate, channels)
                n_samples = start
            n_samples += len(block)
            yield block
        if not i and link.starts_whole and len(link.runs) > 1:
            origin = link.samples(run.granule) - round(n_samples / scale)
    if link.end_granule >= 0:
        job.damage.cut((link.end_granule - link.runs[-1].granule) / link.sample_rate)
    if not link.is_ended:
        is_last = link is chain.links[-1]
        if is_last and (chain.is_cut or chain.n_extra):
            job.damage.doubt("it is cut short within a page, and nothing tells how much is missing")
        else:
            job.damage.note("its last page is not marked as the last one, so its end may be missing")
    if link.n_bad_pages:
        job.damage.note(number(link.n_bad_pages, "broken Ogg page"))


def _of_pieces(job: Job, link: ogg.Link, run: ogg.Run) -> Blocks:
    with Pieces(job.path, link.pieces(run, job.path)) as pieces:
        sound = _open(pieces, Chatter())
        if sound is not None:
            with sound:
                yield from _read(sound, _UNKNOWN_SAMPLES)
