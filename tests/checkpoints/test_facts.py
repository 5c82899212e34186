"""What YAML files say to people: tasks, licences, figures and warnings."""

from pathlib import Path
from typing import Any

import pytest

from separation.checkpoints import catalogue
from separation.checkpoints.facts import LICENCE_CLASSES, RANKING_TEST, TASKS, facts_in, licence_class
from separation.errors import CheckpointError

PATH = Path("x.yaml")
NO_RESIDUAL = {"backing_vocals", "restored"}  # what they leave is nothing that anybody wants
SHIPPED = sorted(path.stem for path in catalogue.CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize(
    "licence, found",
    [
        ("MIT", "permissive"),
        ("Apache-2.0", "permissive"),
        ("BSD 3-Clause", "permissive"),
        ("CC BY 4.0", "permissive"),
        ("CC-BY-4.0", "permissive"),
        ("CC0-1.0", "permissive"),
        ("GPL-3.0", "copyleft"),
        ("AGPL-3.0-only", "copyleft"),
        ("LGPL-2.1", "copyleft"),
        ("CC-BY-SA-4.0", "copyleft"),
        ("CC-BY-NC-4.0", "non-commercial"),
        ("CC BY-NC-SA 4.0", "non-commercial"),
        ("cc_by_nc_4.0", "non-commercial"),
        ("non-commercial", "non-commercial"),
        ("none stated", "none stated"),
        ("not stated by its author", "none stated"),
        ("unknown", "none stated"),
        ("ask me", "other"),
        ("Permit No 5", "other"),
        ("", "other"),
    ],
)
def test_a_licence_has_a_class(licence: str, found: str) -> None:
    assert licence_class(licence) == found


def test_figures_name_their_test_and_stem() -> None:
    document = {
        "task": ["vocals", "denoise"],
        "licence": "MIT",
        "quality": [
            {"test": RANKING_TEST, "source": "a page", "sdr": {"vocals": 10.0, "instrumental": 17.123}},
            {"sdr": {"vocals": 12}, "fullness": {"vocals": 20.5}},
        ],
    }
    facts = facts_in(document, PATH)
    assert facts.tasks == ("vocals", "denoise") and facts.licence_class == "permissive"
    assert facts.quality == (
        "vocals 10.00, instrumental 17.12 dB SDR (MVSEP Multisong, a page); "
        "vocals 12.00 dB SDR, vocals 20.50 fullness (test set not named)"
    )
    assert facts.ranking_sdr("vocals") == 10.0 and facts.ranking_sdr("drums") is None
    first, second = facts.as_json()["scores"]
    assert first == {"test": RANKING_TEST, "source": "a page", "sdr": {"vocals": 10.0, "instrumental": 17.123}}
    assert second["test"] is None and second["source"] is None


def test_facts_that_are_not_stated_are_null() -> None:
    facts = facts_in({"quality": "good", "task": "vocals"}, PATH)
    assert (facts.quality, facts.scores, facts.tasks, facts.licence) == ("good", (), ("vocals",), "not stated")
    assert facts_in({}, PATH).as_json() == {
        "title": None,
        "author": None,
        "tasks": [],
        "licence": "not stated",
        "licence_class": "none stated",
        "licence_source": None,
        "quality": "not stated",
        "scores": [],
        "source": None,
        "warning": None,
    }


@pytest.mark.parametrize(
    "document, message",
    [
        ({"task": "vocal"}, "unknown task 'vocal': use one of vocals, instrumental, karaoke, "),
        ({"task": [["vocals"]]}, r"unknown task \['vocals'\]: use one of vocals"),
        ({"task": 3}, "task must be a list, not 3"),
        ({"licence": ["MIT"]}, r"licence must be a string, not \['MIT'\]"),
        ({"quality": 9.5}, "quality must be a string, not 9.5"),
        ({"quality": [9.5]}, "each entry of quality must be a section with test, source and figures .*, not 9.5"),
        ({"quality": [{"test": "a"}]}, "an entry of quality has no figures: add one of sdr, "),
        ({"quality": [{"sdr": {"vocals": "9"}}]}, "a figure of quality must be a number, not '9'"),
        ({"quality": [{"sdr": {"vocals": True}}]}, "a figure of quality must be a number, not True"),
        ({"quality": [{"sisdr": {"vocals": 9}}]}, "unknown key 'sisdr': correct or remove it"),
    ],
)
def test_a_wrong_fact_is_named(document: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^x\.yaml: {message}"):
        facts_in(document, PATH)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_yaml_is_complete(name: str) -> None:
    model = catalogue.read_config(name)
    facts = model.facts
    assert facts.title and facts.author and facts.tasks
    assert facts.licence != "not stated" and facts.quality != "not stated"
    assert licence_class(facts.licence) in LICENCE_CLASSES
    assert all(scores.source for scores in facts.scores)
    for file in model.files:
        assert file.url is None or file.sha256 or file.bytes
    known = {*model.stems, model.residual, "mean", *(["cymbals"] if "crash" in model.stems else [])}
    assert {stem for scores in facts.scores for by_stem in scores.figures.values() for stem in by_stem} <= known
    assert model.residual or len(model.stems) > 1 or model.stems[0] in NO_RESIDUAL
    if model.residual and model.residual.startswith("no_"):
        assert model.residual == f"no_{model.stems[0]}"
    assert (model.source.read_text(encoding="utf-8")).startswith("# ")


def test_every_task_has_a_model_or_will() -> None:
    used = {task for name in SHIPPED for task in catalogue.read_config(name).facts.tasks}
    assert used <= set(TASKS)
    assert {"vocals", "instrumental", "karaoke", "de-reverb", "denoise", "drum_kit", "guitar", "piano", "crowd"} <= used
