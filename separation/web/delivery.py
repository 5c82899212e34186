"""The size of stems, compared with what Cog's server can deliver: it holds all of a song's stems in memory."""

import logging

from separation.audio.options import OutputOptions
from separation.engine.separator import Separator
from separation.system.memory import total_memory_bytes

UPLOAD_SECONDS = 25  # that Cog allows for the upload of a file
UPLOADED_PER_SECOND = 10_000_000  # bytes; an assumption
ANSWERED = 8.2  # bytes of the server's memory per byte of stems that it answers with as data URIs; measured
USABLE = 0.8  # of the memory; the models have the rest
FLAC_RATIO = 0.64  # of the size of the same samples as integers; measured on loud stems at 24 bits

logger: logging.Logger = logging.getLogger("separation")


class DeliveredSeparator(Separator):
    """A separator that warns before a song's models run if Cog's server may fail to deliver the stems."""

    def on_decoded(self, duration_seconds: float, options: OutputOptions) -> None:
        if problem := delivery_problem(duration_seconds, len(self.stems), options, total_memory_bytes()):
            logger.warning(problem)


def stem_bytes(duration_seconds: float, options: OutputOptions) -> float:
    """The expected size of a stem's file. FLAC's depends on the music."""
    if options.kbps is not None:
        return duration_seconds * options.kbps * 125
    rate = 44100 if options.sample_rate == "source" else options.sample_rate
    depth = str(options.encoding[f"{options.format}_depth"]).removesuffix("f")
    ratio = FLAC_RATIO if options.format == "flac" else 1.0
    return duration_seconds * rate * 2 * int(depth) / 8 * ratio


def delivery_problem(duration_seconds: float, n_stems: int, options: OutputOptions, memory_bytes: int) -> str:
    """Why the server may fail to deliver a song's stems, and which format fits; empty if nothing speaks against it.

    Args:
        memory_bytes: of the container; 0 if unknown.
    """
    reasons = _reasons(stem_bytes(duration_seconds, options), n_stems, memory_bytes)
    if not reasons:
        return ""
    others = (OutputOptions(format, sample_rate=options.sample_rate) for format in ("flac", "mp3"))
    smaller = {other.format: stem_bytes(duration_seconds, other) for other in others}
    fitting = [name for name, n_bytes in smaller.items() if not _reasons(n_bytes, n_stems, memory_bytes)]
    remedy = (
        f"choose output_format {fitting[0]}, about {_mb(smaller[fitting[0]])} a stem"
        if fitting
        else "send the song in parts"
    )
    size = _mb(stem_bytes(duration_seconds, options))
    what = f"{n_stems} stems of {duration_seconds / 60:.1f} minutes as {options.format} are about {size} each"
    return f"{what}: {' and '.join(reasons)}: {remedy}"


def _reasons(n_bytes: float, n_stems: int, memory_bytes: int) -> list[str]:
    reasons = []
    if n_bytes > UPLOAD_SECONDS * UPLOADED_PER_SECOND:
        reasons.append(f"an upload may take more than the {UPLOAD_SECONDS} s that Cog allows")
    needed = n_bytes * n_stems * ANSWERED
    if memory_bytes and needed > memory_bytes * USABLE:
        reasons.append(f"without uploads, Cog's server needs about {needed / 2**20:,.0f} MiB of memory to answer")
    return reasons


def _mb(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:,.0f} MB"
