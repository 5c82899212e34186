"""Decodes audio files to waveforms on disk.

libsndfile reads WAV, FLAC, Ogg and MP3 in this process; ffmpeg reads everything else, through a pipe. The format is
recognised by the content of a file, never by its name.
"""

import contextlib
import logging
import math
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from separation.audio import flac, ogg, sndfile
from separation.audio.damage import Damage, counted
from separation.audio.ffmpeg import is_installed
from separation.audio.ffmpeg_sources import open_ffmpeg
from separation.audio.integrity import check_length
from separation.audio.resample import resample, resampled, resampled_length
from separation.audio.source import DecoderError, Job, Source
from separation.audio.waveform import MAX_SAMPLE, SAMPLE_RATE, Waveform, sample_fault
from separation.errors import AudioError
from separation.progress import Progress

MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 8000, 192000  # hertz, of the input

logger: logging.Logger = logging.getLogger("separation")


def decode(
    path: Path | str,
    folder: Path,
    *,
    sample_rate: int | None = SAMPLE_RATE,
    max_seconds: float | None = None,
    progress: Progress = Progress(),
    accept_damaged: bool = False,
) -> Waveform:
    """Decode a song to a stereo waveform, with its title, artist and album, in a temporary file in `folder`.

    The song may have 8 to 192 kHz and 1 to 8 channels. Mono is duplicated. More than two channels are mixed down, and a
    warning says so. Songs that were joined in one file are decoded one after the other, at the rate of the first.

    In a damaged song, silence takes the place of missing samples, so that the rest stays in time, and a warning says
    where. If more than a tenth is missing, or an unknown amount, the song is refused.

    While a song is resampled, the folder holds it twice.

    Args:
        sample_rate: of the result, in hertz; None keeps the song's own.
        max_seconds: a longer song is refused. Decoding stops there, whatever length the file announces.
        progress: called with 0 first, and then after each block; it may raise to cancel.
        accept_damaged: decode what can be read of a song that would be refused as damaged.

    Raises:
        AudioError: the file is missing, not audio, empty, damaged, too long, or holds NaN, Inf or samples beyond
            `MAX_SAMPLE`.
        OutputError: `folder` is full or cannot be written to.
    """
    path = Path(path)
    name = repr(path.name)
    progress(0.0)
    _check_is_file(path, name)
    job = Job(path, max_seconds, Damage(name, accept=accept_damaged))
    with contextlib.ExitStack() as on_error:
        try:
            native = on_error.enter_context(_join(job, folder, sample_rate, progress, _open))
        except DecoderError:
            job = replace(job, damage=Damage(name, accept=accept_damaged))  # the first decoder's findings do not count
            native = on_error.enter_context(_join(job, folder, sample_rate, progress, _open_again))
        if sample_rate in (None, native.sample_rate):
            on_error.pop_all()
            return native
        with native:
            return resample(native, sample_rate, folder, progress=progress.part(0.5, 1))


def _join(
    job: Job,
    folder: Path,
    sample_rate: int | None,
    progress: Progress,
    open_: Callable[[Job, contextlib.ExitStack], list[Source]],
) -> Waveform:
    """The songs in a file, one after the other, in stereo at the rate of the first.

    If the result will be resampled to `sample_rate`, this is the first half of `progress`.
    """
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as on_error:
        first, *others = open_(job, stack)
        native = on_error.enter_context(Waveform(folder, sample_rate=_checked_rate(job, first), tags=first.tags))
        reading = progress if sample_rate in (None, first.sample_rate) else progress.part(0, 0.5)
        expected_seconds = sum(source.expected_samples / source.sample_rate for source in (first, *others))

        def report() -> None:
            reading(min(native.n_samples / (expected_seconds * native.sample_rate or math.inf), 1.0))

        _append(job, first, native, report)
        for source in others:
            job.damage.start_part(native.n_samples / native.sample_rate)
            if _checked_rate(job, source) == native.sample_rate:
                _append(job, source, native, report)
            else:
                _append_resampled(job, source, native, folder, report)
        job.damage.judge(native.n_samples / native.sample_rate)
        if native.n_samples == 0:
            raise AudioError(f"{job.name} has no samples: choose another file")
        on_error.pop_all()
        return native


def _append_resampled(job: Job, source: Source, wave: Waveform, folder: Path, report: Callable[[], None]) -> None:
    """Append a source of another rate to a waveform."""
    with Waveform(folder, sample_rate=source.sample_rate) as part:
        _append(job, source, part, report)
        length = resampled_length(part.n_samples, part.sample_rate, wave.sample_rate)
        for block in resampled(part, part.sample_rate, wave.sample_rate, length):
            check_length(wave.n_samples + block.shape[1], wave.sample_rate, job.max_seconds, job.name)
            wave.append(block)


def _checked_rate(job: Job, source: Source) -> int:
    if not MIN_SAMPLE_RATE <= source.sample_rate <= MAX_SAMPLE_RATE:
        raise AudioError(
            f"{job.name} has a sample rate of {source.sample_rate} Hz: convert it to one of {MIN_SAMPLE_RATE} to "
            f"{MAX_SAMPLE_RATE} Hz"
        )
    return source.sample_rate


def _append(job: Job, source: Source, wave: Waveform, report: Callable[[], None]) -> None:
    """Append a source to a waveform, in stereo. Calls `report` after each block."""
    name, to_stereo = job.name, source.layout.to_stereo()
    is_stereo = np.array_equal(to_stereo, np.eye(2))
    if not is_stereo and len(to_stereo) > 1:
        logger.warning(
            "%s has %d channels (%s), which are mixed down to stereo: centre and surround 3 dB lower, without LFE",
            name,
            len(to_stereo),
            f"not named in the file, taken as {source.layout}" if source.layout.is_guessed else source.layout,
        )
    for block in source.blocks:
        check_length(wave.n_samples + len(block), source.sample_rate, job.max_seconds, name)
        is_good = np.abs(block) <= MAX_SAMPLE  # False for NaN
        if not is_good.all():
            first = int(is_good.all(axis=1).argmin())
            fault = sample_fault(block[first][~is_good[first]][0])
            seconds = (wave.n_samples + first) / source.sample_rate
            raise AudioError(f"{name} holds {fault} at {seconds:.3f} s: export it again")
        wave.append(torch.from_numpy(block if is_stereo else block @ to_stereo).T)
        report()


def _open(job: Job, stack: contextlib.ExitStack) -> list[Source]:
    """The songs in a file (mostly one), from the first decoder that can read them."""
    with job.path.open("rb") as file:
        is_ogg = file.read(4) == b"OggS"
    if is_ogg:
        chain = ogg.read_chain(job.path, job.name)
        sources = sndfile.open_whole(job, stack) if chain.is_whole else sndfile.open_ogg(job, chain)
        if not sources and chain.n_bad_pages:
            job.damage.add_note(counted(chain.n_bad_pages, "broken Ogg page"))
        return sources or open_ffmpeg(job, stack, chain.links)
    songs = flac.find_songs(job.path)
    if len(songs) > 1 or (songs and not flac.ends_as_announced(job.path, songs[0])):
        return sndfile.open_flac(job, songs, stack)
    return sndfile.open_whole(job, stack) or open_ffmpeg(job, stack)


def _open_again(job: Job, stack: contextlib.ExitStack) -> list[Source]:
    """The songs in a file, from another decoder, after the first one stopped before the end."""
    songs = flac.find_songs(job.path)
    if songs:
        return sndfile.open_flac(job, songs, stack)
    if not is_installed():
        raise AudioError(
            f"{job.name} is damaged (libsndfile cannot read all of it): get the file again, or install ffmpeg"
        )
    return open_ffmpeg(job, stack)


def _check_is_file(path: Path, name: str) -> None:
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            path.open("rb").close()
    except FileNotFoundError as e:
        raise AudioError(f"{name} does not exist: check the path") from e
    except (OSError, ValueError) as e:  # ValueError: a NUL in the path
        raise AudioError(f"{name} cannot be read ({getattr(e, 'strerror', None) or e}): check the path") from e
    if not stat.S_ISREG(status.st_mode):
        raise AudioError(f"{name} is not a file: give the path of an audio file")
    if status.st_size == 0:
        raise AudioError(f"{name} is empty (0 bytes): get the file again")
