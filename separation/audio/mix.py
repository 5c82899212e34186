"""A mix of sound files: their sum, each at a level of its own."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from separation.audio.decode import decode
from separation.audio.encode import encode
from separation.audio.excerpt import Excerpt
from separation.audio.options import OutputOptions
from separation.audio.waveform import BLOCK_SAMPLES, Waveform, read_padded


def write_mix(
    levels: Mapping[Path, float], target: Path, *, part: Excerpt = Excerpt(), tags: Mapping[str, str] | None = None
) -> None:
    """Write the sum of sound files as WAV in 32-bit float, at the rate of the first file.

    It is as long as the longest file, or as the part. The sum is computed in double precision and rounded once. The
    folder of `target` holds the decoded files meanwhile.

    Args:
        levels: what to multiply the samples of each file by.
        part: the part of the mix to write.

    Raises:
        AudioError: a file is missing or cannot be read.
        InputError: the part starts after the end.
        OutputError: the folder is full or cannot be written to.
    """
    folder = target.parent
    with ExitStack() as stack:
        waves: list[Waveform] = []
        for path in levels:
            rate = waves[0].sample_rate if waves else None
            waves.append(stack.enter_context(decode(path, folder, sample_rate=rate)))
        mix = stack.enter_context(Waveform(folder, sample_rate=waves[0].sample_rate))
        start, stop = part.samples(max(waves, key=lambda wave: wave.n_samples))
        for first in range(start, stop, BLOCK_SAMPLES):
            last = min(first + BLOCK_SAMPLES, stop)
            blocks = [
                level * read_padded(wave, first, last).double()
                for wave, level in zip(waves, levels.values(), strict=True)
            ]
            mix.append(torch.stack(blocks).sum(dim=0).float())
        encode(mix, target, OutputOptions("wav"), tags=tags)
