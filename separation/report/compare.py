"""The page that compares candidates for a stem: they play in sync and equally loud, one at a time, blind if asked.

This module fills the data into compare.html, which draws and plays it and keeps the user's ratings and notes.
"""

import base64
import json
import math
import random
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from separation.audio.waveform import Waveform
from separation.errors import InputError
from separation.evaluation.weighting import loudness_lufs
from separation.progress import Progress
from separation.report.picture import OTHER_COLOURS, STEM_COLOURS
from separation.report.player import Picture, Sound, write_page
from separation.system.os_errors import output_errors
from separation.system.output import OutputFolder
from separation.system.threads import Threads

LOUDEST_LUFS = -16.0
HEADROOM = 0.9  # of full scale, for what MP3 adds to a peak
MOST_GAIN = 30.0  # relative to the smallest: a candidate with next to nothing in it stays quiet


@dataclass(frozen=True)
class Candidate:
    """Something to listen to: its name, its samples `[2, T]` at 44100 Hz, and what is known about it."""

    name: str
    samples: Tensor
    facts: Sequence[str] = ()


@dataclass(frozen=True)
class Comparison:
    """The contents of the page.

    Attributes:
        title: the page's title.
        about: a line below it, such as which part of the song this is.
        mixture: the same part of the song, `[2, T]`.
        candidates: at least one, each as long as the mixture.
        meaning: what the facts mean, in a sentence.
        blind: hide the names and facts until the user asks for them, and shuffle the candidates.
    """

    title: str
    about: str
    mixture: Tensor
    candidates: Sequence[Candidate]
    meaning: str = ""
    blind: bool = False


def write_comparison(
    comparison: Comparison, target: Path, *, overwrite: bool = False, progress: Progress = Progress()
) -> None:
    """Write the page to `target`. A failed run leaves no file behind.

    Raises:
        InputError: there are no candidates.
        OutputError: the page cannot be written. Without `overwrite`, a file that this program did not write is never
            replaced.
    """
    if not comparison.candidates:
        raise InputError("there are no candidates to compare: give at least one")
    candidates = list(comparison.candidates)
    if comparison.blind:
        random.SystemRandom().shuffle(candidates)
    tracks = [Candidate("The song", comparison.mixture), *candidates]
    with OutputFolder(target.parent, overwrite=overwrite) as output, ExitStack() as stack, Threads() as pool:
        output.check_targets([target.name])
        waves: list[Waveform] = []
        for track in tracks:
            waves.append(stack.enter_context(Waveform(output.work)))
            waves[-1].append(track.samples)
        gains = equal_loudness([track.samples for track in tracks])
        sound = Sound(waves, gains)
        data = _page_data(comparison, tracks, gains, sound.pictures(pool)) | sound.times()
        part = output.work / target.name
        with output_errors(target):
            write_page(part, "compare.html", data, sound, pool, progress)
        progress(1.0, "done")
        output.publish({"page": part})


def equal_loudness(tracks: Sequence[Tensor]) -> list[float]:
    """The factors that make all tracks `[2, T]` equally loud without clipping. Silence keeps its level."""
    loudness = [loudness_lufs(samples) for samples in tracks]
    target = LOUDEST_LUFS
    for each, samples in zip(loudness, tracks, strict=True):
        if each > -math.inf:
            target = min(target, each + 20 * math.log10(HEADROOM / float(samples.abs().max())))
    gains = [10 ** ((target - each) / 20) if each > -math.inf else 1.0 for each in loudness]
    return [min(gain, MOST_GAIN * min(gains)) for gain in gains]


def _page_data(
    comparison: Comparison, tracks: Sequence[Candidate], gains: Sequence[float], pictures: Sequence[Picture]
) -> dict[str, Any]:
    """The data for compare.html, without the sound. The first track is the mixture."""
    names = [
        {"name": track.name, "facts": [*track.facts, f"{_decibels(gain)} for equal loudness"]}
        for track, gain in zip(tracks, gains, strict=True)
    ]
    shown: Mapping[str, Any] = {"names": names}
    if comparison.blind:
        shown = {"key": base64.b64encode(json.dumps(names).encode()).decode()}
    peak = max(
        gain * max(picture.high.max(), -picture.low.min()) for picture, gain in zip(pictures, gains, strict=True)
    )
    loudest = max(gain**2 * picture.energy.max() for picture, gain in zip(pictures, gains, strict=True))
    colours = [*STEM_COLOURS.values(), *OTHER_COLOURS]
    return {
        "title": comparison.title,
        "about": comparison.about,
        "meaning": comparison.meaning,
        "id": secrets.token_hex(8),
        "skip": 1,
        **shown,
        "tracks": [
            {
                "mixture": index == 0,
                "colour": colours[index % len(colours)],
                **picture.drawn(peak / gain, loudest / gain**2),  # as loud as it plays
            }
            for index, (picture, gain) in enumerate(zip(pictures, gains, strict=True))
        ],
    }


def _decibels(gain: float) -> str:
    return f"{20 * math.log10(gain):+.1f} dB".replace("-", "−")
