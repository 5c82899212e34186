"""The shipped recipes of tasks: docs/recipes.md tells them apart as their YAML files have them, and each one runs."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from helpers.common import PROJECT, SONG, quick_first
from helpers.small_model import DOCUMENT, HYPER_PARAMETERS, identity, write_weights, write_yaml
from separation import Separator
from separation.checkpoints.build import build
from separation.checkpoints.catalogue import files_for, read_config
from separation.checkpoints.facts import LICENCE_CLASSES
from separation.cli.main import main
from separation.engine import recipes
from separation.engine.pool import LoadedModels
from separation.engine.recipes import Recipe, load_recipe
from separation.models.base import SeparationModel
from separation.models.bs_roformer import BSRoFormer, BSRoFormerConfig

STEMS = {
    ("karaoke", "all"): ("lead", "backing", "instrumental"),
    ("clean_vocals", "all"): ("vocals",),
    ("instrumental_full", "all"): ("instrumental", "vocals"),
    ("instrumental_clean", "all"): ("instrumental", "vocals"),
    ("fast", "vocals_instrumental"): ("vocals", "instrumental"),
    ("fast", "all_4"): ("vocals", "drums", "bass", "other"),
    ("best", "vocals_instrumental"): ("vocals", "instrumental"),
    ("best", "all_4"): ("vocals", "drums", "bass", "other"),
    ("drum_kit_6", "all"): ("kick", "snare", "toms", "hihat", "ride", "crash"),
    ("strings", "all"): ("strings", "no_strings"),
}
SUM_TO_THE_SONG = [("karaoke", "all"), ("instrumental_clean", "all"), ("best", "vocals_instrumental")]
MODELS = sorted({model for preset in STEMS for model in load_recipe(*preset).models})


def row(name: str, choice: str) -> list[str]:
    """The preset's row in the table of docs/recipes.md: stems, quality, runs, operations, download, licence."""
    text = (PROJECT / "docs" / "recipes.md").read_text(encoding="utf-8")
    option = f"--recipe {name}" + ("" if choice in ("all", "vocals_instrumental") else f" --stems {choice}")
    (cells,) = re.findall(rf"^\| `{option}` \| (.+) \|$", text, re.M)
    return [cell.strip() for cell in cells.split(" | ")]


@pytest.mark.parametrize("name, choice", STEMS)
def test_a_preset_gives_its_stems_without_another_option(name: str, choice: str) -> None:
    assert load_recipe(name, choice).stems == STEMS[name, choice]
    if choice != "all_4":
        assert load_recipe(name) == load_recipe(name, choice)


def test_every_other_recipe_has_the_contracts_choices() -> None:
    assert set(recipes.names()) == {name for name, _ in STEMS} | {"demo", "standard", "sw"}


@pytest.mark.parametrize("name, choice", STEMS)
def test_the_table_of_presets_is_that_of_their_yaml_files(name: str, choice: str) -> None:
    preset = load_recipe(name, choice)
    stems, quality, runs, _, download, licence = row(name, choice)
    models = {model: read_config(model) for model in preset.models}
    files = [file for model, found in models.items() for file in files_for(found, preset.models[model])]
    classes = {model.facts.licence_class for model in models.values()}
    assert stems == ", ".join(preset.stems)
    published = " ".join(model.facts.quality for model in models.values())
    assert all(re.search(rf"\b{re.escape(figure)}\b", published) for figure in re.findall(r"\d+\.\d+", quality))
    assert int(runs) == len(preset.runs)
    assert download == f"{sum(file.bytes or 0 for file in files) / 1e9:.2f} GB"
    assert licence == next(each for each in LICENCE_CLASSES if each in classes)


def test_no_preset_uses_a_model_of_disputed_origin() -> None:
    assert not [model for model in MODELS if read_config(model).facts.warning]
    assert load_recipe("standard").models == {"bs_roformer_viperx_1297": ("vocals",)}


@pytest.mark.parametrize("name", quick_first(MODELS, 1))
def test_the_models_of_presets_can_be_built(name: str) -> None:
    description = read_config(name)
    specialists = tuple(file.stem for file in description.files if file.stem)
    model = build(description, specialists)
    assert set(model.stems) == set(description.stems)


def substitutes(preset: Recipe) -> LoadedModels:
    """Small random models with the names and the stems of a preset's models."""
    models: dict[str, SeparationModel] = {}
    for name, stems in preset.models.items():
        sizes = {"freqs_per_bands": (205,) * 5, "stft_n_fft": 2048, "stft_win_length": 2048, "stft_hop_length": 1024}
        config = BSRoFormerConfig(**HYPER_PARAMETERS | sizes | {"num_stems": len(stems)})
        models[name] = BSRoFormer(config, identity(stems, name=name, chunk_samples=88_200)).eval()
    return LoadedModels(models)


@pytest.mark.parametrize("name, choice", quick_first(STEMS, 4))
def test_a_preset_runs_with_small_models_in_place_of_its_own(name: str, choice: str) -> None:
    preset = load_recipe(name, choice)
    song = soundfile.read(SONG, dtype="float32", frames=40_000)[0].T.copy()
    torch.manual_seed(0)
    stems = Separator(preset, pool=substitutes(preset)).separate(torch.from_numpy(song))
    assert tuple(stems) == STEMS[name, choice]
    assert all(stem.shape == song.shape and stem.any() for stem in stems.values())
    if (name, choice) in SUM_TO_THE_SONG:
        assert np.abs(sum(stem.numpy() for stem in stems.values()) - song).max() <= 1e-6


def write_checkpoint(folder: Path, stems: tuple[str, ...]) -> Path:
    """A small checkpoint with these stems; returns its YAML file."""
    folder.mkdir()
    sizes: dict[str, Any] = {"freqs_per_bands": [205] * 5, "stft_n_fft": 2048, "stft_win_length": 2048}
    model = HYPER_PARAMETERS | sizes | {"stft_hop_length": 1024, "num_stems": len(stems)}
    path = write_yaml(
        folder, drop=("files",), stems=list(stems), model=model, audio=DOCUMENT["audio"] | {"chunk_size": 88200}
    )
    description = read_config(path)
    torch.manual_seed(len(folder.name))
    write_weights(build(description, initialised=True).state_dict(), folder / "small.safetensors")
    return path


@pytest.mark.parametrize("name, choice", quick_first(SUM_TO_THE_SONG, 1))
def test_the_command_line_runs_a_presets_lines_over_small_checkpoints(name: str, choice: str, tmp_path: Path) -> None:
    source = recipes.FOLDER / (f"{name}.yaml" if choice == "all" else f"{name}/{choice}.yaml")
    text = source.read_text(encoding="utf-8")
    for number, (model, stems) in enumerate(load_recipe(name, choice).models.items()):
        text = re.sub(rf"\b{model}\b", write_checkpoint(tmp_path / f"model{number}", stems).as_posix(), text)
    (tmp_path / "preset.yaml").write_text(text, encoding="utf-8")
    song = soundfile.read(SONG, dtype="float32", frames=30_000)[0]
    soundfile.write(tmp_path / "song.wav", song, 44100, subtype="FLOAT")
    arguments = ["separate", str(tmp_path / "song.wav"), "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*arguments, "--recipe", str(tmp_path / "preset.yaml")]) == 0
    found = {stem: soundfile.read(tmp_path / "out" / "song" / f"{stem}.wav")[0] for stem in STEMS[name, choice]}
    assert all(stem.any() for stem in found.values())
    assert np.abs(sum(found.values()) - song).max() <= 1e-6
