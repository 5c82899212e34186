"""Chunks are as long as a model was trained on, and half overlapped, unless somebody asks otherwise."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from helpers.common import song
from helpers.small_model import HYPER_PARAMETERS, chunks, small_model, write_weights, write_yaml
from separation import Cache, Separator
from separation.checkpoints import catalogue
from separation.checkpoints import description as descriptions
from separation.checkpoints.build import build
from separation.checkpoints.chunk_choice import ChunkChoice
from separation.checkpoints.load import load_model
from separation.cli import main as __main__
from separation.cli.main import build_parser
from separation.engine.options import EngineOptions
from separation.errors import CheckpointError, InputError
from separation.models import ARCHITECTURES

AUTO: Any = "auto"


@pytest.mark.parametrize(
    "choice, free, fixed",
    [
        (ChunkChoice(), (485_100, 242_550), (485_100, 242_550)),
        (ChunkChoice(8, AUTO), (352_800, 176_400), (485_100, 242_550)),
        (ChunkChoice(AUTO, 3), (485_100, 132_300), (485_100, 132_300)),
        (ChunkChoice(8, 2), (352_800, 88_200), (485_100, 121_275)),  # a quarter
        (ChunkChoice.of_container(8, 4), (485_100, 242_550), (485_100, 242_550)),
        (ChunkChoice.of_container(8, 5), (352_800, 220_500), (485_100, 303_187)),
        (ChunkChoice.of_container(9, 4), (396_900, 176_400), (485_100, 215_600)),
    ],
)
def test_what_is_asked_for_and_what_is_not_in_samples(
    choice: ChunkChoice, free: tuple[int, int], fixed: tuple[int, int]
) -> None:
    assert choice.samples("scnet", 485_100, 44100, is_fixed=False) == free
    assert choice.samples("scnet", 485_100, 44100, is_fixed=True) == fixed


@pytest.mark.parametrize("is_fixed", [False, True])
def test_an_overlap_longer_than_a_models_own_chunk_names_the_model(is_fixed: bool) -> None:
    words = r"^overlap \(3 s\) must be smaller than the chunk of short \(2\.98 s\): choose a smaller overlap, or auto$"
    with pytest.raises(InputError, match=words):
        ChunkChoice(AUTO, 3).samples("short", 131_584, 44100, is_fixed=is_fixed)


@pytest.mark.parametrize("name", catalogue.available())
def test_every_shipped_model_runs_on_the_chunk_of_its_yaml(name: str) -> None:
    description = catalogue.read_config(name)
    own = description.audio["chunk_size"]
    assert description.chunks(ChunkChoice()) == (own, own // 2)


def test_the_models_with_chunks_of_one_length_are_those_that_the_catalogue_takes_for_such() -> None:
    fixed = {name for name, architecture in ARCHITECTURES.items() if architecture.fixed_chunk}
    assert fixed == descriptions.FIXED_CHUNKS


@pytest.mark.parametrize("name", ["demo", "mel_band_roformer_kim", "htdemucs", "hdemucs_mmi", "drumsep", "scnet"])
def test_the_models_with_a_choice_of_attention_or_int8_are_those_that_the_catalogue_takes_for_such(name: str) -> None:
    description = catalogue.read_config(name)
    model = build(description)
    assert (model.head_size is not None) == (description.architecture in descriptions.WITH_ATTENTION)
    assert model.has_int8 == (description.architecture in descriptions.WITH_INT8)


def test_a_model_of_the_users_own_runs_on_its_own_chunks(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, audio={"chunk_size": 5000}, drop=("files",))
    model = load_model(path, checkpoint=write_weights(small_model().state_dict(), tmp_path / "x.ckpt"))
    plan = Separator.from_model(model).plans["small"]
    assert (plan.chunk_samples, plan.overlap_samples) == (5000, 2500)
    plan = Separator.from_model(model, options=EngineOptions(chunk_seconds=5, overlap_seconds=2)).plans["small"]
    assert (plan.chunk_samples, plan.overlap_samples) == (220_500, 88_200)


@pytest.mark.parametrize("chunk_samples, is_enough", [(32, False), (33, True)])
def test_a_chunk_shorter_than_half_a_frame_is_refused(tmp_path: Path, chunk_samples: int, is_enough: bool) -> None:
    path = write_yaml(tmp_path, audio={"chunk_size": chunk_samples}, drop=("files",))
    weights = write_weights(small_model().state_dict(), tmp_path / "x.ckpt")
    if is_enough:
        estimates = Separator.from_model(load_model(path, checkpoint=weights)).separate(chunks(500)[0])
        assert estimates["drums"].shape == (2, 500)
    else:
        words = r"small\.yaml: chunk_size is 32 samples, and its Fourier transform needs at least 33: correct it$"
        with pytest.raises(CheckpointError, match=words):
            load_model(path, checkpoint=weights)


def test_equal_chunks_spelt_differently_are_one_estimate_in_the_cache(tmp_path: Path) -> None:
    (tmp_path / "song.wav").write_bytes(song(1))
    sizes = {"freqs_per_bands": (205,) * 5, "stft_n_fft": 2048, "stft_win_length": 2048, "stft_hop_length": 1024}
    weights = write_weights(small_model(**sizes).state_dict(), tmp_path / "x.ckpt")
    audio, sizes["freqs_per_bands"] = {"chunk_size": 352_800}, [205] * 5
    path = write_yaml(tmp_path, audio=audio, model=HYPER_PARAMETERS | sizes, drop=("files",))
    cache, model = Cache(tmp_path / "cache"), load_model(path, checkpoint=weights)
    choices: list[Any] = [{}, {"chunk_seconds": 8, "overlap_seconds": 4}, {"overlap_seconds": 4}, {"chunk_seconds": 9}]
    for choice in choices:
        separator = Separator.from_model(model, cache=cache, options=EngineOptions(**choice))
        separator.separate_file(tmp_path / "song.wav", tmp_path / "out")
    chunks = [(entry.settings["chunk_samples"], entry.settings["overlap_samples"]) for entry in cache.entries()]
    assert sorted(chunks) == [(352_800, 176_400)] * 2 + [(396_900, 198_450)] * 2  # of two stems


def test_equal_chunks_spelt_differently_are_the_same_settings() -> None:
    def settings(options: str) -> Any:
        return __main__._settings(build_parser().parse_args(["separate", "x", "-o", "y", *shlex.split(options)]))

    usual = settings("--recipe demo")
    for options in ("--chunk-size 8 --overlap 4", "--chunk-size 8", "--overlap 4", "--chunk-size auto --overlap auto"):
        assert settings(f"--recipe demo {options}") == usual
    assert usual["chunks"] == {"demo": [352_800, 176_400]}
    assert settings("--recipe demo --chunk-size 7")["chunks"] == {"demo": [308_700, 154_350]}
    by_default, asked = settings("--stems all_4"), settings("--stems all_4 --chunk-size 8 --overlap 2")
    assert by_default["chunks"]["htdemucs_ft"] == [343_980, 171_990]
    assert asked["chunks"] == {"bs_roformer_viperx_1297": [352_800, 88_200], "htdemucs_ft": [343_980, 85_995]}
