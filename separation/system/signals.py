"""Signals that end the program: Ctrl-C (SIGINT), SIGTERM and SIGHUP.

Python raises an exception in the main thread wherever that is. That is right almost everywhere: what is half done is
undone on the way out. It is wrong in an import, whose C code may turn the exception into another, while a finished
song is put in its place, and once the program is over.
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
AGAIN_SECONDS = 0.05  # after which a signal that came at a bad moment is tried again
PATIENCE_SECONDS = 1.0  # in which a second signal is an echo of the first: some programs pass on what we get too


class Stopping:
    """What signals do to this process, from the time that it is made until it ends.

    Until `began` is set a signal ends the process at once. From then on SIGINT raises KeyboardInterrupt, and the others
    SystemExit(128 + number); a later one ends the process at once, for whoever does not want to wait for the tidying
    up. Signals that the caller of the program had ignored stay so: `nohup`, and a shell's background jobs.
    """

    def __init__(self) -> None:
        self.began = False
        self.code: int | None = None  # of a program that is over, which a signal no longer changes
        self._came = 0.0  # when the first signal did
        self._number = 0
        for number in NUMBERS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.code is not None:
            os._exit(self.code)
        if not self.began or (self._number and time.monotonic() > self._came + PATIENCE_SECONDS):
            os._exit(128 + number)
        if self._number:
            return
        if _is_importing(frame):
            # Not `threading`, whose lock the interrupted code may hold.
            _thread.start_new_thread(_again, (number,))
            return
        self._number, self._came = number, time.monotonic()
        self._raise()

    def raise_again(self) -> None:
        """Raise what the signal that came has raised; nothing if none came."""
        if self._number:
            self._raise()

    def _raise(self) -> None:
        raise KeyboardInterrupt if self._number == signal.SIGINT else SystemExit(128 + self._number)


_stopping: Stopping | None = None


def install() -> Stopping:
    """Settle what signals do to this process."""
    global _stopping
    _stopping = Stopping()
    return _stopping


def check() -> None:
    """Raise again what a signal has raised, which is lost in a callback from C. For a progress callback."""
    if _stopping is not None:
        _stopping.raise_again()


def _again(number: int) -> None:
    time.sleep(AGAIN_SECONDS)
    signal.raise_signal(number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals wait until the block is over. In other threads than the main one, where none is handled, does nothing."""
    came: list[int] = []
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            stack.callback(lambda: signal.raise_signal(came[0]) if came else None)
            for number in NUMBERS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: somebody else's, not from Python
                    signal.signal(number, lambda number, _: came.append(number))
                    stack.callback(signal.signal, number, before)
        yield
