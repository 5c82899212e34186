"""The page that compares candidates: equally loud, in sync, blind if asked; in a browser its sound and its notes."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.axe import VIEWS, faults, view
from helpers.browser import HOME, RIGHT, Browser
from helpers.common import needs_chromium
from helpers.served_process import wait_for
from separation.errors import InputError, OutputError
from separation.evaluation.weighting import loudness_lufs
from separation.report.compare import Candidate, Comparison, equal_loudness, write_comparison
from separation.system.record import RECORD

RATE = 44100
SECONDS = 11  # two segments
NAMES = ("first </script>", "second 歌", "third")
SILENT, SOUNDING = -80, -40  # dBFS


def tone(hertz: float, level: float, seconds: float = SECONDS) -> Tensor:
    return level * torch.sin(2 * torch.pi * hertz * torch.arange(int(seconds * RATE)) / RATE).expand(2, -1)


def comparison(*, blind: bool = False, seconds: float = SECONDS) -> Comparison:
    """Three tones at different levels."""
    samples = [tone(hertz, level, seconds) for hertz, level in ((441, 0.5), (882, 0.05), (1764, 0.9))]
    candidates = [Candidate(name, each, [f"fact of {name}"]) for name, each in zip(NAMES, samples, strict=True)]
    mixture = torch.stack(samples).sum(dim=0) / 2
    return Comparison("vocals of song.wav", "3 to 14 s", mixture, candidates, "What it means.", blind)


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'id="song">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert found
    return dict(json.loads(found[1]))


def test_equal_loudness_is_as_loud_as_no_track_clips() -> None:
    tracks = [tone(1000, 0.5, 1), tone(1000, 0.05, 1), tone(3000, 0.9, 1)]
    gains = equal_loudness(tracks)
    loudness = [loudness_lufs(gain * samples) for gain, samples in zip(gains, tracks, strict=True)]
    assert loudness == pytest.approx([-16.0] * 3, abs=1e-6)
    spiky = torch.zeros(2, RATE)
    spiky[:, ::1000] = 0.5
    gains = equal_loudness([tracks[0], spiky])
    assert 0.5 * gains[1] == pytest.approx(0.9)
    assert loudness_lufs(gains[0] * tracks[0]) == pytest.approx(loudness_lufs(gains[1] * spiky), abs=1e-6)


def test_silence_keeps_its_level_and_next_to_silence_stays_quiet() -> None:
    gains = equal_loudness([tone(1000, 0.5, 1), torch.zeros(2, RATE), tone(1000, 1e-6, 1)])
    assert gains[1] == 1.0
    assert gains[2] == pytest.approx(30 * gains[0])


@pytest.mark.slow
@pytest.mark.parametrize("blind", [False, True])
def test_names_and_facts_are_plain_unless_the_comparison_is_blind(blind: bool, tmp_path: Path) -> None:
    write_comparison(comparison(blind=blind, seconds=0.5), tmp_path / "vocals.html")
    assert {path.name for path in tmp_path.iterdir()} == {"vocals.html", RECORD}
    data = data_of(tmp_path / "vocals.html")
    names = json.loads(base64.b64decode(data["key"])) if blind else data["names"]
    assert names[0]["name"] == "The song"
    assert {each["name"] for each in names[1:]} == set(NAMES)
    assert all(each["facts"][0] == f"fact of {each['name']}" for each in names[1:])
    text = (tmp_path / "vocals.html").read_text(encoding="utf-8")
    assert ("fact of" in text) is not blind and ("third" in text) is not blind


@pytest.mark.slow
def test_a_blind_comparison_is_shuffled_and_says_which_is_which(tmp_path: Path) -> None:
    orders = set()
    for _ in range(12):  # the chance that all are alike is (1/6)^11
        write_comparison(comparison(blind=True, seconds=0.1), tmp_path / "vocals.html")
        names = json.loads(base64.b64decode(data_of(tmp_path / "vocals.html")["key"]))[1:]
        orders.add(tuple(each["name"] for each in names))
    assert len(orders) > 1


def test_the_page_loads_nothing_else(tmp_path: Path) -> None:
    write_comparison(comparison(seconds=0.5), tmp_path / "vocals.html")
    text = re.sub(r">[A-Za-z0-9+/=]{100,}<", "><", (tmp_path / "vocals.html").read_text(encoding="utf-8"))
    assert "://" not in text and "/* style */" not in text and "/* player */" not in text
    assert not re.search(r"@import|fetch\(|XMLHttpRequest|(?:src|href)=(?!\"data:)", text)


@pytest.mark.slow
def test_what_cannot_be_compared_or_written_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there are no candidates"):
        write_comparison(Comparison("a", "b", tone(441, 0.5, 1), []), tmp_path / "out" / "page.html")
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(OutputError, match="already exists"):
        write_comparison(comparison(seconds=0.1), tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    write_comparison(comparison(seconds=0.1), tmp_path / "page.html", overwrite=True)


# --- in a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(params=[False, True], ids=["open", "blind"])
def browser(chromium: Browser, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Browser]:
    """The page, just opened. At the end, its console must be empty and it must have loaded only itself."""
    page = tmp_path / "vocals.html"
    write_comparison(comparison(blind=request.param), page)
    chromium.console(), chromium.requests()
    chromium.open(page)
    yield chromium
    assert chromium.console() == []
    asked = {url for url in chromium.requests() if not url.startswith(("data:", "chrome:", "blob:"))}
    assert asked == {page.resolve().as_uri()}


def hear(browser: Browser, number: int) -> None:
    """Wait until only this track is audible."""
    script = """return player.tracks.map((track, index) =>
        player.playing ? 20 * Math.log10(level(track, views[index].samples) + 1e-9) : -180)"""

    def heard() -> bool:
        levels = browser.run(script)
        return all(dbfs > SOUNDING if index == number else dbfs < SILENT for index, dbfs in enumerate(levels))

    wait_for(heard, f"the sound of track {number}", seconds=10)


def pressed(browser: Browser) -> list[bool]:
    return [each == "true" for each in browser.run("return views.map(view => view.listen.ariaPressed)")]


def position(browser: Browser) -> float:
    return float(browser.run("return player.position"))


def titles(browser: Browser) -> list[str]:
    return list(browser.run("return views.map(view => view.title.firstChild.textContent)"))


@needs_chromium
@pytest.mark.slow
def test_another_candidate_goes_on_at_the_same_position_and_equally_loud(browser: Browser) -> None:
    browser.press(" ")
    hear(browser, 1)
    before, loudness = position(browser), []
    for key in ("3", "2", "0", "1"):
        browser.press(key)
        hear(browser, int(key))
        assert pressed(browser) == [index == int(key) for index in range(4)]
        loudness.append(browser.run("return level(player.chosen, views[0].samples)"))
    assert before < position(browser) < SECONDS
    assert max(loudness) < 2 * min(loudness)  # the levels of the files differ by a factor of 18
    browser.press("n")
    hear(browser, 2)
    browser.click("[aria-label^='Listen to']:not([aria-pressed=true])")  # the song
    hear(browser, 0)
    browser.press(" ")
    stopped = position(browser)
    assert position(browser) == stopped


@needs_chromium
@pytest.mark.slow
def test_tracks_play_in_sync(browser: Browser) -> None:
    """All sources of a run start at the same moment, at the same place."""
    browser.press(" ")
    hear(browser, 1)
    assert browser.run("return player.scheduled.every(piece => piece.sources.length === 4)")
    seek = "player.seek(10.5); return new Promise(resolve => setTimeout(() => resolve(player.position), 300))"
    assert browser.run(seek) >= 10.5 or browser.run("return Boolean(player.loop)")
    hear(browser, 1)


@needs_chromium
@pytest.mark.slow
def test_the_excerpt_repeats_unless_asked_not_to(browser: Browser) -> None:
    browser.run("player.seek(10.7)")
    browser.press(" ")
    wait_for(lambda: 0 < position(browser) < 5, "the repetition", seconds=10)
    assert browser.run("return player.playing")
    browser.press("r")
    assert browser.run("return document.getElementById('repeat').ariaPressed") == "false"
    browser.run("player.seek(10.7)")
    wait_for(lambda: browser.run("return !player.playing"), "the end", seconds=10)
    browser.press(HOME)
    browser.press(RIGHT)
    assert position(browser) == pytest.approx(1, abs=1e-3)


@needs_chromium
@pytest.mark.slow
def test_ratings_and_notes_are_kept_and_saved(browser: Browser) -> None:
    enter = """const view = views[2];
        view.rating.value = "4"; view.rating.dispatchEvent(new Event("change"));
        view.note.focus()"""
    browser.run(enter)
    for key in "n 3":  # keys do not control the player while a note is written
        browser.press(key)
    assert pressed(browser) == [False, True, False, False] and not browser.run("return player.playing")
    browser.open(Path(browser.run("return decodeURI(location.pathname)")))
    kept = browser.run("return views.slice(1).map(view => [view.rating.value, view.note.value])")
    assert kept == [["", ""], ["4", "n 3"], ["", ""]]
    catch = """let saved; URL.createObjectURL = blob => { saved = blob; return "data:,"; };
        HTMLAnchorElement.prototype.click = function () { this.dataset.name = this.download; };
        document.getElementById("save").click(); return saved.text()"""
    saved = json.loads(browser.run(catch))
    assert saved["title"] == "vocals of song.wav" and saved["excerpt"] == "3 to 14 s"
    assert [each["rating"] for each in saved["candidates"]] == [None, 4, None]
    assert [each["note"] for each in saved["candidates"]] == ["", "n 3", ""]
    assert [each["number"] for each in saved["candidates"]] == [1, 2, 3]
    assert saved["revealed"] is not saved["blind"]
    names = [each["name"] for each in saved["candidates"]]
    assert names == ([f"Candidate {number}" for number in (1, 2, 3)] if saved["blind"] else list(NAMES))


@needs_chromium
@pytest.mark.slow
def test_names_are_hidden_until_they_are_revealed(browser: Browser) -> None:
    blind = browser.run("return Boolean(song.key)")
    hidden = ["The song", "Candidate 1", "Candidate 2", "Candidate 3"]
    if blind:
        assert titles(browser) == hidden
        text = browser.run("return document.documentElement.outerHTML")
        assert "fact of" not in text and "third" not in text
        assert browser.label(".track:nth-of-type(2) .listen") == "Listen to Candidate 1"
        browser.click("#reveal")
        browser.open(Path(browser.run("return decodeURI(location.pathname)")))  # and stay so
    assert set(titles(browser)) == {"The song", *NAMES}
    for index, title in enumerate(titles(browser)):
        facts = browser.run("return views[arguments[0]].facts.textContent.replaceAll('\\u00a0', ' ')", index)
        assert index == 0 or f"fact of {title}" in facts
        assert browser.label(f".track:nth-of-type({index + 1}) .listen") == f"Listen to {title}"
    assert browser.run("return getComputedStyle(document.getElementById('reveal')).display") == "none"


@needs_chromium
@pytest.mark.slow
def test_every_control_has_a_label_and_is_reached_by_tab(browser: Browser) -> None:
    blind = browser.run("return Boolean(song.key)")
    names = ["Repeat", *(["Reveal names"] if blind else []), "Save ratings and notes", "Play", "Position"]
    for index, title in enumerate(titles(browser)):
        names += [f"{what} {title}" for what in ("Listen to", "Rating of", "Note on")[: 3 if index else 1]]
    controls = """return [...document.querySelectorAll("button, input, select, textarea")]
        .filter(each => each.checkVisibility()).map((each, i) => each.dataset.i = i)"""
    assert [browser.label(f"[data-i='{index}']") for index in browser.run(controls)] == names
    for index in range(len(names)):
        browser.press("\ue004")
        focus = "const at = document.activeElement; return [at.dataset.i, getComputedStyle(at).outlineStyle]"
        assert browser.run(focus) == [str(index), "solid"]


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_fits_a_phone_where_a_tap_plays(browser: Browser, width: int) -> None:
    metrics: dict[str, Any] = {"width": width, "height": 740, "deviceScaleFactor": 2, "mobile": width < 1000}
    browser.developer("Emulation.setDeviceMetricsOverride", **metrics)
    browser.developer("Emulation.setTouchEmulationEnabled", enabled=width < 1000)
    pointer = "touch" if width < 1000 else "mouse"
    try:
        browser.open(Path(browser.run("return decodeURI(location.pathname)")))
        assert browser.run("return document.documentElement.scrollWidth") <= width
        browser.click("#play", pointer=pointer)
        browser.click(".track:nth-of-type(4) .listen", pointer=pointer)
        hear(browser, 3)
    finally:
        browser.developer("Emulation.clearDeviceMetricsOverride")
        browser.developer("Emulation.setTouchEmulationEnabled", enabled=False)


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width, height, scheme", VIEWS)
def test_axe_finds_nothing(chromium: Browser, tmp_path: Path, width: int, height: int, scheme: str) -> None:
    write_comparison(comparison(blind=True, seconds=0.5), tmp_path / "vocals.html")
    with view(chromium, width, height, scheme):
        chromium.open(tmp_path / "vocals.html")
        assert faults(chromium) == []
        chromium.click("#reveal")
        assert faults(chromium) == []
