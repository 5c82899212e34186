"""The song that a piece of work belongs to: it is named in warnings, and in errors about disks and memory.

Code that has a warning about a song logs it to the logger `separation`. A context variable tells apart the threads of
an engine that works on several songs; `Threads` passes it on.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from separation.errors import EstimateError, OutputError
from separation.system.memory import enough_memory

_current: ContextVar[tuple[str, list[str]] | None] = ContextVar("current song", default=None)  # its name and warnings


@contextmanager
def song_context(name: str) -> Iterator[list[str]]:
    """Names the song in warnings and errors from the block; yields the list of its warnings, which grows.

    A warning that is logged in the block, or in `Threads` that get their jobs there, starts with the song's name and is
    logged once. The message of an OutputError or EstimateError starts with it too. Running out of memory becomes an
    EstimateError. Inside another `song_context`, the outer song's name is used.
    """
    outer = _current.get()
    warnings: list[str] = outer[1] if outer else []
    token = _current.set(outer or (name, warnings))
    try:
        with enough_memory(repr(name)):
            yield warnings
    except (OutputError, EstimateError) as e:
        if repr(name) not in str(e):
            e.args = (f"{name!r}: {e}",)
        raise
    finally:
        _current.reset(token)


def _names_song(record: logging.LogRecord) -> bool:
    """Logging filter: puts the song's name before a warning, and drops one that was already logged."""
    song = _current.get()
    if song is None or record.levelno < logging.WARNING:
        return True
    name, warnings = song
    message = record.getMessage()
    if not message.startswith(repr(name)):
        message = f"{name!r}: {message}"
    record.msg, record.args = message, ()
    if message in warnings:
        return False
    warnings.append(message)
    return True


logging.getLogger("separation").addFilter(_names_song)
