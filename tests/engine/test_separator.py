"""Separator: what must stay true of every separation, on the demo recipe and on small models with random weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.common import PROJECT, SONG, quick_first
from helpers.small_model import HYPER_PARAMETERS, small_model, write_weights, write_yaml
from helpers.small_separators import QUICK, Recorder, random_model, read, write
from separation import AudioError, InputError, ModelPool, RecipeError, Separator
from separation.checkpoints.load import load_model
from separation.engine.options import EngineOptions
from separation.engine.recipes import resolve
from separation.engine.song_waveforms import Samples
from separation.evaluation.metrics import sdr


def test_vocals_plus_instrumental_is_the_mixture(pool: ModelPool, clip: Tensor) -> None:
    stems = Separator("demo", "vocals_instrumental", pool=pool, options=QUICK).separate(clip)
    assert list(stems) == ["vocals", "instrumental"]
    assert (stems["vocals"] + stems["instrumental"] - clip).abs().max() <= 2e-7
    assert sdr(clip, stems["vocals"]) < 10  # the vocals are not the mixture


def test_all_4_sums_to_the_mixture_if_other_is_the_residual(pool: ModelPool, clip: Tensor) -> None:
    stems = Separator("demo", "all_4", pool=pool, options=QUICK).separate(clip)
    assert (torch.stack(list(stems.values())).sum(0) - clip).abs().max() <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["vocals", "drums", "bass", "other"])
def test_two_stems_are_a_stem_of_all_4_and_the_mixture_minus_it(
    pool: ModelPool, clip: Tensor, tmp_path: Path, stem: str
) -> None:
    expected = Separator("demo", "all_4", pool=pool, options=QUICK).separate(clip)[stem]
    separator = Separator("demo", two_stems=stem, pool=pool, options=QUICK)
    assert separator.stems == (stem, f"no_{stem}")
    stems = separator.separate(clip)
    assert list(stems) == [stem, f"no_{stem}"]
    assert (stems[stem] - expected).abs().max() <= 1e-6
    assert (stems[stem] + stems[f"no_{stem}"] - clip).abs().max() <= 2e-7
    files = separator.separate_file(write(tmp_path / "song.wav", clip), tmp_path / "out")
    assert [path.name for path in files.values()] == [f"{stem}.wav", f"no_{stem}.wav"]
    assert len(list((tmp_path / "out").glob("*.wav"))) == 2
    for name, path in files.items():
        assert (read(path) - stems[name]).abs().max() <= 1e-6


def test_two_stems_override_stems_and_an_unknown_stem_is_an_error(pool: ModelPool) -> None:
    assert Separator("demo", "all_6", two_stems="bass", pool=pool).stems == ("bass", "no_bass")
    assert Separator("demo", "all_4", two_stems="guitar", pool=pool).stems == ("guitar", "no_guitar")
    for stem in ("kazoo", "none", ""):
        with pytest.raises(RecipeError, match=f"'demo' has no stem '{stem}': choose one of vocals, .*guitar"):
            Separator("demo", two_stems=stem, pool=pool)


@pytest.mark.slow
def test_one_model_gives_two_stems_without_a_recipe(clip: Tensor) -> None:
    model = random_model(("left", "right"))
    stems = Separator.from_model(model, two_stems="right").separate(clip[:, :50_000])
    assert list(stems) == ["right", "no_right"]
    assert (stems["right"] - Separator.from_model(model).separate(clip[:, :50_000])["right"]).abs().max() <= 1e-6
    with pytest.raises(RecipeError, match=r"'random' has no stem 'vocals': choose one of left, right"):
        Separator.from_model(model, two_stems="vocals")


@pytest.mark.slow
def test_the_lowest_bin_of_an_offset_is_in_the_stems_unless_the_yaml_zeroes_it(tmp_path: Path) -> None:
    """The stems differ below the second bin only."""
    weights = write_weights(small_model().state_dict(), tmp_path / "small.ckpt")
    seconds = torch.arange(44100) / 44100
    song = 0.3 * torch.sin(2 * torch.pi * 5000 * seconds).repeat(2, 1) + 0.1
    stems = {}
    for zero_dc in (None, False, True):
        hyper_parameters = HYPER_PARAMETERS if zero_dc is None else HYPER_PARAMETERS | {"zero_dc": zero_dc}
        model = load_model(write_yaml(tmp_path, model=hyper_parameters), checkpoint=weights)
        stems[zero_dc] = Separator.from_model(model).separate(song)
    for stem, kept in stems[None].items():
        assert torch.equal(kept, stems[False][stem])
        of_offset = (kept - stems[True][stem])[:, 4096:-4096]
        assert of_offset.mean().abs() > 0.001  # of 0.1; the window leaves a part of an offset in the second bin
        difference = torch.fft.rfft(of_offset).abs()
        lowest = 3 * difference.shape[-1] // 32  # the window spreads a bin over its neighbours
        assert difference[:, lowest:].max() < 1e-3 * difference.max()


@pytest.mark.slow
def test_one_model_gives_what_it_leaves_if_that_has_a_name(clip: Tensor) -> None:
    model = random_model(("vocals",), residual="instrumental")
    mixture = clip[:, :50_000]
    stems = Separator.from_model(model).separate(mixture)
    assert list(stems) == ["vocals", "instrumental"]
    assert torch.allclose(stems["vocals"] + stems["instrumental"], mixture, atol=1e-6)
    assert torch.equal(stems["vocals"], Separator.from_model(random_model(("vocals",))).separate(mixture)["vocals"])


def test_the_same_input_gives_the_same_samples_whatever_ran_before(pool: ModelPool, clip: Tensor) -> None:
    separator = Separator("demo", "vocals_instrumental", pool=pool, options=QUICK)
    first = separator.separate(clip)["vocals"]
    separator.separate(torch.randn(2, 30_000))
    assert torch.equal(separator.separate(clip)["vocals"], first)


@pytest.mark.slow
def test_batch_size_and_thread_count_do_not_change_the_stems(pool: ModelPool, clip: Tensor) -> None:
    short = clip[:, :120_000]
    expected = Separator(
        "demo", "all_6", options=EngineOptions(chunk_seconds=4, overlap_seconds=2), pool=pool
    ).separate(short)
    batched = Separator(
        "demo", "all_6", options=EngineOptions(chunk_seconds=4, overlap_seconds=2, batch_size=3), pool=pool
    ).separate(short)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            alone = Separator(
                "demo", "all_6", options=EngineOptions(chunk_seconds=4, overlap_seconds=2), pool=pool
            ).separate(short)
            for stem in expected:
                assert (batched[stem] - expected[stem]).abs().max() <= 1e-5
                assert (alone[stem] - expected[stem]).abs().max() <= 1e-5
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_batch_size_in_bfloat16_changes_the_stems_by_no_more_than_its_rounding(clip: Tensor) -> None:
    half = ModelPool(EngineOptions(device="cpu", precision="bf16"))
    options = EngineOptions(chunk_seconds=4, overlap_seconds=2)
    one = Separator("demo", pool=half, options=options).separate(clip[:, :200_000])
    three = Separator("demo", pool=half, options=replace(options, batch_size=3)).separate(clip[:, :200_000])
    assert sdr(one["vocals"], three["vocals"]) > 40


def test_stems_do_not_depend_on_pairs_nor_on_pytorchs_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    separator = Separator.from_model(random_model(("left", "right")), options=QUICK)
    noise = torch.randn(2, 300_000) * 0.1
    threads, results = torch.get_num_threads(), []
    try:
        for count, helps in ((1, False), (2, False), (2, True), (5, True)):
            torch.set_num_threads(count)
            monkeypatch.setattr("separation.engine.model_runner.pairs_help", lambda helps=helps: helps)
            results.append(separator.separate(noise)["left"])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert (result - results[0]).abs().max() <= 1e-6 * results[0].abs().max()


@pytest.mark.slow
def test_music_60_db_lower_gives_the_same_stems_60_db_lower(pool: ModelPool, clip: Tensor) -> None:
    separator = Separator("demo", "all_4", pool=pool, options=QUICK)
    loud, quiet = separator.separate(clip[:, :150_000]), separator.separate(clip[:, :150_000] * 1e-3)
    for stem in loud:
        assert sdr(loud[stem], quiet[stem] * 1e3) > 60


def test_a_song_that_fails_does_not_block_the_next(
    pool: ModelPool, clip: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AppendError(Exception):
        pass

    def fail(samples: Samples, block: Tensor) -> None:
        raise AppendError

    separator = Separator("demo", pool=pool, options=QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(Samples, "append", fail)
        with pytest.raises(AppendError) as raised:
            separator.separate(clip[:, :1000])
    assert raised.value.__traceback__ is not None  # keeps the frames of the failed run alive
    assert separator.separate(clip[:, :1000])["vocals"].any()


def test_silence_in_is_silence_out(pool: ModelPool) -> None:
    for stem in Separator("demo", "all_6", pool=pool, options=QUICK).separate(torch.zeros(2, 100_000)).values():
        assert stem.shape == (2, 100_000)
        assert not stem.any()


@pytest.mark.parametrize("length", quick_first([1, 2, 1000, 4410, 44_100], 3))
def test_a_short_song_keeps_its_length(pool: ModelPool, clip: Tensor, length: int) -> None:
    separator = Separator("demo", "vocals_instrumental", pool=pool, options=QUICK)
    for stem in separator.separate(clip[:, 50_000 : 50_000 + length]).values():
        assert stem.shape == (2, length)
        assert torch.isfinite(stem).all()


def test_bad_mixtures_are_errors_that_say_where(pool: ModelPool) -> None:
    separator = Separator("demo", "vocals_instrumental", pool=pool, options=QUICK)
    mixture = torch.zeros(2, 1000)
    mixture[1, 321] = float("nan")
    with pytest.raises(AudioError, match="sample 321"):
        separator.separate(mixture)
    with pytest.raises(AudioError, match="no samples"):
        separator.separate(torch.zeros(2, 0))
    with pytest.raises(InputError, match=r"^the mixture has shape \[1000\]: pass a tensor of shape \[2, T\]$"):
        separator.separate(torch.zeros(1000))


def test_one_model_separates_a_song_without_a_recipe(clip: Tensor) -> None:
    stems = Separator.from_model(random_model(("left", "right")), options=QUICK).separate(clip)
    assert list(stems) == ["left", "right"]
    assert stems["left"].shape == clip.shape


def test_a_mono_model_runs_on_each_channel(clip: Tensor) -> None:
    model = random_model(("vocals", "other"), stereo=False)
    separator = Separator.from_model(model, options=QUICK)
    stems = separator.separate(clip[:, :60_000])
    for channel in (0, 1):
        doubled = clip[channel : channel + 1, :60_000].expand(2, -1)
        alone = separator.separate(doubled * clip[:, :60_000].abs().max() / doubled.abs().max())  # the same input gain
        scale = doubled.abs().max() / clip[:, :60_000].abs().max()
        assert (alone["vocals"][0] * scale - stems["vocals"][channel]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "options, words",
    [
        ({"pool": True, "device": "cpu"}, "device 'cpu' has no effect with a pool"),
        ({"pool": True, "precision": "fp32"}, "precision 'fp32' has no effect with a pool"),
        ({"pool": True, "attention": "sdpa"}, "attention 'sdpa' has no effect with a pool"),
        ({"stems": "all_4"}, "stems 'all_4' have no effect with a loaded recipe"),
    ],
)
def test_an_argument_without_effect_is_refused(options: dict[str, Any], words: str, pool: ModelPool) -> None:
    recipe = resolve("test", "test", {"vocals": "demo"}) if "stems" in options else "demo"
    engine = EngineOptions(**{name: value for name, value in options.items() if name not in ("pool", "stems")})
    given = {"pool": pool} if "pool" in options else {"stems": options["stems"]}
    with pytest.raises(InputError, match=words):
        Separator(recipe, options=engine, **given)


@pytest.mark.parametrize("rate", [48_000, 32_000])
@pytest.mark.parametrize("n_samples", [1, 700, 44_100 * 3 + 17])
def test_a_model_of_another_sample_rate_sees_the_song_at_its_rate(rate: int, n_samples: int) -> None:
    model = Recorder("wide", ("vocals",), rate // 2, sample_rate=rate)
    model.normalisation = "none"
    times = torch.arange(n_samples).double() / 44_100
    mixture = torch.stack([(2 * torch.pi * 440 * times).sin(), (2 * torch.pi * 1000 * times).cos()]).float() * 0.5
    estimate = Separator.from_model(model, options=EngineOptions(batch_size=2)).separate(mixture)["vocals"]
    assert estimate.shape == mixture.shape
    inner = slice(2000, -2000) if n_samples > 10_000 else slice(0)  # the song's ends ring
    assert (estimate - mixture)[:, inner].abs().sum() <= 1e-5 * n_samples
    seen = torch.cat(model.seen)
    assert seen.shape[1:] == (2, rate // 2)  # 0.5 s at the model's rate
    if n_samples > 10_000:
        spectra = np.abs(np.fft.rfft(seen.double() * torch.hann_window(rate // 2)))
        assert [440, 1000] in (2 * spectra.argmax(-1)).tolist()  # of the chunks that no end of the song is in


def test_the_estimates_at_another_rate_do_not_depend_on_the_batch_size() -> None:
    mixture = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0)) * 0.1
    model = Recorder("wide", ("vocals", "other"), 24_000, sample_rate=48_000)
    one, three = (
        Separator.from_model(model, options=EngineOptions(batch_size=size)).separate(mixture) for size in (1, 3)
    )
    assert all((one[stem] - three[stem]).abs().max() <= 1e-6 for stem in one)


def test_a_file_is_separated_by_a_model_of_another_rate_as_in_memory(tmp_path: Path) -> None:
    mixture = torch.randn(2, 60_000, generator=torch.Generator().manual_seed(0)) * 0.1
    song = write(tmp_path / "song.wav", mixture)
    separator = Separator.from_model(Recorder("wide", ("vocals",), 24_000, sample_rate=48_000))
    estimate = read(separator.separate_file(song, tmp_path / "out")["vocals"])
    assert (estimate - separator.separate(mixture)["vocals"]).abs().max() <= 1e-6


@pytest.mark.slow
def test_the_shipped_weights_separate_the_shipped_song(pool: ModelPool) -> None:
    mixture = read(SONG)
    stems = Separator("demo", "all_6", pool=pool).separate(mixture)
    for stem, estimate in stems.items():
        reference = read(PROJECT / "weights" / "demo" / "stems" / f"{stem}.ogg")
        assert sdr(reference, estimate) >= sdr(reference, mixture) + 8
