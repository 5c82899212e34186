"""The songs of a file, as every decoder returns them: streams of samples."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from separation.audio.channels import Layout
from separation.audio.damage import Damage

Blocks = Iterator[NDArray[np.float32]]  # each `[n, C]`


@dataclass(frozen=True)
class Job:
    """A file to decode.

    Args:
        max_seconds: a longer file is refused.
        damage: collects what the decoder finds to be wrong with the file.
    """

    path: Path
    max_seconds: float | None
    damage: Damage

    @property
    def name(self) -> str:
        """The song's name in quotes."""
        return self.damage.name


@dataclass(frozen=True)
class Source:
    """A song that is ready to be decoded: reading `blocks` decodes it.

    Args:
        sample_rate: hertz.
        layout: of the channels in `blocks`.
        expected_samples: per channel; an estimate for the progress, 0 if unknown.
    """

    sample_rate: int
    layout: Layout
    expected_samples: float
    blocks: Blocks
    tags: dict[str, str] = field(default_factory=dict)


class DecoderError(Exception):
    """A decoder stopped within a song, or gave fewer samples than the file holds. Another decoder may read more."""
