"""Tags and cover art: read from songs, and written in the form that each format has for them.

Tags have ffmpeg's generic names, such as `title`, `album_artist` and `track`; others keep the name that they have in
the song. A cover is the content of a JPEG or PNG file.
"""

import base64
import logging
import re
import shutil
import struct
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import soundfile

from separation.audio import ffmpeg, mp4
from separation.audio.chatter import Chatter
from separation.audio.integrity import chunks
from separation.audio.reader import ByteReader
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
_M4A_TAGS = {  # that ffmpeg writes
    *(
        "title",
        "artist",
        "album",
        "album_artist",
        "composer",
        "genre",
        "date",
        "track",
        "disc",
        "copyright",
        "grouping",
    ),
    *("compilation", "comment", "lyrics", "description", "synopsis", "show", "episode_id", "network", "keywords"),
    *("episode_sort", "season_number", "media_type", "hd_video"),
}
_FREE_FORM_NAMES = {"bpm": "BPM", "isrc": "ISRC", "publisher": "LABEL", "performer": "PERFORMER"}
_UTF8 = 1  # the type of an item's content
_VORBIS_NAMES = {"album_artist": "ALBUMARTIST", "track": "TRACKNUMBER", "disc": "DISCNUMBER"}
_MIME_TYPES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG": "image/png"}
_FRONT_COVER = 3
_SILENT_FRAMES = 3 * (b"\xff\xfb\x90\x64" + bytes(413))  # of MP3, so that a tag before them is a file

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
    found, tag = _read_by_ffmpeg(path, name), _id3_of_wav(path)
    if not tag:
        return found
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder, "tag.mp3")
        alone.write_bytes(tag + _SILENT_FRAMES)
        more = _read_by_ffmpeg(alone, name)
    return Metadata({**found.tags, **more.tags}, found.cover or more.cover)


def _read_by_ffmpeg(path: Path, name: str) -> Metadata:
    entries = "format_tags:stream=index,codec_type,codec_name:stream_tags:stream_disposition=attached_pic"
    answer = ffmpeg.probe(path, name, "-show_entries", entries)
    streams = answer.get("streams", [])
    covers = (stream for stream in streams if stream.get("disposition", {}).get("attached_pic"))
    pictures = [stream for stream in covers if stream.get("codec_name") in ("mjpeg", "png")]
    pictures.sort(key=lambda stream: stream.get("tags", {}).get("comment") != "Cover (front)")
    cover = ffmpeg.picture(path, int(pictures[0]["index"]), name) if pictures else b""
    sound: dict[str, Any] = next((stream for stream in streams if stream.get("codec_type") == "audio"), {})
    found = {**sound.get("tags", {}), **answer.get("format", {}).get("tags", {})}
    tags = {_name(key): value for key, value in found.items() if value and not _OF_THE_FILE.fullmatch(key)}
    return Metadata(tags, cover if _mime(cover) and len(cover) <= MAX_COVER_BYTES else b"")


def _id3_of_wav(path: Path) -> bytes:
    """The ID3 tag of a WAV file, which ffmpeg ignores beside an INFO list; empty if there is none."""
    with ByteReader.open(path) as reader:
        if reader.get(0, 4) != b"RIFF":
            return b""
        found = (place for kind, *place in chunks(reader) if kind.lower() == b"id3 ")
        start, n_bytes = next(found, (0, 0))
        return reader.get(start, n_bytes)


def tags_for(template: str | None, path: Path) -> dict[str, str]:
    """The song's tags that a template for names needs; none if it needs none.

    A file that cannot be read has none: decoding says what is wrong with it.
    """
    needed = fields_in(template) & set(FROM_TAGS) if template is not None else set()
    found: dict[str, str] = {}
    if needed:
        with suppress(soundfile.LibsndfileError, OSError), Chatter().caught(), soundfile.SoundFile(path) as sound:
            tags = {"artist": sound.artist, "album": sound.album, "track": sound.tracknumber}
            found = {tag: text for tag, text in tags.items() if text}
    if needed - found.keys():  # libsndfile reads neither the tags of AIFF nor every format
        with suppress(AudioError):
            found = {**_probed(path).tags, **found}
    return found


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


def ogg_tags(metadata: Metadata) -> dict[str, str]:
    """The tags, and the cover as the tag that Ogg has for it."""
    picture = base64.b64encode(picture_block(metadata.cover)).decode() if metadata.cover else ""
    return {**metadata.tags, "METADATA_BLOCK_PICTURE": picture}


def ffmetadata(tags: Mapping[str, str]) -> bytes:
    """The tags as a file for ffmpeg."""
    lines = (b"%s=%s\n" % (_escaped(name), _escaped(value)) for name, value in tags.items() if _text(value))
    return b";FFMETADATA1\n" + b"".join(lines)


def _escaped(text: str) -> bytes:
    return re.sub(rb"([=;#\\\n])", rb"\\\1", _text(text))


# ---------------------------------------------------------------------------------------------------------------------
# The items of iTunes, for M4A. Tags that these have no place for go into free-form items, as Picard, Mixxx and others
# name them.


def m4a_tags(metadata: Metadata) -> dict[str, str]:
    """The tags under ffmpeg's names for M4A."""
    tags = dict(metadata.tags)
    if number := re.fullmatch(r"\s*(\d{1,3}(\.\d+)?)\s*", tags.get("bpm", "")):
        tags["tmpo"] = str(round(float(number[1])))
    return tags


def free_form_items(tags: Mapping[str, str]) -> bytes:
    """The atoms for the tags that ffmpeg does not write to M4A; empty if there are none."""
    return b"".join(
        _free_form_item(_FREE_FORM_NAMES.get(name, name), _text(value))
        for name, value in tags.items()
        if name.lower() not in _M4A_TAGS and _text(value)
    )


def _free_form_item(name: str, text: bytes) -> bytes:
    parts = (
        mp4.atom(b"mean", bytes(4) + b"com.apple.iTunes"),
        mp4.atom(b"name", bytes(4) + _text(name)),
        mp4.atom(b"data", struct.pack(">II", _UTF8, 0) + text),
    )
    return mp4.atom(b"----", b"".join(parts))


# ---------------------------------------------------------------------------------------------------------------------
# Files


def add_to_m4a(source: BinaryIO, target: BinaryIO, metadata: Metadata) -> None:
    """Copy an M4A file whose index comes before its sound, with the tags that ffmpeg does not write."""
    items, index = free_form_items(metadata.tags), mp4.find_atom(source, b"moov")
    source.seek(0)
    target.write(source.read(index.start))
    moov = mp4.inserted(source.read(index.end - index.start), (b"moov", b"udta", b"meta", b"ilst"), items)
    target.write(mp4.shifted(moov, len(items)))
    shutil.copyfileobj(source, target, 2**20)


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
