"""How good an estimate is and how loud it is, in decibels, computed in float64."""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from separation.errors import InputError

Read = Callable[[int, int], Tensor]  # samples [start, stop) of every stem, [S, C, stop - start]

FRAME_SAMPLES = 44100  # that BSS-eval v4 gives scores of their own: a second


@dataclass(frozen=True)
class Scores:
    """A stem's scores in dB, NaN where one is undefined."""

    sdr_musdb_db: float  # median over frames, as SiSEC and the tables for MUSDB18 have it
    sdr_mdx23_db: float  # `sdr`: the song as one signal
    si_sdr_db: float  # `si_sdr`
    sir_db: float  # median over frames: to what the other stems left in it
    sar_db: float  # median over frames: to what comes from no stem


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
    error = estimate - reference
    return _si_sdr(_energy(reference), _energy(error), float((error * reference).sum()))


def scores(references: Read, estimates: Read, n_samples: int) -> list[Scores]:
    """The scores of S estimates, each of C channels, against references that belong together, at 44100 Hz.

    SDR (MUSDB), SIR and SAR are those of BSS-eval v4 (Stöter, Liutkus and Ito 2018, arXiv:1804.06267) as museval has
    them: medians over frames of a second, in which its SDR is no other than `sdr`. A frame in which one of the stems is
    silent, true or estimated, has no score, nor has what is left of the song after the last whole second. A stem for
    which that is so in every frame is left out of this: only the other two are known of it, and not even those where
    its reference is silent.

    Reads a second at a time, so memory does not grow with the song. SIR and SAR, which one stem alone has not, are
    computed by museval: where that is installed, it holds the song in memory, several times.
    """
    moments, silences = [], []
    for start in range(0, n_samples, FRAME_SAMPLES):
        stop = min(start + FRAME_SAMPLES, n_samples)
        true, estimate = references(start, stop).double(), estimates(start, stop).double()
        error = estimate - true
        pairs = ((true, true), (error, error), (error, true))
        # As lists: small tensors that stay between large ones that go would keep the heap from shrinking.
        moments.append([(one * other).sum(dim=(1, 2)).tolist() for one, other in pairs])
        silences.append((_silent(true) | _silent(estimate)).tolist())
    sums = torch.tensor(moments, dtype=torch.float64)  # [N, 3, S], the last frame whole or not
    silent = torch.tensor(silences[: max(1, n_samples // FRAME_SAMPLES)])  # [N, S]
    stems = (~silent.all(dim=0)).nonzero().flatten()
    frames = (~silent[:, stems].any(dim=1)).nonzero().flatten()
    medians = torch.full((3, silent.shape[1]), math.nan, dtype=torch.float64)  # SDR, SIR, SAR
    if len(stems) and len(frames):
        energy, error_energy = sums[frames, :2][..., stems].unbind(dim=1)
        medians[0, stems] = _median(10 * (energy / error_energy).log10())
        if len(stems) > 1 and has_museval():
            medians[1:, stems] = _sir_and_sar(references(0, n_samples)[stems], estimates(0, n_samples)[stems], frames)
    return [
        Scores(
            sdr_musdb_db=musdb,
            sdr_mdx23_db=_decibels(reference, error) if reference else math.nan,
            si_sdr_db=_si_sdr(reference, error, product) if reference else math.nan,
            sir_db=sir,
            sar_db=sar,
        )
        for (musdb, sir, sar), (reference, error, product) in zip(
            medians.T.tolist(), sums.sum(dim=0).T.tolist(), strict=True
        )
    ]


def has_museval() -> bool:
    """Whether the package that computes SIR and SAR is installed."""
    return importlib.util.find_spec("museval") is not None


def level_dbfs(audio: Tensor) -> float:
    """RMS level in dB of `[C, T]` against a constant full scale of 1, so a full-scale sine has -3.01; silence -inf."""
    return _decibels(_energy(audio.double()), float(max(1, audio.numel())))


def _silent(audio: Tensor) -> Tensor:
    """Of each stem of `[S, C, n]` whether it is; mixed to mono, which is how museval has it."""
    return (audio.sum(dim=1) == 0).all(dim=1)


def _sir_and_sar(references: Tensor, estimates: Tensor, frames: Tensor) -> Tensor:
    """Of `[S, C, T]`, `[2, S]`."""
    from museval.metrics import bss_eval

    both = [audio.mT.double().numpy() for audio in (references, estimates)]
    _, _, sir, sar, _ = bss_eval(*both, window=FRAME_SAMPLES, hop=FRAME_SAMPLES)
    return torch.stack([_median(torch.from_numpy(values.T)[frames]) for values in (sir, sar)])


def _median(values: Tensor) -> Tensor:
    """Over the first axis; of an even number the mean of the middle two, which torch's own is not."""
    ordered = values.sort(dim=0).values
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2


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


def _si_sdr(reference: float, error: float, product: float) -> float:
    """From the energies of reference and error, and their product summed."""
    residual = error - product**2 / reference  # of the estimate: what no scaled reference explains
    return _decibels((reference + product) ** 2 / reference, max(residual, 0.0))
