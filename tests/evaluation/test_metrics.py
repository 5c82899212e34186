import math

import pytest
import torch

from separation.errors import InputError
from separation.evaluation.metrics import FRAME_SAMPLES, level_dbfs, scores, sdr, si_sdr


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_sdr_of_a_scaled_reference_is_the_closed_form() -> None:
    reference = noise(0, 2, 1000)
    assert sdr(reference, 0.5 * reference) == pytest.approx(20 * math.log10(2))
    assert sdr(reference, 1.25 * reference) == pytest.approx(20 * math.log10(4))
    assert sdr(reference, -reference) == pytest.approx(-20 * math.log10(2))


def test_sdr_counts_all_channels_as_one_signal() -> None:
    reference = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    estimate = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    assert sdr(reference, estimate) == pytest.approx(10 * math.log10(25))


def test_sdr_of_silence_is_zero_and_of_the_reference_itself_infinite() -> None:
    reference = noise(0, 2, 1000)
    assert sdr(reference, torch.zeros_like(reference)) == 0
    assert sdr(reference, reference) == math.inf


def test_sdr_is_computed_in_float64() -> None:
    reference = torch.full((1, 1_000_000), 0.1)
    estimate = reference + torch.full_like(reference, 2.0**-20)
    error = (estimate.double() - reference.double()).square().sum()
    exact = 10 * math.log10(float(reference.double().square().sum() / error))
    assert sdr(reference, estimate) == pytest.approx(exact, abs=1e-9)


def test_si_sdr_does_not_depend_on_the_estimates_level() -> None:
    reference = noise(0, 2, 1000)
    estimate = reference + 0.1 * noise(1, 2, 1000)
    assert si_sdr(reference, 8 * estimate) == pytest.approx(si_sdr(reference, estimate), abs=1e-6)


def test_si_sdr_of_orthogonal_noise_is_the_closed_form() -> None:
    reference = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    estimate = torch.tensor([[2.0, 2.0, 1.0, 1.0]])  # twice the reference, and as much again at a quarter of its energy
    assert si_sdr(reference, estimate) == pytest.approx(10 * math.log10(4))


def test_si_sdr_of_an_estimate_without_the_reference_is_minus_infinity() -> None:
    reference = torch.tensor([[1.0, 0.0]])
    assert si_sdr(reference, torch.tensor([[0.0, 1.0]])) == -math.inf
    assert si_sdr(reference, torch.zeros(1, 2)) == -math.inf


@pytest.mark.parametrize("metric", [sdr, si_sdr])
def test_a_score_that_would_mean_nothing_is_an_input_error(metric) -> None:  # type: ignore[no-untyped-def]
    audio = noise(0, 2, 100)
    with pytest.raises(InputError, match="reference is silent"):
        metric(torch.zeros(2, 100), audio)
    with pytest.raises(InputError, match=r"\[2, 100\] and the estimate \[1, 100\]"):
        metric(audio, audio[:1])
    with pytest.raises(InputError, match="estimate holds NaN"):
        metric(audio, audio / 0 * 0)


def musdb_sdr(*frames_db: float, tail: int = 0) -> float:
    """Of a stem whose estimate has these SDRs in its whole seconds, and an SDR of 0 dB in `tail` more samples."""
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


def test_what_is_left_after_the_last_whole_second_is_not_in_the_median() -> None:
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
