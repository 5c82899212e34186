"""A part of a song: which samples of an estimate must be computed for it, and which are known already."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from separation.audio.waveform import Waveform
from separation.engine.chunk_plan import Span

MARGIN_SAMPLES = 16384  # around a part: what resamplers and ensembles read beside it


class EstimatePart(NamedTuple):
    """The samples of a span of an estimate."""

    span: Span
    wave: Waveform  # as long as the span


class KnownPart:
    """What is known of the estimates of a run: a span, the same for all of them, or nothing.

    Args:
        parts: of each estimate, None if nothing is known of it. If their spans differ, nothing is known.
    """

    def __init__(self, parts: Iterable[EstimatePart | None] = ()) -> None:
        found = list(parts)
        known = [part for part in found if part is not None]
        is_usable = bool(known) and len(known) == len(found) and len({part.span for part in known}) == 1
        self._waves = [part.wave for part in known] if is_usable else []
        self.span: Span | None = known[0].span if is_usable else None

    def missing(self, span: Span) -> list[Span]:
        """What of a span is not known."""
        if self.span is None:
            return [span]
        before, after = (
            Span(span.start, min(span.stop, self.span.start)),
            Span(max(span.start, self.span.stop), span.stop),
        )
        return [each for each in (before, after) if each.start < each.stop]

    def with_span(self, span: Span) -> Span:
        """What is known once a span is: both together if they touch, else the span."""
        if self.span is None or self.span.start > span.stop or span.start > self.span.stop:
            return span
        return Span(min(self.span.start, span.start), max(self.span.stop, span.stop))

    def fill_in(self, estimates: Iterable[Tensor], start: int) -> None:
        """Write the known samples into blocks `[2, n]` of the estimates, which start at that sample of the song."""
        if self.span is None:
            return
        for block, wave in zip(estimates, self._waves, strict=True):
            first, last = max(start, self.span.start), min(start + block.shape[1], self.span.stop)
            if first < last:
                block[:, first - start : last - start] = wave.read(first - self.span.start, last - self.span.start)


def with_margin(span: Span, n_samples: int) -> Span:
    """A span of a song of `n_samples` with MARGIN_SAMPLES at both ends, as far as the song reaches."""
    return Span(max(0, span.start - MARGIN_SAMPLES), min(n_samples, span.stop + MARGIN_SAMPLES))


def excerpt(blocks: Iterable[Tensor], start: int, stop: int) -> Iterator[Tensor]:
    """Samples `[start, stop)` of a waveform that comes in blocks `[C, n]`, in blocks."""
    first = 0
    for block in blocks:
        last = first + block.shape[-1]
        if start < last:
            yield block[:, max(0, start - first) : stop - first]
        if last >= stop:
            return
        first = last
