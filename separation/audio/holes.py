"""Samples that ffmpeg decodes, each at the time that the file gives it: what is missing between is silence."""

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from separation.audio.damage import MIN_MISSING_SECONDS, Damage
from separation.audio.ffmpeg import Decoding, Frame
from separation.audio.waveform import silent

_PACKET_SAMPLES = 4096  # of ALAC, at most
_TELLING = {"mov", "flac", "wv", "tta", "ape", "caf", "aiff", "w64", "wav", "au", "tak", "mpc8"}
_START_SECONDS = 0.5  # times that go back to before this are of another song, appended
_MAX_HOLE_SECONDS = 60.0  # a longer one, in a file that does not tell its length, is a wrong time


class Timeline:
    """Where each frame belongs, by its own time, after those before it.

    Times in files are rounded and jitter: only a jump of more than `MIN_MISSING_SECONDS` is a hole, or one of most of a
    frame once ffmpeg has complained.
    """

    def __init__(self, decoding: Decoding, sample_rate: int, announced: float, damage: Damage) -> None:
        self._decoding, self._rate, self._damage = decoding, sample_rate, damage
        self._limit = (announced + 1) * sample_rate if announced else 0.0  # samples
        self._origin: int | None = None  # the file's time of the first sample
        self._next = 0  # the time at which the next frame should start

    def silence_before(self, frame: Frame, n_written: int) -> int:
        """The samples of silence that are due between the `n_written` ones so far and the frame."""
        if frame.start is None:
            self._next += frame.n_samples
            return 0
        if self._origin is None:
            self._origin = self._next = frame.start
        jump, target = frame.start - self._next, frame.start - self._origin
        self._next = frame.start + frame.n_samples
        tolerance = MIN_MISSING_SECONDS * self._rate
        silence = target - n_written
        seconds = n_written / self._rate
        if jump < -tolerance:
            if target < _START_SECONDS * self._rate:
                self._origin = frame.start - n_written
            self._damage.note(f"its times go back at {seconds:.2f} s")
        elif silence > 0 and (jump > tolerance or (self._decoding.n_errors and jump >= 0.75 * frame.n_samples)):
            if target > self._limit if self._limit else silence > _MAX_HOLE_SECONDS * self._rate:
                self._origin = frame.start - n_written
                self._damage.doubt(f"its times jump by {silence / self._rate:.1f} s at {seconds:.2f} s")
                return 0
            self._damage.hole(seconds, silence / self._rate)
            return silence
        return 0


def placed(decoding: Decoding, channels: int, timeline: Timeline) -> Iterator[NDArray[np.float32]]:
    """Blocks `[n, channels]` of all that ffmpeg decodes, with silence where by the file's times some is missing."""
    frames: deque[Frame] = deque()
    n_written = n_read = n_framed = 0  # samples: yielded, out of ffmpeg, in the frames that were placed
    for data in decoding.blocks():
        block = np.frombuffer(data[: len(data) // (channels * 4) * channels * 4], dtype="<f4").reshape(-1, channels)
        frames += decoding.take_frames(n_read + len(block) - n_framed - sum(frame.n_samples for frame in frames))
        done = 0
        while frames and n_framed < n_read + len(block):
            frame = frames.popleft()
            at = n_framed - n_read  # in the block
            silence = timeline.silence_before(frame, n_written + max(at - done, 0))
            n_framed += frame.n_samples
            if silence:
                at = max(at, done)
                if at > done:
                    yield block[done:at]
                n_written, done = n_written + at - done + silence, at
                yield from silent(silence, channels)
        if done < len(block):
            yield block[done:] if done else block
        n_written += len(block) - done
        n_read += len(block)


def announced_seconds(stream: Mapping[str, Any], answer: Mapping[str, Any], container: Sequence[str]) -> float:
    """How long an audio stream is by its file, of which ffprobe gave this answer; 0 where it does not say.

    Of other containers than these ffmpeg gives no more than an estimate.
    """
    if "caf" in container and not stream["codec_name"].startswith("pcm_"):
        # ffmpeg counts whole packets, of which the last one may hold less.
        return max(0.0, float(stream.get("duration", 0)) - _PACKET_SAMPLES / int(stream["sample_rate"]))
    if _TELLING & set(container):
        return float(stream.get("duration", 0))
    if "avi" in container:  # its duration is that of the index, which may be cut
        numerator, denominator = map(int, stream.get("time_base", "0/1").split("/"))
        return int(stream.get("nb_frames", 0)) * numerator / denominator
    start = max(0.0, float(stream.get("start_time", 0)))
    if "matroska" in container:  # tells when the stream ends
        tags = {key.lower(): value for key, value in stream.get("tags", {}).items()}
        if found := re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)\0*", tags.get("duration", "")):
            return max(0.0, 3600 * int(found[1]) + 60 * int(found[2]) + float(found[3]) - start)
    if {"matroska", "asf", "flv"} & set(container) and len(answer["streams"]) == 1:
        return max(0.0, float(answer["format"].get("duration", 0)) - start)
    return 0.0
