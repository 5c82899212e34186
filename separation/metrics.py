"""How good an estimate is and how loud it is, in decibels, computed in float64."""

import math

import torch
from torch import Tensor

from separation.errors import InputError


def sdr(reference: Tensor, estimate: Tensor) -> float:
    """Signal-to-distortion ratio in dB of an estimate `[C, T]` of a reference `[C, T]`; infinite where they are equal.

    All channels and samples count as one signal: `10 log10(sum reference^2 / sum (reference - estimate)^2)`, the
    definition of the Music Demixing Challenge (Mitsufuji et al. 2022, arXiv:2108.13559). Estimating silence scores 0.

    Raises InputError if the shapes differ, a sample is NaN or Inf, or the reference is silent: a ratio to nothing is
    no figure.
    """
    reference, estimate = _pair(reference, estimate)
    return _decibels(_energy(reference), _energy(reference - estimate))


def si_sdr(reference: Tensor, estimate: Tensor) -> float:
    """Scale-invariant SDR in dB of an estimate `[C, T]` of a reference `[C, T]`.

    Le Roux et al. 2019, arXiv:1811.02508. The reference is first scaled to come as near to the estimate as it
    can, so the estimate's level does not count. An estimate that holds nothing of the reference, silence among them,
    scores minus infinity.

    Raises InputError where `sdr` does.
    """
    reference, estimate = _pair(reference, estimate)
    target = reference * (torch.sum(estimate * reference) / _energy(reference))
    return _decibels(_energy(target), _energy(target - estimate))


def level_dbfs(audio: Tensor) -> float:
    """RMS level in dB of `[C, T]` against a constant full scale of 1, so a full-scale sine has -3.01; silence -inf."""
    return _decibels(_energy(audio.double()), float(max(1, audio.numel())))


def _pair(reference: Tensor, estimate: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, once they are known to be comparable."""
    if reference.shape != estimate.shape:
        raise InputError(
            f"The reference has the shape {list(reference.shape)} and the estimate {list(estimate.shape)}: "
            "give two of one shape, [channels, samples]."
        )
    for name, audio in (("reference", reference), ("estimate", estimate)):
        if not torch.isfinite(audio).all():
            raise InputError(f"The {name} holds NaN or Inf, so its score means nothing: give finite samples.")
    if not reference.any():
        raise InputError(
            "The reference is silent and a ratio to silence is undefined: leave this stem out of the score."
        )
    return reference.double(), estimate.double()


def _energy(audio: Tensor) -> float:
    return float(audio.square().sum())


def _decibels(numerator: float, denominator: float) -> float:
    if numerator == 0:
        return -math.inf
    return math.inf if denominator == 0 else 10 * math.log10(numerator / denominator)
