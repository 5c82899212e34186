"""Which loudspeaker each channel of a file is meant for, and what it gives to the two of stereo.

A file's own word counts: the mask of WAV, RF64, W64 and FLAC, the layout of CAF, AIFF and MOV, the order of Ogg, and
what ffmpeg says of any other.
"""

import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import IO

import numpy as np
from numpy.typing import NDArray

from separation.audio.integrity import after_id3v2, chunks
from separation.errors import AudioError

_MAX_CHUNKS = 10_000  # a file made to keep this module busy can hold millions

# ffmpeg's names of loudspeakers, the first 18 by the bits of a WAV's mask from the lowest up, and those that are used
# here: C(entre), s(ide), b(ack), S(urround, the one at the back), t(op) f(ront), b(ottom) f(ront), s(urround) d(irect).
_FFMPEG = {
    **{"FL": "L", "FR": "R", "FC": "C", "LFE": "LFE", "BL": "Lb", "BR": "Rb", "FLC": "Lc", "FRC": "Rc", "BC": "S"},
    **{"SL": "Ls", "SR": "Rs", "TC": "Tc", "TFL": "Ltf", "TFC": "Ctf", "TFR": "Rtf", "TBL": "Ltb", "TBC": "Ctb"},
    **{"TBR": "Rtb", "DL": "Lt", "DR": "Rt", "WL": "Lw", "WR": "Rw", "SDL": "Lsd", "SDR": "Rsd", "LFE2": "LFE2"},
    **{"TSL": "Lts", "TSR": "Rts", "BFC": "Cbf", "BFL": "Lbf", "BFR": "Rbf", "BIL": "L", "BIR": "R"},
}
FFMPEG_CHANNELS = tuple(_FFMPEG)  # in the order of ffmpeg's layouts
_MASK = list(_FFMPEG.values())[:18]
_UNKNOWN = "?"
MASK_COMMENT = "waveformatextensible_channel_mask"  # of FLAC, in lower case

# What each gives to the left output, mirrored for the right (ITU-R BS.775, annex 4, which has no more than L R C LFE
# Ls Rs S; the others by whether they are in front, and by their side). LFE is left out.
_TO_LEFT = {
    **dict.fromkeys(("L", "Lc", "Lw", "Lbf", "Lt"), 1.0),
    **dict.fromkeys(("C", "Cbf", "Ls", "Lb", "Lsd", "Ltf", "Ltb", "Lts"), 0.5**0.5),
    **dict.fromkeys(("S", "Tc", "Ctf", "Ctb", _UNKNOWN), 0.5),
    # Not loudspeakers: ambisonics, of which two cardioids to the sides are taken, and mid and side.
    **{"W": 1.0, "W-3dB": 2**0.5, "Y": 1.0, "Mid": 1.0, "Side": 1.0},
}
_INVERTED = ("Y", "Side")  # to the right output


@dataclass(frozen=True)
class Layout:
    """The loudspeaker of each channel, in the order of a file; `is_guessed` where the file does not tell them."""

    speakers: tuple[str, ...]
    is_guessed: bool = False

    def __str__(self) -> str:
        return " ".join(self.speakers)

    def to_stereo(self) -> NDArray[np.float32]:
        """`[C, 2]` float32. One channel alone goes to both sides, whatever it is.

        No output's coefficients sum to more than 1, as ffmpeg has it, so that none exceeds full scale.
        """
        if len(self.speakers) == 1:
            return np.ones((1, 2), np.float32)
        speakers = list(self.speakers)
        if {"L", "R", "Lt", "Rt"} <= set(speakers):  # the last two are a mix of all others
            speakers = [speaker if speaker not in ("Lt", "Rt") else "" for speaker in speakers]
        matrix = np.array([[_to_left(speaker), _to_right(speaker)] for speaker in speakers])
        return (matrix / np.abs(matrix).sum(axis=0).max()).astype(np.float32)


def _to_left(speaker: str) -> float:
    return _TO_LEFT.get(speaker, 0.0)


def _to_right(speaker: str) -> float:
    return -_to_left(speaker) if speaker in _INVERTED else _to_left(speaker.translate(_MIRROR))


_MIRROR = str.maketrans("LR", "RL")


# With so many channels, where the file does not tell more. As WAV, FLAC and AIFF order them, and ffmpeg.
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
_VORBIS = {  # Vorbis I specification, 4.3.9; Opus has the same
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
FFMPEG_LAYOUTS = {  # ffmpeg's names; others it spells out
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


def usual(channels: int, name: str) -> Layout:
    """The layout of so many channels of the file of that name, which does not tell it. More than 8 are an error."""
    if channels not in _USUAL:
        raise AudioError(f"{name} has {channels} channels; mix it down to 8 or fewer.")
    return Layout(tuple(_USUAL[channels].split()), is_guessed=channels > 2)


def layout_of_file(file: IO[bytes], channels: int, name: str) -> Layout:
    """What the file of that name tells of its channels, else the usual layout. For files that libsndfile reads."""
    guess = usual(channels, name)
    return _checked(_told(file, channels) if channels > 1 else None, channels) or guess


def layout_of_mov(file: IO[bytes], track_id: int, channels: int) -> Layout | None:
    """What a MOV tells of a track whose samples are plain numbers; of those, old versions of ffmpeg tell another order.

    An encoded track's decoder has an order of its own.
    """
    content = _mov_layout(file, track_id)
    return _checked(_told_by_core_audio(content) if content else None, channels)


def layout_by_ffmpeg(text: str, channels: int, name: str) -> Layout:
    """The layout that ffmpeg calls by that text, which may be empty; else the usual one."""
    guess = usual(channels, name)
    if ambisonic := re.fullmatch(r"ambisonic 1(\+stereo)?", text):
        return Layout(tuple(_AMBISONIC[6 if ambisonic[1] else 4].split()))
    listed = re.search(r"[A-Z0-9]+(\+[A-Z0-9]+)+(?=\)?$)", FFMPEG_LAYOUTS.get(text, text))
    if listed is None:
        return guess
    return _checked([_FFMPEG.get(channel, _UNKNOWN) for channel in listed[0].split("+")], channels) or guess


def _checked(speakers: Sequence[str] | None, channels: int) -> Layout | None:
    """None where the file tells nothing of use, or of another number of channels than it has, as ffmpeg has it too."""
    if speakers is None or len(speakers) != channels:
        return None
    is_of_use = any(speaker != _UNKNOWN and (_to_left(speaker) or _to_right(speaker)) for speaker in speakers)
    return Layout(tuple(speakers)) if is_of_use else None


def layout_by_mask(text: str, channels: int) -> Layout | None:
    """The layout of a mask as a FLAC's comment has it, if it is one for so many channels."""
    return _checked(_of_comment(text), channels)


def _of_comment(text: str) -> list[str] | None:
    return _of_mask(int(text, 0)) if re.fullmatch(r"0[xX][0-9a-fA-F]{1,8}|[1-9]\d{0,9}", text) else None


def _of_mask(mask: int) -> list[str]:
    bits = (bit for bit in range(32) if mask >> bit & 1)
    return [_MASK[bit] if bit < len(_MASK) else _UNKNOWN for bit in bits]


# --- what files tell


def _told(file: IO[bytes], channels: int) -> Sequence[str] | None:
    """The loudspeakers that a file tells, in the order of its channels, or None."""
    file.seek(0)
    top = file.read(4)
    if top in _LAYOUT_CHUNKS:
        return _told_in_chunks(file, top)
    if top == b"OggS":
        return _told_by_ogg(file, channels)
    file.seek(after_id3v2(file))
    if file.read(4) != b"fLaC":
        return None
    # By its specification a FLAC without a mask has the usual layout.
    return _told_by_flac(file) or _USUAL[channels].split()


_LAYOUT_CHUNKS = {  # the kind that tells the layout, by a file's first four bytes
    **dict.fromkeys((b"RIFF", b"RF64", b"BW64", b"RIFX"), b"fmt "),
    b"riff": b"fmt " + bytes.fromhex("f3acd3118cd100c04f8edb8a"),
    b"FORM": b"CHAN",  # AIFF
    b"caff": b"chan",
}


def _told_in_chunks(file: IO[bytes], top: bytes) -> Sequence[str] | None:
    size = file.seek(0, os.SEEK_END)
    for kind, _, n_bytes in chunks(file, top):
        if kind == _LAYOUT_CHUNKS[top] and 0 <= n_bytes <= size:
            content = file.read(min(n_bytes, 4096))
            if kind in (b"CHAN", b"chan"):
                return _told_by_core_audio(content)
            return _told_by_wave_format(content, "<" if top != b"RIFX" else ">")
    return None


_EXTENSIBLE = 0xFFFE  # the format that has a mask
_B_FORMAT = bytes.fromhex("00002107d3118644c8c1ca000000")  # the end of ambisonics' identity in its place


def _told_by_wave_format(content: bytes, order: str) -> Sequence[str] | None:
    """Of a `fmt ` chunk (Microsoft's WAVEFORMATEXTENSIBLE)."""
    if len(content) < 40 or struct.unpack_from(order + "H", content)[0] != _EXTENSIBLE:
        return None
    if content[26:40] == _B_FORMAT:
        return ["W-3dB", "X", "Y", "Z"]
    return _of_mask(struct.unpack_from(order + "I", content, 20)[0]) or None


# Apple's channel layout tags by their number, without the channel count in the lower 16 bits (CoreAudioBaseTypes.h).
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
_DESCRIPTIONS, _BITMAP = 0, 1  # in place of a tag: a label for each channel, or a mask like a WAV's
# Apple's labels, of which the first 18 follow the mask. Not 42, mono: of several, none is in the middle.
_LABELS = {
    **dict(enumerate(_MASK, 1)),
    **{33: "Lb", 34: "Rb", 35: "Lw", 36: "Rw", 37: "LFE2", 38: "Lt", 39: "Rt", 44: "S", 49: "Lts", 51: "Rts"},
    **{52: "Ltb", 53: "Ctb", 54: "Rtb", 55: "Ls", 56: "Rs", 57: "Lbf", 58: "Rbf", 59: "Cbf", 60: "Lts", 61: "Rts"},
    **{62: "LFE2", 63: "Lb", 64: "Rb", 200: "W", 201: "X", 202: "Y", 203: "Z", 204: "Mid", 205: "Side"},
    **{206: "L", 207: "R", 208: "L", 209: "R", 301: "L", 302: "R"},
}


def _told_by_core_audio(content: bytes) -> Sequence[str] | None:
    """Of a `chan` chunk: a tag, a bitmap, the number of descriptions, and these, 20 bytes each."""
    if len(content) < 12:
        return None
    tag, bitmap, n_descriptions = struct.unpack_from(">III", content)
    if tag >> 16 == _DESCRIPTIONS:
        labels = content[12 : 12 + 20 * n_descriptions]
        labels = labels[: len(labels) // 20 * 20]
        return [_LABELS.get(label[0], _UNKNOWN) for label in struct.iter_unpack(">I16x", labels)]
    if tag >> 16 == _BITMAP:
        return _of_mask(bitmap)
    return _CORE_AUDIO.get(tag >> 16, "").split() or None


def _mov_layout(file: IO[bytes], track_id: int) -> bytes | None:
    """The content of the `chan` atom in the sample description of a track (QuickTime File Format)."""
    for track in _atoms(file, (0, file.seek(0, os.SEEK_END)), b"moov", b"trak"):
        for start, _ in _atoms(file, track, b"tkhd"):
            file.seek(start)
            header = file.read(24)
            at = 20 if header[:1] == b"\1" else 12  # behind two times of 64 or 32 bits
            if int.from_bytes(header[at : at + 4], "big") != track_id:
                break
        else:
            for start, stop in _atoms(file, track, b"mdia", b"minf", b"stbl", b"stsd"):
                file.seek(start)
                description = file.read(min(stop - start, 2**16))
                at = description.find(b"chan")
                return description[at + 8 :] if at > 0 else None  # behind its version
    return None


def _atoms(file: IO[bytes], within: tuple[int, int], kind: bytes, *inner: bytes) -> Iterator[tuple[int, int]]:
    """Where the contents of the atoms of a kind are, or of those of the `inner` kinds one in the other inside them."""
    position, stop = within
    for _ in range(_MAX_CHUNKS):
        file.seek(position)
        header = file.read(16)
        n_bytes, start = int.from_bytes(header[:4], "big"), position + 8
        if n_bytes == 1:  # the size has 64 bits
            n_bytes, start = int.from_bytes(header[8:], "big"), position + 16
        end = position + n_bytes if n_bytes else stop
        if len(header) < 8 or not start <= end <= stop:
            return
        if header[4:8] == kind:
            if inner:
                yield from _atoms(file, (start, end), *inner)
            else:
                yield start, end
        position = end


def _told_by_ogg(file: IO[bytes], channels: int) -> Sequence[str] | None:
    file.seek(0)
    start = file.read(2**16)
    opus = start.find(b"OpusHead")
    family = start[opus + 18] if 0 <= opus < len(start) - 18 else 1
    if family == 2:
        return _AMBISONIC.get(channels, "").split()
    return _VORBIS.get(channels, "").split() if family < 2 else None


_COMMENT_BLOCK = 4


def _told_by_flac(file: IO[bytes]) -> Sequence[str] | None:
    """Of a FLAC's comments; `file` stands behind the mark."""
    for _ in range(_MAX_CHUNKS):
        header = file.read(4)
        if len(header) < 4:
            return None
        n_bytes = int.from_bytes(header[1:], "big")
        if header[0] & 127 == _COMMENT_BLOCK:
            for comment in islice(_comments(file.read(n_bytes)), _MAX_CHUNKS):
                key, _, value = comment.decode("latin-1").partition("=")
                if key.lower() == MASK_COMMENT:
                    return _of_comment(value)
            return None
        if header[0] & 128:  # the last block
            return None
        file.seek(n_bytes, os.SEEK_CUR)
    return None


def _comments(content: bytes) -> Iterator[bytes]:
    """Of a Vorbis comment header: the vendor's name, the number of comments, and these, each after its length."""
    position = 4 + int.from_bytes(content[:4], "little") + 4
    while position + 4 <= len(content):
        start = position + 4
        position = start + int.from_bytes(content[position:start], "little")
        yield content[start:position]
