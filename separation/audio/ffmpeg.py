"""Runs ffmpeg and ffprobe: what a file contains, its samples with their timestamps, and the errors that they report.

Pipes are read by threads instead of select, so that it works on every platform.
"""

import contextlib
import json
import queue
import re
import shutil
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from separation.audio.waveform import BLOCK_SAMPLES
from separation.errors import AudioError

PATIENCE_SECONDS = 30.0  # the time limit for ffprobe's answer, and for each block from ffmpeg

# The formats that hold audio and are recognised by content. Playlists (hls, concat, dash) could name other files.
_DEMUXERS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dts,dtshd,eac3,flac,flv,iff,loas,matroska,mlp,mov,mp3,mpc,mpc8,mpeg,mpegts,"
    "mxf,nut,ogg,oma,rm,tak,truehd,tta,voc,w64,wav,wtv,wv,xwma"
)
_SAMPLE_BYTES = 4  # float32
_LOG_BYTES = 2**18
_GATHER_SECONDS = 0.003  # the log is read with this pause, because parsing its lines one by one is slow
_ERROR = re.compile(r"^(?:\[[^\]]*\] )*\[(?:error|fatal|panic)\] (.*)$")
_FRAME = re.compile(rb"^\[Parsed_ashowinfo.{5,30}\] n:\d+ pts:(\w+).*? rate:(\d+) nb_samples:(\d+)", re.MULTILINE)
_HARMLESS = "non monotonically increasing dts"  # reported about ffmpeg's output if timestamps in the file go back
_MAX_ERRORS = 1000  # further errors are only counted


class UnreadableError(AudioError):
    """ffprobe cannot read the file."""


def is_installed() -> bool:
    return shutil.which("ffmpeg") is not None and shutil.which("ffprobe") is not None


def _find_program(program: str, name: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise AudioError(
            f"{name} is not audio that libsndfile can read: install ffmpeg, which reads M4A, AAC, video and others"
        )
    return found


def _input(source: Path | None, demuxer: str | None = None) -> list[str]:
    """Options to read a file, or stdin if None.

    The file's name cannot act as an option or a protocol, and its content cannot make ffmpeg open other files.
    """
    guard = ["-protocol_whitelist", "file,pipe", "-format_whitelist", _DEMUXERS, "-err_detect", "crccheck"]
    if demuxer:
        guard += ["-f", demuxer]
    return [*guard, "-i", "pipe:0" if source is None else f"file:{source.absolute()}"]


def _cannot_run(program: str, reason: str, name: str) -> AudioError:
    return AudioError(f"{program} cannot run ({reason}), so {name} was not read: install ffmpeg again")


def _check_runs(program: str, name: str) -> None:
    """Raise `AudioError` if the program itself is broken, so that the song does not get the blame."""
    try:
        result = subprocess.run(
            [program, "-version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
    except OSError as e:
        raise _cannot_run(program, e.strerror or str(e), name) from e
    except subprocess.TimeoutExpired as e:
        raise _cannot_run(program, f"no answer within {e.timeout:g} s", name) from e
    if result.returncode != 0:
        lines = [line.strip() for line in _lines(result.stderr)]
        raise _cannot_run(program, next(filter(None, lines), f"exit code {result.returncode}"), name)


def probe(path: Path, name: str, *options: str) -> dict[str, Any]:
    """ffprobe's answer to these options, with the lines of its errors under `errors`.

    Raises `UnreadableError` if it cannot read the file, and `AudioError` if it cannot run or does not answer.
    """
    _find_program("ffmpeg", name)
    program = _find_program("ffprobe", name)
    command = [program, "-v", "level+error", *_input(path), *options, "-of", "json"]
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_SECONDS, check=False
        )
    except OSError as e:
        raise _cannot_run(program, e.strerror or str(e), name) from e
    except subprocess.TimeoutExpired as e:
        fault = f"ffprobe gave no answer within {e.timeout:g} s"
        raise AudioError(f"{name} is damaged ({fault}): get the file again") from e
    if result.returncode != 0:
        _check_runs(program, name)
        raise UnreadableError(f"{name} is not audio that libsndfile or ffmpeg can read: choose an audio file")
    answer: dict[str, Any] = json.loads(result.stdout.decode(errors="replace"))
    answer["errors"] = _errors(result.stderr)
    return answer


def picture(path: Path, stream: int, name: str) -> bytes:
    """The first picture in a stream of a file, as it is encoded there; empty if ffmpeg cannot read it."""
    program = _find_program("ffmpeg", name)
    options = ["-map", f"0:{stream}", "-frames:v", "1", "-c:v", "copy", "-f", "image2pipe", "pipe:1"]
    command = [program, "-nostdin", "-v", "quiet", *_input(path), *options]
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_SECONDS, check=False
        )
    except OSError as e:
        raise _cannot_run(program, e.strerror or str(e), name) from e
    except subprocess.TimeoutExpired as e:
        raise AudioError(f"{name} is damaged (no cover within {e.timeout:g} s): get the file again") from e
    return result.stdout


def _lines(output: bytes) -> list[str]:
    return output.decode(errors="replace").splitlines()


def _errors(output: bytes) -> list[str]:
    return [found[1] for line in _lines(output) if (found := _ERROR.match(line))]


class DecodedFrame(NamedTuple):
    """Samples that came out of a decoder together."""

    start: int | None  # the first one's timestamp, in samples; None if the file has none
    n_samples: int  # per channel


@dataclass
class _Log:
    """What ffmpeg writes to stderr, read by a thread: the frames in the order of its output, and errors."""

    frames: deque[DecodedFrame] = field(default_factory=deque)
    errors: list[str] = field(default_factory=list)
    n_errors: int = 0
    has_ended: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    def read(self, pipe: IO[bytes], sample_rate: int) -> None:
        rest = b""
        while data := pipe.read(_LOG_BYTES):
            time.sleep(_GATHER_SECONDS)
            whole_lines, newline, rest = (rest + data).rpartition(b"\n")
            if newline:
                self._parse(whole_lines, sample_rate)
        with self.changed:
            self.has_ended = True
            self.changed.notify_all()

    def _parse(self, lines: bytes, sample_rate: int) -> None:
        frames = []
        for pts, rate, n_samples in _FRAME.findall(lines):
            n = int(n_samples)
            start = None if pts == b"NOPTS" else int(pts)
            if int(rate) != sample_rate:  # the rate changes within the stream: ffmpeg resamples what follows
                n, start = n * sample_rate // int(rate), None
            frames.append(DecodedFrame(start, n))
        errors = []
        if b"[error]" in lines or b"[fatal]" in lines or b"[panic]" in lines:
            errors = [error for error in _errors(lines) if _HARMLESS not in error]
        with self.changed:
            self.frames.extend(frames)
            self.n_errors += len(errors)
            self.errors += errors[: _MAX_ERRORS - len(self.errors)]
            self.changed.notify_all()


class Input(NamedTuple):
    """A file, or a stream of bytes in the format that ffmpeg calls `demuxer`."""

    path: Path
    demuxer: str | None = None
    blocks: Iterator[bytes] | None = None

    @property
    def is_stream(self) -> bool:
        return self.blocks is not None

    def arguments(self) -> list[str]:
        return _input(None, self.demuxer) if self.is_stream else _input(self.path)


@dataclass(frozen=True)
class Output:
    """Which audio of a file ffmpeg decodes, and how.

    Args:
        sample_rate: hertz.
        channels: in the output.
        options: choose the stream and its channels.
        filters: are applied to the stream.
        joining: a filter that makes one stream of several, in place of `options` that choose one.
    """

    sample_rate: int
    channels: int
    options: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    joining: str = ""

    def arguments(self) -> list[str]:
        chain = ",".join(("ashowinfo", *self.filters))  # ashowinfo logs a line for each frame
        if self.joining:
            filters = ["-filter_complex", f"{self.joining},{chain}[sound]", "-map", "[sound]"]
        else:
            filters = ["-filter:a", chain]
        return [*self.options, *filters, "-f", "f32le", "-ar", str(self.sample_rate), "pipe:1"]


class Decoder:
    """A running ffmpeg that writes interleaved float32 samples.

    Use it as a context manager, which ends the program. `name` is the song's name in quotes.
    """

    def __init__(self, source: Input, output: Output, name: str) -> None:
        program = _find_program("ffmpeg", name)
        # repeat+level+info: do not merge repeated lines, and mark each line with its level.
        quiet = ["-hide_banner", "-nostdin", "-nostats", "-v", "repeat+level+info"]
        self._program, self._name, self._log = program, name, _Log()
        self._timed_out = False
        try:
            self._process = subprocess.Popen(
                [program, *quiet, *source.arguments(), *output.arguments()],
                stdin=subprocess.PIPE if source.is_stream else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
            )
        except OSError as e:
            raise _cannot_run(program, e.strerror or str(e), name) from e
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        block_bytes = BLOCK_SAMPLES * output.channels * _SAMPLE_BYTES
        self._blocks: queue.Queue[bytes | bytearray] = queue.Queue(maxsize=4)
        self._is_closed = threading.Event()
        self._log_reader = threading.Thread(
            target=self._log.read, args=(self._process.stderr, output.sample_rate), daemon=True
        )
        self._threads = [
            self._log_reader,
            threading.Thread(target=self._read_samples, args=(self._process.stdout, block_bytes), daemon=True),
        ]
        if source.blocks is not None:
            assert self._process.stdin is not None
            writer = threading.Thread(target=_write, args=(self._process.stdin, source.blocks), daemon=True)
            self._threads.append(writer)
        for thread in self._threads:
            thread.start()

    @property
    def errors(self) -> list[str]:
        """ffmpeg's error lines; only the first ones if there are many."""
        return self._log.errors

    @property
    def n_errors(self) -> int:
        return self._log.n_errors

    def _read_samples(self, pipe: IO[bytes], n_bytes: int) -> None:
        while not self._is_closed.is_set():
            block = bytearray(n_bytes)
            view, n_read = memoryview(block), 0
            while n_read < n_bytes and (n := pipe.readinto(view[n_read:])):  # type: ignore[attr-defined]
                n_read += n
            self._put(block if n_read == n_bytes else block[:n_read])
            if n_read < n_bytes:
                break
        self._put(b"")

    def _put(self, data: bytes | bytearray) -> None:
        while not self._is_closed.is_set():
            with contextlib.suppress(queue.Full):
                self._blocks.put(data, timeout=0.5)
                return

    def blocks(self) -> Iterator[bytes | bytearray]:
        """All samples in blocks of one size, the last of which may be shorter. Kills ffmpeg if it stops answering."""
        while True:
            try:
                data = self._blocks.get(timeout=PATIENCE_SECONDS)
            except queue.Empty:
                self._timed_out = True
                self._process.kill()
                data = self._blocks.get()
            if not data:
                return
            yield data

    def take_frames(self, n_samples: int) -> list[DecodedFrame]:
        """The next frames that together have at least `n_samples`, or all that are left."""
        taken: list[DecodedFrame] = []
        with self._log.changed:
            while n_samples > 0:
                self._log.changed.wait_for(lambda: self._log.frames or self._log.has_ended, PATIENCE_SECONDS)
                if not self._log.frames:
                    break
                frame = self._log.frames.popleft()
                n_samples -= frame.n_samples
                taken.append(frame)
        return taken

    def wait(self) -> int:
        """Wait for the end of ffmpeg and of its log; returns the exit code.

        Raises `AudioError` if ffmpeg failed because it cannot run at all.
        """
        code = self._process.wait()
        self._log_reader.join(PATIENCE_SECONDS)
        if code != 0 and not self._timed_out:
            _check_runs(self._program, self._name)
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed.set()
        self._process.kill()  # does nothing if it has ended
        self._process.wait()
        for thread in self._threads:
            thread.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):  # bytes that were not written yet
                    pipe.close()


def _write(pipe: IO[bytes], blocks: Iterator[bytes]) -> None:
    with contextlib.suppress(OSError):  # the program has ended before it read everything
        for block in blocks:
            rest = memoryview(block)
            while rest:
                rest = rest[pipe.write(rest) :]
        pipe.close()
