"""Weights and chunks that any program can draw again, and figures of what a public reference made of them.

Where a reference is in no package, a test compares with figures that were recorded from it once.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from separation.models.base import SeparationModel

N_SAMPLES = 24  # of the estimates in the figures


def _drawn(generator: np.random.Generator, shape: Iterable[int]) -> Tensor:
    """Uniformly distributed numbers of zero mean and unit variance."""
    return torch.from_numpy((2 * generator.random(tuple(shape)) - 1) * math.sqrt(3)).float()


def drawn_weights(state: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Weights for a state dict, drawn in the order of its sorted keys."""
    generator = np.random.Generator(np.random.PCG64(seed))
    weights = {}
    for key in sorted(state):
        if key.endswith("num_batches_tracked"):
            weights[key] = state[key]
            continue
        drawn = _drawn(generator, state[key].shape)
        if state[key].is_complex():
            drawn = torch.complex(drawn, _drawn(generator, state[key].shape))
        if drawn.ndim > 1:
            weights[key] = drawn / math.sqrt(drawn[0].numel())
        elif key.endswith("running_var"):
            weights[key] = drawn.abs() / 10 + 0.5
        elif key.endswith(("weight", "gamma")):  # of a norm
            weights[key] = 1 + drawn / 10
        else:
            weights[key] = drawn.abs() / 10 if key.endswith("freqs") else drawn / 10
    return weights


def drawn_chunks(shape: Iterable[int], seed: int = 1) -> Tensor:
    return _drawn(np.random.Generator(np.random.PCG64(seed)), shape) / 10


def figures_of(estimates: Tensor) -> list[float]:
    """The norm of each stem of estimates `[B, S, C, T]`, then some samples of them, first to last."""
    flat = estimates.flatten().double()
    places = torch.linspace(0, len(flat) - 1, N_SAMPLES, dtype=torch.float64).round().long()
    return [*estimates.double().transpose(0, 1).flatten(1).norm(dim=1).tolist(), *flat[places].tolist()]


def as_text(figures: Iterable[float]) -> str:
    """The figures as a test states them."""
    return textwrap.fill(
        " ".join(f"{figure:.7g}" for figure in figures), 116, initial_indent="    ", subsequent_indent="    "
    )


def assert_as_recorded(model: SeparationModel, length: int, figures_text: str) -> None:
    """The model, with drawn weights, makes of two drawn chunks what the reference made, to 1e-5 of the largest."""
    recorded = [float(number) for number in figures_text.split()]
    model.load(drawn_weights(model.state_dict()))
    with torch.inference_mode():
        figures = figures_of(model(drawn_chunks((2, model.channels, length))))
    stems = len(model.stems)
    assert len(figures) == len(recorded) == stems + N_SAMPLES
    for got, expected in ((figures[:stems], recorded[:stems]), (figures[stems:], recorded[stems:])):
        difference = np.abs(np.subtract(got, expected)).max()
        assert difference <= 1e-5 * np.abs(expected).max()
