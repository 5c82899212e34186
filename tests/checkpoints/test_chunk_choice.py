"""By default, a model runs on the chunk of its training, half overlapped; a user can ask for others."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from helpers.command_line import settings_of
from helpers.common import song
from helpers.small_model import HYPER_PARAMETERS, small_model, write_weights, write_yaml
from separation import Cache, Separator
from separation.checkpoints import catalogue
from separation.checkpoints.chunk_choice import ChunkChoice
from separation.checkpoints.description import SIDE_BY_SIDE
from separation.checkpoints.load import load_model
from separation.engine.options import EngineOptions
from separation.errors import InputError

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
def test_seconds_become_samples(choice: ChunkChoice, free: tuple[int, int], fixed: tuple[int, int]) -> None:
    assert choice.samples("scnet", 485_100, 44100, is_fixed=False) == free
    assert choice.samples("scnet", 485_100, 44100, is_fixed=True) == fixed


@pytest.mark.parametrize("is_fixed", [False, True])
def test_an_overlap_longer_than_the_chunk_names_the_model(is_fixed: bool) -> None:
    words = r"^overlap \(3 s\) must be smaller than the chunk of short \(2\.98 s\): choose a smaller overlap, or auto$"
    with pytest.raises(InputError, match=words):
        ChunkChoice(AUTO, 3).samples("short", 131_584, 44100, is_fixed=is_fixed)
    with pytest.raises(InputError, match=r"chunk of short \(3 s\)"):
        ChunkChoice(AUTO, 3).samples("short", 3 * 44100, 44100, is_fixed=is_fixed)


@pytest.mark.parametrize("name", catalogue.available())
def test_every_shipped_model_runs_on_the_chunk_of_its_yaml(name: str) -> None:
    description = catalogue.read_config(name)
    own = description.audio["chunk_size"]
    assert description.chunks(ChunkChoice()) == (own, 0 if description.architecture in SIDE_BY_SIDE else own // 2)


def test_a_users_own_model_runs_on_its_own_chunk(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, audio={"chunk_size": 5000}, drop=("files",))
    model = load_model(path, checkpoint=write_weights(small_model().state_dict(), tmp_path / "x.ckpt"))
    plan = Separator.from_model(model).plans["small"]
    assert (plan.chunk_samples, plan.overlap_samples) == (5000, 2500)
    plan = Separator.from_model(model, options=EngineOptions(chunk_seconds=5, overlap_seconds=2)).plans["small"]
    assert (plan.chunk_samples, plan.overlap_samples) == (220_500, 88_200)


@pytest.mark.slow
def test_equal_choices_are_one_estimate_in_the_cache(tmp_path: Path) -> None:
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
    assert sorted(chunks) == [(352_800, 176_400)] * 2 + [(396_900, 198_450)] * 2  # for two stems


def test_equal_choices_are_the_same_settings() -> None:
    def settings(options: str) -> Any:
        return settings_of(*shlex.split(options))

    usual = settings("--recipe demo")
    for options in ("--chunk-size 8 --overlap 4", "--chunk-size 8", "--overlap 4", "--chunk-size auto --overlap auto"):
        assert settings(f"--recipe demo {options}") == usual
    assert usual["chunks"] == {"demo": [352_800, 176_400]}
    assert settings("--recipe demo --chunk-size 7")["chunks"] == {"demo": [308_700, 154_350]}
    by_default, asked = settings("--stems all_4"), settings("--stems all_4 --chunk-size 8 --overlap 2")
    assert by_default["chunks"]["htdemucs_ft"] == [343_980, 171_990]
    assert asked["chunks"] == {"bs_roformer_viperx_1297": [352_800, 88_200], "htdemucs_ft": [343_980, 85_995]}
