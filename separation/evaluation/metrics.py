"""SDR, SI-SDR, SIR, SAR and levels of audio in decibels, computed in float64."""

import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from separation.errors import InputError

Read = Callable[[int, int], Tensor]  # samples [start, stop) of every stem, [S, C, stop - start]

FRAME_SAMPLES = 44100  # one second; BSS-eval v4 scores each frame
EXACT_DB = 40.0  # where rounding in museval begins to limit a SAR
TOLERANCE_DB = 3.0  # how much medians over frames may differ from a whole song


@dataclass(frozen=True)
class Scores:
    """The scores of a stem; NaN if undefined or not asked for."""

    sdr_musdb_db: float  # median over frames, as in SiSEC and the MUSDB18 tables
    sdr_mdx23_db: float  # `sdr` of the whole song
    si_sdr_db: float  # `si_sdr` of the whole song
    sir_db: float  # median over frames; interference from other stems
    sar_db: float  # median over frames; artefacts that come from no stem
    bleedless: float = math.nan  # these two: `spectral.bleedless_and_fullness`
    fullness: float = math.nan
    log_wmse: float = math.nan  # `log_wmse.log_wmse`
    l1_freq: float = math.nan  # `spectral.l1_frequency`
    mrstft: float = math.nan  # `spectral.multi_resolution_stft`


def sdr(reference: Tensor, estimate: Tensor) -> float:
    """Signal-to-distortion ratio in dB of an estimate `[C, T]` of a reference `[C, T]`; infinite if they are equal.

    All channels and samples count as one signal: `10 log10(sum reference^2 / sum (reference - estimate)^2)`, the
    definition of the Music Demixing Challenge (Mitsufuji et al. 2022, arXiv:2108.13559). A silent estimate scores 0.

    Raises InputError if the shapes differ, a sample is NaN or Inf, or the reference is silent, which leaves the ratio
    undefined.
    """
    reference, estimate = _pair(reference, estimate)
    return _decibels(_energy(reference), _energy(reference - estimate))


def si_sdr(reference: Tensor, estimate: Tensor) -> float:
    """Scale-invariant SDR in dB of an estimate `[C, T]` of a reference `[C, T]`.

    Le Roux et al. 2019, arXiv:1811.02508. The reference is first scaled to be as close to the estimate as possible, so
    the estimate's level does not matter. An estimate that contains nothing of the reference scores minus infinity; so
    does silence.

    Raises InputError like `sdr`.
    """
    reference, estimate = _pair(reference, estimate)
    error = estimate - reference
    return _si_sdr(_energy(reference), _energy(error), float((error * reference).sum()))


def scores(references: Read, estimates: Read, n_samples: int, *, sir_and_sar: bool = True) -> list[Scores]:
    """The scores in dB of the S stems of a song at 44100 Hz; `references` and `estimates` read `[S, C, n]`.

    SDR (MUSDB), SIR and SAR follow BSS-eval v4 (Stöter, Liutkus and Ito 2018, arXiv:1804.06267) as implemented in
    museval: medians over frames of one second, in each of which the SDR equals `sdr`. Like museval, this skips every
    frame in which any reference or estimate is silent, and the incomplete frame at the end of the song.

    A stem that is silent in every frame does not count here. Its frame scores are NaN; its other scores are NaN only if
    its reference is silent.

    SIR and SAR need museval and at least two stems; otherwise, or if not asked for, they are NaN. museval holds several
    copies of the song in memory. Without it, memory does not grow with the song.
    """
    moments, silences = [], []
    for start in range(0, n_samples, FRAME_SAMPLES):
        stop = min(start + FRAME_SAMPLES, n_samples)
        true, estimate = references(start, stop).double(), estimates(start, stop).double()
        error = estimate - true
        pairs = ((true, true), (error, error), (error, true))
        # As lists: small tensors that outlive large ones would keep the heap from shrinking.
        moments.append([(one * other).sum(dim=(1, 2)).tolist() for one, other in pairs])
        silences.append((_silent(true) | _silent(estimate)).tolist())
    sums = torch.tensor(moments, dtype=torch.float64)  # [N, 3, S], including an incomplete last frame
    silent = torch.tensor(silences[: max(1, n_samples // FRAME_SAMPLES)])  # [N, S]
    stems = (~silent.all(dim=0)).nonzero().flatten()
    frames = (~silent[:, stems].any(dim=1)).nonzero().flatten()
    medians = torch.full((3, silent.shape[1]), math.nan, dtype=torch.float64)  # SDR, SIR, SAR
    if len(stems) and len(frames):
        energy, error_energy = sums[frames, :2][..., stems].unbind(dim=1)
        medians[0, stems] = median(10 * (energy / error_energy).log10())
        if sir_and_sar and len(stems) > 1 and has_museval():
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


def is_ill_conditioned(group: Iterable[Scores]) -> bool:
    """Whether SIR and SAR of stems that were scored together are impossible, because museval's equations have failed.

    Artefacts are what no filter of the references explains, so they are at most the error. With an SDR of r, as a
    ratio, the estimate has at least 1 - 1/√r of the reference's level. So the SAR is at least (√r - 1)² - 1.
    """
    return any(score.sar_db < _lowest_sar_db(min(score.sdr_musdb_db, EXACT_DB)) - TOLERANCE_DB for score in group)


def _lowest_sar_db(sdr_db: float) -> float:
    ratio = (10 ** (sdr_db / 20) - 1) ** 2 - 1
    return 10 * math.log10(ratio) if sdr_db > 0 and ratio > 0 else -math.inf


def has_museval() -> bool:
    """Whether museval, which computes SIR and SAR, is installed."""
    return importlib.util.find_spec("museval") is not None


def level_dbfs(audio: Tensor) -> float:
    """RMS level of `[C, T]` in dB relative to a constant 1: a full-scale sine has -3.01, silence -inf."""
    return _decibels(_energy(audio.double()), float(max(1, audio.numel())))


def _silent(audio: Tensor) -> Tensor:
    """Which stems of `[S, C, n]` are silent when mixed to mono, as in museval; `[S]`."""
    return (audio.sum(dim=1) == 0).all(dim=1)


def _sir_and_sar(references: Tensor, estimates: Tensor, frames: Tensor) -> Tensor:
    """SIR and SAR of stems `[S, C, T]`, the medians over these frames, `[2, S]`."""
    from museval.metrics import bss_eval

    both = [audio.mT.double().numpy() for audio in (references, estimates)]
    _, _, sir, sar, _ = bss_eval(*both, window=FRAME_SAMPLES, hop=FRAME_SAMPLES)
    return torch.stack([median(torch.from_numpy(values.T)[frames]) for values in (sir, sar)])


def median(values: Tensor) -> Tensor:
    """The median over the first axis. Unlike torch.median, it is the mean of the middle two for an even number."""
    ordered = values.sort(dim=0).values
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2


def _pair(reference: Tensor, estimate: Tensor) -> tuple[Tensor, Tensor]:
    """Both signals in float64. Raises InputError if they cannot be compared."""
    if reference.shape != estimate.shape:
        raise InputError(
            f"the reference has the shape {list(reference.shape)} and the estimate {list(estimate.shape)}: "
            "give equal shapes, [channels, samples]"
        )
    for name, audio in (("reference", reference), ("estimate", estimate)):
        if not torch.isfinite(audio).all():
            raise InputError(f"the {name} holds NaN or Inf: give finite samples")
    if not reference.any():
        raise InputError("the reference is silent, so its score is undefined: leave this stem out")
    return reference.double(), estimate.double()


def _energy(audio: Tensor) -> float:
    return float(audio.square().sum())


def _decibels(numerator: float, denominator: float) -> float:
    if numerator == 0:
        return -math.inf
    return math.inf if denominator == 0 else 10 * math.log10(numerator / denominator)


def _si_sdr(reference: float, error: float, product: float) -> float:
    """SI-SDR from the energies of reference and error, and the sum of their products."""
    residual = error - product**2 / reference  # the part of the estimate that no scaled reference explains
    return _decibels((reference + product) ** 2 / reference, max(residual, 0.0))
