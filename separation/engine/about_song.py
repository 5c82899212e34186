"""Whatever is said about a song names it: warnings, and what disks and memory are too small for.

Who has a warning about a song logs it to the logger `separation`. The threads of an engine that works on several songs
at once are told apart by a context variable, which `Threads` hand on.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from separation.errors import EstimateError, OutputError
from separation.system.memory import enough_memory

_at_hand: ContextVar[tuple[str, list[str]] | None] = ContextVar("song at hand", default=None)


@contextmanager
def about_song(name: str) -> Iterator[list[str]]:
    """Work on the song of that name; yields the list of the warnings, which grows. May be nested.

    A warning that is logged in the block, or in `Threads` that it gives jobs to, names the song and is given once. So
    do an OutputError and an EstimateError, which the block also raises where memory runs out.
    """
    outer = _at_hand.get()
    warnings: list[str] = outer[1] if outer else []
    token = _at_hand.set(outer or (name, warnings))
    try:
        with enough_memory(repr(name)):
            yield warnings
    except (OutputError, EstimateError) as e:
        if repr(name) not in str(e):
            e.args = (f"{name!r}: {e}",)
        raise
    finally:
        _at_hand.reset(token)


def _is_new(record: logging.LogRecord) -> bool:
    """Whether to give a record. Makes a warning begin with the song's name."""
    song = _at_hand.get()
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


logging.getLogger("separation").addFilter(_is_new)
