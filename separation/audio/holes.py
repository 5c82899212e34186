"""Places the samples that ffmpeg decodes by the timestamps in the file, and fills holes with silence."""

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from separation.audio.damage import MIN_MISSING_SECONDS, Damage
from separation.audio.ffmpeg import DecodedFrame, Decoder
from separation.audio.waveform import silent

_MAX_ALAC_PACKET_SAMPLES = 4096
# The containers, by ffmpeg's names, whose duration ffmpeg knows exactly.
_EXACT = {"mov", "flac", "wv", "tta", "ape", "caf", "aiff", "w64", "wav", "au", "tak", "mpc8"}
_RESTART_SECONDS = 0.5  # timestamps that go back to before this belong to another song that was appended
_MAX_HOLE_SECONDS = 60.0  # in a file of unknown length, a longer hole must come from a wrong timestamp


class Timeline:
    """Where each decoded frame belongs, by its timestamp.

    Timestamps are rounded and jitter, so only a jump of more than `MIN_MISSING_SECONDS` counts as a hole. Once ffmpeg
    has reported an error, a jump of three quarters of a frame is enough.

    Args:
        announced: the seconds that the file announces, or 0.
    """

    def __init__(self, sample_rate: int, announced: float, damage: Damage) -> None:
        self._rate, self._damage = sample_rate, damage
        self._limit = (announced + 1) * sample_rate if announced else 0.0  # the latest plausible time, in samples
        self._origin: int | None = None  # the timestamp of the first sample
        self._due = 0  # the timestamp that the next frame should have

    def silence_before(self, frame: DecodedFrame, n_written: int, *, after_error: bool) -> int:
        """How many samples of silence belong between the `n_written` samples so far and this frame."""
        if frame.start is None:
            self._due += frame.n_samples
            return 0
        if self._origin is None:
            self._origin = self._due = frame.start
        jump, target = frame.start - self._due, frame.start - self._origin
        self._due = frame.start + frame.n_samples
        silence, seconds = target - n_written, n_written / self._rate
        if jump < -MIN_MISSING_SECONDS * self._rate:
            if target < _RESTART_SECONDS * self._rate:
                self._origin = frame.start - n_written
            self._damage.add_note(f"its timestamps go back at {seconds:.2f} s")
            return 0
        is_long = jump > MIN_MISSING_SECONDS * self._rate or (after_error and jump >= 0.75 * frame.n_samples)
        if silence <= 0 or not is_long:
            return 0
        if not self._is_plausible(target, silence):
            self._origin = frame.start - n_written
            self._damage.add_doubt(f"its timestamps jump by {silence / self._rate:.1f} s at {seconds:.2f} s")
            return 0
        self._damage.add_hole(seconds, silence / self._rate)
        return silence

    def _is_plausible(self, target: int, silence: int) -> bool:
        return target <= self._limit if self._limit else silence <= _MAX_HOLE_SECONDS * self._rate


def placed(decoder: Decoder, channels: int, timeline: Timeline) -> Iterator[NDArray[np.float32]]:
    """Blocks `[n, channels]` of everything that ffmpeg decodes, with silence in the holes."""
    frames: deque[DecodedFrame] = deque()  # waiting to be placed
    n_written = n_read = n_placed = 0  # samples: yielded, from ffmpeg, in placed frames
    for data in decoder.blocks():
        block = np.frombuffer(data[: len(data) // (channels * 4) * channels * 4], dtype="<f4").reshape(-1, channels)
        frames += decoder.take_frames(n_read + len(block) - n_placed - sum(frame.n_samples for frame in frames))
        done = 0  # samples of the block that were yielded
        while frames and n_placed < n_read + len(block):
            frame = frames.popleft()
            at = max(n_placed - n_read, done)  # the frame's start in the block
            silence = timeline.silence_before(frame, n_written + at - done, after_error=decoder.n_errors > 0)
            n_placed += frame.n_samples
            if silence:
                if at > done:
                    yield block[done:at]
                n_written, done = n_written + at - done + silence, at
                yield from silent(silence, channels)
        if done < len(block):
            yield block[done:] if done else block
        n_written += len(block) - done
        n_read += len(block)


def announced_seconds(stream: Mapping[str, Any], answer: Mapping[str, Any], container: Sequence[str]) -> float:
    """How long an audio stream is, as its file announces it; 0 if it does not.

    Args:
        stream: the stream in ffprobe's answer.
        container: ffmpeg's names of the format. For formats that are not handled here, ffmpeg only estimates.
    """
    if "caf" in container and not stream["codec_name"].startswith("pcm_"):
        # ffmpeg counts whole packets; the last one may hold less.
        return max(0.0, float(stream.get("duration", 0)) - _MAX_ALAC_PACKET_SAMPLES / int(stream["sample_rate"]))
    if _EXACT & set(container):
        return float(stream.get("duration", 0))
    if "avi" in container:  # ffmpeg's duration is that of the index, which may be cut
        numerator, denominator = map(int, stream.get("time_base", "0/1").split("/"))
        return int(stream.get("nb_frames", 0)) * numerator / denominator
    start = max(0.0, float(stream.get("start_time", 0)))
    if "matroska" in container:  # its duration tag is the time when the stream ends
        tags = {key.lower(): value for key, value in stream.get("tags", {}).items()}
        if found := re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)\0*", tags.get("duration", "")):
            return max(0.0, 3600 * int(found[1]) + 60 * int(found[2]) + float(found[3]) - start)
    if {"matroska", "asf", "flv"} & set(container) and len(answer["streams"]) == 1:
        return max(0.0, float(answer["format"].get("duration", 0)) - start)
    return 0.0
