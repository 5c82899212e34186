"""What libraries print to stderr themselves, which a user could not assign to a song: caught, and told in one place."""

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator

_STDERR = 2  # the descriptor
_OF_LIBRARY = re.compile(rb"^.*libmpg123.*(?:\n|$)|^(?:Note|Warning): .*(?:\n|$)", re.MULTILINE)

# The descriptor is the whole program's: one at a time may turn it aside.
_turned_aside = threading.Lock()


class Chatter:
    """Lines of libmpg123 while `caught` was active, of one song."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.n_lines = 0

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Within, the descriptor of stderr leads to a file; what others wrote there goes on to stderr afterwards.

        For as short as can be, a call into the library, since threads that do the same wait for each other.
        """
        with _turned_aside, contextlib.ExitStack() as stack:
            try:
                before = os.dup(_STDERR)
            except OSError:  # stderr is closed: nothing is printed
                yield
                return
            stack.callback(os.close, before)
            file = stack.enter_context(tempfile.TemporaryFile(buffering=0))
            try:
                os.dup2(file.fileno(), _STDERR)
                yield
            finally:
                os.dup2(before, _STDERR)
                if file.seek(0, os.SEEK_END):
                    file.seek(0)
                    self._take(file.read(), before)

    def _take(self, written: bytes, stderr: int) -> None:
        for found in _OF_LIBRARY.findall(written):
            if found.startswith(b"Warning: "):  # of what is odd and does no harm
                continue
            self.n_lines += 1
            if len(self.lines) < 10:
                self.lines.append(found.decode(errors="replace").strip())
        with contextlib.suppress(OSError):
            os.write(stderr, _OF_LIBRARY.sub(b"", written))
