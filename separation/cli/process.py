"""The process of the command line: streams that may be closed or full, signals, and the exit code.

`run` is what the command `separation` and `python -m separation` call, by way of `separation.cli.start`.
"""

import io
import os
import select
import sys
from importlib import import_module
from typing import Any, NoReturn, TextIO

from separation.system import signals


def run() -> NoReturn:
    """Run the command line and exit: 0 success, 2 bad input or usage, 128 + a signal's number, 1 anything else.

    What cannot be printed, because a disk is full or a reader has gone, never keeps songs from being done. Of stdout it
    makes the exit code 1 in the end.
    """
    stopping = signals.install()
    _open_descriptors()
    out, sys.stdout = _lasting(sys.stdout, 1)
    _, sys.stderr = _lasting(sys.stderr, 2)
    sys.unraisablehook = _unraisable
    # PyTorch's threads then wait asleep. Spinning, as they would, they take the cores from the fused layers' threads
    # and from other processes: two songs at once took longer than one after the other. Read as PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
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
        if not isinstance(out.error, BrokenPipeError):  # whoever read it has seen enough: `| head`
            print(f"error: cannot write to the standard output: {out.error.strerror}", file=sys.stderr)
        code = 1
    stopping.code = code
    sys.exit(code)


class _Lasting(io.RawIOBase):
    """A file that is written to. After an error, which it keeps, it takes everything and writes nothing."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self.error: OSError | None = None

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        n_bytes = len(rest)
        try:
            while rest and self.error is None:
                written = self._raw.write(rest)
                if written is None:  # a pipe or a terminal that the caller of the program has made non-blocking
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


def _lasting(stream: Any, descriptor: int) -> tuple[_Lasting, TextIO]:
    """The stream as one whose errors are kept; None, whose descriptor was closed, as one that nobody reads."""
    if stream is None:
        raw = _Lasting(io.FileIO(descriptor, "w", closefd=False))
        return raw, io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace")
    raw = _Lasting(getattr(stream.buffer, "raw", stream.buffer))
    buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
    text = io.TextIOWrapper(
        buffer,
        stream.encoding,
        "backslashreplace",  # a song's name may hold what the terminal cannot show
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    return raw, text


def _open_descriptors() -> None:
    """Open those of stdin, stdout and stderr that are closed: else songs get them, and what libraries print."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _unraisable(raised: Any) -> None:
    """An exception that Python cannot pass on; `signals.check` raises a signal's again."""
    if not issubclass(raised.exc_type, KeyboardInterrupt | SystemExit):
        sys.__unraisablehook__(raised)
