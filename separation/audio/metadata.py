"""Tags and cover art: read from songs, and written in the form that each format has for them.

Tags have ffmpeg's generic names, such as `title`, `album_artist` and `track`; others keep the name that they have in
the song. A cover is the content of a JPEG or PNG file.
"""

import base64
import logging
import re
import shutil
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import soundfile

from separation.audio import ffmpeg
from separation.audio.chatter import Chatter
from separation.errors import AudioError
from separation.system.names import FROM_TAGS, fields_in

MAX_COVER_BYTES = 2**24 - 2**16  # a block of FLAC has 24-bit sizes

# About the song's file or its sound, so not true of a stem.
_OF_THE_FILE = re.compile(
    r"encoder|encoded[-_ ]by|encoder_?settings|tsse|tenc|tlen|tflt|major_brand|minor_version|compatible_brands|"
    r"creation_time|handler_name|vendor_id|duration(-.*)?|language|itunsmpb|itunnorm|itunpgap|gapless_playback|"
    r"replaygain_.*|r128_.*|mp3gain_.*|metadata_block_picture|coverart.*|cuesheet|waveformatextensible_channel_mask|"
    r"_statistics.*|bps.*|number_of_(frames|bytes).*|accurate_?rip.*|md5.*|time_reference|umid|coding_history",
    re.IGNORECASE,
)
_ALIASES = {
    "tbpm": "bpm",
    "tmpo": "bpm",
    "tsrc": "isrc",
    "tkey": "initialkey",
    "year": "date",
    "albumartist": "album_artist",
}
_ID3_FRAMES = {
    "title": "TIT2",
    "artist": "TPE1",
    "album": "TALB",
    "album_artist": "TPE2",
    "composer": "TCOM",
    "performer": "TPE3",
    "genre": "TCON",
    "date": "TDRC",
    "track": "TRCK",
    "disc": "TPOS",
    "copyright": "TCOP",
    "publisher": "TPUB",
    "grouping": "TIT1",
    "compilation": "TCMP",
    "bpm": "TBPM",
    "isrc": "TSRC",
    "initialkey": "TKEY",
}
_VORBIS_NAMES = {"album_artist": "ALBUMARTIST", "track": "TRACKNUMBER", "disc": "DISCNUMBER"}
_MIME_TYPES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png"}
_FRONT_COVER = 3

logger: logging.Logger = logging.getLogger("separation")


@dataclass(frozen=True)
class Metadata:
    """Tags by name, and the cover; empty if there is none."""

    tags: Mapping[str, str] = field(default_factory=dict)
    cover: bytes = b""


def read_metadata(path: Path) -> Metadata:
    """A song's tags and cover, as far as ffmpeg reads them; none without ffmpeg."""
    try:
        return _probed(path)
    except AudioError as e:
        logger.warning("its tags are copied only in part, and its cover is not (%s)", e)
        return Metadata()


def _probed(path: Path) -> Metadata:
    """As `read_metadata`. Raises AudioError if ffmpeg cannot read the file."""
    if not ffmpeg.is_installed():
        return Metadata()
    name = repr(path.name)
    entries = "format_tags:stream=index,codec_type,codec_name:stream_tags:stream_disposition=attached_pic"
    answer = ffmpeg.probe(path, name, "-show_entries", entries)
    streams = answer.get("streams", [])
    covers = (stream for stream in streams if stream.get("disposition", {}).get("attached_pic"))
    pictures = [stream for stream in covers if stream.get("codec_name") in ("mjpeg", "png")]
    cover = ffmpeg.picture(path, int(pictures[0]["index"]), name) if pictures else b""
    sound: dict[str, Any] = next((stream for stream in streams if stream.get("codec_type") == "audio"), {})
    found = {**sound.get("tags", {}), **answer.get("format", {}).get("tags", {})}
    tags = {_name(key): value for key, value in found.items() if value and not _OF_THE_FILE.fullmatch(key)}
    return Metadata(tags, cover if _mime(cover) and len(cover) <= MAX_COVER_BYTES else b"")


def tags_for(template: str | None, path: Path) -> dict[str, str]:
    """The song's tags that a template for names needs; none if it needs none.

    A file that cannot be read has none: decoding says what is wrong with it.
    """
    if template is None or not fields_in(template) & set(FROM_TAGS):
        return {}
    with suppress(soundfile.LibsndfileError, OSError), Chatter().caught(), soundfile.SoundFile(path) as sound:
        tags = {"artist": sound.artist, "album": sound.album, "track": sound.tracknumber}
        return {tag: text for tag, text in tags.items() if text}
    with suppress(AudioError):
        return dict(_probed(path).tags)
    return {}


def _name(key: str) -> str:
    name = key.lower()
    name = "lyrics" if name.startswith("lyrics-") else _ALIASES.get(name, name)
    return name if name in _ID3_FRAMES or name in ("comment", "lyrics") else key


def _mime(cover: bytes) -> str:
    return next((mime for start, mime in _MIME_TYPES.items() if cover.startswith(start)), "")


def _text(value: str) -> bytes:
    """UTF-8 up to the first NUL, which ends a text in most formats."""
    return value.encode(errors="replace").partition(b"\0")[0]


# ---------------------------------------------------------------------------------------------------------------------
# ID3v2.4, for MP3 and WAV (https://id3.org/id3v2.4.0-frames)


def id3_tag(metadata: Metadata) -> bytes:
    """The tag; empty if there is nothing to say."""
    frames = b"".join(_id3_frame(name, _text(value)) for name, value in metadata.tags.items() if _text(value))
    if metadata.cover:
        head = b"\3" + _mime(metadata.cover).encode() + b"\0" + bytes([_FRONT_COVER]) + b"\0"
        frames += _id3(b"APIC", head + metadata.cover)
    return b"ID3\4\0\0" + _syncsafe(len(frames)) + frames if frames else b""


def _id3_frame(name: str, text: bytes) -> bytes:
    if name in ("comment", "lyrics"):
        return _id3(b"COMM" if name == "comment" else b"USLT", b"\3und\0" + text)
    if frame := _ID3_FRAMES.get(name):
        return _id3(frame.encode(), b"\3" + text)
    return _id3(b"TXXX", b"\3" + _text(name) + b"\0" + text)


def _id3(frame: bytes, content: bytes) -> bytes:
    return frame + _syncsafe(len(content)) + b"\0\0" + content


def _syncsafe(number: int) -> bytes:
    """28 bits, seven in a byte."""
    return bytes(number >> shift & 127 for shift in (21, 14, 7, 0))


# ---------------------------------------------------------------------------------------------------------------------
# Vorbis comments, for FLAC and Ogg (https://www.rfc-editor.org/rfc/rfc9639#section-8)


def picture_block(cover: bytes) -> bytes:
    """A FLAC picture block, without its header."""
    mime = _mime(cover).encode()
    sizes = struct.pack(">IIII", 0, 0, 0, 0)  # unknown, as the format allows
    parts = (struct.pack(">II", _FRONT_COVER, len(mime)), mime, struct.pack(">I", 0), sizes)
    return b"".join((*parts, struct.pack(">I", len(cover)), cover))


def _comments(tags: Mapping[str, str], vendor: bytes) -> bytes:
    lines = [f"{_vorbis_name(name)}=".encode() + _text(value) for name, value in tags.items() if _text(value)]
    packed = (struct.pack("<I", len(line)) + line for line in lines)
    return struct.pack("<I", len(vendor)) + vendor + struct.pack("<I", len(lines)) + b"".join(packed)


def _vorbis_name(name: str) -> str:
    if name in _ID3_FRAMES or name in ("comment", "lyrics"):
        return _VORBIS_NAMES.get(name, name.upper())
    return re.sub(r"[^\x20-\x3c\x3e-\x7d]", "_", name)


def ffmetadata(metadata: Metadata, *, with_picture: bool) -> bytes:
    """The tags as a file for ffmpeg; with the cover as the tag that Ogg has for it."""
    tags = dict(metadata.tags)
    if with_picture and metadata.cover:
        tags["METADATA_BLOCK_PICTURE"] = base64.b64encode(picture_block(metadata.cover)).decode()
    lines = (b"%s=%s\n" % (_escaped(name), _escaped(value)) for name, value in tags.items() if _text(value))
    return b";FFMETADATA1\n" + b"".join(lines)


def _escaped(text: str) -> bytes:
    return re.sub(rb"([=;#\\\n])", rb"\\\1", _text(text))


# ---------------------------------------------------------------------------------------------------------------------
# Files


def add_to_mp3(source: BinaryIO, target: BinaryIO, metadata: Metadata) -> None:
    """Copy an MP3 file without tags, with an ID3 tag before its frames."""
    target.write(id3_tag(metadata))
    shutil.copyfileobj(source, target, 2**20)


def add_to_wav(file: BinaryIO, metadata: Metadata) -> None:
    """Append an ID3 chunk to a WAV or RF64 file."""
    tag = id3_tag(metadata)
    end = file.seek(0, 2)
    chunk = b"id3 " + struct.pack("<I", len(tag)) + tag + bytes(len(tag) % 2)
    file.write(bytes(end % 2) + chunk)
    size = file.tell() - 8
    file.seek(0)
    if file.read(4) == b"RF64":  # the size is in the chunk ds64, which comes first
        file.seek(20)
        file.write(struct.pack("<Q", size))
    else:
        file.write(struct.pack("<I", size))


def add_to_flac(source: BinaryIO, target: BinaryIO, metadata: Metadata) -> None:
    """Copy a FLAC file with comments and picture in place of its own."""
    source.seek(4)
    blocks: list[tuple[int, bytes]] = []
    vendor, is_last = b"", False
    while not is_last:
        kind, *size = source.read(4)
        is_last, kind = kind >= 128, kind & 127
        content = source.read(int.from_bytes(size, "big"))
        if kind == 4:
            vendor = content[4 : 4 + int.from_bytes(content[:4], "little")]
        elif kind != 1:  # padding
            blocks.append((kind, content))
    blocks.append((4, _comments(metadata.tags, vendor)))
    if metadata.cover:
        blocks.append((6, picture_block(metadata.cover)))
    target.write(b"fLaC")
    for number, (kind, content) in enumerate(blocks, 1):
        target.write(bytes([kind | (128 if number == len(blocks) else 0)]) + len(content).to_bytes(3, "big") + content)
    shutil.copyfileobj(source, target, 2**20)
