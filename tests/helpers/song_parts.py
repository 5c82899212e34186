"""A reference, its estimate and their mixture, the same on every machine, for scores recorded from other programs."""

import numpy as np
from numpy.typing import NDArray

RATE = 44100
Samples = NDArray[np.float32]  # [2, T]


def song_parts(n_samples: int = 3 * RATE) -> dict[str, Samples]:
    """`reference` (decaying tones that pause for half a second), `estimate` and `mixture`."""
    generator = np.random.Generator(np.random.PCG64(0))
    at = np.arange(n_samples) / RATE
    tones = [np.sin(2 * np.pi * pitch * at) * np.exp(-3 * (at % 0.75)) for pitch in (110, 440, 1320, 5280)]
    tones[0][(at > 1) & (at < 1.5)] = tones[1][(at > 1) & (at < 1.5)] = 0
    reference = np.stack([0.3 * tones[0] + 0.1 * tones[1], 0.2 * tones[1] + 0.05 * tones[2]])
    rest = 0.1 * (generator.random((2, n_samples)) - 0.5) + 0.1 * np.stack([tones[3], tones[2]])
    estimate = 0.9 * reference + 0.05 * rest
    parts = {"reference": reference, "estimate": estimate, "mixture": reference + rest}
    return {name: np.ascontiguousarray(samples, np.float32) for name, samples in parts.items()}


def cases() -> dict[str, dict[str, Samples]]:
    """`song_parts`, whole, short, and with silence in several places."""
    parts = song_parts()
    silence = np.zeros_like(parts["reference"])
    quiet = parts["reference"].copy()
    quiet[:, :RATE] = 0
    return {
        "whole": parts,
        "short": {name: samples[:, :5001] for name, samples in parts.items()},
        "silent reference": parts | {"reference": silence},
        "silent estimate": parts | {"estimate": silence},
        "silent start": parts | {"reference": quiet, "estimate": 0.8 * quiet},
        "equal": parts | {"estimate": parts["reference"]},
        "silent mixture": parts | {"mixture": silence},
    }
