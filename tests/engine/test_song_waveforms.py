"""song_waveforms: sums of estimates grow with them, and an error ends every wait."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch
import yaml
from torch import Tensor

from separation.audio.waveform import BLOCK_SAMPLES, Waveform
from separation.engine.recipes import MIXTURE, Combination, Estimate, Recipe, Run, resolve
from separation.engine.song_waveforms import Samples, SongWaveforms

N_SAMPLES = BLOCK_SAMPLES + 1000
RECIPE = resolve("test", "test", {"vocals": "m", "drums": "m", "instrumental": "residual"})
RUN = Run("m", MIXTURE)
VOCALS, DRUMS = Estimate(RUN, "vocals"), Estimate(RUN, "drums")


def noise(seed: int) -> Tensor:
    return torch.randn(2, N_SAMPLES, generator=torch.Generator().manual_seed(seed))


def new() -> Samples:
    return Samples(N_SAMPLES)


def song(recipe: Recipe = RECIPE) -> SongWaveforms[Samples]:
    return SongWaveforms(recipe, Samples.of(noise(0)), new)


def test_samples_have_the_statistics_of_a_waveform(tmp_path: object) -> None:
    samples = Samples.of(noise(1) * 0.3 + 0.1)
    with Waveform(tmp_path) as wave:
        wave.append(samples.samples)
        assert samples.peak == wave.peak
        assert samples.mean == pytest.approx(wave.mean, rel=1e-12)
        assert samples.std == pytest.approx(wave.std, rel=1e-12)
    assert Samples.of(torch.ones(2, 1)).std == 0


def test_a_reader_of_samples_waits_until_they_are_appended() -> None:
    samples, read = Samples(4), []
    thread = threading.Thread(target=lambda: read.append(samples.read(0, 4).tolist()))
    thread.start()
    samples.append(torch.tensor([[1.0, 2.0], [1.0, 2.0]]))
    samples.append(torch.tensor([[3.0, 4.0], [3.0, 4.0]]))
    thread.join(60)
    assert read == [[[1, 2, 3, 4]] * 2]


def test_an_estimate_with_weight_1_is_its_own_sum() -> None:
    waves = song()
    assert waves.sum_of(RECIPE.outputs["vocals"]) is waves.estimates[VOCALS]
    assert waves.sum_of(MIXTURE) is waves.estimates[None]


def test_a_sum_is_filled_once_while_its_estimates_grow() -> None:
    waves = song()
    residual = RECIPE.outputs["instrumental"]
    total = waves.sum_of(residual)
    assert waves.sum_of(residual) is total
    vocals, drums = noise(1), noise(2)
    with waves:
        for part in (slice(0, BLOCK_SAMPLES), slice(BLOCK_SAMPLES, N_SAMPLES)):
            waves.estimates[VOCALS].append(vocals[:, part])
            waves.estimates[DRUMS].append(drums[:, part])
            assert torch.equal(total.read(part.start, part.stop), (noise(0) - vocals - drums)[:, part])
        assert waves.wait_for(residual) is total
        waves.finish()


ENSEMBLES = """
(best): {max_fft: [m, n]}
(even): {median: [m, n, k]}
vocals: {min_fft: [m, k, residual after best]}
drums: {max: [m, residual after even]}
rest: residual
"""


def grow(waves: SongWaveforms[Samples], block: int) -> dict[str, Tensor]:
    """The stems, when each model appends its estimates in blocks of this length."""
    stems = {stem: waves.sum_of(parts) for stem, parts in waves_recipe.outputs.items()}
    with waves:
        for seed, (run, names) in enumerate(waves.runs.items()):
            waves.wait_for(run.input)
            for start in range(0, N_SAMPLES, block):
                for number, stem in enumerate(names):
                    waves.estimates[Estimate(run, stem)].append(noise(9 + seed + 3 * number)[:, start : start + block])
        waves.finish()
    return {stem: wave.samples for stem, wave in stems.items()}


waves_recipe = resolve("test", "test", yaml.safe_load(ENSEMBLES))


def test_ensembles_of_ensembles_do_not_depend_on_the_blocks_in_which_estimates_come() -> None:
    first = grow(song(waves_recipe), N_SAMPLES)
    for block in (1000, BLOCK_SAMPLES + 1):
        again = grow(song(waves_recipe), block)
        assert all(torch.equal(again[stem], first[stem]) for stem in first)
    assert (first["vocals"] + first["drums"] + first["rest"] - noise(0)).abs().max() <= 2e-6


def test_a_stem_that_is_resampled_reads_an_ensemble_ahead_of_its_growth() -> None:
    waves = song(resolve("test", "test", {"a": {"max_fft": ["m", "n"]}}))
    (parts,) = resolve("test", "test", {"a": {"max_fft": ["m", "n"]}}).outputs.values()
    readable, copy = waves.readable(parts), new()
    waves.fill(copy, parts, (readable.read(at, stop) for at, stop in ((0, N_SAMPLES - 1), (N_SAMPLES - 1, N_SAMPLES))))
    with waves:
        for seed, wave in enumerate(list(waves.estimates.values())[1:]):
            wave.append(noise(seed + 1))
        waves.finish()
    assert torch.equal(copy.samples, waves.sum_of(parts).samples)


def test_a_song_that_fails_ends_the_wait_for_an_ensemble() -> None:
    waves = song(waves_recipe)
    wave = waves.sum_of(waves_recipe.outputs["vocals"])
    with pytest.raises(KeyboardInterrupt), waves:
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="closed"):
        wave.read(0, 1)


def test_cached_estimates_need_no_run_and_hold_their_samples() -> None:
    cached = Samples.of(noise(1))
    waves = SongWaveforms(RECIPE, Samples.of(noise(0)), new, lambda estimate: cached if estimate == VOCALS else None)
    assert waves.runs == {RUN: ("drums",)}
    assert waves.estimates[VOCALS] is cached
    everything = SongWaveforms(RECIPE, Samples.of(noise(0)), new, lambda estimate: cached)
    assert everything.runs == {}


def test_a_sum_that_fails_closes_its_waveform_and_the_error_is_raised_by_check() -> None:
    class FillError(Exception):
        pass

    def blocks() -> Iterator[Tensor]:
        raise FillError
        yield

    def wait(waves: SongWaveforms[Samples], wave: Samples) -> None:
        with waves:
            with pytest.raises(ValueError, match="closed"):
                wave.read(0, 1)
            waves.check()

    waves, wave = song(), new()
    parts: Combination = ((VOCALS, 1.0),)
    waves.fill(wave, parts, blocks())
    with pytest.raises(FillError):
        wait(waves, wave)


def test_an_exception_in_the_block_ends_every_wait() -> None:
    waves = song()
    total = waves.sum_of(RECIPE.outputs["instrumental"])
    with pytest.raises(KeyboardInterrupt), waves:
        raise KeyboardInterrupt
    for wave in (total, waves.estimates[VOCALS]):
        with pytest.raises(ValueError, match="closed"):
            wave.read(0, 1)


def test_the_end_of_the_block_waits_for_background_jobs_and_raises_their_errors() -> None:
    class JobError(Exception):
        pass

    begin, done = threading.Event(), []

    def job() -> None:
        begin.wait(60)
        done.append(True)

    def fail() -> None:
        raise JobError

    with SongWaveforms(RECIPE, Samples.of(noise(0)), new) as waves:
        waves.in_background(job)
        begin.set()
    assert done == [True]
    with pytest.raises(JobError), SongWaveforms(RECIPE, Samples.of(noise(0)), new) as waves:
        waves.in_background(fail)


def test_a_background_job_can_read_its_waveform_to_the_end_although_the_song_fails() -> None:
    read: list[Tensor] = []

    def job() -> None:
        time.sleep(0.1)  # the exception has left the block
        read.append(waves.estimates[VOCALS].read(0, N_SAMPLES))

    waves = song()
    waves.estimates[VOCALS].append(noise(1))
    waves.in_background(job)
    with pytest.raises(KeyboardInterrupt), waves:
        raise KeyboardInterrupt
    assert torch.equal(read[0], noise(1))
