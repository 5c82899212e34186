"""Audio files to waveforms on disk.

libsndfile reads WAV, FLAC, OGG and MP3 in process; ffmpeg reads anything else, through a pipe. What a
file is, is judged by its content; its name is never looked at.
"""

import contextlib
import logging
import math
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from separation.audio import flac, sndfile, tracks
from separation.audio.channels import FFMPEG_LAYOUTS, MASK_COMMENT, layout_by_ffmpeg, layout_by_mask, layout_of_mov
from separation.audio.damage import MIN_MISSING_SECONDS, Damage, number
from separation.audio.ffmpeg import Decoding, UnreadableError, is_installed, probe
from separation.audio.frames import CODECS, MPEG, Codec, Part, find_parts
from separation.audio.holes import Timeline, announced_seconds, placed
from separation.audio.integrity import check_length, check_mp4, ends_within_packet, find_audio
from separation.audio.mend import clean, find_holes, spliced
from separation.audio.ogg import Link, find_links
from separation.audio.pieces import Piece, Pieces
from separation.audio.resample import resample, resampled, resampled_length
from separation.audio.source import Blocks, BrokenError, Job, Source
from separation.audio.waveform import BLOCK_SAMPLES, MAX_SAMPLE, SAMPLE_RATE, TAGS, Waveform, sample_fault, silent
from separation.audio.wavpack import find_blocks
from separation.errors import AudioError
from separation.progress import Progress

MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 8000, 192000  # hertz, of the input

_EXTRA_SECONDS = 0.05  # by which encoders lengthen a song

logger = logging.getLogger("separation")


def decode(
    path: Path | str,
    folder: Path,
    *,
    sample_rate: int | None = SAMPLE_RATE,
    max_seconds: float | None = None,
    progress: Progress = Progress(),
    accept_damaged: bool = False,
) -> Waveform:
    """The song in a file as a stereo waveform at `sample_rate`, in a temporary file in `folder`.

    8 to 192 kHz, 1 to 8 channels. Mono is duplicated; more than two channels are mixed down by what the file tells of
    them (see `channels`), and a warning says so. Where the rate differs the folder holds the waveform twice for a
    while; None keeps the file's own. Title, artist and album come with it. `progress` is called with the share that is
    done, first with 0 and then after each block; raise from it to cancel. Reading stops after `max_seconds`, whatever
    the file says of its length.

    What is missing of a damaged file is silent, so that what follows stays in time, and a warning says where. If more
    than a tenth is missing, or nothing tells how much, the file is refused, unless `accept_damaged`. Songs that were
    joined in one file are read one after the other, at the rate of the first.

    Raises `AudioError` if the file is missing, not audio, empty, damaged or cut short, holds NaN, Inf or samples beyond
    `MAX_SAMPLE`, or is longer than `max_seconds`; `OutputError` if `folder` cannot be written to.
    """
    path = Path(path)
    name = repr(path.name)
    progress(0.0)
    _check_is_file(path, name)
    job = Job(path, max_seconds, Damage(name, accept=accept_damaged))
    with contextlib.ExitStack() as on_error:
        try:
            native = on_error.enter_context(_read(job, folder, sample_rate, progress, _open))
        except BrokenError:
            job = replace(job, damage=Damage(name, accept=accept_damaged))  # with other findings
            native = on_error.enter_context(_read(job, folder, sample_rate, progress, _open_again))
        decoded = native
        if sample_rate is not None and native.sample_rate != sample_rate:
            decoded = resample(native, sample_rate, folder, progress=progress.part(0.5, 1))
            native.close()
        decoded.source_rate, decoded.source_samples = native.sample_rate, native.n_samples
        on_error.pop_all()
        return decoded


def _read(
    job: Job,
    folder: Path,
    sample_rate: int | None,
    progress: Progress,
    open_: Callable[[Job, contextlib.ExitStack], list[Source]],
) -> Waveform:
    """The file's sources one after the other, in stereo at the first one's rate.

    `progress` is called with the share of the whole job: half of it where it goes on to another `sample_rate`.
    """
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as on_error:
        first, *others = open_(job, stack)
        native = on_error.enter_context(Waveform(folder, sample_rate=_checked_rate(job, first)))
        native.tags = first.tags
        share = 1.0 if sample_rate in (None, first.sample_rate) else 0.5
        expected = sum(source.expected_samples / source.sample_rate for source in (first, *others))

        def reading() -> None:
            progress(share * min(native.n_samples / (expected * native.sample_rate or math.inf), 1.0))

        _append(job, first, native, reading)
        for source in others:
            job.damage.offset = native.n_samples / native.sample_rate
            if _checked_rate(job, source) == native.sample_rate:
                _append(job, source, native, reading)
                continue
            with Waveform(folder, sample_rate=source.sample_rate) as part:
                _append(job, source, part, reading)
                length = resampled_length(part.n_samples, part.sample_rate, native.sample_rate)
                for block in resampled(part, part.sample_rate, native.sample_rate, length):
                    check_length(native.n_samples + block.shape[1], native.sample_rate, job.max_seconds, job.name)
                    native.append(block)
        job.damage.judge(native.n_samples / native.sample_rate)
        if native.n_samples == 0:
            raise AudioError(f"{job.name} holds no samples of audio; choose another file.")
        on_error.pop_all()
        return native


def _checked_rate(job: Job, source: Source) -> int:
    if not MIN_SAMPLE_RATE <= source.sample_rate <= MAX_SAMPLE_RATE:
        raise AudioError(
            f"{job.name} has a sample rate of {source.sample_rate} Hz; convert it to one of {MIN_SAMPLE_RATE} to "
            f"{MAX_SAMPLE_RATE} Hz."
        )
    return source.sample_rate


def _append(job: Job, source: Source, wave: Waveform, done: Callable[[], None]) -> None:
    """Append a source to a waveform, in stereo; `done` is called after each block."""
    name, to_stereo = job.name, source.layout.to_stereo()
    is_stereo = np.array_equal(to_stereo, np.eye(2))
    if not is_stereo and len(to_stereo) > 1:
        logger.warning(
            "%s has %d channels (%s): mixed down to stereo, centre and surround 3 dB lower, LFE left out",
            name,
            len(to_stereo),
            f"taken as {source.layout}, since it does not say" if source.layout.is_guessed else source.layout,
        )
    for block in source.blocks:
        check_length(wave.n_samples + len(block), source.sample_rate, job.max_seconds, name)
        sound = np.abs(block) <= MAX_SAMPLE  # which NaN is not
        if not sound.all():
            place = int(sound.all(axis=1).argmin())
            fault = sample_fault(block[place][~sound[place]][0])
            seconds = (wave.n_samples + place) / source.sample_rate
            raise AudioError(f"{name} holds {fault} at {seconds:.3f} s; export it again without.")
        wave.append(torch.from_numpy(block if is_stereo else block @ to_stereo).T)
        done()


def _open(job: Job, stack: contextlib.ExitStack) -> list[Source]:
    """A file's songs, mostly one, by the first decoder that reads them as they are."""
    with job.path.open("rb") as file:
        is_ogg = file.read(4) == b"OggS"
    if is_ogg:
        chain = find_links(job.path, job.name)
        sources = sndfile.open_whole(job, stack) if chain.is_whole else sndfile.open_ogg(job, chain)
        if not sources and chain.n_bad_pages:
            job.damage.note(number(chain.n_bad_pages, "broken Ogg page"))
        return sources or _open_ffmpeg(job, stack, chain.links)
    songs = flac.find_songs(job.path)
    if len(songs) > 1 or (songs and not flac.ends_as_announced(job.path, songs[0])):
        return sndfile.open_flac(job, songs, stack)
    return sndfile.open_whole(job, stack) or _open_ffmpeg(job, stack)


def _open_again(job: Job, stack: contextlib.ExitStack) -> list[Source]:
    """A file whose decoder could not go on, in another way."""
    songs = flac.find_songs(job.path)
    if songs:
        return sndfile.open_flac(job, songs, stack)
    if not is_installed():
        raise AudioError(f"{job.name} is damaged: libsndfile cannot read all of it; get the file again.")
    return _open_ffmpeg(job, stack)


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


_ENTRIES = f"format=format_name,duration:format_tags:stream_tags:{tracks.ENTRIES}"


def _open_ffmpeg(job: Job, stack: contextlib.ExitStack, links: Sequence[Link] = ()) -> list[Source]:
    """What ffmpeg makes of a file, of which `links` are the songs if it is Ogg."""
    path, name, damage = job.path, job.name, job.damage
    with path.open("rb") as file:
        audio = find_audio(file, name)
        bytes_missing = audio.missing_share if audio else 0.0
        try:
            answer = probe(path, name, "-show_entries", _ENTRIES)
        except UnreadableError as e:
            check_mp4(file, name)
            if not bytes_missing:
                raise AudioError(str(e)) from e  # by the name that users know
            raise AudioError(f"{name} is cut short: ffmpeg can make nothing of the rest; get the file again.") from e
        container = answer["format"]["format_name"].split(",")
        file.seek(0)
        if "ogg" in container and file.read(4) != b"OggS":
            damage.note("its first Ogg page is broken")
        if ends_within_packet(file, container):
            damage.note("it is cut short within a packet, and nothing tells how much is missing")
    sound = tracks.sound_of(answer["streams"], container, name)
    stream, channels = sound.tracks[0], sound.n_channels
    sample_rate = int(stream["sample_rate"])
    tags = {key.lower(): value for tags in (stream, answer["format"]) for key, value in tags.get("tags", {}).items()}
    layout = layout_by_ffmpeg(sound.layout, channels, name)
    if stream.get("codec_name") == "flac":  # of Ogg's comments, ffmpeg passes over this one
        layout = layout_by_mask(tags.get(MASK_COMMENT, ""), channels) or layout
    if "mov" in container and stream.get("codec_name", "").startswith("pcm_") and not sound.joining:
        with path.open("rb") as file:
            layout = layout_of_mov(file, int(stream["id"], 16), channels) or layout
    announced = min(announced_seconds(track, answer, container) for track in sound.tracks)
    lead_samples = round(_lead_seconds(path, name, sound) * sample_rate)

    def decoded(stdin: tuple[str, Iterator[bytes]] | None, announced: float) -> Blocks:
        options, filters = _same_channels(sound.layout, channels)
        if not sound.joining:
            options += ["-map", "0:a:0" if stdin else f"0:{stream['index']}"]
        decoding = stack.enter_context(
            Decoding(
                path,
                name,
                options,
                sample_rate=sample_rate,
                block_bytes=BLOCK_SAMPLES * channels * 4,
                filters=filters,
                joining=sound.joining,
                stdin=stdin,
            )
        )
        timeline, n_samples = Timeline(decoding, sample_rate, announced, damage), 0
        for block in placed(decoding, channels, timeline):
            n_samples += len(block)
            yield block
        failed, seconds = decoding.wait() != 0, n_samples / sample_rate
        missing = announced - seconds
        if bytes_missing and ("matroska" not in container or not announced):
            missing = max(missing, seconds * bytes_missing)
        if missing > MIN_MISSING_SECONDS:
            damage.cut(missing)
        elif announced and missing < -_EXTRA_SECONDS and container[0] not in CODECS:
            damage.note(f"it holds {-missing:.2f} s more than it announces")
        words = f"ffmpeg reports {number(decoding.n_errors, 'error')}" if decoding.n_errors else "ffmpeg gives up"
        words += f', "{decoding.errors[0]}"' if decoding.errors else ""
        if failed and not announced:
            damage.doubt(words)
        elif failed or decoding.n_errors:
            damage.note(words)

    def whole() -> Blocks:
        yield from silent(lead_samples, channels)
        yield from decoded(None, announced)

    def mended(codec: Codec, part: Part) -> Blocks:
        holes = find_holes(part, damage)
        with clean(part, path, codec) as pieces:
            seconds = (part.n_samples - part.skipped - part.padding) / part.header.sample_rate
            blocks = decoded((codec.demuxer, pieces.blocks()), seconds)
            yield from spliced(blocks, part, holes, sample_rate, damage)

    def source(blocks: Blocks, seconds: float) -> Source:
        return Source(sample_rate, layout, {tag: tags[tag] for tag in TAGS if tags.get(tag)}, seconds, blocks)

    codec = CODECS.get(container[0])
    if codec is not None:
        parts = sndfile.find_mpeg_parts(job) if codec is MPEG else find_parts(path, codec)
        if len(parts) > 1 or any(not part.is_plain for part in parts):
            return [
                source(mended(codec, part), part.n_samples / part.header.sample_rate * sample_rate) for part in parts
            ]
        for part in parts:
            find_holes(part, damage)
            announced = part.least_samples / part.header.sample_rate

    def of_pieces(demuxer: str, pieces: Sequence[Piece], seconds: float) -> Source:
        file = stack.enter_context(Pieces(path, pieces))
        return source(decoded((demuxer, file.blocks()), seconds), seconds * sample_rate)

    songs = find_blocks(path) if "wv" in container else []
    if len(songs) > 1 or any(song.n_holes for song in songs):
        rates = [song.sample_rate or sample_rate for song in songs]
        return [
            of_pieces("wv", song.pieces, song.total_samples / rate) for song, rate in zip(songs, rates, strict=True)
        ]
    if len(links) > 1 or any(not link.is_whole for link in links):
        return [of_pieces("ogg", link.all_pieces(), _told_by_ogg(link, damage)) for link in links if link.runs]
    return [source(whole(), float(answer["format"].get("duration", 0)) * sample_rate)]


def _told_by_ogg(link: Link, damage: Damage) -> float:
    """The seconds of an Ogg song, as far as its pages tell."""
    if not link.starts_whole:
        damage.note("pages of it are missing")
    if not link.is_ended:
        damage.doubt("it is cut short, and nothing tells how much is missing")
    return max(0, link.samples(max(link.runs[-1].granule, link.end_granule))) / link.sample_rate


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
