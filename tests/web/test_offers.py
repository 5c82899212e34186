"""What the local page offers."""

from pathlib import Path
from typing import Any

import pytest

from helpers.own_checkpoint import put
from separation.checkpoints.catalogue import available
from separation.checkpoints.facts import TASKS
from separation.engine.recipes import choices, names
from separation.web.offers import PRESETS, RECIPES, offers
from separation.web.order import Order


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The offers of a server without any weights but those of the demo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEPARATION_WEIGHTS", str(tmp_path_factory.mktemp("weights")))
        patch.delenv("SEPARATION_MODELS", raising=False)
        return offers()


def test_every_recipe_and_every_model_is_offered_once_and_can_be_ordered(found: dict[str, Any]) -> None:
    recipes = [offer["order"] for offer in found["presets"] + found["recipes"]]
    assert sorted((order["recipe"], order["stems"]) for order in recipes) == [
        (name, choice) for name in names() for choice in choices(name)
    ]
    models = [offer["order"] for task in found["tasks"].values() for offer in task["models"]]
    assert sorted(order["model"] for order in models) == available() == sorted(found["facts"])
    for offer in found["presets"] + found["recipes"] + [each for t in found["tasks"].values() for each in t["models"]]:
        order = Order.read(offer["order"] | {"name": "song.wav", "format": "wav"})
        assert list(order.load().stems) == offer["stems"]
        assert set(offer["models"]) <= found["facts"].keys()


def test_every_other_recipe_has_a_title() -> None:
    assert RECIPES.keys() == set(names()) - {recipe for recipe, *_ in PRESETS}


def test_models_are_listed_by_task_the_best_published_first(found: dict[str, Any]) -> None:
    tasks = found["tasks"]
    assert list(tasks) == [task for task in TASKS if task in tasks]
    titles = [offer["title"] for offer in tasks["vocals"]["models"]]
    assert titles.index("MelBand-RoFormer Kim") < titles.index("BS-RoFormer viperx 1297")  # 10.98 and 10.87 dB


def test_quality_licence_and_download_are_those_of_the_yaml(found: dict[str, Any]) -> None:
    kit = {offer["title"]: offer for offer in found["presets"]}["Drum kit"]
    assert kit["missing"] is None  # the size of one file is not known
    vocals = found["presets"][0]
    assert vocals["bytes"] == vocals["missing"] == 639_331_213
    facts = found["facts"]
    assert facts["bs_roformer_viperx_1297"]["quality"].startswith("vocals 10.87, instrumental 17.17 dB SDR (MVSEP ")
    assert facts["bs_roformer_viperx_1297"]["licence"] == "none stated"
    assert facts["apollo_vocals_baicai"]["quality"] == "none stated"
    assert facts["mel_band_roformer_deux_becruily"]["licence_class"] == "non-commercial"


@pytest.mark.slow
def test_a_model_of_the_users_own_is_offered_and_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "own.yaml", "own.ckpt")
    monkeypatch.setenv("SEPARATION_MODELS", str(tmp_path))
    (offer,) = [offer for offer in offers()["tasks"][""]["models"] if offer["title"] == "own"]
    assert (offer["missing"], offer["by_hand"]) == (0, False)
    (tmp_path / "own.ckpt").unlink()
    (offer,) = [offer for offer in offers()["tasks"][""]["models"] if offer["title"] == "own"]
    assert offer["by_hand"]
