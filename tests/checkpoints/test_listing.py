"""Models are found by task, stem and licence, and sorted by the figures of one test set."""

import re
from pathlib import Path
from typing import Any

import pytest

from helpers.small_model import write_yaml
from separation.checkpoints import catalogue
from separation.checkpoints.facts import RANKING_TEST
from separation.checkpoints.listing import MOST_NAMED, Filter, listed, without_one
from separation.errors import InputError


def names(**wanted: Any) -> list[str]:
    entries, _ = listed(Filter(**wanted))
    return [entry.model.name for entry in entries]


def quality(sdr: float | None, *, test: str = RANKING_TEST) -> dict[str, Any]:
    return {} if sdr is None else {"quality": [{"test": test, "sdr": {"vocals": sdr}}]}


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalogue of a few models."""
    models: dict[str, dict[str, Any]] = {
        "a": {"task": "vocals", "licence": "MIT"} | quality(9.0),
        "b": {"task": "vocals", "licence": "GPL-3.0", "residual": "instrumental"} | quality(12.0),
        "c": {"task": ["karaoke", "vocals"], "stems": ["lead_vocals", "backing_track"]} | quality(0.0),
        "d": {"task": "vocals", "licence": "CC BY-NC 4.0"} | quality(20.0, test="another test"),
        "e": {"task": "drums", "stems": ["drums", "no_drums"]} | quality(-1.0),
    }
    monkeypatch.setattr(catalogue, "CONFIGS", tmp_path)
    for name, keys in models.items():
        write_yaml(tmp_path, **keys).rename(tmp_path / f"{name}.yaml")
    (tmp_path / "z.yaml").write_text("audio: 3", encoding="utf-8")


@pytest.mark.usefixtures("shipped", "weights")
def test_a_filter_finds_models_by_what_they_say() -> None:
    assert names() == ["a", "b", "c", "d", "e"]
    assert names(task="vocals") == ["a", "b", "c", "d"]
    assert names(task="karaoke") == ["c"]
    assert names(stem="instrumental") == ["b"]  # a residual
    assert names(stem="vocals") == ["a", "b", "c", "d"]  # lead_vocals are vocals
    assert names(stem="drums") == ["a", "b", "d", "e"] and names(stem="no_drums") == ["e"]
    assert names(licence="permissive") == ["a"] and names(licence="non-commercial") == ["d"]
    assert names(licence="none stated") == ["c", "e"] and names(licence="other") == []
    assert names(task="vocals", stem="vocals", licence="copyleft") == ["b"]
    assert names(here=True) == []


@pytest.mark.usefixtures("shipped", "weights")
def test_quality_is_that_of_one_test_set_and_of_the_stem_itself() -> None:
    assert names(sort="quality", stem="vocals") == ["b", "a", "c", "d"]  # 12, 9, 0, and no figure
    assert names(sort="quality", task="vocals") == ["b", "a", "c", "d"]
    assert names(sort="quality", stem="drums") == ["a", "b", "d", "e"]  # no figure of drums at all


@pytest.mark.usefixtures("shipped", "weights")
def test_models_that_cannot_be_read_are_named_with_their_errors() -> None:
    _, errors = listed(Filter())
    assert errors == {"z": f"{catalogue.CONFIGS / 'z.yaml'}: audio must be a section, not 3"}


@pytest.mark.parametrize(
    "wanted, message",
    [
        ({"task": "vocal"}, "unknown task 'vocal': use vocals, or another of instrumental, karaoke, "),
        ({"task": "xyz"}, "unknown task 'xyz': use one of vocals, instrumental, "),
        ({"licence": "free"}, "unknown licence 'free': use one of none stated, non-commercial, copyleft, permissive"),
        ({"sort": "size"}, "unknown order 'size': use one of name, quality$"),
        ({"stem": "lead"}, "no model gives the stem 'lead': use lead_vocals, or another of vocals, drums"),
        ({"stem": "drums", "task": "karaoke"}, "no model for karaoke gives the stem 'drums': use one of lead_vocals, "),
        ({"task": "lead_vocals"}, "lead_vocals is a stem, not a task: use --stem lead_vocals$"),
        ({"sort": "quality"}, "quality compares models by the SDR of one stem on one test set: add --stem, such as"),
        ({"sort": "quality", "task": "karaoke"}, "quality compares models by .*, such as --stem lead_vocals$"),
    ],
)
@pytest.mark.usefixtures("shipped", "weights")
def test_a_word_that_there_is_not_is_an_error_with_the_choices(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        listed(Filter(**wanted))


@pytest.mark.usefixtures("weights")
def test_an_error_does_not_name_a_hundred_stems() -> None:
    with pytest.raises(InputError) as caught:
        listed(Filter(stem="lead"))
    assert re.fullmatch(r"no model gives the stem 'lead': use lead_vocals or one that .* prints", str(caught.value))
    assert str(caught.value).count(",") < MOST_NAMED


@pytest.mark.usefixtures("shipped", "weights")
def test_a_filter_that_finds_nothing_knows_which_part_of_it_to_leave_out() -> None:
    assert without_one(Filter(task="karaoke", licence="permissive")) == {"task": 1, "licence": 1}
    assert without_one(Filter(stem="instrumental", licence="permissive", sort="quality")) == {"stem": 1, "licence": 1}
    assert without_one(Filter(task="drums", stem="drums", here=True)) == {"here": 1}
    assert without_one(Filter(task="drums", licence="permissive", here=True)) == {}


@pytest.mark.parametrize("task, stem", [("strings", "bowed_strings"), ("karaoke", "lead_vocals"), ("winds", "wind")])
@pytest.mark.usefixtures("weights")
def test_an_order_without_a_stem_is_an_error_that_names_one_of_the_task(task: str, stem: str) -> None:
    with pytest.raises(InputError, match=f"add --stem, such as --stem {stem}$"):
        listed(Filter(task=task, sort="quality"))


@pytest.mark.usefixtures("weights")
def test_stems_that_multisong_lacks_are_ranked_on_their_own_leaderboards() -> None:
    guitar = [entry.model for entry in listed(Filter(stem="guitar", sort="quality"))[0]]
    figures = [model.facts.ranking_sdr("guitar") for model in guitar]
    known = [figure for figure in figures if figure is not None]
    assert known == sorted(known, reverse=True) and len(known) >= 4
    assert guitar[0].name == "bs_roformer_sw" and not any(figures[len(known) :])


@pytest.mark.usefixtures("weights")
def test_the_parts_of_a_drum_kit_are_ranked_on_the_test_that_all_its_models_took() -> None:
    found = [entry.model.name for entry in listed(Filter(task="drum_kit", stem="kick", sort="quality"))[0]]
    assert found == ["drumsep", "mdx23c_drumsep_6stem_aufr33_jarredou", "hdemucs_drumsep_inagoy"]
