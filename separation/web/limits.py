"""Limits on the songs that a server accepts."""

from separation.settings import positive


def max_seconds() -> float:
    """The longest song: SEPARATION_MAX_SECONDS, or three hours. Stems of three hours still fit a WAV file (4 GB)."""
    return positive("SEPARATION_MAX_SECONDS", 3 * 60 * 60)


def max_mib() -> float:
    """The largest file: SEPARATION_MAX_MIB, or 4096 MiB."""
    return positive("SEPARATION_MAX_MIB", 4096)
