"""Which tracks of a file are the song, and when its sound begins relative to the picture. Streams are ffprobe's."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from separation.audio.channels import FFMPEG_CHANNELS
from separation.errors import AudioError

ENTRIES = (
    "stream=index,id,codec_type,codec_name,sample_rate,channels,channel_layout,start_time,duration,nb_frames,time_base:"
    "stream_disposition"
)

_MAX_LEAD_SECONDS = 3600.0  # between picture and sound; a longer lead comes from wrong timestamps
_MIN_LEAD_SECONDS = 0.0015  # timestamps in Matroska are whole milliseconds
_REPORTED_LEAD_SECONDS = 0.05  # a shorter lead is not worth a warning
_TOLERANCE_SECONDS = 0.05  # the lengths of tracks that belong together may differ by this much
_SPLIT = {"mov", "mxf"}  # containers in which cameras and studios store one channel per track
# The dispositions of tracks that are not the song: for other listeners, in another language, or a part of it.
_NOT_THE_SONG = (
    "comment",
    "dub",
    "lyrics",
    "karaoke",
    "hearing_impaired",
    "visual_impaired",
    "clean_effects",
    "descriptions",
)
# The words in a title by which the sides differ.
_SIDES = re.compile(r"left|right|channel|track|\b(l|r|ch)\b|[\d\W_]", re.IGNORECASE)

logger: logging.Logger = logging.getLogger("separation")

Stream = dict[str, Any]


@dataclass(frozen=True)
class Sound:
    """The tracks that are the song.

    Args:
        tracks: one, or several with one channel each.
        channels: of several tracks, the loudspeaker of each, by ffmpeg's names and in its order.
        picture_start: in seconds by the file's clock; None without a picture.
    """

    tracks: tuple[Stream, ...]
    channels: tuple[str, ...] = ()
    picture_start: float | None = None

    @property
    def n_channels(self) -> int:
        return len(self.channels) or int(self.tracks[0].get("channels", 0))

    @property
    def layout(self) -> str:
        """ffmpeg's name of the layout; may be empty."""
        return "+".join(self.channels) or str(self.tracks[0].get("channel_layout", ""))

    @property
    def joining(self) -> str:
        """ffmpeg's filter that makes one stream of several tracks; empty for one track."""
        if len(self.tracks) == 1:
            return ""
        inputs = "".join(f"[0:{track['index']}]" for track in self.tracks)
        routes = "|".join(f"{number}.0-{channel}" for number, channel in enumerate(self.channels))
        return f"{inputs}join=inputs={len(self.tracks)}:channel_layout={self.layout}:map={routes}"

    def lead_seconds(self, first_time: float | None, name: str) -> float:
        """How long after the picture the sound begins; that much silence belongs before it. Warns if it is long.

        `first_time` is the timestamp of the first sample in seconds, if it has one. If the sound begins before the
        picture, the result is 0: nothing is cut off.
        """
        if self.picture_start is None or first_time is None:
            return 0.0
        lead = first_time - self.picture_start
        if lead < _MIN_LEAD_SECONDS:
            return 0.0
        if lead > _MAX_LEAD_SECONDS:
            logger.warning(
                "%s: by its timestamps, the sound begins %.0f s after the picture, which is ignored", name, lead
            )
            return 0.0
        if lead > _REPORTED_LEAD_SECONDS:
            logger.warning(
                "%s: the sound begins %.2f s after the picture, so the stems begin with that much silence", name, lead
            )
        return lead


def find_sound(streams: Sequence[Stream], container: Sequence[str], name: str) -> Sound:
    """The song among the streams of a file: the default track, or the first one.

    Tracks of one channel that belong together are joined. If there are several tracks, a warning names the choice.
    Raises `AudioError` if there is no audio, or none that can be decoded.

    Args:
        container: ffmpeg's names of the format.
        name: the song's name in quotes.
    """
    audio = [stream for stream in streams if stream["codec_type"] == "audio"]
    if not audio:
        raise AudioError(f"{name} has no audio stream: choose a file with sound")
    usable = [stream for stream in audio if int(stream.get("sample_rate", 0)) and int(stream.get("channels", 0))]
    if not usable:
        raise AudioError(f"{name} is damaged (ffmpeg finds no sample rate or channels): get the file again")

    def preference(stream: Stream) -> tuple[bool, bool]:
        return not _has_disposition(stream, "default"), any(_has_disposition(stream, kind) for kind in _NOT_THE_SONG)

    song = min(usable, key=preference)
    joined = _joined(song, usable, container)
    tracks = tuple(joined.values()) or (song,)
    if len(audio) > 1:
        logger.warning("%s has %d audio tracks: %s", name, len(audio), _choice(tracks, tuple(joined), audio))
    starts = [float(stream["start_time"]) for stream in streams if _is_picture(stream) and "start_time" in stream]
    return Sound(tracks, tuple(joined), min(starts, default=None))


def _has_disposition(stream: Stream, disposition: str) -> bool:
    return bool(stream.get("disposition", {}).get(disposition))


def _is_picture(stream: Stream) -> bool:
    """Whether the stream is a video, and not an album's cover or the pictures of chapters."""
    stills = ("attached_pic", "timed_thumbnails", "still_image")
    return stream["codec_type"] == "video" and not any(_has_disposition(stream, kind) for kind in stills)


def _joined(song: Stream, usable: Sequence[Stream], container: Sequence[str]) -> dict[str, Stream]:
    """The tracks of one channel that together are the song, by loudspeaker in ffmpeg's order; empty if it is one track.

    Tracks belong together if they name their loudspeakers, with left and right among them. In containers where cameras
    and studios store one channel per track, the first two tracks without names are left and right.
    """
    single = [stream for stream in usable if int(stream["channels"]) == 1 and _belong_together(song, stream)]
    named: dict[str, Stream] = {}
    for stream in single:
        named.setdefault(_loudspeaker(stream), stream)
    named.pop("", None)
    if song in named.values() and {"FL", "FR"} <= named.keys():
        return {channel: named[channel] for channel in FFMPEG_CHANNELS if channel in named}
    if _SPLIT & set(container) and len(single) > 1 and single[0] is song and named.keys() <= {"FC"}:
        return {"FL": single[0], "FR": single[1]}
    return {}


def _belong_together(song: Stream, other: Stream) -> bool:
    def facts(stream: Stream) -> tuple[Any, ...]:
        tags = _tags(stream)
        title = _SIDES.sub("", tags.get("title") or tags.get("handler_name") or "")
        kinds = [_has_disposition(stream, kind) for kind in _NOT_THE_SONG]
        return stream.get("codec_name"), stream["sample_rate"], stream["channels"], tags.get("language"), title, kinds

    lengths = [float(stream.get("duration", 0)) for stream in (song, other)]
    starts = [float(stream.get("start_time", 0)) for stream in (song, other)]
    difference = max(abs(lengths[0] - lengths[1]), abs(starts[0] - starts[1]))
    return facts(song) == facts(other) and difference <= _TOLERANCE_SECONDS


def _tags(stream: Stream) -> dict[str, str]:
    return {key.lower(): value for key, value in stream.get("tags", {}).items()}


def _loudspeaker(stream: Stream) -> str:
    """ffmpeg's name of the loudspeaker of a track with one channel; empty if the track does not name it."""
    layout = str(stream.get("channel_layout", ""))
    named = re.fullmatch(r"(?:1 channels? \()?([A-Z0-9]+)\)?", layout)
    return named[1] if named and named[1] in FFMPEG_CHANNELS else "FC" if layout == "mono" else ""


def _choice(tracks: Sequence[Stream], channels: Sequence[str], audio: Sequence[Stream]) -> str:
    """Which of several tracks are taken, in words."""
    numbers = [audio.index(track) + 1 for track in tracks]
    if channels:
        is_pair = len(channels) == 2
        listed = " and ".join(map(str, numbers)) if is_pair else ", ".join(map(str, numbers))
        sides = "left and right" if is_pair else "the channels " + " ".join(channels)
        others = ", and the others are left out" if len(audio) > len(tracks) else ""
        return f"{listed} have one channel each and are taken as {sides}{others}"
    tags = _tags(tracks[0])
    described = [tags[key] for key in ("language", "title") if tags.get(key) and tags[key] != "und"]
    details = f" ({', '.join(described)})" if described else ""
    why = "the default" if _has_disposition(tracks[0], "default") else "the first"
    return f"number {numbers[0]}{details}, {why}, is taken"
