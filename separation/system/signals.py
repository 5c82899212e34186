"""Signals that end the program: Ctrl-C (SIGINT), SIGTERM, SIGHUP, and SIGBREAK on Windows.

A signal raises an exception in the main thread, wherever that thread is; unfinished work is undone on the way out.
There are three exceptions to this rule. During an import the signal is tried again later, because C code may turn
its exception into another. While a finished song is moved into place, the signal waits. Once the program has finished,
the signal no longer changes the exit code.
"""

import _thread
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
RETRY_SECONDS = 0.05  # the delay before a signal that arrived during an import is raised again
ECHO_SECONDS = 1.0  # a second signal this soon echoes the first: some programs forward signals that we also receive


class Stopping:
    """Handles the signals that this process receives, from construction on.

    Until `began` is set, a signal ends the process at once. After that, SIGINT raises KeyboardInterrupt and the others
    raise SystemExit(128 + number). A later signal ends the process without waiting for it to clean up. Signals that the
    parent process ignores stay ignored, as `nohup` and a shell's background jobs need.
    """

    def __init__(self) -> None:
        self.began = False
        self.code: int | None = None  # the exit code, once the program has finished
        self._number = 0  # the first signal
        self._time = 0.0  # when it arrived
        for number in NUMBERS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.code is not None:
            os._exit(self.code)
        if not self.began or (self._number and time.monotonic() > self._time + ECHO_SECONDS):
            os._exit(128 + number)
        if self._number:
            return
        if _is_importing(frame):
            # Not `threading`: the interrupted code may hold its lock.
            _thread.start_new_thread(_retry, (number,))
            return
        self._number, self._time = number, time.monotonic()
        self._raise()

    def raise_again(self) -> None:
        """Raise the exception of the signal that arrived, if any."""
        if self._number:
            self._raise()

    def _raise(self) -> None:
        raise KeyboardInterrupt if self._number == signal.SIGINT else SystemExit(128 + self._number)


_stopping: Stopping | None = None


def install() -> Stopping:
    """Start to handle signals."""
    global _stopping
    _stopping = Stopping()
    return _stopping


def check() -> None:
    """Raise the exception of a signal again. Progress callbacks call this, because C code may have swallowed it."""
    if _stopping is not None:
        _stopping.raise_again()


def _retry(number: int) -> None:
    time.sleep(RETRY_SECONDS)
    signal.raise_signal(number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay signals until the block ends. Does nothing outside the main thread, which alone handles signals."""
    pending: list[int] = []
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            stack.callback(lambda: signal.raise_signal(pending[0]) if pending else None)
            for number in NUMBERS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: a handler that was not set from Python
                    signal.signal(number, lambda number, _: pending.append(number))
                    stack.callback(signal.signal, number, before)
        yield
