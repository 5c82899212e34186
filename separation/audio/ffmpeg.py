"""ffmpeg and ffprobe: what is in a file, its samples with their times, and what the programs complain of.

All that is run of ffmpeg is run here. Works on every platform: pipes are read by threads, not by select.
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
from typing import IO, Any, NamedTuple

from separation.errors import AudioError

PATIENCE_SECONDS = 30.0  # for a word from ffprobe and for each next block from ffmpeg

# Those that hold audio and recognise it by its content. No playlists (hls, concat, dash), which can name other files.
_DEMUXERS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,dsf,dts,dtshd,eac3,flac,flv,iff,loas,matroska,mlp,mov,mp3,mpc,mpc8,mpeg,mpegts,"
    "mxf,nut,ogg,oma,rm,tak,truehd,tta,voc,w64,wav,wtv,wv,xwma"
)
_PIPE_BYTES = 2**18
_GATHER_SECONDS = 0.003  # in which many lines come: reading them one by one costs more than all the rest
_ERROR = re.compile(r"^(?:\[[^\]]*\] )*\[(?:error|fatal|panic)\] (.*)$")
_FRAME = re.compile(rb"^\[Parsed_ashowinfo.{5,30}\] n:\d+ pts:(\w+).*? rate:(\d+) nb_samples:(\d+)", re.MULTILINE)
_HARMLESS = "non monotonically increasing dts"  # of its output, where the file's times go back
_MAX_ERRORS = 1000  # kept


def _guarded_input(path: Path | None, demuxer: str | None) -> list[str]:
    """No name is taken for an option or for another protocol, and no file leads to others."""
    guard = ["-protocol_whitelist", "file,pipe", "-format_whitelist", _DEMUXERS, "-err_detect", "crccheck"]
    if demuxer:
        guard += ["-f", demuxer]
    return [*guard, "-i", "pipe:0" if path is None else f"file:{path.absolute()}"]


def _program(program: str, name: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise AudioError(f"{name} is not audio that libsndfile reads; install ffmpeg for M4A, AAC, video and others.")
    return found


class UnreadableError(AudioError):
    """A file of which ffprobe can make nothing."""


def is_installed() -> bool:
    return shutil.which("ffmpeg") is not None and shutil.which("ffprobe") is not None


def _cannot_run(program: str, why: str, name: str) -> AudioError:
    return AudioError(f"{program} cannot run ({why}), so {name} was not read; install ffmpeg again.")


def _check_runs(program: str, name: str) -> None:
    """Raise `AudioError` if the program is broken, so that what it did not do is not laid on the song."""
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
        raise _cannot_run(program, f"it does not answer within {e.timeout:g} s", name) from e
    if result.returncode != 0:
        lines = result.stderr.decode(errors="replace").split("\n")
        raise _cannot_run(program, next(filter(None, map(str.strip, lines)), f"exit code {result.returncode}"), name)


def probe(path: Path, name: str, *options: str) -> dict[str, Any]:
    """What ffprobe says of a file, asked with these options, and what it complains of: its `errors`, a list of lines.

    Raises `AudioError` if it cannot read the file, or cannot run.
    """
    _program("ffmpeg", name)
    program = _program("ffprobe", name)
    command = [program, "-v", "level+error", *_guarded_input(path, None), *options, "-of", "json"]
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_SECONDS, check=False
        )
    except OSError as e:
        raise _cannot_run(program, e.strerror or str(e), name) from e
    except subprocess.TimeoutExpired as e:
        raise AudioError(
            f"{name} is damaged: ffmpeg cannot tell what is in it within {e.timeout:g} s; get the file again."
        ) from e
    if result.returncode != 0:
        _check_runs(program, name)
        raise UnreadableError(f"{name} is not audio that libsndfile or ffmpeg can read; choose an audio file.")
    answer: dict[str, Any] = json.loads(result.stdout.decode(errors="replace"))
    answer["errors"] = [found[1] for line in _lines(result.stderr) if (found := _ERROR.match(line))]
    return answer


def _lines(output: bytes) -> list[str]:
    return output.decode(errors="replace").splitlines()


class Frame(NamedTuple):
    """Samples that came out of a decoder together."""

    start: int | None  # the first one's time by the file, in samples from the file's start; None if it has none
    n_samples: int


@dataclass
class _Words:
    """What ffmpeg writes to stderr, read by a thread: frames in the order of its output, and errors."""

    frames: deque[Frame] = field(default_factory=deque)
    errors: list[str] = field(default_factory=list)
    n_errors: int = 0
    ended: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    def read(self, pipe: IO[bytes], sample_rate: int) -> None:
        rest = b""
        while data := pipe.read(_PIPE_BYTES):
            time.sleep(_GATHER_SECONDS)
            whole, newline, rest = (rest + data).rpartition(b"\n")
            if newline:
                self._take(whole, sample_rate)
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def _take(self, words: bytes, sample_rate: int) -> None:
        frames = []
        for pts, rate, n_samples in _FRAME.findall(words):
            n = int(n_samples)
            start = None if pts == b"NOPTS" else int(pts)
            if int(rate) != sample_rate:  # the stream changes within: ffmpeg resamples what follows
                n, start = n * sample_rate // int(rate), None
            frames.append(Frame(start, n))
        errors = []
        if b"[error]" in words or b"[fatal]" in words or b"[panic]" in words:
            errors = [found[1] for line in _lines(words) if (found := _ERROR.match(line))]
            errors = [error for error in errors if _HARMLESS not in error]
        with self.changed:
            self.frames.extend(frames)
            self.n_errors += len(errors)
            self.errors += errors[: _MAX_ERRORS - len(self.errors)]
            self.changed.notify_all()


class Decoding:
    """A running ffmpeg that writes one audio stream's samples as float32, a sample's channels side by side.

    Use as a context manager: its end ends the program. The file is at `path`, or comes as the pieces of `stdin`, whose
    format is named with them. `options` choose the stream and the channels of the output; `joining` is a filter that
    makes it of several instead. `filters` come after all.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        options: list[str],
        *,
        sample_rate: int,
        block_bytes: int,
        filters: tuple[str, ...] = (),
        joining: str = "",
        stdin: tuple[str, Iterator[bytes]] | None = None,
    ) -> None:
        program = _program("ffmpeg", name)
        source = _guarded_input(None, stdin[0]) if stdin else _guarded_input(path, None)
        # -v repeat+level+info: all lines, each with its level. ashowinfo writes one for each frame.
        words = ["-hide_banner", "-nostdin", "-nostats", "-v", "repeat+level+info"]
        chain = ",".join(("ashowinfo", *filters))
        output = (
            ["-filter_complex", f"{joining},{chain}[sound]", "-map", "[sound]"] if joining else ["-filter:a", chain]
        )
        output += ["-f", "f32le", "-ar", str(sample_rate), "pipe:1"]
        self._name, self._words = name, _Words()
        try:
            self._process = subprocess.Popen(
                [program, *words, *source, *options, *output],
                stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
            )
        except OSError as e:
            raise _cannot_run(program, e.strerror or str(e), name) from e
        self._program, self._fell_silent = program, False
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._data: queue.Queue[bytes | bytearray] = queue.Queue(maxsize=4)
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._read_samples, args=(self._process.stdout, block_bytes), daemon=True),
            threading.Thread(target=self._words.read, args=(self._process.stderr, sample_rate), daemon=True),
        ]
        if stdin is not None:
            assert self._process.stdin is not None
            self._threads.append(threading.Thread(target=_write, args=(self._process.stdin, stdin[1]), daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def errors(self) -> list[str]:
        """The first of ffmpeg's error lines; there are `n_errors`."""
        return self._words.errors

    @property
    def n_errors(self) -> int:
        return self._words.n_errors

    def _read_samples(self, pipe: IO[bytes], n_bytes: int) -> None:
        while not self._stopped.is_set():
            block = bytearray(n_bytes)
            view, n_read = memoryview(block), 0
            while n_read < n_bytes and (n := pipe.readinto(view[n_read:])):  # type: ignore[attr-defined]
                n_read += n
            self._put(block if n_read == n_bytes else block[:n_read])
            if n_read < n_bytes:
                break
        self._put(b"")

    def _put(self, data: bytes | bytearray) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._data.put(data, timeout=0.5)
                return

    def blocks(self) -> Iterator[bytes | bytearray]:
        """All samples, in blocks of `block_bytes`, of which the last one may be shorter. A silent ffmpeg is ended."""
        while True:
            try:
                data = self._data.get(timeout=PATIENCE_SECONDS)
            except queue.Empty:
                self._fell_silent = True
                self._process.kill()
                data = self._data.get()
            if not data:
                return
            yield data

    def take_frames(self, n_samples: int) -> list[Frame]:
        """The next frames, which together have at least so many samples, where there are as many."""
        taken: list[Frame] = []
        with self._words.changed:
            while n_samples > 0:
                self._words.changed.wait_for(lambda: self._words.frames or self._words.ended, PATIENCE_SECONDS)
                if not self._words.frames:
                    break
                frame = self._words.frames.popleft()
                n_samples -= frame.n_samples
                taken.append(frame)
        return taken

    def wait(self) -> int:
        """ffmpeg's exit code, once it has ended and its last words are read.

        Raises `AudioError` if it failed because it cannot run at all.
        """
        code = self._process.wait()
        self._threads[1].join(PATIENCE_SECONDS)
        if code != 0 and not self._fell_silent:
            _check_runs(self._program, self._name)
        return code

    def __enter__(self) -> "Decoding":
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._process.kill()  # does nothing once it has ended
        self._process.wait()
        for thread in self._threads:
            thread.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not yet written to an ended program
                    pipe.close()


def _write(pipe: IO[bytes], parts: Iterator[bytes]) -> None:
    with contextlib.suppress(OSError):  # the program has ended before it read all
        for part in parts:
            rest = memoryview(part)
            while rest:
                rest = rest[pipe.write(rest) :]
        pipe.close()
