"""The songs of a file that ffmpeg decodes: as the file is, or with its damage mended."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from separation.audio import sndfile, tracks, wavpack
from separation.audio.channels import (
    FFMPEG_LAYOUTS,
    MASK_COMMENT,
    Layout,
    layout_by_ffmpeg,
    layout_by_mask,
    layout_of_mov,
)
from separation.audio.damage import MIN_MISSING_SECONDS, counted
from separation.audio.ffmpeg import Decoder, Input, Output, UnreadableError, probe
from separation.audio.frames import CODECS, MPEG, Codec, Part, find_parts
from separation.audio.holes import Timeline, announced_seconds, placed
from separation.audio.integrity import check_mp4, ends_within_packet, find_audio
from separation.audio.mend import find_holes, whole_frames, with_silence
from separation.audio.ogg import Link
from separation.audio.pieces import Piece, Pieces
from separation.audio.reader import ByteReader
from separation.audio.source import Blocks, Job, Source
from separation.audio.waveform import TAGS, silent
from separation.errors import AudioError

AAC_FRAME_SAMPLES = 1024
_EXTRA_SECONDS = 0.05  # encoders may lengthen a song by this much
_ENTRIES = f"format=format_name,duration:format_tags:stream_tags:{tracks.ENTRIES}"


@dataclass(frozen=True)
class _Probed:
    """ffprobe's answer about a file, and which of its tracks are the song.

    Args:
        container: ffmpeg's names of the format.
        bytes_missing: the missing part of the file, as a share of what is there.
    """

    job: Job
    answer: dict[str, Any]
    container: tuple[str, ...]
    sound: tracks.Sound
    bytes_missing: float

    @property
    def stream(self) -> dict[str, Any]:
        """The first of the song's tracks."""
        return self.sound.tracks[0]

    @property
    def sample_rate(self) -> int:
        return int(self.stream["sample_rate"])

    @property
    def tags(self) -> dict[str, str]:
        """By key in lowercase."""
        parts = (self.stream, self.answer["format"])
        return {key.lower(): value for part in parts for key, value in part.get("tags", {}).items()}

    @property
    def announced_seconds(self) -> float:
        return min(announced_seconds(track, self.answer, self.container) for track in self.sound.tracks)

    def layout(self) -> Layout:
        channels = self.sound.n_channels
        layout = layout_by_ffmpeg(self.sound.layout, channels, self.job.name)
        if self.stream.get("codec_name") == "flac":  # in Ogg, ffmpeg ignores this comment
            layout = layout_by_mask(self.tags.get(MASK_COMMENT, ""), channels) or layout
        is_pcm = self.stream.get("codec_name", "").startswith("pcm_")
        if "mov" in self.container and is_pcm and not self.sound.joining:
            with ByteReader.open(self.job.path) as reader:
                layout = layout_of_mov(reader, int(self.stream["id"], 16), channels) or layout
        return layout


def open_ffmpeg(job: Job, stack: ExitStack, links: Sequence[Link] = ()) -> list[Source]:
    """The songs that ffmpeg finds in a file. If the file is Ogg, `links` are its songs."""
    probed = _probe(job)
    songs = _Songs(probed, stack)
    codec = CODECS.get(probed.container[0])
    parts = [] if codec is None else sndfile.find_mpeg_parts(job) if codec is MPEG else find_parts(job.path, codec)
    if codec is not None and (len(parts) > 1 or any(not part.has_no_gaps for part in parts)):
        return [songs.mended(codec, part) for part in parts]
    wavpack_songs = wavpack.find_songs(job.path) if "wv" in probed.container else []
    if len(wavpack_songs) > 1 or any(song.n_holes for song in wavpack_songs):
        rates = [song.sample_rate or probed.sample_rate for song in wavpack_songs]
        return [
            songs.from_pieces("wv", song.ranges, song.total_samples / rate)
            for song, rate in zip(wavpack_songs, rates, strict=True)
        ]
    if len(links) > 1 or any(not link.is_whole for link in links):
        return [songs.from_pieces("ogg", link.intact_ranges(), _ogg_seconds(link, job)) for link in links if link.runs]
    for part in parts:
        find_holes(part, job.damage)
    announced = parts[0].least_samples / parts[0].header.sample_rate if parts else probed.announced_seconds
    return [songs.whole(announced)]


def _probe(job: Job) -> _Probed:
    with ByteReader.open(job.path) as reader:
        audio = find_audio(reader, job.name)
        bytes_missing = audio.missing_share if audio else 0.0
        try:
            answer = probe(job.path, job.name, "-show_entries", _ENTRIES)
        except UnreadableError as e:
            check_mp4(reader, job.name)
            if not bytes_missing:
                raise AudioError(str(e)) from e  # under the public name
            raise AudioError(f"{job.name} is cut short (ffmpeg cannot read the rest): get the file again") from e
        container = tuple(answer["format"]["format_name"].split(","))
        if "ogg" in container and reader.get(0, 4) != b"OggS":
            job.damage.add_note("its first Ogg page is broken")
        if ends_within_packet(reader, container):
            job.damage.add_note("it ends within a packet, and how much is missing is unknown")
    return _Probed(job, answer, container, tracks.find_sound(answer["streams"], container, job.name), bytes_missing)


@dataclass(frozen=True)
class _Songs:
    """Opens the songs of a file. `stack` closes files and ends ffmpeg when all songs are decoded."""

    probed: _Probed
    stack: ExitStack

    def whole(self, announced: float) -> Source:
        """The file as it is, with the length that it announces in seconds."""
        job, rate = self.probed.job, self.probed.sample_rate
        lead = silent(round(_lead_seconds(self.probed) * rate), self.probed.sound.n_channels)
        decoded = self._decoded(Input(job.path), announced)
        if "mov" in self.probed.container and self.probed.stream.get("codec_name") == "aac":
            decoded = _without_padding(decoded, round(announced * rate))
        blocks = chain(lead, decoded)
        return self._source(blocks, float(self.probed.answer["format"].get("duration", 0)))

    def from_pieces(self, demuxer: str, pieces: Sequence[Piece], seconds: float) -> Source:
        """The intact parts of a damaged or joined file, which should last `seconds`."""
        path = self.probed.job.path
        file = self.stack.enter_context(Pieces(path, pieces))
        return self._source(self._decoded(Input(path, demuxer, file.blocks()), seconds), seconds)

    def mended(self, codec: Codec, part: Part) -> Source:
        """A part of a stream of frames, with silence in its holes."""
        return self._source(self._mended(codec, part), part.n_samples / part.header.sample_rate)

    def _mended(self, codec: Codec, part: Part) -> Blocks:
        job = self.probed.job
        holes = find_holes(part, job.damage)
        pieces = self.stack.enter_context(whole_frames(part, job.path))  # stays open as long as ffmpeg reads it
        source = Input(job.path, codec.demuxer, pieces.blocks())
        blocks = self._decoded(source, part.song_samples / part.header.sample_rate)
        yield from with_silence(blocks, part, holes, self.probed.sample_rate, job.damage)

    def _source(self, blocks: Blocks, seconds: float) -> Source:
        probed, tags = self.probed, self.probed.tags
        song_tags = {tag: tags[tag] for tag in TAGS if tags.get(tag)}
        return Source(probed.sample_rate, probed.layout(), seconds * probed.sample_rate, blocks, song_tags)

    def _decoded(self, source: Input, announced: float) -> Blocks:
        probed, damage = self.probed, self.probed.job.damage
        output = _output(probed, is_stream=source.is_stream)
        decoder = self.stack.enter_context(Decoder(source, output, probed.job.name))
        timeline, n_samples = Timeline(probed.sample_rate, announced, damage), 0
        for block in placed(decoder, output.channels, timeline):
            n_samples += len(block)
            yield block
        has_failed = decoder.wait() != 0
        self._judge_length(n_samples / probed.sample_rate, announced)
        if has_failed or decoder.n_errors:
            fault = f"ffmpeg reports {counted(decoder.n_errors, 'error')}" if decoder.n_errors else "ffmpeg gives up"
            fault += f', "{decoder.errors[0]}"' if decoder.errors else ""
            if has_failed and not announced:
                damage.add_doubt(fault)
            else:
                damage.add_note(fault)

    def _judge_length(self, seconds: float, announced: float) -> None:
        probed, damage = self.probed, self.probed.job.damage
        missing = announced - seconds
        if probed.bytes_missing and ("matroska" not in probed.container or not announced):
            missing = max(missing, seconds * probed.bytes_missing)
        if missing > MIN_MISSING_SECONDS:
            damage.add_cut(missing)
        elif announced and missing < -_EXTRA_SECONDS and probed.container[0] not in CODECS:
            damage.add_note(f"it holds {-missing:.2f} s more than it announces")


def _without_padding(blocks: Blocks, n_samples: int) -> Blocks:
    """The blocks without what fills the last AAC frame: ffmpeg drops the padding before a song, but not after it."""
    n_seen, last = 0, []
    for block in blocks:
        n_seen += len(block)
        last.append(block)
        while sum(map(len, last[1:])) >= AAC_FRAME_SAMPLES:
            yield last.pop(0)
    if not last:  # ffmpeg decodes nothing
        return
    excess, end = n_seen - n_samples, np.concatenate(last)
    yield end[: len(end) - excess] if 0 < excess < AAC_FRAME_SAMPLES else end


def _ogg_seconds(link: Link, job: Job) -> float:
    """The length of an Ogg song by its pages. Reports missing pages."""
    if not link.starts_whole:
        job.damage.add_note("pages are missing at its start")
    if not link.is_ended:
        job.damage.add_unknown_cut("its last page is missing")
    return max(0, link.n_samples(max(link.runs[-1].granule, link.end_granule))) / link.sample_rate


def _lead_seconds(probed: _Probed) -> float:
    """The silence that belongs before the sound of a video, so that the stems begin with the picture."""
    sound, job = probed.sound, probed.job
    if sound.picture_start is None:
        return 0.0
    # The first frame that is heard: encoders put samples before the song, which decoders drop.
    options = ["-select_streams", str(probed.stream["index"]), "-read_intervals", "%+#8"]
    answer = probe(job.path, job.name, *options, "-show_entries", "frame=best_effort_timestamp_time")
    times = (frame.get("best_effort_timestamp_time") for frame in answer.get("frames", []))
    first = next((time for time in times if time is not None), None)
    return sound.lead_seconds(None if first is None else float(first), job.name)


def _output(probed: _Probed, *, is_stream: bool) -> Output:
    """ffmpeg's options to decode the song with the channels that ffprobe named, even if they change within the stream.

    With a number of channels alone, ffmpeg would convert the layout to its usual one of that number: quad to L R C S.
    """
    sound = probed.sound
    options: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    if sound.layout in FFMPEG_LAYOUTS:
        filters = (f"aformat=channel_layouts={sound.layout}",)
    elif "+" not in sound.layout and "ambisonic" not in sound.layout:
        options = ("-ac", str(sound.n_channels))
    if not sound.joining:
        options += ("-map", "0:a:0" if is_stream else f"0:{probed.stream['index']}")
    return Output(probed.sample_rate, sound.n_channels, options, filters, sound.joining)
