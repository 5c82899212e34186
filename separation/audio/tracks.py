"""Which of a file's tracks is the song, and when its sound begins beside the picture.

What is known of the tracks is what ffprobe says of them, its streams.
"""

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

_LONGEST_LEAD_SECONDS = 3600.0  # sound that begins later yet, by its times, has wrong times
_SHORTEST_LEAD_SECONDS = 0.0015  # times in Matroska are whole milliseconds
_TOLD_SECONDS = 0.05  # a lead below this is not worth a warning
_TOLERANCE_SECONDS = 0.05  # by which the lengths of tracks that belong together may differ
_SPLIT = {"mov", "mxf"}  # containers where cameras and studios keep a channel a track
# Of tracks beside the song: for other listeners, in another language, or a part of it.
_BESIDES = (
    "comment",
    "dub",
    "lyrics",
    "karaoke",
    "hearing_impaired",
    "visual_impaired",
    "clean_effects",
    "descriptions",
)
_SIDES = re.compile(
    r"left|right|channel|track|\b(l|r|ch)\b|[\d\W_]", re.IGNORECASE
)  # of a title, what tells sides apart

logger = logging.getLogger("separation")

Stream = dict[str, Any]


@dataclass(frozen=True)
class Sound:
    """The tracks that are the song: one, or several of one channel each, for the loudspeakers of `channels`."""

    tracks: tuple[Stream, ...]
    channels: tuple[str, ...] = ()  # ffmpeg's names, in its order
    picture_start: float | None = None  # seconds by the file's own clock; None without a picture

    @property
    def n_channels(self) -> int:
        return len(self.channels) or int(self.tracks[0].get("channels", 0))

    @property
    def layout(self) -> str:
        """As ffmpeg calls it; may be empty."""
        return "+".join(self.channels) or str(self.tracks[0].get("channel_layout", ""))

    @property
    def joining(self) -> str:
        """ffmpeg's filter that makes one stream of several tracks; empty for one."""
        if len(self.tracks) == 1:
            return ""
        inputs = "".join(f"[0:{track['index']}]" for track in self.tracks)
        routes = "|".join(f"{number}.0-{channel}" for number, channel in enumerate(self.channels))
        return f"{inputs}join=inputs={len(self.tracks)}:channel_layout={self.layout}:map={routes}"

    def lead_seconds(self, first_time: float | None, name: str) -> float:
        """How long after the picture the sound begins: that much silence belongs before it. Says so, if it is much.

        `first_time` is that of the first sample by the file's own clock, if it has one. Where the sound begins before
        the picture, so does the file: nothing is left out.
        """
        if self.picture_start is None or first_time is None:
            return 0.0
        lead = first_time - self.picture_start
        if lead < _SHORTEST_LEAD_SECONDS:
            return 0.0
        if lead > _LONGEST_LEAD_SECONDS:
            logger.warning("%s: by its times its sound begins %.0f s after its picture: not taken as true", name, lead)
            return 0.0
        if lead > _TOLD_SECONDS:
            logger.warning("%s: its sound begins %.2f s after its picture: silence is put before the stems", name, lead)
        return lead


def sound_of(streams: Sequence[Stream], container: Sequence[str], name: str) -> Sound:
    """The song among the streams of a file in a container that ffmpeg calls by these names.

    It is the default track or else the first. Tracks of one channel that belong together are one sound. With several
    tracks a warning tells which it is. Raises `AudioError` if there is no audio, or none that can be decoded.
    """
    sounding = [stream for stream in streams if stream["codec_type"] == "audio"]
    if not sounding:
        raise AudioError(f"{name} holds no audio stream; choose a file with sound.")
    usable = [stream for stream in sounding if int(stream.get("sample_rate", 0)) and int(stream.get("channels", 0))]
    if not usable:
        raise AudioError(f"{name} is damaged: ffmpeg finds no sample rate or channels in it; get the file again.")
    song = min(usable, key=lambda stream: (not _has(stream, "default"), any(_has(stream, kind) for kind in _BESIDES)))
    joined = _joined(song, usable, container)
    tracks = tuple(joined.values()) or (song,)
    if len(sounding) > 1:
        logger.warning("%s has %d audio tracks: %s", name, len(sounding), _choice(tracks, tuple(joined), sounding))
    starts = [float(stream["start_time"]) for stream in streams if _is_picture(stream) and "start_time" in stream]
    return Sound(tracks, tuple(joined), min(starts, default=None))


def _has(stream: Stream, disposition: str) -> bool:
    return bool(stream.get("disposition", {}).get(disposition))


def _is_picture(stream: Stream) -> bool:
    """Not the cover of an album, nor the pictures of chapters."""
    stills = ("attached_pic", "timed_thumbnails", "still_image")
    return stream["codec_type"] == "video" and not any(_has(stream, kind) for kind in stills)


def _joined(song: Stream, usable: Sequence[Stream], container: Sequence[str]) -> dict[str, Stream]:
    """The tracks of one channel that make up the song with that one, by their loudspeakers in ffmpeg's order.

    Those that name their loudspeakers, left and right among them; or, where cameras and studios do so, the first two
    of tracks that do not. Empty if the song is that track alone.
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
        tags = {key.lower(): value for key, value in stream.get("tags", {}).items()}
        title = _SIDES.sub("", tags.get("title") or tags.get("handler_name") or "")
        kinds = [_has(stream, kind) for kind in _BESIDES]
        return stream.get("codec_name"), stream["sample_rate"], stream["channels"], tags.get("language"), title, kinds

    lengths = [float(stream.get("duration", 0)) for stream in (song, other)]
    starts = [float(stream.get("start_time", 0)) for stream in (song, other)]
    differ = max(abs(lengths[0] - lengths[1]), abs(starts[0] - starts[1]))
    return facts(song) == facts(other) and differ <= _TOLERANCE_SECONDS


def _loudspeaker(stream: Stream) -> str:
    """ffmpeg's name of the one of a track with one channel; empty if it does not tell."""
    layout = str(stream.get("channel_layout", ""))
    named = re.fullmatch(r"(?:1 channels? \()?([A-Z0-9]+)\)?", layout)
    return named[1] if named and named[1] in FFMPEG_CHANNELS else "FC" if layout == "mono" else ""


def _choice(tracks: Sequence[Stream], channels: Sequence[str], sounding: Sequence[Stream]) -> str:
    """What was taken of several tracks, in words."""
    numbers = [sounding.index(track) + 1 for track in tracks]
    if channels:
        sides = "left and right" if len(channels) == 2 else "the channels " + " ".join(channels)
        listed = " and ".join(map(str, numbers)) if len(channels) == 2 else ", ".join(map(str, numbers))
        others = ", the others are left out" if len(sounding) > len(tracks) else ""
        return f"{listed} have one channel each and are taken as {sides}{others}"
    tags = {key.lower(): value for key, value in tracks[0].get("tags", {}).items()}
    described = [tags[key] for key in ("language", "title") if tags.get(key) and tags[key] != "und"]
    what = f" ({', '.join(described)})" if described else ""
    return f"number {numbers[0]}{what}, {'its default' if _has(tracks[0], 'default') else 'the first'}, is taken"
