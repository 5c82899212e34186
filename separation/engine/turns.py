"""Turns on a device that several songs share."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

CHECK_SECONDS = 0.2


class Turns:
    """A lock that threads get in the order in which they ask for it, so that no song waits for more than its turn."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._is_taken = False

    @property
    def is_wanted(self) -> bool:
        """Whether another thread waits for its turn."""
        return bool(self._waiting)

    @contextmanager
    def turn(self, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Wait for the turn, and pass it on at the end of the block. `waiting` is called meanwhile; it may raise."""
        with self._lock:
            ticket = None if not self._is_taken else threading.Event()
            self._is_taken = True
            if ticket:
                self._waiting.append(ticket)
        try:
            while ticket and not ticket.wait(CHECK_SECONDS):
                waiting()
            yield
        finally:
            self._leave(ticket)

    def _leave(self, ticket: threading.Event | None) -> None:
        """Pass the turn on, or give up waiting for it."""
        with self._lock:
            if ticket and ticket in self._waiting:
                self._waiting.remove(ticket)
            elif self._waiting:
                self._waiting.popleft().set()
            else:
                self._is_taken = False
