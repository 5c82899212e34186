"""The process of the command line: signals, the exit code, and output streams that are closed or full."""

import io
import os
import select
import sys
from importlib import import_module
from typing import Any, NoReturn, TextIO

from separation.system import signals


def run() -> NoReturn:
    """Run the command line and exit: 0 for success, 2 for bad usage or input, 128 + number for a signal, else 1.

    If stdout or stderr cannot be written to, because a disk is full or the reader has gone, songs are still separated.
    If it is stdout, the exit code is 1.
    """
    stopping = signals.install()
    _open_descriptors()
    out, sys.stdout = _forgiving(sys.stdout, 1)
    _, sys.stderr = _forgiving(sys.stderr, 2)
    sys.unraisablehook = _print_unraisable
    main = import_module("separation.cli.main").main
    try:
        stopping.began = True
        code: int = main()
        stopping.code = code
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        code = 130
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0
    sys.stdout.flush()
    if out.error is not None and code == 0:
        if not isinstance(out.error, BrokenPipeError):  # the reader has seen enough, as in `| head`
            print(f"error: cannot write to the standard output: {out.error.strerror}", file=sys.stderr)
        code = 1
    stopping.code = code
    sys.exit(code)


class _Forgiving(io.RawIOBase):
    """A file to write to. It keeps the first error and then discards everything."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self.error: OSError | None = None

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        n_bytes = len(rest)
        try:
            while rest and self.error is None:
                written = self._raw.write(rest)
                if written is None:  # the parent process has made the pipe or terminal non-blocking
                    select.select([], [self._raw], [])
                rest = rest[written or 0 :]
        except OSError as e:
            self.error = e
        return n_bytes

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()


def _forgiving(stream: Any, descriptor: int) -> tuple[_Forgiving, TextIO]:
    """Replace a standard stream, or open one on the descriptor if the parent process has closed it."""
    if stream is None:
        raw = _Forgiving(io.FileIO(descriptor, "w", closefd=False))
        return raw, io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace")
    raw = _Forgiving(getattr(stream.buffer, "raw", stream.buffer))
    buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
    text = io.TextIOWrapper(
        buffer,
        stream.encoding,
        "backslashreplace",  # a song's name may hold characters that the terminal cannot show
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    return raw, text


def _open_descriptors() -> None:
    """Open stdin, stdout and stderr if they are closed. Otherwise a song's file would get that descriptor."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _print_unraisable(raised: Any) -> None:
    """Print an exception that Python cannot raise, unless a signal caused it, which `signals.check` raises again."""
    if not issubclass(raised.exc_type, KeyboardInterrupt | SystemExit):
        sys.__unraisablehook__(raised)
