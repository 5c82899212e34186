"""ModelRunner: how a recipe's models are made ready, and how many chunks they compute."""

from dataclasses import replace

import pytest

from helpers.small_separators import QUICK, Recorder, random_model
from separation import ModelPool, Separator
from separation.engine.chunk_plan import Span


def test_the_batch_size_on_a_cpu_is_1_unless_another_is_chosen(pool: ModelPool) -> None:
    for options, expected in (({}, 1), ({"batch_size": 5}, 5)):
        separator = Separator("demo", "all_4", pool=pool, options=replace(QUICK, **options))
        ready = separator.runner.ready(separator.models["demo"], separator.plans["demo"])
        assert (ready.model, ready.batch_size) == (separator.models["demo"], expected)


def test_on_a_cpu_batches_are_computed_in_pairs_where_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    separator = Separator.from_model(random_model(("left", "right")))
    (model,), (plan,) = separator.models.values(), separator.plans.values()
    for helps in (False, True):
        monkeypatch.setattr("separation.engine.model_runner.pairs_help", lambda helps=helps: helps)
        assert separator.runner.ready(model, plan).in_pairs is helps


def test_the_chunks_of_a_song_and_of_a_part_of_it_are_counted_at_the_models_rate() -> None:
    for rate in (44100, 48000):
        model = Recorder("model", ("vocals",), 10_000, sample_rate=rate)
        runner = Separator.from_model(model).runner
        n_samples = 10 * 44100
        starts = runner.plans["model"].starts(10 * rate)
        assert runner.n_chunks("model", n_samples) == len(starts)
        part = [start for start in starts if start < 5 * rate and start + 10_000 > 4 * rate]
        assert runner.n_chunks("model", n_samples, Span(4 * 44100, 5 * 44100)) == len(part)
