"""Candidates are found by task and by stem, and those that are not downloaded are told apart."""

from pathlib import Path

import pytest

from helpers.candidate_models import put_candidate
from helpers.common import quick_first
from separation.errors import InputError, RecipeError
from separation.evaluation.candidates import Candidates, find_candidates, size_bytes

STEMS = ["voice", "rest"]


@pytest.fixture
def models(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder of models; no other weights are downloaded."""
    monkeypatch.setenv("SEPARATION_MODELS", str(tmp_path / "models"))
    put_candidate(tmp_path / "models", "plain")
    put_candidate(tmp_path / "models", "cleaner", stems=STEMS, task="de-echo", residual="echo")
    return tmp_path / "models"


def here(found: Candidates) -> list[str]:
    return [candidate.name for candidate in found.here]


def test_a_task_gives_its_models_and_those_without_a_task(models: Path) -> None:
    found = find_candidates("vocals", None)
    assert found.stem == "vocals" and here(found) == ["plain"]
    missing = [candidate.name for candidate in found.missing]
    assert "mel_band_roformer_kim" in missing and "htdemucs" not in missing and "cleaner" not in missing
    assert missing.index("mel_band_roformer_kim") < missing.index("mel_band_roformer_vocals_becruily")  # no figure


def test_a_model_with_a_warning_is_not_the_one_to_get_first(models: Path) -> None:
    missing = [candidate.name for candidate in find_candidates("guitar", None).missing]
    assert missing[0].startswith("bs_roformer_mega_")
    assert missing[-2:] == ["bs_roformer_sw", "bs_roformer_guitar_xlance"]  # which have better figures


@pytest.mark.slow
def test_a_stem_alone_gives_all_models_that_give_it(models: Path) -> None:
    found = find_candidates(None, "vocals")
    assert here(found) == ["demo", "plain"]
    assert {"mel_band_roformer_kim", "htdemucs"} <= {candidate.name for candidate in found.missing}
    assert here(find_candidates(None, "echo")) == ["cleaner"]  # what a model leaves counts too
    assert here(find_candidates("de-echo", "rest")) == ["cleaner"]


def test_the_stem_of_a_task_is_the_one_that_most_models_name_first(models: Path) -> None:
    assert find_candidates("instrumental", None).stem == "instrumental"
    assert find_candidates("karaoke", None).stem == "lead_vocals"


@pytest.mark.slow
def test_recipes_take_part_if_they_are_named(models: Path) -> None:
    found = find_candidates(None, "drums", ["standard", "standard"])
    names = [candidate.name for candidate in found.missing]
    assert names[0] == "recipe standard" and "recipe standard" not in names[1:]
    assert found.missing[0].missing == ["htdemucs_ft"]
    assert 80e6 < (size_bytes(found.missing[0]) or 0) < 90e6  # one of its four networks
    with pytest.raises(RecipeError, match="unknown recipe 'none'"):
        find_candidates(None, "drums", ["none"])


def test_models_that_cannot_be_read_are_named(models: Path) -> None:
    (models / "odd.yaml").write_text("audio: 3", encoding="utf-8")
    (models / "odd.safetensors").write_bytes(b"")
    assert "odd" in find_candidates("vocals", None).unreadable


@pytest.mark.parametrize(
    "task, stem, words",
    quick_first(
        [
            (None, None, "there is no task and no stem to compare models for: add --task vocals"),
            ("singing", None, "singing"),
            (
                "vocals",
                "kazoo",
                "no model for vocals gives the stem 'kazoo': use one that `separation models list` names",
            ),
            (None, "vocal", "no model gives the stem 'vocal': use vocals or "),
            ("six_stems", None, "models for six_stems give several stems: add --stem, one of "),
            ("winds", None, "models for winds give several stems: add --stem, one of bassoon, brass, "),
            ("violin", None, "violin is a stem, not a task: use --stem violin"),
        ],
        3,
    ),
)
def test_what_cannot_be_found_is_an_error_that_says_what_there_is(
    task: str | None, stem: str | None, words: str, models: Path
) -> None:
    with pytest.raises(InputError, match=words):
        find_candidates(task, stem)
