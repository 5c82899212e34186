"""Mends a damaged stream of bare frames: keeps its whole frames, and fills the gaps between them with silence."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from separation.audio.damage import MIN_MISSING_SECONDS, Damage
from separation.audio.frames import MPEG, Part, side_bytes
from separation.audio.pieces import Piece, Pieces
from separation.audio.reader import ByteReader
from separation.audio.waveform import silent

_MAX_UNCOUNTED_SECONDS = 0.25  # longer gaps with an unknown number of missing frames are a doubt
_MAX_RESERVOIR_FRAMES = 9  # an MP3 frame's data may begin this many frames before it


class Hole(NamedTuple):
    """A place in a part of a stream where frames are missing."""

    frame: int  # the number of frames before it, in the part
    n_frames: int  # missing; 0 if there are only foreign bytes


def find_holes(part: Part, damage: Damage) -> list[Hole]:
    """The places in a part where frames are missing, and how many.

    The total is known if the file counts its frames. Otherwise, if all frames have the same size, the sizes of the gaps
    give the numbers. Frames that are missing at the end, and gaps whose frames cannot be counted, are reported to
    `damage`.
    """
    gaps = [gap for gap in part.gaps if gap.n_bytes]
    mean_bytes = part.n_bytes / part.n_frames
    lengths = [gap.n_bytes / mean_bytes for gap in gaps]  # in frames
    # Whether a gap has the size of whole frames. If so, frames were overwritten.
    fits = [part.is_cbr and round(n) > 0 and abs(n - round(n)) * mean_bytes <= 2 for n in lengths]
    missing = (
        _missing_by_count(part, lengths, fits, damage)
        if part.announced
        else _missing_by_size(part, lengths, fits, damage)
    )
    if not part.is_info_intact:
        damage.add_note("the header that counts its frames does not match its checksum")
    if part.n_lead > mean_bytes:
        damage.add_note(f"{part.n_lead} bytes at its start are not audio")
    for gap in gaps:
        seconds = damage.time_in_song(gap.frame * part.frame_seconds)
        damage.add_note(f"{gap.n_bytes} bytes at {seconds:.2f} s are not audio")
    return [Hole(gap.frame, n) for gap, n in zip(gaps, missing, strict=True)]


def _missing_by_count(part: Part, lengths: list[float], fits: list[bool], damage: Damage) -> list[int]:
    """The missing frames in each gap of a part whose header counts the frames."""
    missing = [round(n) if fit else 0 for n, fit in zip(lengths, fits, strict=True)]
    left = part.announced - part.n_frames
    for i, n in enumerate(missing):
        missing[i] = min(n, max(0, left))
        left -= missing[i]
    # The rest is spread over the gaps that do not fit. If all fit, frames are missing at the end or were cut out.
    unsure = [i for i, fit in enumerate(fits) if not fit] or ([] if part.is_cut else list(range(len(lengths))))
    if left > 0:
        total = sum(lengths[i] for i in unsure)
        for i in unsure:
            missing[i] += round(left * lengths[i] / total)
    if not unsure and left * part.frame_seconds > MIN_MISSING_SECONDS:
        damage.add_cut(left * part.frame_seconds)
    return missing


def _missing_by_size(part: Part, lengths: list[float], fits: list[bool], damage: Damage) -> list[int]:
    """The missing frames in each gap of a part that does not count its frames."""
    missing, unsure_seconds = [], 0.0
    for n, fit in zip(lengths, fits, strict=True):
        if fit:
            missing.append(round(n))
        else:
            # Frames of one size leave gaps that fit, so a long gap that does not fit was probably inserted.
            missing.append(round(n) if n < 2 or not part.is_cbr else 0)
            unsure_seconds += n * part.frame_seconds
    if unsure_seconds > _MAX_UNCOUNTED_SECONDS:
        damage.add_doubt(
            f"up to {unsure_seconds:.1f} s between its frames are not audio, and how much is missing is unknown"
        )
    if part.is_cut:
        damage.add_note("it ends within a frame, and whether more is missing is unknown")
    elif part.n_extra > 2 * part.n_bytes / part.n_frames:
        damage.add_note(f"{part.n_extra} bytes at its end are not audio")
    return missing


def whole_frames(part: Part, path: Path) -> Pieces:
    """A file with the part's whole frames alone. If they are MP3, a header counts them."""
    pieces: list[Piece] = []
    with ByteReader.open(path) as reader:
        if part.is_layer_iii:
            info = reader.get(part.info[0], part.info[1] - part.info[0]) if part.info else b""
            pieces.append(_xing_frame(info, reader.get(part.runs[0][0], 4), part.n_frames))
        for i, (start, stop) in enumerate(part.runs):
            if i and part.is_layer_iii and part.gaps[i - 1].n_bytes:
                silenced, start = _silenced(reader, start, stop)
                pieces += silenced
            pieces.append((start, stop))
    return Pieces(path, pieces)


def _xing_frame(info: bytes, header: bytes, n_frames: int) -> bytes:
    """A frame with a Xing header that announces `n_frames`: the file's own frame `info`, or a new one."""
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


def _silenced(reader: ByteReader, start: int, stop: int) -> tuple[list[Piece], int]:
    """The first MP3 frames after a gap, silenced where their data begin in lost frames and would decode to noise.

    Their own data stay, because later frames may use them. Also returns where the unchanged frames begin.
    """
    pieces: list[Piece] = []
    n_available = 0  # bytes of data since the gap
    for _ in range(_MAX_RESERVOIR_FRAMES):
        head = reader.get(start, 64)
        header = MPEG.parse(head) if start < stop else None
        if header is None:
            break
        has_checksum = not head[1] & 1
        side_start = 6 if has_checksum else 4
        mpeg1, n_side = head[1] >> 3 & 3 == 3, side_bytes(head)
        n_before = head[side_start] << 1 | head[side_start + 1] >> 7 if mpeg1 else head[side_start]  # main_data_begin
        if n_before <= n_available:
            break
        pieces.append(bytes([head[0], head[1] | 1, *head[2:4]]) + bytes(n_side + side_start - 4))
        pieces.append((start + side_start + n_side, start + header.n_bytes))
        n_available += header.n_bytes - side_start - n_side
        start += header.n_bytes
    return pieces, start


def with_silence(
    blocks: Iterator[NDArray[np.float32]], part: Part, holes: list[Hole], sample_rate: int, damage: Damage
) -> Iterator[NDArray[np.float32]]:
    """The blocks `[n, C]` that a part's whole frames decode to, with silence in the holes."""
    rate = sample_rate / part.header.sample_rate
    due = deque(
        (max(0, round((hole.frame * part.header.n_samples - part.skipped) * rate)), hole.n_frames)
        for hole in holes
        if hole.n_frames
    )
    n_read = n_written = 0
    for block in blocks:
        done = 0  # samples of the block that were yielded
        while due and due[0][0] < n_read + len(block):
            start, n_frames = due.popleft()
            at = max(start - n_read, done)
            if at > done:
                yield block[done:at]
            n_silent = round(n_frames * part.header.n_samples * rate)
            n_written += at - done
            damage.add_hole(n_written / sample_rate, n_silent / sample_rate)
            yield from silent(n_silent, block.shape[1])
            n_written += n_silent
            done = at
        if done < len(block):
            yield block[done:] if done else block
        n_written += len(block) - done
        n_read += len(block)
