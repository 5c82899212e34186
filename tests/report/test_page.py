"""The listening page is self-contained: its text, and in a browser its sound."""

import base64
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from helpers.browser import HOME, LEFT, RIGHT, SHIFT, Browser
from helpers.common import needs_chromium, quick_first
from helpers.served_process import wait_for
from separation.errors import AudioError, OutputError
from separation.report import page as report
from separation.report.page import Report, write_report
from separation.system.record import RECORD

RATE = 44100
SECONDS = 21  # three segments, the last of them short
HERTZ = 441
SILENT, SOUNDING = -90, -30  # dBFS
TITLE = 'A song </script><b>"1" & 2</b> 歌'
STEMS = ("vocals", "drums", "bass")  # keys 1, 2 and 3; key 0 is the mixture


def write(path: Path, samples: np.ndarray) -> Path:
    soundfile.write(path, np.stack([samples, samples], axis=1), RATE, subtype="FLOAT")
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vocals are a sine. Drums and bass are noise and its negative, which cancel out if they play in sync."""
    folder = tmp_path_factory.mktemp("song")
    sine = 0.25 * np.sin(2 * np.pi * HERTZ * np.arange(SECONDS * RATE) / RATE)
    noise = 0.1 * np.random.default_rng(0).standard_normal(SECONDS * RATE)
    sounds = zip(STEMS, (sine, noise, -noise), strict=True)
    stems = {name: write(folder / f"{name}.wav", samples) for name, samples in sounds}
    mixture = write(folder / "mixture.wav", sine)
    target = folder / "stems.html"
    write_report(Report(TITLE, mixture, stems, {"vocals": 8.25, "bass": -1.0}), target)
    written = {path.name for path in folder.iterdir()} - {*(f"{stem}.wav" for stem in STEMS), "mixture.wav"}
    assert written == {"stems.html", RECORD}
    return target


def test_the_page_loads_nothing_else(page: Path) -> None:
    text = re.sub(r">[A-Za-z0-9+/=]{100,}<", "><", page.read_text(encoding="utf-8"))
    assert "://" not in text
    assert not re.search(r"@import|fetch\(|XMLHttpRequest|(?:src|href)=(?!\"data:)", text)


def test_only_a_page_with_a_server_that_mixes_may_connect_to_it(tmp_path: Path) -> None:
    song = write(tmp_path / "song.wav", np.zeros(RATE))
    texts = []
    for mix in ("", "mix.wav"):
        write_report(Report("A", song, {"vocals": song}, mix=mix), tmp_path / "stems.html", overwrite=True)
        texts.append((tmp_path / "stems.html").read_text(encoding="utf-8"))
    assert ["fetch(" in text for text in texts] == ["connect-src" in text for text in texts] == [False, True]
    assert "/* served mix */" not in "".join(texts)


def test_sound_takes_less_than_a_megabyte_per_minute_and_stem(page: Path) -> None:
    assert page.stat().st_size < 1e6 * SECONDS / 60 * 4 + 5e5


@pytest.mark.parametrize("samples", quick_first([1, 2, 4410, 10 * RATE + 1], 3))
def test_a_song_of_any_length_has_a_page(tmp_path: Path, samples: int) -> None:
    song = write(tmp_path / "song.wav", np.zeros(samples))
    write_report(Report("short", song, {"vocals": song}), tmp_path / "stems.html")
    text = (tmp_path / "stems.html").read_text(encoding="utf-8")
    assert '"silent"' in text
    assert text.count('id="sound-') == 2 * math.ceil(samples / (10 * RATE))


def test_the_page_shows_the_level_and_score_of_each_track(page: Path) -> None:
    facts = re.findall(r'"facts": (\[[^]]*\])', page.read_text(encoding="utf-8"))
    assert [json.loads(text) for text in facts] == [
        ["−15.1 dBFS"],  # a sine of 0.25
        ["−15.1 dBFS", "SDR 8.2 dB"],
        ["−20.0 dBFS"],  # noise of 0.1
        ["−20.0 dBFS", "SDR −1.0 dB"],
    ]


def sounds(page: Path) -> list[np.ndarray]:
    """All segments of sound in a page, decoded, `[n, channels]`."""
    pieces = re.findall(r'<script type="text/plain" id="sound-[^"]*">([^<]*)<', page.read_text(encoding="utf-8"))
    return [soundfile.read(io.BytesIO(base64.b64decode(piece)))[0] for piece in pieces]


def test_each_segment_has_a_tenth_of_a_second_of_extra_sound_on_both_sides(page: Path) -> None:
    seconds = [len(sound) / RATE for sound in sounds(page)]
    assert seconds == [10.2] * 4 + [10.2] * 4 + [1.2] * 4  # of the mixture and three stems


@pytest.mark.parametrize("peak, played", quick_first([(4.0, 1.0), (0.25, 0.25)], 1))
def test_only_a_song_beyond_full_scale_is_scaled(peak: float, played: float, tmp_path: Path) -> None:
    sine = np.sin(2 * np.pi * HERTZ * np.arange(RATE) / RATE)
    mixture = write(tmp_path / "mixture.wav", peak * sine)
    vocals = write(tmp_path / "vocals.wav", 0.5 * peak * sine)
    write_report(Report("loud", mixture, {"vocals": vocals}), tmp_path / "stems.html")
    for sound, share in zip(sounds(tmp_path / "stems.html"), (1.0, 0.5), strict=True):
        middle = sound[len(sound) // 4 : -len(sound) // 4]
        assert np.abs(middle).max() == pytest.approx(share * played, rel=0.1)
        assert np.sqrt(np.square(middle).mean()) == pytest.approx(share * played / np.sqrt(2), rel=0.02)  # not clipped


def test_a_song_that_is_too_long_or_missing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    song = write(tmp_path / "song.wav", np.zeros(RATE + 1))
    monkeypatch.setattr(report, "MAX_SECONDS", 1)
    with pytest.raises(AudioError, match=r"the report of 'A': 'song.wav' is longer than 1 s"):
        write_report(Report("A", song, {"vocals": song}), tmp_path / "out" / "stems.html")
    with pytest.raises(AudioError, match=r"the report of 'A': 'none.wav' does not exist"):
        write_report(Report("A", tmp_path / "none.wav", {"vocals": song}), tmp_path / "out" / "stems.html")
    assert list(tmp_path.iterdir()) == [song]


def test_a_page_that_cannot_be_written_is_an_output_error_and_leaves_no_file(tmp_path: Path) -> None:
    song = write(tmp_path / "song.wav", np.zeros(RATE))
    (tmp_path / "stems.html").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        write_report(Report("A", song, {"vocals": song}), tmp_path / "stems.html")
    with pytest.raises(OutputError, match="cannot write to"):
        write_report(Report("A", song, {"vocals": song}), song / "stems.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["song.wav", "stems.html"]


# --- in a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser, page: Path) -> Iterator[Browser]:
    """The page, just opened. At the end, its console must be empty and it must have loaded only itself."""
    chromium.console(), chromium.requests()
    chromium.open(page)
    yield chromium
    assert chromium.console() == []
    asked = {url for url in chromium.requests() if not url.startswith(("data:", "chrome:"))}  # its start page
    assert asked == {page.resolve().as_uri()}


def level(browser: Browser, name: str) -> float:
    """The current level of a track's output in dBFS."""
    script = """const track = player.tracks.find(track => track.name === arguments[0]);
        return 20 * Math.log10(level(track, new Float32Array(2048)) + 1e-9)"""
    return float(browser.run(script, name))


def hear(browser: Browser, *sounding: str) -> None:
    """Wait until exactly these tracks are audible."""

    def heard() -> bool:
        levels = {name: level(browser, name) for name in ("mixture", *STEMS)}
        return all(dbfs > SOUNDING if name in sounding else dbfs < SILENT for name, dbfs in levels.items())

    wait_for(heard, f"the sound of {sounding}", seconds=10)


def position(browser: Browser) -> float:
    return float(browser.run("return player.position"))


def seek(browser: Browser, seconds: float) -> None:
    browser.run("player.seek(arguments[0])", seconds)


def recorded(browser: Browser, node: str, at: float) -> tuple[float, np.ndarray]:
    """Wait for position `at` in seconds. Returns the position and the last 0.74 s of sound at an audio node."""
    script = f"""const recorder = {node}, samples = new Float32Array(recorder.fftSize = 32768);
        return new Promise(resolve => {{
            const timer = setInterval(() => {{
                if (player.position < {at}) return;
                clearInterval(timer);
                recorder.getFloatTimeDomainData(samples);
                resolve([player.position, ...samples]);
            }}, 5);
        }})"""
    position, *samples = browser.run(script)
    return position, np.array(samples)


@needs_chromium
@pytest.mark.slow
def test_the_play_button_starts_and_pauses_the_stems(browser: Browser) -> None:
    assert browser.label("#play") == "Play"
    browser.click("#play")
    hear(browser, *STEMS)
    first = position(browser)
    wait_for(lambda: position(browser) > first + 0.3, "the position's advance")
    assert browser.label("#play") == "Pause"
    browser.click("#play")
    hear(browser)
    stopped = position(browser)
    assert position(browser) == stopped > first
    assert browser.label("#play") == "Play"


@needs_chromium
@pytest.mark.slow
def test_mute_silences_only_its_stem(browser: Browser) -> None:
    browser.click("#play")
    hear(browser, *STEMS)
    browser.click("[aria-label='Mute drums']")
    hear(browser, "vocals", "bass")
    assert browser.run("return document.querySelector(\"[aria-label='Mute drums']\").ariaPressed") == "true"
    browser.click("[aria-label='Mute drums']")
    hear(browser, *STEMS)


@needs_chromium
@pytest.mark.slow
def test_only_soloed_tracks_are_audible_and_the_mixture_only_as_a_solo(browser: Browser) -> None:
    browser.click("[aria-label='Solo bass']")
    browser.click("#play")
    hear(browser, "bass")
    browser.click("[aria-label='Mute bass']")
    hear(browser, "bass")  # solo wins over mute
    browser.click("[aria-label='Solo vocals']")
    hear(browser, "bass", "vocals")
    browser.click("[aria-label='Solo vocals']")
    browser.click("[aria-label='Solo bass']")
    browser.click("[aria-label='Solo mixture']")
    hear(browser, "mixture")


@needs_chromium
@pytest.mark.slow
def test_volume_changes_only_its_stem(browser: Browser) -> None:
    browser.click("#play")
    for amplitude in (0.25, 0.25 / 4):
        dbfs = pytest.approx(20 * math.log10(amplitude / math.sqrt(2)), abs=1)
        wait_for(lambda dbfs=dbfs: level(browser, "vocals") == dbfs, f"an amplitude of {amplitude}", seconds=10)
        browser.click("[aria-label='Volume of vocals']", at=0.5)
    assert level(browser, "bass") > SOUNDING


@needs_chromium
@pytest.mark.slow
def test_stems_stay_in_sync_to_the_sample_after_seeks_and_across_segments(browser: Browser) -> None:
    browser.click("#play")
    hear(browser, *STEMS)
    browser.click("[aria-label='Mute vocals']")
    browser.run("player.recorder = player.context.createAnalyser(); player.output.connect(player.recorder)")
    for start in (3.217, 9.5):
        seek(browser, start)
        assert np.abs(recorded(browser, "player.recorder", start + 1)[1]).max() < 1e-3
        assert np.abs(recorded(browser, "player.tracks[3].analyser", start + 1.5)[1]).max() > 0.2


@needs_chromium
@pytest.mark.slow
def test_a_tone_crosses_segments_without_a_click(browser: Browser) -> None:
    browser.click("#play")
    hear(browser, *STEMS)
    checked = 0
    for start in (9.2, 9.23):
        seek(browser, start)
        at, samples = recorded(browser, "player.tracks[1].analyser", 10.25)
        if at >= 10.5:  # too late, on a busy machine: the next segment begins within the samples
            continue
        assert np.abs(samples).max() == pytest.approx(0.25, abs=0.02)
        bend = np.abs(np.diff(samples, 2)).max()  # the sine: 0.001; a lost sample: 0.016
        assert bend < 0.002
        turned = samples * np.exp(-2j * np.pi * HERTZ / RATE * np.arange(len(samples)))
        assert np.angle(turned[-8000:].sum() / turned[:8000].sum()) == pytest.approx(0, abs=0.02)  # a lost sample: 0.06
        checked += 1
    assert checked, "the browser is too slow"


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("down", [0.25, 0.75])  # the waveform, the spectrogram
def test_a_click_on_a_picture_seeks(browser: Browser, down: float) -> None:
    browser.click(".track:nth-of-type(3) .lane", at=0.75, down=down)
    assert position(browser) == pytest.approx(0.75 * SECONDS, abs=0.1)
    assert browser.run("return document.querySelector('#clock b').textContent").startswith("0:15")
    browser.click("#play")
    hear(browser, *STEMS)
    assert position(browser) > 0.75 * SECONDS - 0.1
    browser.click(".track:nth-of-type(1) .lane", at=0.25, down=down)
    hear(browser, *STEMS)
    assert 0.25 * SECONDS - 0.1 < position(browser) < 0.25 * SECONDS + 5


@needs_chromium
@pytest.mark.slow
def test_the_song_stops_at_its_end_and_then_plays_from_the_start(browser: Browser) -> None:
    seek(browser, SECONDS - 0.3)
    browser.click("#play")
    wait_for(lambda: browser.run("return !player.playing"), "the end", seconds=10)
    assert position(browser) == SECONDS
    browser.click("#play")
    hear(browser, *STEMS)
    assert position(browser) < SECONDS / 2


@needs_chromium
@pytest.mark.slow
def test_keys_play_seek_mute_and_solo(browser: Browser) -> None:
    browser.press(" ")
    hear(browser, *STEMS)
    browser.press("2")
    hear(browser, "vocals", "bass")
    browser.press(SHIFT, "1")
    hear(browser, "vocals")
    browser.press(SHIFT, "1")
    browser.press("2")
    browser.press("0")
    hear(browser, "mixture")
    browser.press("0")
    browser.click("[aria-label='Mute bass']")
    browser.press(" ")  # does not press the button that was clicked last
    hear(browser)
    assert browser.run("return player.tracks[3].muted")
    browser.press(HOME)
    before = position(browser)
    browser.press(RIGHT)
    browser.press(RIGHT)
    assert position(browser) == pytest.approx(before + 10, abs=0.001)
    browser.press(LEFT)
    assert position(browser) == pytest.approx(before + 5, abs=0.001)
    browser.press(HOME)
    assert position(browser) == 0


@needs_chromium
@pytest.mark.slow
def test_every_control_has_a_label_and_is_reached_by_tab(browser: Browser) -> None:
    names = ["Play", "Position", "Loop start", "Loop end", "Clear the loop", "Tempo", "Tempo in percent", "Pitch"]
    names += ["Pitch in semitones", "Save mix", "Solo mixture", "Volume of mixture"]
    names += [f"{control} {stem}" for stem in STEMS for control in ("Mute", "Solo", "Volume of")]
    browser.run("setLoop(0, 21)")  # then it can be cleared
    controls = "return [...document.querySelectorAll('body button, body input')].map((each, i) => each.dataset.i = i)"
    assert [browser.label(f"[data-i='{index}']") for index in browser.run(controls)] == names
    for index in range(len(names)):
        browser.press("\ue004")
        focus = "const at = document.activeElement; return [at.dataset.i, getComputedStyle(at).outlineStyle]"
        assert browser.run(focus) == [str(index), "solid"]
    browser.press(" ")  # on a slider: plays
    hear(browser, *STEMS)


@needs_chromium
@pytest.mark.slow
def test_titles_are_plain_text_and_facts_are_shown(browser: Browser) -> None:
    assert browser.run("return [document.title, document.querySelector('h1').textContent]") == [TITLE, TITLE]
    facts = browser.run("return [...document.querySelectorAll('.facts')].map(each => each.textContent)")
    assert facts == ["−15.1 dBFS", "−15.1 dBFS · SDR 8.2 dB", "−20.0 dBFS", "−20.0 dBFS · SDR −1.0 dB"]


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_fits_a_phone_where_a_tap_plays(browser: Browser, width: int) -> None:
    metrics: dict[str, Any] = {"width": width, "height": 740, "deviceScaleFactor": 2, "mobile": width < 1000}
    browser.developer("Emulation.setDeviceMetricsOverride", **metrics)
    browser.developer("Emulation.setTouchEmulationEnabled", enabled=width < 1000)
    try:
        browser.open(Path(browser.run("return decodeURI(location.pathname)")))
        assert browser.run("return document.documentElement.scrollWidth") <= width
        browser.click("#play", pointer="touch" if width < 1000 else "mouse")
        hear(browser, *STEMS)
    finally:
        browser.developer("Emulation.clearDeviceMetricsOverride")
        browser.developer("Emulation.setTouchEmulationEnabled", enabled=False)
