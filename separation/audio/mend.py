"""A damaged stream of bare frames, mended: only whole frames, and where silence belongs between them."""

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from separation.audio.damage import MIN_MISSING_SECONDS, Damage
from separation.audio.frames import MPEG, Codec, Part, side_bytes
from separation.audio.pieces import Piece, Pieces
from separation.audio.waveform import silent

_MAX_DOUBT_SECONDS = 0.25  # the most that bytes may stand for whose frames nobody can count
_RESERVOIR_FRAMES = 9  # in at most so many before it an MP3 frame's data may begin


class Hole(NamedTuple):
    frame: int  # how many frames stand before it in the part
    n_frames: int  # missing there; 0 if only a fault is there


def find_holes(part: Part, damage: Damage) -> list[Hole]:
    """Where frames of a part are missing, and how many.

    A count in the file tells how many are missing in all; else the bytes between frames do, where all frames have one
    size. What is missing at the end is told to `damage`, and so is what cannot be counted.
    """
    gaps = [gap for gap in part.gaps if gap.n_bytes]
    mean = part.n_bytes / part.n_frames
    lengths = [gap.n_bytes / mean for gap in gaps]  # in frames
    fits = [part.is_cbr and round(n) > 0 and abs(n - round(n)) * mean <= 2 for n in lengths]
    missing = [round(n) if fit else 0 for n, fit in zip(lengths, fits, strict=True)]
    if part.announced:
        left = part.announced - part.n_frames
        for i, n in enumerate(missing):
            missing[i] = min(n, max(0, left))
            left -= missing[i]
        unsure = [i for i, fit in enumerate(fits) if not fit] or ([] if part.is_cut else list(range(len(gaps))))
        total = sum(lengths[i] for i in unsure)
        for i in unsure if left > 0 else []:
            missing[i] += round(left * lengths[i] / total)
        if not unsure and left * part.frame_seconds > MIN_MISSING_SECONDS:
            damage.cut(left * part.frame_seconds)
    else:
        _judge_uncounted(part, lengths, fits, missing, damage)
    if not part.is_info_whole:
        damage.note("the header that counts its frames does not match its checksum")
    if part.n_lead > mean:
        damage.note(f"{part.n_lead} bytes at its start are no audio")
    for gap in gaps:
        damage.note(f"{gap.n_bytes} bytes at {damage.offset + gap.frame * part.frame_seconds:.2f} s are no audio")
    return [Hole(gap.frame, n) for gap, n in zip(gaps, missing, strict=True)]


def _judge_uncounted(part: Part, lengths: list[float], fits: list[bool], missing: list[int], damage: Damage) -> None:
    unsure = 0.0
    for i, fit in enumerate(fits):
        if not fit:
            # Of frames of one size, bytes that are no multiple of it were most likely inserted.
            missing[i] = round(lengths[i]) if lengths[i] < 2 or not part.is_cbr else 0
            unsure += lengths[i] * part.frame_seconds
    if unsure > _MAX_DOUBT_SECONDS:
        damage.doubt(f"up to {unsure:.1f} s between its frames are no audio, and nothing tells how much is missing")
    if part.is_cut:
        damage.note("it ends within a frame, and nothing tells whether more was there")
    elif part.n_extra > 2 * part.n_bytes / part.n_frames:
        damage.note(f"{part.n_extra} bytes at its end are no audio")


def clean(part: Part, path: Path, codec: Codec) -> Pieces:
    """The part's whole frames alone, with a count of them where they are MP3."""
    pieces: list[Piece] = []
    with path.open("rb") as file:

        def read(start: int, n_bytes: int) -> bytes:
            file.seek(start)
            return file.read(n_bytes)

        if part.is_layer_iii:
            info = read(part.info[0], part.info[1] - part.info[0]) if part.info else b""
            pieces.append(_counted(info, read(part.runs[0][0], 4), part.n_frames))
        for i, (start, stop) in enumerate(part.runs):
            if i and part.is_layer_iii and part.gaps[i - 1].n_bytes:
                start = _without_past(start, stop, codec, read, pieces)
            pieces.append((start, stop))
    return Pieces(path, pieces)


def _counted(info: bytes, header: bytes, n_frames: int) -> bytes:
    """The frame with the Xing header, or a new one, which says that so many frames follow."""
    count = n_frames.to_bytes(4, "big")
    if info:
        at = 4 + side_bytes(info)
        if info[at : at + 4] in (b"Xing", b"Info") and info[at + 7] & 1:
            return info[: at + 8] + count + info[at + 12 :]
    header = bytes([header[0], header[1] | 1, 0xE0 | header[2] & 0x0D, header[3]])  # no checksum, the highest bitrate
    frame = MPEG.parse(header)
    assert frame is not None
    content = header + bytes(side_bytes(header)) + b"Xing" + (1).to_bytes(4, "big") + count
    return content.ljust(frame.n_bytes, b"\0")


def _without_past(start: int, stop: int, codec: Codec, read: Callable[[int, int], bytes], pieces: list[Piece]) -> int:
    """Silence MP3 frames behind a gap whose data begin in frames before it, which would be noise.

    They go to `pieces`; their own data stay, for the next frames'. Gives the start of the frames that are left as they
    are.
    """
    available = 0  # bytes of data since the gap
    for _ in range(_RESERVOIR_FRAMES):
        look = read(start, 64)
        header = codec.parse(look) if start < stop else None
        if header is None:
            break
        at = 4 if look[1] & 1 else 6  # without or with a checksum
        mpeg1, side = look[1] >> 3 & 3 == 3, side_bytes(look)
        past = look[at] << 1 | look[at + 1] >> 7 if mpeg1 else look[at]
        if past <= available:
            break
        pieces.append(bytes([look[0], look[1] | 1, *look[2:4]]) + bytes(side + at - 4))
        pieces.append((start + at + side, start + header.n_bytes))
        available += header.n_bytes - at - side
        start += header.n_bytes
    return start


def spliced(
    blocks: Iterator[NDArray[np.float32]], part: Part, holes: list[Hole], sample_rate: int, damage: Damage
) -> Iterator[NDArray[np.float32]]:
    """The blocks `[n, C]` that a part's clean frames decode to, with silence in the holes."""
    rate = sample_rate / part.header.sample_rate
    due = deque(
        (max(0, round((hole.frame * part.header.n_samples - part.skipped) * rate)), hole.n_frames)
        for hole in holes
        if hole.n_frames
    )
    n_read = n_written = 0
    for block in blocks:
        done = 0
        while due and due[0][0] < n_read + len(block):
            at, n_frames = due.popleft()
            at = max(at - n_read, done)
            if at > done:
                yield block[done:at]
            n_silent = round(n_frames * part.header.n_samples * rate)
            n_written += at - done
            damage.hole(n_written / sample_rate, n_silent / sample_rate)
            yield from silent(n_silent, block.shape[1])
            n_written += n_silent
            done = at
        if done < len(block):
            yield block[done:] if done else block
        n_written += len(block) - done
        n_read += len(block)
