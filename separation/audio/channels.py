"""Which loudspeaker each channel of a file is meant for, and how the channels are mixed down to stereo.

The file's own information counts: the mask of WAV, RF64, W64 and FLAC, the layout of CAF, AIFF and MOV, the order of
Ogg, and ffmpeg's answer for other formats.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from separation.audio.integrity import chunks
from separation.audio.reader import ByteRange, ByteReader
from separation.audio.tags import after_id3v2
from separation.errors import AudioError

_MAX_CHUNKS = 10_000  # a hostile file can hold millions
_MAX_LAYOUT_BYTES = 4096
_MAX_START_BYTES = 2**16

# This module's names of loudspeakers, by ffmpeg's. The first 18 are the bits of a WAV's mask, from the
# lowest up. C(entre), s(ide), b(ack), S(urround, the single one at the back), t(op) f(ront), b(ottom) f(ront),
# s(urround) d(irect), w(ide), t(otal, of a downmix).
_FFMPEG = {
    **{"FL": "L", "FR": "R", "FC": "C", "LFE": "LFE", "BL": "Lb", "BR": "Rb", "FLC": "Lc", "FRC": "Rc", "BC": "S"},
    **{"SL": "Ls", "SR": "Rs", "TC": "Tc", "TFL": "Ltf", "TFC": "Ctf", "TFR": "Rtf", "TBL": "Ltb", "TBC": "Ctb"},
    **{"TBR": "Rtb", "DL": "Lt", "DR": "Rt", "WL": "Lw", "WR": "Rw", "SDL": "Lsd", "SDR": "Rsd", "LFE2": "LFE2"},
    **{"TSL": "Lts", "TSR": "Rts", "BFC": "Cbf", "BFL": "Lbf", "BFR": "Rbf", "BIL": "L", "BIR": "R"},
}
FFMPEG_CHANNELS = tuple(_FFMPEG)  # in the order of ffmpeg's layouts
_MASK = list(_FFMPEG.values())[:18]
_UNKNOWN = "?"
MASK_COMMENT = "waveformatextensible_channel_mask"  # the tag that holds a FLAC's mask, in lowercase

# The gain of each loudspeaker in the left output; the right output mirrors it. ITU-R BS.775, annex 4, gives the gains
# of L R C LFE Ls Rs S; the others follow by their side and by whether they are in front. LFE is left out.
_TO_LEFT: dict[str, float] = {
    **dict.fromkeys(("L", "Lc", "Lw", "Lbf", "Lt"), 1.0),
    **dict.fromkeys(("C", "Cbf", "Ls", "Lb", "Lsd", "Ltf", "Ltb", "Lts"), 0.5**0.5),
    **dict.fromkeys(("S", "Tc", "Ctf", "Ctb", _UNKNOWN), 0.5),
    # Not loudspeakers: ambisonics, heard by virtual cardioids that point left and right, and mid and side.
    **{"W": 1.0, "W-3dB": 2**0.5, "Y": 1.0, "Mid": 1.0, "Side": 1.0},
}
_INVERTED = ("Y", "Side")  # subtracted from the right output
_MIRROR = str.maketrans("LR", "RL")


@dataclass(frozen=True)
class Layout:
    """The loudspeaker of each channel, in the order of the file. `is_guessed` if the file does not name them."""

    speakers: tuple[str, ...]
    is_guessed: bool = False

    def __str__(self) -> str:
        return " ".join(self.speakers)

    def to_stereo(self) -> NDArray[np.float32]:
        """`[C, 2]` gains. A single channel goes to both sides.

        The gains of each side add up to at most 1, as in ffmpeg, so that the sum does not exceed full scale.
        """
        if len(self.speakers) == 1:
            return np.ones((1, 2), np.float32)
        speakers = list(self.speakers)
        if {"L", "R", "Lt", "Rt"} <= set(speakers):  # Lt and Rt are a downmix of the other channels
            speakers = [speaker if speaker not in ("Lt", "Rt") else "" for speaker in speakers]
        matrix = np.array([[_to_left(speaker), _to_right(speaker)] for speaker in speakers])
        gains: NDArray[np.float32] = (matrix / np.abs(matrix).sum(axis=0).max()).astype(np.float32)
        return gains


def _to_left(speaker: str) -> float:
    return _TO_LEFT.get(speaker, 0.0)


def _to_right(speaker: str) -> float:
    return -_to_left(speaker) if speaker in _INVERTED else _to_left(speaker.translate(_MIRROR))


# The layouts of WAV, FLAC, AIFF and ffmpeg by the number of channels, for files that do not name theirs.
_USUAL = {
    1: "C",
    2: "L R",
    3: "L R C",
    4: "L R Ls Rs",
    5: "L R C Ls Rs",
    6: "L R C LFE Ls Rs",
    7: "L R C LFE S Ls Rs",
    8: "L R C LFE Lb Rb Ls Rs",
}
# The layouts of Vorbis (specification of Vorbis I, 4.3.9) and of Opus, by the number of channels.
_VORBIS = {
    1: "C",
    2: "L R",
    3: "L C R",
    4: "L R Ls Rs",
    5: "L C R Ls Rs",
    6: "L C R Ls Rs LFE",
    7: "L C R Ls Rs S LFE",
    8: "L C R Ls Rs Lb Rb LFE",
}
_AMBISONIC = {4: "W Y Z X", 6: "W Y Z X L R"}  # RFC 8486, section 3.1
# The layouts that ffmpeg has a name for. It spells out the others.
FFMPEG_LAYOUTS = {
    "mono": "FC",
    "stereo": "FL+FR",
    "2.1": "FL+FR+LFE",
    "3.0": "FL+FR+FC",
    "3.0(back)": "FL+FR+BC",
    "4.0": "FL+FR+FC+BC",
    "quad": "FL+FR+BL+BR",
    "quad(side)": "FL+FR+SL+SR",
    "3.1": "FL+FR+FC+LFE",
    "5.0": "FL+FR+FC+BL+BR",
    "5.0(side)": "FL+FR+FC+SL+SR",
    "4.1": "FL+FR+FC+LFE+BC",
    "5.1": "FL+FR+FC+LFE+BL+BR",
    "5.1(side)": "FL+FR+FC+LFE+SL+SR",
    "6.0": "FL+FR+FC+BC+SL+SR",
    "6.0(front)": "FL+FR+FLC+FRC+SL+SR",
    "3.1.2": "FL+FR+FC+LFE+TFL+TFR",
    "hexagonal": "FL+FR+FC+BL+BR+BC",
    "6.1": "FL+FR+FC+LFE+BC+SL+SR",
    "6.1(back)": "FL+FR+FC+LFE+BL+BR+BC",
    "6.1(front)": "FL+FR+LFE+FLC+FRC+SL+SR",
    "7.0": "FL+FR+FC+BL+BR+SL+SR",
    "7.0(front)": "FL+FR+FC+FLC+FRC+SL+SR",
    "7.1": "FL+FR+FC+LFE+BL+BR+SL+SR",
    "7.1(wide)": "FL+FR+FC+LFE+BL+BR+FLC+FRC",
    "7.1(wide-side)": "FL+FR+FC+LFE+FLC+FRC+SL+SR",
    "5.1.2": "FL+FR+FC+LFE+SL+SR+TFL+TFR",
    "5.1.2(back)": "FL+FR+FC+LFE+BL+BR+TFL+TFR",
    "octagonal": "FL+FR+FC+BL+BR+BC+SL+SR",
    "cube": "FL+FR+BL+BR+TFL+TFR+TBL+TBR",
    "downmix": "DL+DR",
    "binaural": "BIL+BIR",
}


def usual_layout(channels: int, name: str) -> Layout:
    """The layout of a file that does not name its own. Raises `AudioError` for more than 8 channels."""
    if channels not in _USUAL:
        raise AudioError(f"{name} has {channels} channels: mix it down to 8 or fewer")
    return Layout(tuple(_USUAL[channels].split()), is_guessed=channels > 2)


def layout_of_file(reader: ByteReader, channels: int, name: str) -> Layout:
    """The layout of a file that libsndfile reads; the usual one if the file names none."""
    guess = usual_layout(channels, name)
    return _checked(_speakers(reader, channels) if channels > 1 else None, channels) or guess


def layout_of_mov(reader: ByteReader, track_id: int, channels: int) -> Layout | None:
    """The layout of a PCM track in a MOV; None if the file names none.

    Older versions of ffmpeg get the order of PCM tracks wrong. In encoded tracks, the decoder defines the order.
    """
    content = _mov_layout(reader, track_id)
    return _checked(_core_audio_speakers(content) if content else None, channels)


def layout_by_ffmpeg(text: str, channels: int, name: str) -> Layout:
    """The layout that ffmpeg describes by `text`; the usual one if the text is empty or unknown."""
    guess = usual_layout(channels, name)
    if ambisonic := re.fullmatch(r"ambisonic 1(\+stereo)?", text):
        return Layout(tuple(_AMBISONIC[6 if ambisonic[1] else 4].split()))
    listed = re.search(r"[A-Z0-9]+(\+[A-Z0-9]+)+(?=\)?$)", FFMPEG_LAYOUTS.get(text, text))
    if listed is None:
        return guess
    return _checked([_FFMPEG.get(channel, _UNKNOWN) for channel in listed[0].split("+")], channels) or guess


def layout_by_mask(text: str, channels: int) -> Layout | None:
    """The layout by the mask in a FLAC's comment; None if it does not fit the number of channels."""
    return _checked(_comment_speakers(text), channels)


def _checked(speakers: Sequence[str] | None, channels: int) -> Layout | None:
    """The layout; None if it is useless or does not have the file's number of channels. ffmpeg ignores it too."""
    if speakers is None or len(speakers) != channels:
        return None
    is_useful = any(speaker != _UNKNOWN and (_to_left(speaker) or _to_right(speaker)) for speaker in speakers)
    return Layout(tuple(speakers)) if is_useful else None


def _comment_speakers(text: str) -> list[str] | None:
    return _mask_speakers(int(text, 0)) if re.fullmatch(r"0[xX][0-9a-fA-F]{1,8}|[1-9]\d{0,9}", text) else None


def _mask_speakers(mask: int) -> list[str]:
    bits = (bit for bit in range(32) if mask >> bit & 1)
    return [_MASK[bit] if bit < len(_MASK) else _UNKNOWN for bit in bits]


# How files name the loudspeakers of their channels


def _speakers(reader: ByteReader, channels: int) -> Sequence[str] | None:
    """The loudspeakers that a file names, in the order of its channels, or None."""
    top = reader.get(0, 4)
    if top in _LAYOUT_CHUNKS:
        return _chunk_speakers(reader, top)
    if top == b"OggS":
        return _ogg_speakers(reader, channels)
    start = after_id3v2(reader)
    if reader.get(start, 4) != b"fLaC":
        return None
    # A FLAC without a mask has the usual layout, by its specification.
    return _flac_speakers(reader, start + 4) or _USUAL[channels].split()


_LAYOUT_CHUNKS = {  # the chunk that holds the layout, by a file's first four bytes
    **dict.fromkeys((b"RIFF", b"RF64", b"BW64", b"RIFX"), b"fmt "),
    b"riff": b"fmt " + bytes.fromhex("f3acd3118cd100c04f8edb8a"),
    b"FORM": b"CHAN",  # AIFF
    b"caff": b"chan",
}


def _chunk_speakers(reader: ByteReader, top: bytes) -> Sequence[str] | None:
    for kind, start, n_bytes in chunks(reader):
        if kind == _LAYOUT_CHUNKS[top] and 0 <= n_bytes <= reader.size:
            content = reader.get(start, min(n_bytes, _MAX_LAYOUT_BYTES))
            if kind in (b"CHAN", b"chan"):
                return _core_audio_speakers(content)
            return _wave_format_speakers(content, ">" if top == b"RIFX" else "<")
    return None


_EXTENSIBLE = 0xFFFE  # the code of a format with a mask
_B_FORMAT = bytes.fromhex("00002107d3118644c8c1ca000000")  # the end of the subformat's GUID for ambisonics


def _wave_format_speakers(content: bytes, order: str) -> Sequence[str] | None:
    """By a `fmt ` chunk with Microsoft's WAVEFORMATEXTENSIBLE."""
    if len(content) < 40 or struct.unpack_from(order + "H", content)[0] != _EXTENSIBLE:
        return None
    if content[26:40] == _B_FORMAT:
        return ["W-3dB", "X", "Y", "Z"]
    return _mask_speakers(struct.unpack_from(order + "I", content, 20)[0]) or None


# Apple's channel layout tags, without the channel count in the lower 16 bits (CoreAudioBaseTypes.h).
_CORE_AUDIO = {
    101: "L R",
    102: "L R",
    103: "Lt Rt",
    104: "Mid Side",
    105: "L R",
    106: "L R",
    107: "W X Y Z",
    108: "L R Ls Rs",
    109: "L R Ls Rs C",
    110: "L R Ls Rs C S",
    111: "L R Lb Rb C S Ls Rs",
    112: "L R Lb Rb Ltf Rtf Ltb Rtb",
    113: "L R C",
    114: "C L R",
    115: "L R C S",
    116: "C L R S",
    117: "L R C Ls Rs",
    118: "L R Ls Rs C",
    119: "L C R Ls Rs",
    120: "C L R Ls Rs",
    121: "L R C LFE Ls Rs",
    122: "L R Ls Rs C LFE",
    123: "L C R Ls Rs LFE",
    124: "C L R Ls Rs LFE",
    125: "L R C LFE Ls Rs S",
    126: "L R C LFE Ls Rs Lc Rc",
    127: "C Lc Rc L R Ls Rs LFE",
    128: "L R C LFE Ls Rs Lb Rb",
    129: "L R Ls Rs C LFE Lc Rc",
    130: "L R C LFE Ls Rs Lt Rt",
    131: "L R S",
    132: "L R Ls Rs",
    133: "L R LFE",
    134: "L R LFE S",
    135: "L R LFE Ls Rs",
    136: "L R C LFE",
    137: "L R C LFE S",
    138: "L R Ls Rs LFE",
    139: "L R Ls Rs C S",
    140: "L R Ls Rs C Lb Rb",
    141: "C L R Ls Rs S",
    142: "C L R Ls Rs S LFE",
    143: "C L R Ls Rs Lb Rb",
    144: "C L R Ls Rs Lb Rb S",
    148: "L R Ls Rs C Lc Rc",
    149: "C LFE",
    150: "L C R",
    151: "L C R S",
    152: "L C R LFE",
    153: "L R S LFE",
    154: "L C R S LFE",
    155: "L C R Ls Rs S",
    156: "L C R Ls Rs Lb Rb",
    157: "L C R Ls Rs LFE S",
    158: "L C R Ls Rs LFE Tc",
    159: "L C R Ls Rs LFE Ctf",
    160: "L C R Ls Rs LFE Lb Rb",
    161: "L C R Ls Rs LFE Lc Rc",
    162: "L C R Ls Rs LFE Lsd Rsd",
    163: "L C R Ls Rs LFE Lw Rw",
    164: "L C R Ls Rs LFE Ltf Rtf",
    165: "L C R Ls Rs LFE S Tc",
    166: "L C R Ls Rs LFE S Ctf",
    167: "L C R Ls Rs LFE Tc Ctf",
    168: "C L R LFE",
    169: "C L R S LFE",
    170: "Lc Rc L R Ls Rs",
    171: "C L R Lb Rb Tc",
    172: "C S L R Lb Rb",
    173: "Lc Rc L R Ls Rs LFE",
    174: "C L R Lb Rb Tc LFE",
    175: "C S L R Lb Rb LFE",
    176: "Lc C Rc L R Ls Rs",
    177: "Lc C Rc L R Ls Rs LFE",
    178: "Lc Rc L R Ls Rs Lb Rb",
    179: "Lc C Rc L R Ls S Rs",
    182: "C L R Ls Rs LFE S",
    185: "L R Lb Rb",
    186: "L R C Lb Rb",
    187: "L R C LFE Lb Rb",
    188: "L R C LFE S Ls Rs",
    189: "L R C LFE Lb Rb Ls Rs",
    190: "W Y Z X",
    191: "W Y Z X",
    194: "L R C LFE Ls Rs Lts Rts",
    197: "L R S C",
    198: "L R Ls Rs S C",
    199: "L R Ls Rs S C LFE",
    200: "L C R Ls S Rs LFE",
    201: "L R Ls Rs Lb Rb C LFE",
    205: "L R C LFE Ls Rs Ltf Rtf",
    212: "L C R Lb Rb",
    213: "L C R Lb Rb LFE",
    214: "L C R Ls Rs S LFE",
    215: "L C R Ls Rs Lb Rb LFE",
    216: "L R Lb Rb C",
    217: "L R Lb Rb C LFE",
    218: "L R Ls Rs C S LFE",
    219: "L R Lb Rb Ls Rs C LFE",
}
# Two tags that are not layouts: each channel has a label, or there is a mask as in WAV.
_DESCRIPTIONS, _BITMAP = 0, 1
_DESCRIPTION_BYTES = 20
# Apple's labels. The first 18 follow the mask. 42, mono, is left out: one of several channels is not in the centre.
_LABELS = {
    **dict(enumerate(_MASK, 1)),
    **{33: "Lb", 34: "Rb", 35: "Lw", 36: "Rw", 37: "LFE2", 38: "Lt", 39: "Rt", 44: "S", 49: "Lts", 51: "Rts"},
    **{52: "Ltb", 53: "Ctb", 54: "Rtb", 55: "Ls", 56: "Rs", 57: "Lbf", 58: "Rbf", 59: "Cbf", 60: "Lts", 61: "Rts"},
    **{62: "LFE2", 63: "Lb", 64: "Rb", 200: "W", 201: "X", 202: "Y", 203: "Z", 204: "Mid", 205: "Side"},
    **{206: "L", 207: "R", 208: "L", 209: "R", 301: "L", 302: "R"},
}


def _core_audio_speakers(content: bytes) -> Sequence[str] | None:
    """By a `chan` chunk: a tag, a mask, and descriptions of the channels."""
    if len(content) < 12:
        return None
    tag, mask, n_descriptions = struct.unpack_from(">III", content)
    if tag >> 16 == _DESCRIPTIONS:
        descriptions = content[12 : 12 + _DESCRIPTION_BYTES * n_descriptions]
        descriptions = descriptions[: len(descriptions) // _DESCRIPTION_BYTES * _DESCRIPTION_BYTES]
        return [_LABELS.get(label, _UNKNOWN) for (label,) in struct.iter_unpack(">I16x", descriptions)]
    if tag >> 16 == _BITMAP:
        return _mask_speakers(mask)
    return _CORE_AUDIO.get(tag >> 16, "").split() or None


def _mov_layout(reader: ByteReader, track_id: int) -> bytes | None:
    """The content of the `chan` atom in a track's sample description (QuickTime File Format)."""
    for track in _atoms(reader, (0, reader.size), b"moov", b"trak"):
        if _has_other_id(reader, track, track_id):
            continue
        for start, stop in _atoms(reader, track, b"mdia", b"minf", b"stbl", b"stsd"):
            description = reader.get(start, min(stop - start, _MAX_START_BYTES))
            at = description.find(b"chan")
            return description[at + 8 :] if at > 0 else None  # after the atom's kind and version
    return None


def _has_other_id(reader: ByteReader, track: ByteRange, track_id: int) -> bool:
    for start, _ in _atoms(reader, track, b"tkhd"):
        header = reader.get(start, 24)
        at = 20 if header[:1] == b"\1" else 12  # after two times, of 64 or 32 bits by the version
        if int.from_bytes(header[at : at + 4], "big") != track_id:
            return True
    return False


def _atoms(reader: ByteReader, within: ByteRange, kind: bytes, *inner: bytes) -> Iterator[ByteRange]:
    """The contents of all atoms of a kind. `inner` kinds lead down: only the atoms of the last kind are returned."""
    position, stop = within
    for _ in range(_MAX_CHUNKS):
        header = reader.get(position, 16)
        n_bytes, start = int.from_bytes(header[:4], "big"), position + 8
        if n_bytes == 1:  # a 64-bit size follows
            n_bytes, start = int.from_bytes(header[8:], "big"), position + 16
        end = position + n_bytes if n_bytes else stop
        if len(header) < 8 or not start <= end <= stop:
            return
        if header[4:8] == kind:
            if inner:
                yield from _atoms(reader, (start, end), *inner)
            else:
                yield start, end
        position = end


def _ogg_speakers(reader: ByteReader, channels: int) -> Sequence[str] | None:
    start = reader.get(0, _MAX_START_BYTES)
    opus = start.find(b"OpusHead")
    mapping_family = start[opus + 18] if 0 <= opus < len(start) - 18 else 1
    if mapping_family == 2:
        return _AMBISONIC.get(channels, "").split()
    return _VORBIS.get(channels, "").split() if mapping_family < 2 else None


_COMMENT_BLOCK = 4  # the kind of FLAC's metadata block with comments


def _flac_speakers(reader: ByteReader, position: int) -> Sequence[str] | None:
    """By the comments of a FLAC, whose metadata begin at `position`."""
    for _ in range(_MAX_CHUNKS):
        header = reader.get(position, 4)
        if len(header) < 4:
            return None
        n_bytes, is_last = int.from_bytes(header[1:], "big"), bool(header[0] & 0x80)
        if header[0] & 0x7F == _COMMENT_BLOCK:
            for comment in islice(_comments(reader.get(position + 4, n_bytes)), _MAX_CHUNKS):
                key, _, value = comment.decode("latin-1").partition("=")
                if key.lower() == MASK_COMMENT:
                    return _comment_speakers(value)
            return None
        if is_last:
            return None
        position += 4 + n_bytes
    return None


def _comments(content: bytes) -> Iterator[bytes]:
    """The comments of a Vorbis comment header. It holds the vendor's name, a count and the comments, with lengths."""
    position = 4 + int.from_bytes(content[:4], "little") + 4
    while position + 4 <= len(content):
        start = position + 4
        position = start + int.from_bytes(content[position:start], "little")
        yield content[start:position]
