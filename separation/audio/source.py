"""What a decoder gives: a song's samples in blocks, with what is known of them before they are read."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from separation.audio.channels import Layout
from separation.audio.damage import Damage

Blocks = Iterator[NDArray[np.float32]]


@dataclass(frozen=True)
class Job:
    """A file to decode, the longest that it may be, and what is found to be wrong with it."""

    path: Path
    max_seconds: float | None
    damage: Damage

    @property
    def name(self) -> str:
        return self.damage.name


@dataclass(frozen=True)
class Source:
    """An open file: blocks `[n, C]` of float32 at `sample_rate`, the C channels in the order of `layout`."""

    sample_rate: int
    layout: Layout
    tags: dict[str, str]
    expected_samples: float  # per channel; an estimate, and 0 where the file tells nothing
    blocks: Blocks


class BrokenError(Exception):
    """A decoder stopped within the song, or gave less than the file holds: another way may read more."""
