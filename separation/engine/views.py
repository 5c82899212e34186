"""Views of a waveform for test-time augmentation, and how to undo them in the estimates. See `recipe_lines`."""

from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.nn.functional import pad

from separation.audio.waveform import Readable
from separation.engine.recipe_lines import View


class Viewed:
    """A view of a waveform, to read from.

    Attributes:
        n_samples: of the waveform and the silence before it.
    """

    def __init__(self, source: Readable, view: View) -> None:
        self._source, self._view = source, view
        self.n_samples: int = source.n_samples + view.delay_samples

    def read(self, start: int, stop: int) -> Tensor:
        """Samples `[start, stop)`, `[2, stop - start]`."""
        first, last = (max(0, at - self._view.delay_samples) for at in (start, stop))
        samples = _mirrored(self._source.read(first, last), self._view)
        silent = (stop - start) - (last - first)
        return pad(samples, (silent, 0)) if silent else samples


def undone(blocks: Iterable[Tensor], view: View) -> Iterator[Tensor]:
    """The blocks `[..., 2, n]` of estimates for a view, turned into those of estimates for the waveform itself."""
    silent = view.delay_samples
    for block in blocks:
        dropped = min(silent, block.shape[-1])
        silent -= dropped
        yield _mirrored(block[..., dropped:], view)


def _mirrored(samples: Tensor, view: View) -> Tensor:
    """Swap channels and invert; both undo themselves."""
    samples = samples.flip(-2) if view.is_swapped else samples
    return -samples if view.is_inverted else samples
