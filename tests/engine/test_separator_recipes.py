"""Separator with recipes of several models: they equal the plain computation, and compute each chunk once."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from helpers.common import quick_first, slow
from helpers.small_separators import QUICK, Recorder, StandardRecorder, random_model, read, write
from separation import ModelPool, Separator
from separation.engine import separator as separator_module
from separation.engine.chunk_plan import ChunkPlan
from separation.engine.chunking import Level, ReadyModel, separate
from separation.engine.pool import LoadedModels
from separation.engine.recipes import resolve
from separation.engine.song_waveforms import Samples
from separation.evaluation.metrics import sdr
from separation.models.bs_roformer import BSRoFormer


def test_each_model_of_a_recipe_has_its_own_normalisation_and_chunks(
    clip: Tensor,
    tmp_path: Path,
    one_thread: None,  # chunks in their order
) -> None:
    first, second = Recorder("first", ("vocals",), 100_000), StandardRecorder("second", ("bass", "drums"), 78_000)
    pool = LoadedModels({"first": first, "second": second})
    recipe = resolve("test", "test", {"drums": "second", "vocals": "first", "bass": "second"})
    separator = Separator(recipe, options=QUICK, pool=pool)
    mixture = clip * 0.3 + 0.05
    shares: list[float] = []
    stems = separator.separate(mixture, progress=lambda share, stage: shares.append(share))
    assert list(stems) == ["drums", "vocals", "bass"]
    for stem in stems.values():
        assert (stem - mixture).abs().max() <= 1e-6
    assert shares == sorted(shares) and shares[-1] == 1
    assert {chunk.shape[-1] for chunk in first.seen} == {4 * 44100}
    assert {chunk.shape[-1] for chunk in second.seen} == {78_000}
    assert max(chunk.abs().max() for chunk in first.seen) == pytest.approx(0.9)
    inner = torch.cat([chunk[0, :, : 78_000 * 3 // 4] for chunk in second.seen], dim=-1)[:, : mixture.shape[1]]
    assert inner[:, :234_000].mean(0).mean() == pytest.approx(
        ((mixture - mixture.mean()) / mixture.mean(0).std())[:, :234_000].mean().item(), abs=1e-3
    )
    assert len(second.seen) == -(-mixture.shape[1] // (78_000 * 3 // 4))
    from_memory = [chunk.clone() for chunk in second.seen]
    second.seen.clear()
    separator.separate_file(write(tmp_path / "song.wav", mixture), tmp_path / "out")
    assert all((a - b).abs().max() <= 1e-4 for a, b in zip(from_memory, second.seen, strict=True))


def test_a_recipe_of_several_models_decodes_the_mixture_once(
    clip: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []
    decode = separator_module.decode

    def recorded(path: Path, *arguments: Path, **options: object) -> object:
        decoded.append(path)
        return decode(path, *arguments, **options)

    monkeypatch.setattr(separator_module, "decode", recorded)
    names = ("vocals", "bass", "drums")
    pool = LoadedModels({name: Recorder(name, (name,), 100_000) for name in names})
    recipe = resolve("test", "test", {name: name for name in names})
    song = write(tmp_path / "song.wav", clip[:, :100_000])
    files = Separator(recipe, pool=pool, options=QUICK).separate_file(song, tmp_path / "out")
    assert decoded == [song]
    assert all((read(path) - clip[:, :100_000]).abs().max() <= 1e-6 for path in files.values())


def plain(model: BSRoFormer, mixture: NDArray[np.float32], n_silent: int = 0) -> dict[str, NDArray[np.float32]]:
    """The estimates of a model for a whole song, without a Separator or a recipe.

    The model sees `n_silent` samples of silence before the song, whose level is that of the song alone.
    """
    song = torch.from_numpy(np.pad(mixture, ((0, 0), (n_silent, 0))))
    offset, scale = 0.0, float(np.abs(mixture).max()) / 0.9
    if model.normalisation == "standard":
        mono = mixture.mean(axis=0, dtype=np.float64)
        offset, scale = float(mono.mean()), float(mono.std(ddof=1)) + 1e-8
    ready = ReadyModel(model, len(model.stems))
    blocks = separate(ready, Samples.of(song), ChunkPlan(4 * 44100, 44100), Level(offset, scale))
    return dict(zip(model.stems, torch.cat(list(blocks), dim=-1)[..., n_silent:].numpy(), strict=True))


def two_models() -> dict[str, BSRoFormer]:
    """Two small networks with different normalisation; their stems are neither silent nor the mixture."""
    models = {}
    for seed, name in enumerate(("a", "b")):
        models[name] = random_model(("vocals", "drums", "bass"), name=name, seed=seed)
    models["b"].normalisation = "standard"
    return models


Arrays = dict[str, NDArray[np.float32]]


def largest(*parts: NDArray[np.float32]) -> NDArray[np.float32]:
    stacked = np.stack(parts)
    return np.take_along_axis(stacked, np.abs(stacked).argmax(axis=0)[None], axis=0)[0]


def augmented(model: Callable[..., Arrays], mix: NDArray[np.float32]) -> Arrays:
    """The mean over the song, the song with its sides swapped, and the song inverted."""
    plainly, swapped, inverted = model(mix), model(mix[::-1].copy()), model(-mix)
    return {stem: (plainly[stem] + swapped[stem][::-1] - inverted[stem]) / 3 for stem in plainly}


# Recipes, and the same computation in numpy from two models and the mixture.
CONSTRUCTS: dict[str, Callable[..., Arrays]] = {
    "{vocals: [a, b], drums: {a: 3, b: 1}}": lambda a, b, mix: {
        "vocals": (a(mix)["vocals"] + b(mix)["vocals"]) / 2,
        "drums": 0.75 * a(mix)["drums"] + 0.25 * b(mix)["drums"],
    },
    "{vocals: {max: [a, b, residual after drums]}, drums: a with tta, bass: residual}": lambda a, b, mix: {
        "vocals": (v := largest(a(mix)["vocals"], b(mix)["vocals"], mix - (d := augmented(a, mix)["drums"]))),
        "drums": d,
        "bass": mix - v - d,
    },
    "{(vocals): {median_fft: [a, b]}, drums: a of vocals, bass: vocals by b with 2 shifts}": lambda a, b, mix: {
        "drums": a((a(mix)["vocals"] + b(mix)["vocals"]) / 2)["drums"],
        "bass": (b(mix)["vocals"] + b(mix, 11025)["vocals"]) / 2,
    },
    "{vocals: a, drums: b, bass: a, other: residual}": lambda a, b, mix: {
        "vocals": (v := a(mix)["vocals"]),
        "drums": (d := b(mix)["drums"]),
        "bass": (s := a(mix)["bass"]),
        "other": mix - v - d - s,
    },
    "{(drums): a, bass: b of drums}": lambda a, b, mix: {"bass": b(a(mix)["drums"])["bass"]},
    "{drums: b after vocals, vocals: a}": lambda a, b, mix: {
        "drums": b(mix - (v := a(mix)["vocals"]))["drums"],
        "vocals": v,
    },
    "{vocals: a, drums: b after vocals, bass: a after vocals and drums, other: residual}": lambda a, b, mix: {
        "vocals": (v := a(mix)["vocals"]),
        "drums": (d := b(mix - v)["drums"]),
        "bass": (s := a(mix - v - d)["bass"]),
        "other": mix - v - d - s,
    },
    "{(drums): b, (vocals): a of drums, bass: {b of vocals and drums: 1, a after vocals: 2}}": lambda a, b, mix: {
        "bass": b((v := a(d := b(mix)["drums"])["vocals"]) + d)["bass"] / 3 + a(mix - v)["bass"] * (2 / 3)
    },
    "{vocals: a, drums: [b, residual]}": lambda a, b, mix: {
        "vocals": (v := a(mix)["vocals"]),
        "drums": (b(mix)["drums"] + mix - v) / 2,
    },
}


@pytest.mark.parametrize("text", quick_first(CONSTRUCTS, 1))
def test_each_construct_of_a_recipe_equals_the_plain_computation_in_numpy(
    text: str, clip: Tensor, tmp_path: Path
) -> None:
    models, mixture = two_models(), clip[:, :120_000] * 0.5 + 0.02
    pool = LoadedModels(models)
    expected = CONSTRUCTS[text](
        lambda *song: plain(models["a"], *song), lambda *song: plain(models["b"], *song), mixture.numpy()
    )
    separator = Separator(
        resolve("mine", "test", yaml.safe_load(text)),
        options=QUICK,
        pool=pool,
    )
    stems = separator.separate(mixture)
    files = separator.separate_file(write(tmp_path / "song.wav", mixture), tmp_path / "out")
    assert list(stems) == list(files) == list(separator.stems)
    assert stems.keys() == expected.keys()
    for stem, right in expected.items():
        assert sdr(torch.from_numpy(right), mixture) < 30 and np.abs(right).max() > 0.001
        assert np.abs(stems[stem].numpy() - right).max() <= 1e-6
        assert np.abs(read(files[stem]).numpy() - right).max() <= 1e-6
    two = Separator(separator.recipe, options=QUICK, two_stems=stem, pool=pool)
    alone, rest = two.separate(mixture).values()
    assert np.abs(alone.numpy() - right).max() <= 1e-6
    assert np.abs(rest.numpy() - (mixture.numpy() - right)).max() <= 1e-6


@pytest.mark.parametrize(
    "text, two_stems, runs",
    [
        ("{vocals: a, drums: a, bass: a, other: residual}", None, 1),
        slow(("{vocals: a, drums: a after vocals, bass: a after vocals, other: residual}", None, 2)),
        slow(("{(drums): a, vocals: a of drums, bass: [a of drums, a]}", None, 2)),
        ("{vocals: a, drums: a after vocals, bass: a after drums}", "vocals", 1),
        slow(("{vocals: a, drums: a after vocals, bass: a after drums}", "drums", 2)),
        ("{vocals: a, drums: a after vocals, bass: a after drums}", "bass", 3),
        slow(("{vocals: a, (drums): a after vocals, other: residual}", "other", 1)),
    ],
)
def test_every_needed_chunk_is_computed_once_and_no_other(
    text: str, two_stems: str | None, runs: int, clip: Tensor, tmp_path: Path
) -> None:
    model, calls = two_models()["a"], []
    model.register_forward_hook(lambda *_: calls.append(1))
    pool = LoadedModels({"a": model})
    recipe = resolve("mine", "test", yaml.safe_load(text))
    separator = Separator(recipe, options=QUICK, two_stems=two_stems, pool=pool)
    separator.separate(clip[:, :200_000])
    chunks = len(separator.plans["a"].starts(200_000))
    assert chunks == 2 and len(calls) == runs * chunks
    separator.separate_file(write(tmp_path / "song.wav", clip[:, :200_000]), tmp_path / "out")
    assert len(calls) == 2 * runs * chunks


def test_the_progress_of_a_recipe_covers_all_its_runs(clip: Tensor) -> None:
    models = two_models()
    pool = LoadedModels(models)
    recipe = resolve("mine", "test", {"vocals": "a", "drums": "b after vocals", "bass": "a after drums"})
    calls: list[tuple[float, str]] = []
    separator = Separator(recipe, options=QUICK, pool=pool)
    separator.separate(clip[:, :200_000], progress=lambda *call: calls.append(call))
    sixths = [(0, "a"), (1, "a"), (2, "a"), (2, "b"), (3, "b"), (4, "b"), (4, "a"), (5, "a"), (6, "a"), (6, "done")]
    assert calls == [(pytest.approx(share / 6), stage) for share, stage in sixths]


def test_only_the_mask_estimators_of_the_chosen_stems_run(pool: ModelPool, clip: Tensor) -> None:
    model = pool.get("demo", Separator("demo", "all_6", pool=pool).stems)
    ran: list[int] = []
    hooks = [
        estimator.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, estimator in enumerate(model.mask_estimators)
    ]
    every = Separator("demo", "all_6", pool=pool, options=QUICK).separate(clip[:, :50_000])
    assert sorted(set(ran)) == list(range(6))
    for separator, expected in (
        (Separator("demo", "vocals_instrumental", pool=pool, options=QUICK), {0}),
        (Separator("demo", "all_4", pool=pool, options=QUICK), {0, 1, 2}),
        (Separator("demo", two_stems="bass", pool=pool, options=QUICK), {2}),
        (Separator.from_model(model, two_stems="piano", options=QUICK), {4}),
    ):
        ran.clear()
        stems = separator.separate(clip[:, :50_000])
        assert set(ran) == expected
        assert all(torch.equal(stems[stem], every[stem]) for stem in set(stems) & set(every) - {"other"})
    for hook in hooks:
        hook.remove()
