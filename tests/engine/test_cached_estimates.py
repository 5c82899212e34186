"""cached_estimates: the settings of an estimate are everything that its samples depend on."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.small_separators import QUICK, random_model
from separation import Cache, CheckpointError, ModelPool, Separator
from separation.audio.waveform import Waveform
from separation.engine.cached_estimates import CachedEstimates, EstimateSettings, n_bytes
from separation.engine.chunk_plan import ChunkPlan, Span
from separation.engine.recipe_lines import View
from separation.engine.recipes import MIXTURE, Ensemble, Estimate, Run
from separation.models.base import Origin

PLAN = ChunkPlan(1000, 500)
VOCALS = Estimate(Run("m", MIXTURE), "vocals")
AGAIN = Estimate(Run("m", ((VOCALS, 1.0),)), "vocals")


def settings(
    weights: dict[str, str], device: str = "cpu", batch_size: int | None = 1, cpu_kind: str | None = None
) -> EstimateSettings:
    model = random_model(("vocals", "drums"), name="m")
    model.cpu_kind = cpu_kind
    checksums = {part: (lambda checksum=checksum: checksum) for part, checksum in weights.items()}
    model.origin = Origin(architecture="bs_roformer", hyper_parameters={}, stems=model.stems, weights=checksums)
    return EstimateSettings({"m": model}, {"m": PLAN}, torch.device(device), batch_size)


def test_the_device_the_kind_of_cpu_and_the_batch_size_are_part_of_the_settings() -> None:
    here = settings({"0": "aa"}).of(VOCALS, {})
    for name, other in (
        ("device", settings({"0": "aa"}, "mps")),
        ("cpu_kind", settings({"0": "aa"}, cpu_kind="avx2")),
        ("batch_size", settings({"0": "aa"}, batch_size=None)),
    ):
        there = other.of(VOCALS, {})
        assert {key for key, value in there.items() if value != here[key]} == {name}
    assert settings({"0": "aa"}, batch_size=None).of(VOCALS, {})["batch_size"] == "auto"


def test_the_input_of_a_run_is_part_of_the_settings_down_to_the_mixture() -> None:
    found = settings({"0": "aa"})
    ((weight, inner),) = found.of(AGAIN, {"sha256": "song"})["input"]
    assert weight == 1 and inner == found.of(VOCALS, {"sha256": "song"})
    assert inner["input"] == [(1, {"sha256": "song"})]


def test_the_view_and_the_ensembles_of_a_runs_input_are_part_of_the_settings() -> None:
    found = settings({"0": "aa"})
    inverted = Estimate(Run("m", MIXTURE, View(is_inverted=True)), "vocals")
    assert found.of(inverted, {}) == found.of(VOCALS, {}) | {"view": [True, False, 0]}
    parts = (((VOCALS, 1.0),), ((AGAIN, 1.0),))
    largest, smallest = (Estimate(Run("m", ((Ensemble(rule, parts), 1.0),)), "vocals") for rule in ("max", "min"))
    ((_, input),) = found.of(largest, {"sha256": "song"})["input"]
    assert input["rule"] == "max"
    assert input["parts"] == [[(1.0, found.of(part, {"sha256": "song"}))] for part in (VOCALS, AGAIN)]
    assert found.of(largest, {}) != found.of(smallest, {})


def test_with_one_network_per_stem_only_the_weights_of_that_stem_matter() -> None:
    assert settings({"vocals": "aa", "drums": "bb"}).of(VOCALS, {})["weights"] == ["aa"]
    assert settings({"0": "aa", "1": "bb"}).of(VOCALS, {})["weights"] == ["aa", "bb"]


def test_a_model_without_a_checkpoint_cannot_be_identified() -> None:
    model = random_model(("vocals",), name="m")
    with pytest.raises(CheckpointError, match=r"^model 'm' was not made by load_model: turn the cache off$"):
        EstimateSettings({"m": model}, {"m": PLAN}, torch.device("cpu"), 1)


def test_a_stored_estimate_is_found_for_the_same_song_only(tmp_path: Path) -> None:
    cache, same = Cache(tmp_path / "cache"), settings({"0": "aa"})
    noise = torch.randn(2, 2, 1000)
    with ExitStack() as stack:
        song, other, estimate = (stack.enter_context(Waveform(tmp_path)) for _ in range(3))
        for wave, samples in zip((song, other, estimate), (noise[0], noise[1], noise[0]), strict=True):
            wave.append(samples)
        assert n_bytes(1000) == 1000 * 2 * 4
        CachedEstimates(cache, same, song, "song.wav", stack).keep(VOCALS, estimate, Span(0, 1000))
        found = CachedEstimates(cache, same, song, "another name.wav", stack).find(VOCALS)
        assert found is not None and torch.equal(found.read(0, 1000), estimate.read(0, 1000))
        assert found.statistics == estimate.statistics
        assert CachedEstimates(cache, same, other, "song.wav", stack).find(VOCALS) is None
        assert CachedEstimates(cache, same, song, "song.wav", stack).find(AGAIN) is None
    assert [entry.facts["song"] for entry in cache.entries()] == ["song.wav"]


def test_another_chunk_or_overlap_is_another_estimate() -> None:
    pool = ModelPool(replace(QUICK, chunk_seconds="auto", overlap_seconds="auto", device="cpu", precision="fp32"))
    keys = []
    for options in (QUICK, replace(QUICK, overlap_seconds=2), replace(QUICK, chunk_seconds=5)):
        separator = Separator("demo", pool=pool, options=options)
        ((estimate, _),) = separator.recipe.outputs["vocals"]
        keys.append(EstimateSettings(separator.models, separator.plans, separator.device, 1).of(estimate, {}))
    assert [(key["chunk_samples"], key["overlap_samples"]) for key in keys] == [
        (4 * 44100, 44100),
        (4 * 44100, 2 * 44100),
        (5 * 44100, 44100),
    ]
