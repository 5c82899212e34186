"""Scores follow their definitions and agree with the packages that the field uses."""

import math
from collections.abc import Callable
from dataclasses import astuple
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from separation.errors import InputError
from separation.evaluation.metrics import FRAME_SAMPLES, Scores, is_ill_conditioned, level_dbfs, scores, sdr, si_sdr

RATE = 44100


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sdr_of_a_scaled_reference_is_the_closed_form() -> None:
    reference = noise(2, 1000)
    assert sdr(reference, 0.5 * reference) == pytest.approx(20 * math.log10(2))
    assert sdr(reference, 1.25 * reference) == pytest.approx(20 * math.log10(4))
    assert sdr(reference, -reference) == pytest.approx(-20 * math.log10(2))


def test_sdr_counts_all_channels_as_one_signal() -> None:
    reference = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    estimate = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    assert sdr(reference, estimate) == pytest.approx(10 * math.log10(25))


def test_sdr_of_silence_is_zero_and_of_the_reference_itself_infinite() -> None:
    reference = noise(2, 1000)
    assert sdr(reference, torch.zeros_like(reference)) == 0
    assert sdr(reference, reference) == math.inf


def test_sdr_is_computed_in_float64() -> None:
    reference = torch.full((1, 1_000_000), 0.1)
    estimate = reference + torch.full_like(reference, 2.0**-20)
    error = (estimate.double() - reference.double()).square().sum()
    exact = 10 * math.log10(float(reference.double().square().sum() / error))
    assert sdr(reference, estimate) == pytest.approx(exact, abs=1e-9)


def test_si_sdr_does_not_depend_on_the_estimates_level() -> None:
    reference = noise(2, 1000)
    estimate = reference + 0.1 * noise(2, 1000, seed=1)
    assert si_sdr(reference, 8 * estimate) == pytest.approx(si_sdr(reference, estimate), abs=1e-6)


def test_si_sdr_of_orthogonal_noise_is_the_closed_form() -> None:
    reference = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    estimate = torch.tensor([[2.0, 2.0, 1.0, 1.0]])  # twice the reference, plus an error of a quarter of its energy
    assert si_sdr(reference, estimate) == pytest.approx(10 * math.log10(4))


def test_si_sdr_of_an_estimate_without_the_reference_is_minus_infinity() -> None:
    reference = torch.tensor([[1.0, 0.0]])
    assert si_sdr(reference, torch.tensor([[0.0, 1.0]])) == -math.inf
    assert si_sdr(reference, torch.zeros(1, 2)) == -math.inf


@pytest.mark.parametrize("metric", [sdr, si_sdr])
def test_an_undefined_score_is_an_input_error(metric: Callable[[Tensor, Tensor], float]) -> None:
    audio = noise(2, 100)
    with pytest.raises(InputError, match="reference is silent"):
        metric(torch.zeros(2, 100), audio)
    with pytest.raises(InputError, match=r"\[2, 100\] and the estimate \[1, 100\]"):
        metric(audio, audio[:1])
    with pytest.raises(InputError, match="estimate holds NaN"):
        metric(audio, audio / 0 * 0)


def musdb_sdr(*frames_db: float, tail: int = 0) -> float:
    """The SDR of a stem whose whole seconds have these SDRs, followed by `tail` samples with an SDR of 0 dB."""
    reference = torch.ones(1, 2, len(frames_db) * FRAME_SAMPLES + tail)
    estimate = 2 * reference
    for frame, decibels in enumerate(frames_db):
        estimate[..., frame * FRAME_SAMPLES : (frame + 1) * FRAME_SAMPLES] = 1 + 10 ** (-decibels / 20)
    (score,) = scores(
        lambda start, stop: reference[..., start:stop],
        lambda start, stop: estimate[..., start:stop],
        reference.shape[-1],
    )
    return score.sdr_musdb_db


def test_the_median_of_an_even_number_of_frames_is_the_mean_of_the_middle_two() -> None:
    assert musdb_sdr(50, 10, 30) == pytest.approx(30, abs=1e-4)
    assert musdb_sdr(50, 10, 30, 20) == pytest.approx(25, abs=1e-4)


def test_an_incomplete_last_second_is_not_in_the_median() -> None:
    assert musdb_sdr(50, 10, 30, tail=FRAME_SAMPLES - 1) == pytest.approx(30, abs=1e-4)


def test_a_song_of_less_than_a_second_is_one_frame() -> None:
    assert musdb_sdr(tail=FRAME_SAMPLES - 1) == pytest.approx(0, abs=1e-4)


def test_level_is_rms_against_full_scale() -> None:
    seconds = torch.arange(44100) / 44100
    sine = torch.sin(2 * math.pi * 441 * seconds).expand(2, -1)
    assert level_dbfs(torch.ones(2, 10)) == 0
    assert level_dbfs(sine) == pytest.approx(-10 * math.log10(2), abs=1e-4)
    assert level_dbfs(0.1 * sine) == pytest.approx(-20 - 10 * math.log10(2), abs=1e-4)


def test_level_of_silence_and_of_no_samples_is_minus_infinity() -> None:
    assert level_dbfs(torch.zeros(2, 10)) == -math.inf
    assert level_dbfs(torch.zeros(2, 0)) == -math.inf


# Scores of the stems of a song


def reader(audio: Tensor) -> Callable[[int, int], Tensor]:
    return lambda start, stop: audio[..., start:stop]


def score(references: Tensor, estimates: Tensor) -> list[Scores]:
    return scores(reader(references), reader(estimates), references.shape[-1])


@pytest.fixture(scope="module")
def separated(stems: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    """Vocals and drums, and bad estimates of them, `[2, 2, 3.3 s]`: each leaks into the other; the vocals pause."""
    references = torch.from_numpy(np.stack([stems["vocals"], stems["drums"]])).mT.contiguous()[..., : int(3.3 * RATE)]
    references[0, :, RATE : 2 * RATE] = 0
    delayed = references.roll(3, dims=-1)
    leaked = 0.9 * references + 0.05 * delayed.sum(dim=0) + 0.2 * delayed.square()
    return references, leaked + 0.003 * noise(*references.shape).float()


@pytest.mark.slow
def test_sdr_sir_and_sar_agree_with_museval_to_a_thousandth_of_a_decibel(
    separated: tuple[Tensor, Tensor], museval: ModuleType
) -> None:
    sdr_db, _, sir_db, sar_db = museval.evaluate(*(audio.mT.double().numpy() for audio in separated))
    assert np.isnan(sdr_db).tolist() == [[False, True, False]] * 2
    for stem, mine in enumerate(score(*separated)):
        theirs = [np.nanmedian(values[stem]) for values in (sdr_db, sir_db, sar_db)]
        assert [mine.sdr_musdb_db, mine.sir_db, mine.sar_db] == pytest.approx(theirs, abs=1e-3)


def test_si_sdr_agrees_with_fast_bss_eval_to_a_thousandth_of_a_decibel(separated: tuple[Tensor, Tensor]) -> None:
    fast_bss_eval = pytest.importorskip("fast_bss_eval", reason="needs fast_bss_eval (pip install fast_bss_eval)")
    for reference, estimate, mine in zip(*separated, score(*separated), strict=True):
        theirs = fast_bss_eval.si_sdr(reference.double().reshape(1, -1), estimate.double().reshape(1, -1))
        assert mine.si_sdr_db == pytest.approx(float(theirs), abs=1e-3)


def test_scores_of_the_whole_song_equal_the_plain_functions(separated: tuple[Tensor, Tensor]) -> None:
    for reference, estimate, mine in zip(*separated, score(*separated), strict=True):
        assert mine.sdr_mdx23_db == pytest.approx(sdr(reference, estimate), abs=1e-9)
        assert mine.si_sdr_db == pytest.approx(si_sdr(reference, estimate), abs=1e-9)


def test_sdr_musdb_is_the_median_over_whole_seconds() -> None:
    reference = noise(1, 2, 4 * RATE + 1000)
    gain = torch.ones(4 * RATE + 1000, dtype=torch.float64)
    for second, error_db in enumerate((-10, -20, -40, -60)):
        gain[second * RATE : (second + 1) * RATE] += 10 ** (error_db / 20)
    gain[4 * RATE :] = 1000  # not a whole second
    assert score(reference, gain * reference)[0].sdr_musdb_db == pytest.approx(30)


def test_a_stem_that_is_always_silent_has_no_scores_and_does_not_affect_others() -> None:
    references, estimates = noise(3, 2, 2 * RATE), noise(3, 2, 2 * RATE, seed=1)
    references[1] = 0
    first, absent, last = score(references, estimates)
    assert all(map(math.isnan, astuple(absent)))
    for mine, alone in zip([first, last], score(references[[0, 2]], estimates[[0, 2]]), strict=True):
        assert astuple(mine) == pytest.approx(astuple(alone), nan_ok=True)


def test_a_silent_estimate_scores_zero_and_does_not_affect_others() -> None:
    references, estimates = noise(3, 2, 2 * RATE), noise(3, 2, 2 * RATE, seed=1)
    estimates[1] = 0
    first, silence, last = score(references, estimates)
    assert (silence.sdr_mdx23_db, silence.si_sdr_db) == (0, -math.inf)
    assert math.isnan(silence.sdr_musdb_db)
    for mine, alone in zip([first, last], score(references[[0, 2]], estimates[[0, 2]]), strict=True):
        assert astuple(mine) == pytest.approx(astuple(alone), nan_ok=True)


def in_db(sdr_db: float, sar_db: float) -> Scores:
    return Scores(sdr_db, sdr_db, sdr_db, 10.0, sar_db)


@pytest.mark.parametrize(
    "sdr_db, sar_db, wrong",
    [
        (11.1, 0.0, True),  # the demo song's bass
        (math.inf, 12.8, True),  # its drums, scored against themselves
        (math.inf, 65.8, False),
        (10.2, 9.8, False),
        (0.0, -20.0, False),  # a faint estimate that has nothing in common with its reference
        (8.0, math.nan, False),
        (-math.inf, -math.inf, False),
    ],
)
def test_a_sar_that_no_estimate_can_have_is_noticed(sdr_db: float, sar_db: float, wrong: bool) -> None:
    assert is_ill_conditioned([in_db(3.0, 5.0), in_db(sdr_db, sar_db)]) is wrong


@pytest.mark.slow
@pytest.mark.parametrize("side, wrong", [(1e-6, True), (1.0, False)])
def test_nearly_mono_references_give_a_sar_that_no_estimate_can_have(
    side: float, wrong: bool, museval: ModuleType
) -> None:
    low = torch.fft.rfft(noise(2, 3, 2 * RATE)) * (torch.arange(RATE + 1) < 300)
    mono, left, right = torch.fft.irfft(low).split(1, dim=1)
    references = mono + side * noise(2, 2, 2 * RATE, seed=1)
    estimates = references + 0.3 * references.flip(0) + 0.1 * torch.cat([left, right], dim=1)
    assert is_ill_conditioned(score(references, estimates)) is wrong


def test_a_single_stem_has_no_sir_or_sar() -> None:
    (alone,) = score(noise(1, 2, RATE), noise(1, 2, RATE, seed=1))
    assert math.isnan(alone.sir_db) and math.isnan(alone.sar_db)
    assert math.isfinite(alone.sdr_musdb_db)


def test_without_museval_the_song_is_read_one_second_at_a_time() -> None:
    lengths = []

    def read(start: int, stop: int) -> Tensor:
        lengths.append(stop - start)
        return noise(2, 1, stop - start, seed=start)

    assert all(math.isnan(score.sir_db) for score in scores(read, read, 20 * RATE))
    assert max(lengths) == RATE
