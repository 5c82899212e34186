"""Catches messages that libraries print to stderr, because they do not say which song they are about."""

import atexit
import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from functools import cache
from typing import IO

_STDERR = 2  # the descriptor
_BY_LIBRARY = re.compile(rb"^.*libmpg123.*(?:\n|$)|^(?:Note|Warning): .*(?:\n|$)", re.MULTILINE)
_MAX_LINES = 10  # further lines are only counted

# All threads share the descriptor, so only one of them may redirect it at a time.
_redirecting = threading.Lock()


class Chatter:
    """The lines that libmpg123 printed about one song."""

    def __init__(self) -> None:
        self.lines: list[str] = []  # at most _MAX_LINES
        self.n_lines: int = 0

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Redirect stderr to a file. After the block, all other lines are passed on to stderr.

        Keep the block as short as one call into the library, because other threads wait for it.
        """
        with _redirecting, contextlib.ExitStack() as stack:
            try:
                stderr = os.dup(_STDERR)
            except OSError:  # stderr is closed, so nothing is printed
                yield
                return
            stack.callback(os.close, stderr)
            _write(_new_bytes(), stderr)
            try:
                os.dup2(_file().fileno(), _STDERR)
                yield
            finally:
                os.dup2(stderr, _STDERR)
                if written := _new_bytes():
                    self._sort_out(written, stderr)

    def _sort_out(self, written: bytes, stderr: int) -> None:
        """Keep the library's lines, and write the others to `stderr`."""
        for line in _BY_LIBRARY.findall(written):
            if line.startswith(b"Warning: "):  # about harmless oddities
                continue
            self.n_lines += 1
            if len(self.lines) < _MAX_LINES:
                self.lines.append(line.decode(errors="replace").strip())
        _write(_BY_LIBRARY.sub(b"", written), stderr)


# The file is kept, because another thread's write may begin before stderr is restored and end after the file is read.
# Such a late write is passed on at the next redirection or at exit.
_n_read = 0


@cache
def _file() -> IO[bytes]:
    file = tempfile.TemporaryFile("a+b", buffering=0)  # noqa: SIM115  # open until exit

    def finish() -> None:
        with file:
            _write(_new_bytes(), _STDERR)

    atexit.register(finish)
    return file


def _new_bytes() -> bytes:
    """What was written to the file since the last call."""
    global _n_read
    file, content = _file(), b""
    while os.fstat(file.fileno()).st_size > _n_read:
        file.seek(_n_read)  # a late write moves the offset to the end, and the next round reads what is left
        block = file.read()
        content += block
        _n_read += len(block)
    return content


def _write(content: bytes, descriptor: int) -> None:
    if content:
        with contextlib.suppress(OSError):  # stderr leads nowhere
            os.write(descriptor, content)
