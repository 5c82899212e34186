"""Separator: what must stay true of every separation, on the demo recipe and on small models with random weights."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from helpers.common import GIVES_BACK, PROJECT, quick_first
from helpers.small_model import identity
from separation import AudioError, EstimateError, InputError, ModelPool, OutputError, RecipeError, Separator
from separation.audio.encode import encode
from separation.audio.options import OutputOptions
from separation.audio.resample import resample
from separation.audio.waveform import Waveform
from separation.engine import encoders, gpu_models
from separation.engine import pool as pool_module
from separation.engine import separator as separator_module
from separation.engine import song as song_module
from separation.engine.chunk_plan import ChunkPlan
from separation.engine.chunking import Level, ReadyModel, separate
from separation.engine.gpu_models import GpuModels
from separation.engine.options import EngineOptions
from separation.engine.recipes import resolve
from separation.engine.song import Samples
from separation.evaluation.metrics import sdr
from separation.models.base import SeparationModel
from separation.models.bs_roformer import BSRoFormer, BSRoFormerConfig
from separation.system.output import OutputFolder
from separation.system.record import RECORD

SONG = PROJECT / "weights" / "demo" / "song.flac"


QUICK = EngineOptions(chunk_seconds=4, overlap_seconds=1)


@pytest.fixture(scope="module")
def pool() -> ModelPool:
    return ModelPool(EngineOptions(device="cpu", precision="fp32"))


@pytest.fixture(scope="module")
def clip() -> Tensor:
    """Six seconds of the demo song, [2, T]."""
    audio, _ = soundfile.read(SONG, dtype="float32", frames=264_600)
    return torch.from_numpy(audio.T.copy())


def write(path: Path, audio: Tensor, rate: int = 44100) -> Path:
    soundfile.write(path, audio.T.numpy(), rate, subtype="FLOAT")
    return path


def read(path: Path) -> Tensor:
    return torch.from_numpy(soundfile.read(path, dtype="float32", always_2d=True)[0].T.copy())


def test_vocals_plus_instrumental_is_the_mixture(pool: ModelPool, clip: Tensor) -> None:
    stems = Separator("demo", "vocals_instrumental", pool=pool, options=QUICK).separate(clip)
    assert list(stems) == ["vocals", "instrumental"]
    assert (stems["vocals"] + stems["instrumental"] - clip).abs().max() <= 2e-7
    assert sdr(clip, stems["vocals"]) < 10  # the vocals are not the mixture


def test_all_4_sums_to_the_mixture_where_other_is_the_residual(pool: ModelPool, clip: Tensor) -> None:
    stems = Separator("demo", "all_4", pool=pool, options=QUICK).separate(clip)
    assert (torch.stack(list(stems.values())).sum(0) - clip).abs().max() <= 1e-6


@pytest.mark.parametrize(
    "stem", ["vocals", *(pytest.param(stem, marks=pytest.mark.slow) for stem in ("drums", "bass", "other"))]
)
def test_two_stems_are_the_stem_of_all_4_and_the_mixture_minus_it(
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


def test_two_stems_go_before_stems_and_an_unknown_one_is_an_error(pool: ModelPool) -> None:
    assert Separator("demo", "all_6", two_stems="bass", pool=pool).stems == ("bass", "no_bass")
    assert Separator("demo", "all_4", two_stems="guitar", pool=pool).stems == ("guitar", "no_guitar")
    for stem in ("kazoo", "none", ""):
        with pytest.raises(RecipeError, match=f"'demo' has no stem '{stem}': choose one of vocals, .*guitar"):
            Separator("demo", two_stems=stem, pool=pool)


def test_one_model_gives_two_stems_without_a_recipe(clip: Tensor) -> None:
    model = random_model(("left", "right"))
    stems = Separator.from_model(model, two_stems="right").separate(clip[:, :50_000])
    assert list(stems) == ["right", "no_right"]
    assert (stems["right"] - Separator.from_model(model).separate(clip[:, :50_000])["right"]).abs().max() <= 1e-6
    with pytest.raises(RecipeError, match=r"'random' has no stem 'vocals': choose one of left, right"):
        Separator.from_model(model, two_stems="vocals")


@pytest.mark.parametrize(
    "stem, expected",
    [
        ("vocals", ("bs_roformer_viperx_1297", ("vocals",))),
        ("drums", ("htdemucs_ft", ("drums",))),
        ("other", ("htdemucs_ft", ("other",))),
    ],
)
def test_two_stems_load_and_run_only_what_the_one_needs(
    stem: str, expected: tuple[str, tuple[str, ...]], clip: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Recorder] = []

    def load(name: str, *, stems: tuple[str, ...], **_: object) -> Recorder:
        loaded.append(Recorder(name, stems, 100_000))
        return loaded[-1]

    monkeypatch.setattr(pool_module, "load_model", load)
    pool = ModelPool(EngineOptions(device="cpu", precision="fp32"))
    Separator("standard", two_stems=stem, pool=pool, options=QUICK).separate(clip[:, :1000])
    assert [(model.name, model.stems) for model in loaded] == [expected]
    assert list(pool.load_seconds) == [expected[0]]
    assert 0 <= pool.load_seconds[expected[0]] < 10


def test_a_stem_that_no_file_is_made_of_does_not_scale_the_others(clip: Tensor, tmp_path: Path) -> None:
    models = {name: Recorder(name, (name,), 100_000) for name in ("louder", "inverted")}
    for name, gain in (("louder", 3.0), ("inverted", -3.0)):
        models[name].gain.data.fill_(gain)
    pool = ModelPool(EngineOptions(device="cpu", precision="fp32"))
    pool._models = dict(models)
    recipe = resolve("test", "test", {"louder": "louder", "inverted": "inverted", "rest": "residual"})
    mixture = clip[:, :100_000] * 0.8 / clip[:, :100_000].abs().max()
    song = write(tmp_path / "song.wav", mixture)
    files = Separator(recipe, two_stems="rest", pool=pool, options=QUICK).separate_file(
        song, tmp_path / "out", OutputOptions(format="flac")
    )
    assert files.gain == 1
    assert (read(files["rest"]) - mixture).abs().max() <= 1e-5
    assert read(files["no_rest"]).abs().max() <= 1e-5


def test_the_attention_backend_asked_for_is_the_models() -> None:
    for name in ("einsum", "itemwise"):
        separator = Separator("demo", "all_4", options=EngineOptions(device="cpu", precision="fp32", attention=name))
        assert separator.models["demo"].attention == name
    with pytest.raises(InputError, match="unknown attention backend 'abacus'"):
        Separator("demo", "all_4", options=EngineOptions(device="cpu", attention="abacus"))


def test_one_model_for_two_choices_is_loaded_once(pool: ModelPool) -> None:
    first, second = Separator("demo", "vocals_instrumental", pool=pool), Separator("demo", "all_6", pool=pool)
    assert next(first.models["demo"].parameters()) is next(second.models["demo"].parameters())
    assert list(pool.load_seconds) == ["demo"]


def test_the_same_input_gives_the_same_samples_whatever_ran_before(pool: ModelPool, clip: Tensor) -> None:
    separator = Separator("demo", "vocals_instrumental", pool=pool, options=QUICK)
    first = separator.separate(clip)["vocals"]
    separator.separate(torch.randn(2, 30_000))
    assert torch.equal(separator.separate(clip)["vocals"], first)


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


def test_batch_size_in_bfloat16_changes_the_stems_by_no_more_than_its_rounding(clip: Tensor) -> None:
    half = ModelPool(EngineOptions(device="cpu", precision="bf16"))
    options = EngineOptions(chunk_seconds=4, overlap_seconds=2)
    one = Separator("demo", pool=half, options=options).separate(clip[:, :200_000])
    three = Separator("demo", pool=half, options=replace(options, batch_size=3)).separate(clip[:, :200_000])
    assert sdr(one["vocals"], three["vocals"]) > 40


def test_chunks_at_once_are_one_on_a_cpu_unless_asked_for(pool: ModelPool) -> None:
    for options, expected in (({}, 1), ({"batch_size": 5}, 5)):
        separator = Separator("demo", "all_4", pool=pool, options=replace(QUICK, **options))
        ready = separator._ready(separator.models["demo"], separator.plans["demo"])
        assert (ready.model, ready.batch_size) == (separator.models["demo"], expected)


class Gpu:
    """What a GPU that holds `room` chunks at once says when models are made ready on it; nothing is computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fitting: int) -> None:
        self.room = 99
        self.measured: list[tuple[int, int]] = []
        self.captured: list[tuple[str, tuple[int, ...]]] = []
        monkeypatch.setattr(gpu_models, "chunk_memory_bytes", self._measure)
        monkeypatch.setattr(gpu_models, "fitting_batch_size", lambda n_bytes, gpu: fitting)
        monkeypatch.setattr(gpu_models, "captured", self._capture)

    def _measure(self, model: object, channels: int, samples: int, device: torch.device) -> int:
        self.measured.append((channels, samples))
        return 700

    def _capture(self, name: str, model: Any, shape: tuple[int, ...], device: torch.device) -> Any:
        self.captured.append((name, shape))
        if shape[0] > self.room:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return model


def test_on_a_gpu_a_model_is_made_ready_once_for_each_kind_of_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, models, device = Gpu(monkeypatch, 8), GpuModels(), torch.device("cuda")
    model = random_model(("left", "right"))
    ready = models.get(model, 1000, "auto", device)
    assert (ready.model, ready.batch_size, ready.n_stems, ready.device) == (model, 8, 2, device)
    assert models.get(model, 1000, "auto", device) is ready
    assert models.get(model.only(("right",)), 1000, "auto", device) is not ready
    assert models.get(model, 2000, "auto", device).batch_size == 8
    assert models.get(model, 1000, 3, device).batch_size == 3
    assert gpu.measured == [(2, 1000), (2, 1000), (2, 2000), (2, 1000)]
    assert gpu.captured == [
        ("random", (size, 2, samples)) for size, samples in ((8, 1000),) * 2 + ((8, 2000), (3, 1000))
    ]
    models.forget("random")
    assert models.get(model, 1000, "auto", device) is not ready


def test_on_a_gpu_that_others_use_a_batch_is_halved_for_this_song_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu, models, model = Gpu(monkeypatch, 8), GpuModels(), random_model(("left",))
    sizes = []
    for gpu.room in (2, 4, 8, 2):  # the last comes too late to matter
        sizes.append(models.get(model, 1000, "auto", torch.device("cuda")).batch_size)
    assert sizes == [2, 4, 8, 8]
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned[:2] == [
        f"the GPU's memory does not hold a batch of {size} chunks: continuing with batches of {size // 2}"
        for size in (8, 4)
    ]
    gpu.room = 0
    with pytest.raises(EstimateError, match="the memory of cuda does not hold one chunk of 2000 samples"):
        models.get(model, 2000, "auto", torch.device("cuda"))


def test_on_a_gpu_the_least_recently_used_models_do_not_stay_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, 8)
    monkeypatch.setattr(gpu_models, "MAX_READY", 2)
    models, model = GpuModels(), random_model(("left",))
    for samples in (1000, 2000, 1000, 3000):
        models.get(model, samples, "auto", torch.device("cuda"))
    assert [kind[2] for kind in models.ready] == [1000, 3000]


def test_the_spare_of_a_model_in_float16_is_one_copy_in_bfloat16_and_a_warning_names_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    models, model, chunk = GpuModels(), random_model(("left",)), torch.randn(1, 2, 44_100) * 0.1
    with torch.inference_mode():
        exact = model(chunk)
        model.to_precision(torch.float16)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        spare = models.spare(model)
        assert isinstance(spare, SeparationModel) and not spare.is_half and model.is_half
        assert sdr(exact, spare(chunk)) > 30
    assert spare.is_half is False and {weight.dtype for weight in spare.parameters()} == {torch.float32, torch.bfloat16}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert models.spare(model) is spare
    warned = [record.getMessage() for record in caplog.records]
    assert warned == ["random: NaN or Inf in float16: the rest of this song is computed in bfloat16"] * 2


def test_a_spare_for_which_the_memory_is_missing_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def copy(model: SeparationModel, dtype: torch.dtype) -> SeparationModel:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SeparationModel, "in_precision", copy)
    with pytest.raises(EstimateError, match="second copy of random, in bfloat16: choose precision bf16"):
        GpuModels().spare(random_model(("left",)))


def test_music_60_db_lower_gives_the_same_stems_60_db_lower(pool: ModelPool, clip: Tensor) -> None:
    separator = Separator("demo", "all_4", pool=pool, options=QUICK)
    loud, quiet = separator.separate(clip[:, :150_000]), separator.separate(clip[:, :150_000] * 1e-3)
    for stem in loud:
        assert sdr(loud[stem], quiet[stem] * 1e3) > 60


def test_silence_in_is_silence_out(pool: ModelPool) -> None:
    for stem in Separator("demo", "all_6", pool=pool, options=QUICK).separate(torch.zeros(2, 100_000)).values():
        assert stem.shape == (2, 100_000)
        assert not stem.any()


@pytest.mark.parametrize("length", [1, 2, 1000, 4410, 44_100])
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
    with pytest.raises(InputError, match=r"\[2, T\].*\[1000\]"):
        separator.separate(torch.zeros(1000))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"chunk_seconds": 3}, "chunk size 3 s.*4 to 30"),
        ({"overlap_seconds": 9}, "overlap 9 s.*1 to 8"),
        ({"chunk_seconds": 4, "overlap_seconds": 4}, "overlap.*smaller than the chunk size.*below 4 s"),
        ({"chunk_seconds": 5, "overlap_seconds": 8}, "overlap.*smaller than the chunk size"),
        ({"batch_size": 0}, "batch size 0"),
        ({"chunk_seconds": 8.0}, "chunk size 8.0 s.*whole seconds"),
        ({"overlap_seconds": 2.5}, "overlap 2.5 s.*whole seconds"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"precision": "int4"}, "unknown precision 'int4'"),
    ],
)
def test_options_that_cannot_be_used_are_one_clear_sentence(options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Separator("demo", "all_4", options=EngineOptions(**options))


def random_model(stems: tuple[str, ...], *, name: str = "random", stereo: bool = True, seed: int = 0) -> BSRoFormer:
    torch.manual_seed(seed)
    config = BSRoFormerConfig(
        dim=16, depth=1, dim_head=8, heads=2, stereo=stereo, num_stems=len(stems), stft_hop_length=1024
    )
    return BSRoFormer(config, identity(stems, name=name, chunk_samples=352_800)).eval()


def test_one_model_separates_a_song_without_a_recipe(clip: Tensor) -> None:
    stems = Separator.from_model(
        random_model(("left", "right")), options=EngineOptions(chunk_seconds=4, overlap_seconds=1)
    ).separate(clip)
    assert list(stems) == ["left", "right"]
    assert stems["left"].shape == clip.shape


def test_a_mono_model_works_on_each_channel(clip: Tensor) -> None:
    model = random_model(("vocals", "other"), stereo=False)
    separator = Separator.from_model(model, options=EngineOptions(chunk_seconds=4, overlap_seconds=1))
    stems = separator.separate(clip[:, :60_000])
    for channel in (0, 1):
        doubled = clip[channel : channel + 1, :60_000].expand(2, -1)
        alone = separator.separate(doubled * clip[:, :60_000].abs().max() / doubled.abs().max())  # the same input gain
        scale = doubled.abs().max() / clip[:, :60_000].abs().max()
        assert (alone["vocals"][0] * scale - stems["vocals"][channel]).abs().max() <= 1e-5


def test_nan_from_a_model_is_an_error_and_leaves_no_file(clip: Tensor, tmp_path: Path) -> None:
    model = random_model(("vocals",))
    with torch.no_grad():
        model.final_norm.gamma.fill_(float("nan"))
    song = write(tmp_path / "song.wav", clip[:, :50_000])
    with pytest.raises(EstimateError, match="NaN or Inf"):
        Separator.from_model(model).separate_file(song, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["song.wav"]


def test_a_file_gives_the_stems_that_memory_gives(pool: ModelPool, clip: Tensor, tmp_path: Path) -> None:
    separator = Separator("demo", "vocals_instrumental", pool=pool, options=QUICK)
    files = separator.separate_file(write(tmp_path / "song.wav", clip), tmp_path / "out")
    expected = separator.separate(clip)
    assert [path.name for path in files.values()] == ["vocals.wav", "instrumental.wav"]
    assert files.duration_seconds == pytest.approx(6)
    for stem, path in files.items():
        assert soundfile.info(path).subtype == "FLOAT"
        assert (read(path) - expected[stem]).abs().max() <= 1e-6
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [RECORD, "instrumental.wav", "vocals.wav"]


@pytest.mark.parametrize("format, tolerance", [("wav", 1e-7), ("flac", 1e-6), ("mp3", 0.05)])
@pytest.mark.parametrize("sample_rate", [44100, 48000])
def test_every_format_and_rate_has_the_songs_length_and_sums_to_the_mixture(
    pool: ModelPool, clip: Tensor, tmp_path: Path, format: str, tolerance: float, sample_rate: int
) -> None:
    song = write(tmp_path / "song.wav", clip[:, :100_000])
    separator = Separator("demo", "vocals_instrumental", pool=pool, options=QUICK)
    files = separator.separate_file(song, tmp_path / "out", OutputOptions(format=format, sample_rate=sample_rate))
    stems = [read(path) for path in files.values()]
    expected = -(-100_000 * sample_rate // 44100)
    assert {stem.shape[1] for stem in stems} == {expected}
    if sample_rate == 44100:
        assert ((stems[0] + stems[1]) * (1 / files.gain) - clip[:, :100_000]).abs().max() <= tolerance


def test_loud_stems_are_scaled_by_one_gain_in_flac_and_kept_in_wav(
    pool: ModelPool, clip: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    song = write(tmp_path / "song.wav", clip[:, :100_000] * 4)
    separator = Separator("demo", "vocals_instrumental", pool=pool, options=QUICK)
    wav = separator.separate_file(song, tmp_path / "wav")
    assert wav.gain == 1
    assert max(read(path).abs().max() for path in wav.values()) > 1
    flac = separator.separate_file(song, tmp_path / "flac", OutputOptions(format="flac"))
    assert flac.gain < 1
    assert "scaled by" in caplog.text
    for stem, path in flac.items():
        assert read(path).abs().max() <= 1
        assert (read(path) / flac.gain - read(wav[stem])).abs().max() <= 1e-5


def test_a_cancelled_run_leaves_no_file_and_the_next_is_right(pool: ModelPool, clip: Tensor, tmp_path: Path) -> None:
    class CancelError(Exception):
        pass

    def cancel(share: float, stage: str) -> None:
        if share > 0.3:
            raise CancelError

    song = write(tmp_path / "song.wav", clip)
    separator = Separator("demo", "vocals_instrumental", pool=pool, options=QUICK)
    with pytest.raises(CancelError):
        separator.separate_file(song, tmp_path / "a" / "b", progress=cancel)
    assert [path.name for path in tmp_path.iterdir()] == ["song.wav"]
    shares: list[float] = []
    separator.separate_file(song, tmp_path / "out", progress=lambda share, stage: shares.append(share))
    assert shares == sorted(shares)
    assert shares[0] == 0 and shares[-1] == 1


def test_progress_goes_over_the_whole_job_and_names_each_stage_once(
    pool: ModelPool, clip: Tensor, tmp_path: Path
) -> None:
    song = write(tmp_path / "song.wav", clip)
    separator = Separator(
        "demo", "vocals_instrumental", options=EngineOptions(chunk_seconds=4, overlap_seconds=1), pool=pool
    )
    calls: list[tuple[float, str]] = []
    files = separator.separate_file(song, tmp_path / "out", progress=lambda *call: calls.append(call))
    shares = [share for share, _ in calls]
    assert shares == sorted(shares)
    assert calls[0] == (0, "decoding") and calls[-1] == (1, "done")
    stages = list(dict.fromkeys(stage for _, stage in calls))
    assert stages == ["decoding", "demo", "writing vocals", "writing instrumental", "done"]
    last = {stage: share for share, stage in calls}
    assert last["decoding"] == pytest.approx(0.05) and last["demo"] == pytest.approx(0.9)
    assert len({share for share, stage in calls if stage == "decoding"}) > 3
    assert len({share for share, stage in calls if stage == "demo"}) >= 3
    assert 0 < files.elapsed_seconds < 60
    assert files.times_realtime == pytest.approx(6 / files.elapsed_seconds)


def test_a_song_can_be_cancelled_while_it_is_decoded(pool: ModelPool, clip: Tensor, tmp_path: Path) -> None:
    class CancelError(Exception):
        pass

    def cancel(share: float, stage: str) -> None:
        if stage == "decoding" and share > 0:
            raise CancelError

    song = write(tmp_path / "song.wav", clip)
    with pytest.raises(CancelError):
        Separator("demo", pool=pool, options=QUICK).separate_file(song, tmp_path / "out", progress=cancel)
    assert [path.name for path in tmp_path.iterdir()] == ["song.wav"]


def test_an_interrupt_while_stems_are_written_is_not_lost_and_leaves_no_file(
    pool: ModelPool, clip: Tensor, tmp_path: Path
) -> None:
    class CancelError(Exception):
        pass

    def cancel(*_: object) -> None:
        raise CancelError

    def soon(share: float, stage: str) -> None:
        if stage == "writing vocals":
            signal.setitimer(signal.ITIMER_REAL, 0.02)

    song = write(tmp_path / "song.wav", clip)
    before = signal.signal(signal.SIGALRM, cancel)
    try:
        with pytest.raises(CancelError):
            Separator("demo", "all_6", pool=pool, options=QUICK).separate_file(
                song, tmp_path / "out", OutputOptions(format="mp3"), progress=soon
            )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert [path.name for path in tmp_path.iterdir()] == ["song.wav"]


def test_a_song_can_be_cancelled_while_a_stem_is_encoded(
    pool: ModelPool, clip: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CancelError(Exception):
        pass

    cancelled, stages = threading.Event(), []

    def cancel(share: float, stage: str) -> None:
        stages.append(stage)
        if stages.count("writing vocals") == 2:
            cancelled.set()
            raise CancelError

    monkeypatch.setattr(encoders, "encode", lambda *_, **__: cancelled.wait(20))
    song = write(tmp_path / "song.wav", clip[:, :10_000])
    with pytest.raises(CancelError):
        Separator("demo", pool=pool, options=QUICK).separate_file(song, tmp_path / "out", progress=cancel)
    assert [path.name for path in tmp_path.iterdir()] == ["song.wav"]


def test_stems_take_their_place_together_or_not_at_all(pool: ModelPool, clip: Tensor, tmp_path: Path) -> None:
    song = write(tmp_path / "song.wav", clip[:, :10_000])
    (tmp_path / "out" / "instrumental.wav" / "in the way").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"instrumental\.wav.*is a folder"):
        Separator("demo", "vocals_instrumental", pool=pool, options=QUICK).separate_file(song, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["instrumental.wav"]


@pytest.mark.skipif(os.cpu_count() == 1, reason="needs two cores")
def test_stems_are_encoded_side_by_side(
    pool: ModelPool, clip: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, both = encoders.encode, threading.Barrier(2, timeout=20)

    def met(*arguments: object, **options: object) -> None:
        both.wait()  # an error if the other encoder does not come
        encode(*arguments, **options)

    monkeypatch.setattr(encoders, "encode", met)
    song = write(tmp_path / "song.wav", clip[:, :20_000])
    files = Separator("demo", "vocals_instrumental", pool=pool, options=QUICK).separate_file(
        song, tmp_path / "out", OutputOptions(format="mp3")
    )
    assert [path.name for path in files.values()] == ["vocals.mp3", "instrumental.mp3"]


def test_a_move_that_fails_puts_the_older_stems_back(tmp_path: Path) -> None:
    (tmp_path / "vocals.wav").write_text("older")
    with OutputFolder(tmp_path, overwrite=True, recorded=False) as output:
        (output.work / "vocals.wav").write_text("newer")
        parts = {"vocals": output.work / "vocals.wav", "instrumental": output.work / "not there.wav"}
        with pytest.raises(OutputError, match=r"not there\.wav"):
            output.publish(parts)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("vocals.wav", "older")]


def test_newer_stems_take_the_place_of_older_ones(pool: ModelPool, clip: Tensor, tmp_path: Path) -> None:
    song = write(tmp_path / "song.wav", clip[:, :10_000])
    separator = Separator("demo", "vocals_instrumental", pool=pool, options=QUICK)
    for level in (1.0, 0.5):
        write(song, clip[:, :10_000] * level)
        files = separator.separate_file(song, tmp_path / "out")
        assert (read(files["vocals"]) + read(files["instrumental"]) - clip[:, :10_000] * level).abs().max() <= 1e-6
    assert len(list((tmp_path / "out").glob("*.wav"))) == 2


class Recorder(SeparationModel):
    """Keeps what it is given; estimates each stem as its input."""

    channels = 2

    def __init__(self, name: str, stems: tuple[str, ...], chunk_samples: int, *, sample_rate: int = 44100) -> None:
        super().__init__(identity(stems, name=name, sample_rate=sample_rate, chunk_samples=chunk_samples))
        self.gain = torch.nn.Parameter(torch.ones(1))
        self.seen: list[Tensor] = []

    def forward(self, chunks: Tensor) -> Tensor:
        self.seen.append(chunks.clone())
        return (chunks * self.gain).unsqueeze(1).repeat(1, len(self.stems), 1, 1)


class StandardRecorder(Recorder):
    """As Demucs: chunks of its own length, normalised by mean and deviation, no reflected border."""

    normalisation = "standard"
    fixed_chunk = True
    reflects_border = False


def recording(model: Recorder) -> ModelPool:
    pool = ModelPool(EngineOptions(device="cpu", precision="fp32"))
    pool._models = {model.name: model}
    return pool


@pytest.mark.parametrize("level", [0.5, 3.0])
@pytest.mark.parametrize(
    "options",
    [
        {"format": "wav"},
        {"format": "wav", "wav_depth": "16"},
        {"format": "flac"},
        {"format": "flac", "flac_depth": "16"},
        {"format": "mp3"},
        {"format": "flac", "sample_rate": 48000},
    ],
)
def test_the_files_are_those_of_encoding_the_whole_stems_afterwards(
    options: dict[str, Any], level: float, clip: Tensor, tmp_path: Path
) -> None:
    recipe = resolve("test", "test", {"vocals": "first", "drums": "first of vocals", "instrumental": "residual"})
    model = Recorder("first", ("vocals", "drums"), 100_000)
    model.gain.data.fill_(0.7)
    separator = Separator(recipe, pool=recording(model), options=QUICK)
    mixture = clip[:, :200_001] * level / clip[:, :200_001].abs().max()
    files = separator.separate_file(write(tmp_path / "song.wav", mixture), tmp_path / "out", OutputOptions(**options))
    assert (files.gain < 1) == (level > 1 and options != {"format": "wav"})
    rate = options.get("sample_rate", 44100)
    depths = {name: value for name, value in options.items() if name.endswith("_depth")}
    for stem, samples in separator.separate(mixture).items():
        expected = tmp_path / f"{stem}.{options['format']}"
        with Waveform(tmp_path) as wave:
            wave.append(samples)
            with resample(wave, rate, tmp_path) if rate != 44100 else wave as at_rate:
                tags = {"title": f"song ({stem})"}
                encode(at_rate, expected, OutputOptions(options["format"], **depths), tags=tags, gain=files.gain)
        assert files[stem].read_bytes() == expected.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"song.wav", "out", *(path.name for path in files.values())}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"pool": True, "device": "cpu"}, "device 'cpu' means nothing beside a pool"),
        ({"pool": True, "precision": "fp32"}, "precision 'fp32' means nothing beside a pool"),
        ({"pool": True, "attention": "sdpa"}, "attention 'sdpa' means nothing beside a pool"),
        ({"stems": "all_4"}, "stems 'all_4' mean nothing beside a loaded recipe"),
    ],
)
def test_an_argument_that_another_makes_meaningless_is_refused(
    options: dict[str, Any], words: str, pool: ModelPool
) -> None:
    recipe = resolve("test", "test", {"vocals": "demo"}) if "stems" in options else "demo"
    engine = EngineOptions(**{name: value for name, value in options.items() if name not in ("pool", "stems")})
    given = {"pool": pool} if "pool" in options else {"stems": options["stems"]}
    with pytest.raises(InputError, match=words):
        Separator(recipe, options=engine, **given)


@pytest.mark.parametrize("sample_rate", [44100, 48000])
def test_every_stem_is_encoded_while_the_model_still_works(
    sample_rate: int, clip: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, begun = encoders.encode, {"vocals": threading.Event(), "instrumental": threading.Event()}

    def watched(wave: Waveform, path: Path, *arguments: Any, gain: Callable[[], float], **options: Any) -> None:
        def watched_gain() -> float:
            begun[path.stem].set()
            return gain()

        encode(wave, path, *arguments, gain=watched_gain, **options)

    class Waiting(Recorder):
        def forward(self, chunks: Tensor) -> Tensor:
            if len(self.seen) == 2:  # the third and last: 4 s are with the encoders
                assert all(event.wait(20) for event in begun.values())
            return super().forward(chunks)

    monkeypatch.setattr(encoders, "encode", watched)
    model = Waiting("first", ("vocals",), 100_000)
    recipe = resolve("test", "test", {"vocals": "first", "instrumental": "residual"})
    separator = Separator(recipe, pool=recording(model), options=QUICK)
    song = write(tmp_path / "song.wav", clip)
    separator.separate_file(song, tmp_path / "out", OutputOptions(format="flac", sample_rate=sample_rate))
    assert len(model.seen) == 3


@pytest.mark.parametrize("where", ["an encoder", "a sum", "the input of a run", "the end of that input"])
def test_what_fails_beside_the_model_ends_the_run_with_its_error(
    where: str, clip: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def fail(*_: object, **__: object) -> Iterator[Tensor]:
        failed.set()
        raise OutputError("the disk is full")

    def fail_at_the_end(total: Any) -> Iterator[Tensor]:
        yield total.read(0, total.n_samples)[:, 1:]
        time.sleep(0.1)  # the run waits
        raise OutputError("the disk is full")

    class Slow(Recorder):
        def forward(self, chunks: Tensor) -> Tensor:
            assert failed.wait(20)
            time.sleep(0.05)
            return super().forward(chunks)

    if where == "an encoder":
        monkeypatch.setattr(encoders, "encode", fail)
    else:
        monkeypatch.setattr(song_module._Sum, "blocks", fail_at_the_end if "end" in where else fail)
    lines = {"vocals": "first", "drums": "first after vocals"}
    if "input" not in where:
        lines = {"vocals": "first", "instrumental": "residual"}
    model = Slow("first", ("vocals", "drums"), 100_000)
    recipe = resolve("test", "test", lines)
    separator = Separator(recipe, pool=recording(model), options=QUICK)
    if where != "an encoder":  # a sum is begun when it is asked for
        failed.set()
    song = write(tmp_path / "song.wav", clip.repeat(1, 8))
    with pytest.raises(OutputError, match="the disk is full"):
        separator.separate_file(song, tmp_path / "out")
    chunks = len(separator.plans["first"].starts(8 * clip.shape[1]))
    assert len(model.seen) == chunks if "end" in where else len(model.seen) < chunks
    assert [path.name for path in tmp_path.iterdir()] == ["song.wav"]


def test_once_a_stem_is_too_loud_nothing_more_is_encoded_before_the_gain_is_known(
    clip: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, gains = encoders.encode, []

    def watched(*arguments: Any, gain: Callable[[], float] | float, **options: Any) -> None:
        def watched_gain() -> float:
            gains.append(gain() if callable(gain) else gain)
            return gains[-1]

        encode(*arguments, gain=watched_gain, **options)

    monkeypatch.setattr(encoders, "encode", watched)
    recipe = resolve("test", "test", {"vocals": "first", "instrumental": "residual"})
    separator = Separator(recipe, pool=recording(Recorder("first", ("vocals",), 100_000)), options=QUICK)
    mixture = clip * 0.1
    mixture[:, 0] = 2.0
    files = separator.separate_file(
        write(tmp_path / "song.wav", mixture), tmp_path / "out", OutputOptions(format="flac")
    )
    assert files.gain == pytest.approx(0.5)
    assert gains == [files.gain] * 2 * -(-mixture.shape[1] // 65536)


def test_each_model_of_a_recipe_gets_its_own_normalisation_and_chunks(clip: Tensor, tmp_path: Path) -> None:
    first, second = Recorder("first", ("vocals",), 100_000), StandardRecorder("second", ("bass", "drums"), 78_000)
    pool = ModelPool(EngineOptions(device="cpu", precision="fp32"))
    pool._models = {"first": first, "second": second}
    recipe = resolve("test", "test", {"drums": "second", "vocals": "first", "bass": "second"})
    separator = Separator(recipe, options=EngineOptions(chunk_seconds=4, overlap_seconds=1), pool=pool)
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


def test_the_models_of_a_recipe_share_the_mixture_which_is_decoded_once(
    clip: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []
    decode = separator_module.decode

    def recorded(path: Path, *arguments: Path, **options: object) -> object:
        decoded.append(path)
        return decode(path, *arguments, **options)

    monkeypatch.setattr(separator_module, "decode", recorded)
    pool = ModelPool(EngineOptions(device="cpu", precision="fp32"))
    pool._models = {name: Recorder(name, (name,), 100_000) for name in ("vocals", "bass", "drums")}
    recipe = resolve("test", "test", {name: name for name in pool._models})
    song = write(tmp_path / "song.wav", clip[:, :100_000])
    files = Separator(recipe, pool=pool, options=QUICK).separate_file(song, tmp_path / "out")
    assert decoded == [song]
    assert all((read(path) - clip[:, :100_000]).abs().max() <= 1e-6 for path in files.values())


def plain(model: BSRoFormer, mixture: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """What the model makes of a whole song, without a Separator or a recipe."""
    song = torch.from_numpy(mixture)
    offset, scale = 0.0, float(np.abs(mixture).max()) / 0.9
    if model.normalisation == "standard":
        mono = mixture.mean(axis=0, dtype=np.float64)
        offset, scale = float(mono.mean()), float(mono.std(ddof=1)) + 1e-8
    ready = ReadyModel(model, len(model.stems))
    blocks = separate(ready, Samples.of(song), ChunkPlan(4 * 44100, 44100), Level(offset, scale))
    return dict(zip(model.stems, torch.cat(list(blocks), dim=-1).numpy(), strict=True))


def two_models() -> dict[str, BSRoFormer]:
    """Two small networks of unlike normalisation; their stems are neither silent nor the mixture."""
    models = {}
    for seed, name in enumerate(("a", "b")):
        models[name] = random_model(("vocals", "drums", "bass"), name=name, seed=seed)
    models["b"].normalisation = "standard"
    return models


Arrays = dict[str, NDArray[np.float32]]
# Recipe -> the same in numpy, of the models and the mixture.
CONSTRUCTS: dict[str, Callable[..., Arrays]] = {
    "{vocals: a, drums: b, bass: a, other: residual}": lambda a, b, mix: {
        "vocals": (v := a(mix)["vocals"]),
        "drums": (d := b(mix)["drums"]),
        "bass": (s := a(mix)["bass"]),
        "other": mix - v - d - s,
    },
    "{vocals: [a, b], drums: {a: 3, b: 1}}": lambda a, b, mix: {
        "vocals": (a(mix)["vocals"] + b(mix)["vocals"]) / 2,
        "drums": 0.75 * a(mix)["drums"] + 0.25 * b(mix)["drums"],
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


@pytest.mark.parametrize("text", quick_first(CONSTRUCTS, 4))
def test_each_construct_of_a_recipe_is_the_plain_computation_in_memory_and_in_files(
    text: str, clip: Tensor, tmp_path: Path
) -> None:
    models, mixture = two_models(), clip[:, :120_000] * 0.5 + 0.02
    pool = ModelPool(EngineOptions(device="cpu", precision="fp32"))
    pool._models = dict(models)
    expected = CONSTRUCTS[text](
        lambda song: plain(models["a"], song), lambda song: plain(models["b"], song), mixture.numpy()
    )
    separator = Separator(
        resolve("mine", "test", yaml.safe_load(text)),
        options=EngineOptions(chunk_seconds=4, overlap_seconds=1),
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
    two = Separator(
        separator.recipe, options=EngineOptions(chunk_seconds=4, overlap_seconds=1), two_stems=stem, pool=pool
    )
    alone, rest = two.separate(mixture).values()
    assert np.abs(alone.numpy() - right).max() <= 1e-6
    assert np.abs(rest.numpy() - (mixture.numpy() - right)).max() <= 1e-6


@pytest.mark.parametrize(
    "text, two_stems, runs",
    [
        ("{vocals: a, drums: a, bass: a, other: residual}", None, 1),
        ("{vocals: a, drums: a after vocals, bass: a after vocals, other: residual}", None, 2),
        ("{(drums): a, vocals: a of drums, bass: [a of drums, a]}", None, 2),
        ("{vocals: a, drums: a after vocals, bass: a after drums}", "vocals", 1),
        ("{vocals: a, drums: a after vocals, bass: a after drums}", "drums", 2),
        ("{vocals: a, drums: a after vocals, bass: a after drums}", "bass", 3),
        ("{vocals: a, (drums): a after vocals, other: residual}", "other", 1),
    ],
)
def test_no_chunk_is_computed_twice_and_none_that_is_not_needed(
    text: str, two_stems: str | None, runs: int, clip: Tensor, tmp_path: Path
) -> None:
    model, calls = two_models()["a"], []
    model.register_forward_hook(lambda *_: calls.append(1))
    pool = ModelPool(EngineOptions(device="cpu", precision="fp32"))
    pool._models = {"a": model}
    recipe = resolve("mine", "test", yaml.safe_load(text))
    separator = Separator(
        recipe, options=EngineOptions(chunk_seconds=4, overlap_seconds=1), two_stems=two_stems, pool=pool
    )
    separator.separate(clip[:, :200_000])
    chunks = len(separator.plans["a"].starts(200_000))
    assert chunks == 2 and len(calls) == runs * chunks
    separator.separate_file(write(tmp_path / "song.wav", clip[:, :200_000]), tmp_path / "out")
    assert len(calls) == 2 * runs * chunks


def test_the_progress_of_a_recipe_goes_over_all_its_runs(clip: Tensor) -> None:
    models = two_models()
    pool = ModelPool(EngineOptions(device="cpu", precision="fp32"))
    pool._models = dict(models)
    recipe = resolve("mine", "test", {"vocals": "a", "drums": "b after vocals", "bass": "a after drums"})
    calls: list[tuple[float, str]] = []
    separator = Separator(recipe, options=EngineOptions(chunk_seconds=4, overlap_seconds=1), pool=pool)
    separator.separate(clip[:, :200_000], progress=lambda *call: calls.append(call))
    sixths = [(0, "a"), (1, "a"), (2, "a"), (2, "b"), (3, "b"), (4, "b"), (4, "a"), (5, "a"), (6, "a"), (6, "done")]
    assert calls == [(pytest.approx(share / 6), stage) for share, stage in sixths]


def test_of_a_network_with_a_mask_estimator_a_stem_only_those_asked_for_run(pool: ModelPool, clip: Tensor) -> None:
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


def test_a_pool_keeps_the_specialists_it_has_when_others_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, ...]] = []

    def load(name: str, *, stems: tuple[str, ...], **_: object) -> Recorder:
        loaded.append(stems)
        return Recorder(name, stems, 1000)

    monkeypatch.setattr(pool_module, "load_model", load)
    pool = ModelPool(EngineOptions(device="cpu", precision="fp32"))
    pool.get("bag", ("drums", "bass"))
    assert pool.get("bag", ("bass",)) is pool.get("bag", ("drums",))
    assert pool.get("bag", ("vocals", "bass")).stems == ("drums", "bass", "vocals")
    assert loaded == [("drums", "bass"), ("drums", "bass", "vocals")]


def test_a_model_of_another_sample_rate_is_refused() -> None:
    model = Recorder("wide", ("vocals",), 1000, sample_rate=48000)
    with pytest.raises(InputError, match=r"'wide' works at 48000 Hz"):
        Separator.from_model(model)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to stop being root")
def test_a_folder_that_another_user_may_not_see_is_an_error(pool: ModelPool, clip: Tensor, tmp_path: Path) -> None:
    separator, song = Separator("demo", "all_4", pool=pool, options=QUICK), write(tmp_path / "song.wav", clip[:, :1000])
    tmp_path.chmod(0o700)
    os.seteuid(65534)
    try:
        with pytest.raises(OutputError, match=r"cannot write to .*Permission denied"):
            separator.separate_file(song, tmp_path / "a" / "out")
    finally:
        os.seteuid(0)


def test_an_unwritable_folder_is_an_error_that_names_it(pool: ModelPool, clip: Tensor, tmp_path: Path) -> None:
    song = write(tmp_path / "song.wav", clip[:, :1000])
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match=r"cannot write to .*file"):
        Separator("demo", "all_4", pool=pool, options=QUICK).separate_file(song, tmp_path / "file" / "out")


MEASURE = """
import re, sys
from pathlib import Path
import torch
from separation import ModelPool, Separator
from separation.models.base import Identity, SeparationModel
from separation.engine.recipes import resolve
from separation.engine.pool import GpuModels

class Half(SeparationModel):
    channels = 2

    def __init__(self):
        super().__init__(Identity(name="half", stems=("song", "again"), sample_rate=44100, chunk_samples=352800))
        self.gain = torch.nn.Parameter(torch.full((1,), 0.5))

    def forward(self, chunks):
        return (chunks * self.gain).unsqueeze(1).expand(-1, 2, -1, -1)

pool = ModelPool(EngineOptions(device="cpu", precision="fp32"))
pool._models = {"half": Half()}
recipe = resolve("test", "test", {"(song)": "half", "again": "half after song", "other": "residual"})
Separator(recipe, pool=pool).separate_file(sys.argv[1], sys.argv[2], format="flac", sample_rate=48000)
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_song(tmp_path: Path) -> None:
    peaks = []
    for seconds in (30, 480):
        song = tmp_path / f"{seconds}.wav"
        with soundfile.SoundFile(song, "w", 44100, 2) as file:
            for _ in range(seconds // 30):
                file.write(torch.randn(30 * 44100, 2).numpy() * 0.1)
        run = [sys.executable, "-c", MEASURE, song, tmp_path / "out"]
        printed = subprocess.run(
            run, cwd=PROJECT, env=os.environ | GIVES_BACK, check=True, capture_output=True, text=True
        ).stdout
        peaks.append(int(printed))
    assert peaks[1] - peaks[0] <= 20_000, peaks  # KiB; the longer song alone has 160 MiB of float32


@pytest.mark.parametrize("title", ["Größe", ""])
def test_tags_go_over_into_the_stems_whose_titles_tell_them_apart(
    title: str, pool: ModelPool, clip: Tensor, tmp_path: Path
) -> None:
    song = tmp_path / "01 song.flac"
    with soundfile.SoundFile(song, "w", 44100, 2) as file:
        file.artist, file.album = "Band", "Album"
        if title:
            file.title = title
        file.write(clip[:, :44_100].T.numpy())
    for format in ("wav", "flac", "mp3"):
        files = Separator("demo", "vocals_instrumental", pool=pool, options=QUICK).separate_file(
            song, tmp_path / format, OutputOptions(format=format)
        )
        for stem, path in files.items():
            with soundfile.SoundFile(path) as file:
                tags = file.title, file.artist, file.album
            assert tags == (f"{title or '01 song'} ({stem})", "Band", "Album")


def test_the_shipped_weights_separate_the_shipped_song(pool: ModelPool) -> None:
    mixture = read(SONG)
    stems = Separator("demo", "all_6", pool=pool).separate(mixture)
    for stem, estimate in stems.items():
        reference = read(PROJECT / "weights" / "demo" / "stems" / f"{stem}.ogg")
        assert sdr(reference, estimate) >= sdr(reference, mixture) + 8
