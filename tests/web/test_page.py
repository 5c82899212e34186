"""The local page in a browser: what a user does with it and sees."""

import base64
import io
import json
import re
import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from helpers.axe import VIEWS, faults, view
from helpers.browser import RIGHT, Browser
from helpers.common import SONG, STEMS, needs_chromium, needs_ffmpeg, read, song
from helpers.page_server import MAX_MIB, Process
from helpers.served_process import wait_for
from helpers.videos import picture, video
from separation import Separator
from separation.audio.ffmpeg import is_installed
from separation.audio.options import OutputOptions
from separation.engine.options import EngineOptions
from separation.web.queue import KEEP_SECONDS

TAB, ENTER = "\ue004", "\ue007"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser, server: Process, tmp_path: Path) -> Iterator[Browser]:
    """The page without songs; downloads go to `tmp_path`. At the end, its console must be empty."""
    chromium.open(server.url)
    chromium.run("localStorage.clear()")
    chromium.open(server.url)
    chromium.developer("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    chromium.console(), chromium.requests()
    yield chromium
    assert chromium.console() == []
    asked = {url for url in chromium.requests() if not url.startswith(("data:", "chrome:", "blob:"))}
    assert all(url.startswith(server.url) for url in asked), asked


def change(browser: Browser, selector: str, value: str) -> None:
    """Choose an option of a select, as a user does."""
    script = """const select = document.querySelector(arguments[0]); select.value = arguments[1];
        select.dispatchEvent(new Event("change", { bubbles: true })); return select.value"""
    assert browser.run(script, selector, value) == value


def select(browser: Browser, recipe: str, stems: str = "vocals_instrumental", format: str = "flac") -> None:
    """Choose a recipe that is not among the first ones, and a format."""
    browser.run("document.querySelector('[name=wanted][value=more]').click()")
    change(browser, "#task", "recipes")
    change(browser, "#model", json.dumps({"recipe": recipe, "stems": stems}, separators=(",", ":")))
    change(browser, "#format", format)


def focused(browser: Browser, selector: str) -> bool:
    return bool(browser.run("return document.activeElement === document.querySelector(arguments[0])", selector))


def card(browser: Browser, number: int = 0) -> str:
    """The text of a song's card; number 0 is the newest."""
    return str(browser.run("return document.querySelectorAll('li')[arguments[0]]?.innerText ?? ''", number))


def width(browser: Browser) -> int:
    return int(browser.run("return document.querySelector('canvas').clientWidth"))


def change_text(browser: Browser, selector: str, text: str) -> None:
    """Write a text into a field."""
    script = """const field = document.querySelector(arguments[0]); field.value = arguments[1];
        field.dispatchEvent(new Event("input", { bubbles: true }))"""
    browser.run(script, selector, text)


def downloaded(path: Path) -> bytes:
    wait_for(path.exists, f"the download of {path.name}", seconds=20)
    return path.read_bytes()


@needs_chromium
@pytest.mark.slow
def test_a_song_can_be_chosen_separated_heard_and_downloaded(browser: Browser, server: Process, tmp_path: Path) -> None:
    select(browser, "demo", "all_6")
    assert browser.run("return document.querySelector('#start').disabled")
    browser.choose("#files", SONG)
    assert browser.run("return document.querySelector('#chosen').textContent") == "song.flac, 1.5 MB"
    browser.click("#start")
    seen: set[float] = set()

    def done() -> bool:
        seen.add(float(browser.run("return document.querySelector('li progress').value")))
        return "Done" in card(browser)

    wait_for(done, "the end of the song")
    assert len(seen) > 2
    assert browser.run("return document.querySelector('#announcement').textContent") == "song.flac: Done"
    files = Separator("demo", "all_6", options=EngineOptions(device="cpu")).separate_file(
        SONG, tmp_path / "out", OutputOptions(format="flac")
    )
    browser.click("a[href$='drums.flac']")
    np.testing.assert_array_equal(read(downloaded(tmp_path / "song - drums.flac")), read(files["drums"]))
    browser.click("a[href$='stems.zip']")
    archive = zipfile.ZipFile(io.BytesIO(downloaded(tmp_path / "song - stems.zip")))
    assert archive.namelist() == [f"song/{stem}.flac" for stem in STEMS["all_6"]]
    for stem, path in files.items():
        np.testing.assert_array_equal(read(archive.read(f"song/{stem}.flac")), read(path))

    browser.click("[aria-label='Listen to song.flac']")
    level = """const track = player.tracks.find(track => track.name === arguments[0]);
        return 20 * Math.log10(level(track, new Float32Array(2048)) + 1e-9)"""
    wait_for(lambda: browser.run("return globalThis.play !== undefined && !play.disabled"), "the player")
    browser.click("#play")
    wait_for(lambda: browser.run(level, "drums") > -40, "the drums")
    browser.click("[aria-label='Mute drums']")
    wait_for(lambda: browser.run(level, "drums") < -90, "the drums' silence")
    wait_for(lambda: browser.run(level, "bass") > -40, "the bass")
    links = browser.run("return [...document.querySelectorAll('nav a')].map(each => each.textContent)")
    assert links == ["← all songs", *(f"↓ {stem}" for stem in STEMS["all_6"]), "↓ all as zip"]
    browser.click("nav a:nth-of-type(2)")
    np.testing.assert_array_equal(read(downloaded(tmp_path / "song - vocals.flac")), read(files["vocals"]))
    browser.click("nav a")
    wait_for(lambda: "Done" in card(browser), "the song on the page again")
    browser.click("[aria-label='Remove song.flac']")
    assert card(browser) == ""
    wait_for(lambda: not list(server.songs.glob("*/stems/guitar.flac")), "its removal")


@needs_chromium
@pytest.mark.slow
def test_a_mix_is_saved_from_the_stems_own_files(browser: Browser, server: Process, tmp_path: Path) -> None:
    select(browser, "demo", format="wav")
    browser.choose("#files", SONG)
    browser.click("#start")
    wait_for(lambda: "Done" in card(browser), "the end of the song")
    assert "128.0 BPM" in card(browser)
    browser.click("[aria-label='Listen to song.flac']")
    wait_for(lambda: browser.run("return globalThis.play !== undefined && !play.disabled"), "the player")
    page = browser.run("return location.pathname").rpartition("/")[0]
    vocals, instrumental = (read(server.ask("GET", f"{page}/{stem}.wav")[1]) for stem in ("vocals", "instrumental"))
    quality = "return document.querySelector('#quality').textContent"
    assert browser.run(quality) == "as WAV, from the stems"
    browser.run("player.set(player.tracks[1], { volume: 0.5 })")

    def saved() -> NDArray[np.float32]:
        browser.click("#save")
        content = downloaded(tmp_path / "song.flac mix.wav")
        (tmp_path / "song.flac mix.wav").unlink()
        assert soundfile.info(io.BytesIO(content)).subtype == "FLOAT"
        return read(content)

    mix = (0.25 * vocals.astype(np.float64) + instrumental).astype(np.float32)
    np.testing.assert_array_equal(saved(), mix)
    browser.run("setLoop(3, 6); player.set(player.tracks[1], { muted: true })")
    np.testing.assert_array_equal(saved(), instrumental[3 * 44100 : 6 * 44100])
    browser.run("change({ tempo: 0.5 })")
    slow = saved()
    assert len(slow) == 6 * 44100
    assert np.sqrt(np.square(slow).mean() / np.square(instrumental[3 * 44100 : 6 * 44100]).mean()) > 0.7
    browser.run("player.set(player.tracks[0], { solo: true })")
    assert browser.run(quality) == "as WAV, from MP3"
    browser.run("player.set(player.tracks[0], { solo: false })")
    assert server.ask("DELETE", page)[0] == 200
    browser.click("#save")
    status = "return document.querySelector('#status').textContent"
    wait_for(lambda: browser.run(status), "the refusal")
    assert browser.run(status) == "No mix: this song is no longer on the server: send it again"
    assert "Failed to load resource" in browser.console()[0]  # Chromium logs the refusal


@needs_chromium
@needs_ffmpeg
@pytest.mark.slow
def test_a_stem_file_is_only_offered_for_four_stems(browser: Browser) -> None:
    option = "const one = document.querySelector('[value=\"stem.mp4\"]'); return [one.disabled, one.textContent]"
    title = "Stem file for DJ programs (.stem.mp4)"
    assert browser.run(option) == [True, f"{title}: needs 4 stems"]
    browser.run("document.querySelectorAll('[name=wanted]')[2].click()")
    assert browser.run(option) == [False, title]
    change(browser, "#format", "stem.mp4")
    browser.run("document.querySelectorAll('[name=wanted]')[0].click()")
    assert browser.run("return document.querySelector('#format').value") == "wav"
    assert browser.run("return document.querySelector('#announcement').textContent") == "Format: WAV, 32-bit float"


@needs_chromium
@pytest.mark.slow
def test_mono_stems_are_offered_unless_the_format_is_in_stereo(browser: Browser, short: bytes, tmp_path: Path) -> None:
    (tmp_path / "song.wav").write_bytes(short)
    select(browser, "demo", "all_4", format="stem.mp4" if is_installed() else "flac")
    change(browser, "#format", "flac")
    change(browser, "#channels", "mono")
    browser.choose("#files", tmp_path / "song.wav")
    browser.click("#start")
    wait_for(lambda: "Done" in card(browser), "the end of the song")
    assert "FLAC, 24 bit · mono" in card(browser)
    browser.click("a[href$='vocals.flac']")
    assert soundfile.info(io.BytesIO(downloaded(tmp_path / "song - vocals.flac"))).channels == 1
    if is_installed():
        change(browser, "#format", "stem.mp4")
        assert browser.run("return document.querySelector('#channels').value") == "stereo"
        assert browser.run("return document.querySelector('#channels [value=mono]').disabled")


@needs_chromium
@pytest.mark.slow
def test_what_is_there_of_a_damaged_song_is_separated_without_another_upload(chromium: Browser, tmp_path: Path) -> None:
    (tmp_path / "song.wav").write_bytes(song(2)[: 2**18])
    (tmp_path / "work").mkdir()
    server = Process(tmp_path / "work")
    chromium.open(server.url)
    chromium.developer("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    select(chromium, "demo")
    chromium.choose("#files", tmp_path / "song.wav")
    chromium.click("#start")
    told = "'song.wav' is cut short (the last 1.26 s of 2.00 s are missing, from 0.74 s on)"
    wait_for(lambda: f"{told}: get the file again, or use what is there" in card(chromium), "the refusal")
    (tmp_path / "song.wav").unlink()
    chromium.open(server.url)
    wait_for(lambda: told in card(chromium), "the refusal after a reload")
    chromium.run("document.querySelector('#songs .files button').focus()")
    assert chromium.label("#songs .files button") == "Use what is there: song.wav"
    chromium.press(ENTER)
    wait_for(lambda: "Done" in card(chromium), "the end of the song")
    assert told in card(chromium) and "what is there" in card(chromium) and card(chromium, 1) == ""
    chromium.click("a[href$='vocals.flac']")
    assert len(read(downloaded(tmp_path / "song - vocals.flac"))) == (2**18 - 88) // 8  # without the header
    assert chromium.console() == []
    assert server.stop(signal.SIGTERM) == (128 + signal.SIGTERM, f"{told}\n")


@needs_chromium
@needs_ffmpeg
@pytest.mark.slow
def test_a_video_is_saved_with_a_stem_or_the_mix_as_its_sound(
    browser: Browser, server: Process, short: bytes, tmp_path: Path
) -> None:
    (tmp_path / "song.wav").write_bytes(short)
    clip = video(tmp_path / "clip.mp4", tmp_path / "song.wav")
    select(browser, "demo", "all_4")
    browser.choose("#files", clip)
    browser.click("#start")
    wait_for(lambda: "Done" in card(browser), "the end of the song")
    assert browser.run("return document.querySelector('.video select').options.length") == 8
    change(browser, ".video select", "drums=1&bass=1&other=1")
    assert "all but vocals" in browser.run("return document.querySelector('.video :checked').textContent")
    browser.click(".video button")
    wait_for(lambda: "The video is ready: clip - mix.mp4" in card(browser), "the notice")
    (tmp_path / "clip - mix.mp4").unlink()
    change(browser, ".video select", "vocals=1")
    browser.click(".video button")
    vocals = downloaded(tmp_path / "clip - vocals.mp4")
    wait_for(lambda: "The video is ready: clip - vocals.mp4" in card(browser), "the notice")
    assert picture(tmp_path / "clip - vocals.mp4") == picture(clip)
    with view(browser, 320, 740, "light"):
        browser.run("document.querySelector('.video option').textContent = 'a long name '.repeat(9)")
        assert browser.run("return document.documentElement.scrollWidth") == 320
    assert browser.label(".video button") == "Save video of clip.mp4"
    browser.click("[aria-label='Listen to clip.mp4']")
    wait_for(lambda: browser.run("return globalThis.play !== undefined && !play.disabled"), "the player")
    browser.run("player.set(player.tracks[2], { volume: 0.5 })")
    status = "return document.querySelector('#status').textContent"
    for state, words in {
        "change({ tempo: 0.5 })": "A video keeps its tempo and pitch: set them to 100 % and 0 first.",
        "change({ tempo: 1 }); player.set(player.tracks[0], { solo: true })": "choose stems, not the mixture",
        "for (const track of player.tracks) player.set(track, { solo: false, muted: true })": "to save a video",
    }.items():
        browser.run(state)
        browser.click("#save-video")
        assert words in browser.run(status)
    browser.run("for (const track of player.tracks) player.set(track, { muted: false })")
    browser.click("#save-video")
    mix = downloaded(tmp_path / "clip - mix.mp4")
    wait_for(lambda: browser.run(status) == "The video is ready: clip - mix.mp4", "the notice")
    assert picture(tmp_path / "clip - mix.mp4") == picture(clip) and mix != vocals
    part = server.send(clip.read_bytes(), "clip.mp4", part=[0, 1])
    assert server.wait_until_over(part)["video"] == []
    page = browser.run("return location.pathname").rpartition("/")[0]
    (server.songs / page.rpartition("/")[2] / "song" / "clip.mp4").unlink()
    browser.click("#save-video")
    wait_for(lambda: browser.run(status), "the refusal")
    assert browser.run(status) == "No video: the files of 'clip.mp4' are not here any more: send it again"
    assert "Failed to load resource" in browser.console()[0]  # Chromium logs the refusal


@needs_chromium
@pytest.mark.slow
def test_the_page_warns_before_unsent_songs_are_lost(browser: Browser, short: bytes, tmp_path: Path) -> None:
    unload = "const leaving = new Event('beforeunload', { cancelable: true }); return !dispatchEvent(leaving)"
    select(browser, "demo")
    (tmp_path / "song.flac").write_bytes(short)
    browser.run("globalThis.asked = fetch; globalThis.fetch = () => new Promise(() => {})")  # a slow connection
    browser.choose("#files", tmp_path / "song.flac")
    assert not browser.run(unload)
    browser.click("#start")
    assert browser.run(unload)
    browser.click("[aria-label='Cancel song.flac']")
    assert not browser.run(unload)


@needs_chromium
@pytest.mark.slow
def test_dropped_songs_queue_up_and_can_be_cancelled(browser: Browser, short: bytes) -> None:
    select(browser, "demo", format="mp3")
    script = """const transfer = new DataTransfer();
        for (const [name, text] of arguments[0]) {
            transfer.items.add(new File([Uint8Array.from(atob(text), c => c.charCodeAt(0))], name));
        }
        document.querySelector("h1").dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}))"""

    long, brief = (base64.b64encode(content).decode() for content in (song(15, format="FLAC"), short))
    browser.run(script, [["<b>1</b>.flac", long], ["2.wav", brief]])
    assert browser.run("return document.querySelector('#chosen').textContent").startswith("2 files")
    browser.press(ENTER)  # the drop has focused the button
    wait_for(lambda: "1 song ahead" in card(browser, 1), "the second song's place in the line")
    assert card(browser).startswith("<b>1</b>.flac")
    browser.click("[aria-label='Cancel <b>1</b>.flac']")
    assert "Cancelled" in card(browser)
    wait_for(lambda: "Done" in card(browser, 1), "the end of the second song")
    browser.open(browser.run("return location.href"))
    wait_for(lambda: "Done" in card(browser), "the second song after a reload")
    assert card(browser, 1) == ""


@needs_chromium
@pytest.mark.slow
def test_a_song_is_sent_again_once_a_full_queue_has_room(browser: Browser, short: bytes, tmp_path: Path) -> None:
    select(browser, "demo")
    full = """const asked = fetch, full = () => Promise.resolve(new Response("20 songs are waiting", {status: 503}));
        globalThis.refused = 0;
        globalThis.fetch = (path, how) => how.method === "POST" && ++refused < 3 ? full() : asked(path, how)"""
    browser.run(full)
    (tmp_path / "song.flac").write_bytes(short)
    browser.choose("#files", tmp_path / "song.flac")
    browser.click("#start")
    wait_for(lambda: browser.run("return refused") == 1, "the refusal")
    assert "Waiting to upload" in card(browser)
    wait_for(lambda: "Done" in card(browser), "the end of the song")
    assert browser.run("return refused") == 3


@needs_chromium
@pytest.mark.slow
def test_a_wrong_file_and_an_oversized_file_show_their_errors(browser: Browser, tmp_path: Path) -> None:
    select(browser, "demo")
    (tmp_path / "words.txt").write_text("words, not sound\n" * 50)
    (tmp_path / "big.wav").write_bytes(bytes(MAX_MIB * 2**20 + 1))
    browser.choose("#files", tmp_path / "words.txt")
    browser.click("#start")
    wait_for(lambda: "'words.txt' is not audio" in card(browser), "the error")
    browser.choose("#files", tmp_path / "big.wav")
    browser.click("#start")
    wait_for(lambda: "'big.wav' has more than 3 MiB" in card(browser), "the other message")
    assert "Failed to load resource" in browser.console()[0]  # Chromium logs the refusal


@needs_chromium
@pytest.mark.slow
def test_the_page_reconnects_to_the_next_server_which_goes_on(chromium: Browser, tmp_path: Path) -> None:
    (tmp_path / "song.flac").write_bytes(song(15, format="FLAC"))
    (tmp_path / "work").mkdir()
    first = Process(tmp_path / "work")
    chromium.open(first.url)
    select(chromium, "demo")
    chromium.choose("#files", tmp_path / "song.flac")
    chromium.click("#start")
    wait_for(lambda: "%" in card(chromium), "the beginning of its separation")
    first.stop(signal.SIGKILL)
    wait_for(lambda: chromium.run("return !document.querySelector('#lost').hidden"), "the page's notice", seconds=20)
    assert "does not respond" in chromium.run("return document.querySelector('#lost').textContent")
    assert faults(chromium) == []
    chromium.choose("#files", tmp_path / "song.flac")  # it waits for the server
    chromium.click("#start")
    second = Process(tmp_path / "work", port=int(first.host.split(":")[1]))
    try:
        wait_for(lambda: all("Done" in card(chromium, number) for number in (0, 1)), "both songs")
        assert chromium.run("return document.querySelector('#lost').hidden")
    finally:
        assert second.stop(signal.SIGINT) == (0, "")
        chromium.console()


@needs_chromium
@pytest.mark.slow
def test_a_part_is_chosen_on_the_waveform_and_then_the_rest_is_separated(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "song.flac").write_bytes(song(20, format="FLAC"))
    select(browser, "demo", format="wav")
    browser.choose("#files", tmp_path / "song.flac")
    wait_for(lambda: browser.run("return region.length") == 20, "the waveform")
    canvas = browser.find("canvas")
    steps = [
        {"type": "pointerMove", "duration": 0, "origin": canvas, "x": round(-0.4 * width(browser)), "y": 0},
        {"type": "pointerDown", "button": 0},
        {"type": "pointerMove", "duration": 50, "origin": canvas, "x": round(-0.1 * width(browser)), "y": 0},
        {"type": "pointerUp", "button": 0},
    ]
    browser.command("actions", actions=[{"type": "pointer", "id": "mouse", "actions": steps}])
    start, end = browser.run("return region.order")
    assert (start, end) == (pytest.approx(2, abs=0.2), pytest.approx(8, abs=0.2))
    assert browser.run("return document.querySelector('#from').value") == f"0:{start:04.1f}".removesuffix(".0")
    browser.run("document.querySelector('#start-slider').focus()")
    browser.press(RIGHT)
    assert browser.run("return region.order") == [pytest.approx(start + 0.1), end]
    browser.click("#play")
    wait_for(lambda: browser.run("return region.playing.context.currentTime > 0"), "the sound")
    assert browser.label("#play") == "Stop"
    browser.click("#play")
    assert browser.run("return region.playing === null")
    change_text(browser, "#to", "0:0x")
    assert "The end is not a time" in browser.run("return document.querySelector('#part-note').textContent")
    assert browser.run("return document.querySelector('#start').disabled")
    change_text(browser, "#from", "4")
    change_text(browser, "#to", "0:06.5")
    assert browser.run("return document.querySelector('#start').textContent") == "Separate 0:04 to 0:06.5"
    browser.click("#start")
    wait_for(lambda: "Done" in card(browser), "the part")
    assert "0:04 to 0:06.5" in card(browser)
    browser.click("a[href$='vocals.wav']")
    part = read(downloaded(tmp_path / "song 4s-6.5s - vocals.wav"))
    browser.click("[aria-label='Separate the whole song: song.flac']")
    wait_for(lambda: "Done" in card(browser), "the whole song")
    browser.click("a[href$='vocals.wav']")
    whole = read(downloaded(tmp_path / "song - vocals.wav"))
    np.testing.assert_array_equal(part, whole[4 * 44100 : round(6.5 * 44100)])


@needs_chromium
@pytest.mark.slow
def test_a_file_that_the_browser_cannot_decode_still_has_times(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "song.ape").write_bytes(b"not decodable" * 1000)
    browser.choose("#files", tmp_path / "song.ape")
    note = "return document.querySelector('#wave-note').textContent"
    wait_for(lambda: "cannot draw" in browser.run(note), "the notice")
    assert browser.run("return region.order") is None
    browser.click("[value=part]")
    assert browser.run("return region.order") == "preview"
    assert browser.run("return document.querySelector('#start').textContent") == "Separate the loudest half minute"
    change_text(browser, "#from", "1:20")
    assert browser.run("return region.order") == [80, None]
    change_text(browser, "#to", "1:10")
    assert "must come after" in browser.run("return document.querySelector('#part-note').textContent")
    browser.click("#loudest")
    assert browser.run("return region.order") == "preview"


@needs_chromium
@pytest.mark.slow
def test_every_control_has_a_label_and_can_be_reached_with_the_keyboard(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "song.wav").write_bytes(song(3))
    assert browser.label("#files") == "Drop songs here, or choose files"
    browser.choose("#files", tmp_path / "song.wav")
    wait_for(lambda: browser.run("return region.length !== null"), "the waveform")
    browser.click("[value=part]")
    browser.run("document.querySelector('[name=wanted][value=more]').click()")
    names = {
        "[name=extent]:checked": "A part first",
        "#start-slider": "Start",
        "#end-slider": "End",
        "#from": "From",
        "#to": "to",
        "#play": "Play",
        "#loudest": "The loudest half minute",
        "[name=wanted]:checked": "More",
        "#task": "Task",
        "#model": "Model",
        "#format": "Format",
        "#channels": "Channels",
        "#start": "Separate 0:00 to 0:03",
    }
    labels = {selector: browser.label(selector) for selector in names}
    assert re.fullmatch(r"More \d+ models for \d+ tasks", labels.pop("[name=wanted]:checked"))
    assert labels == {selector: name for selector, name in names.items() if selector in labels}
    browser.run("document.querySelector('#files').focus()")
    for selector in names:
        browser.press(TAB)
        assert focused(browser, selector), selector


@needs_chromium
@pytest.mark.slow
def test_the_page_says_what_is_known_about_a_choice(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "song.wav").write_bytes(song(1))
    browser.choose("#files", tmp_path / "song.wav")
    about = "return document.querySelector('#about').innerText"
    assert "vocals 10.87, instrumental 17.17 dB SDR (MVSEP Multisong, " in browser.run(about)
    assert "none stated" in browser.run(about)
    select(browser, "best")
    assert "Not for commercial use: the licence of MelBand-RoFormer Deux forbids it." in browser.run(about)
    select(browser, "demo")
    assert "downloaded, 9.1 MB" in browser.run(about)
    change(browser, "#task", "karaoke")
    assert "lead vocals" in browser.run(about)
    assert f"{KEEP_SECONDS // 3600} hours" in browser.run("return document.querySelector('#limits').textContent")
    browser.open(browser.run("return location.href"))
    assert browser.run("return document.querySelector('#task').value") == "karaoke"


@needs_chromium
@needs_ffmpeg
@pytest.mark.slow
@pytest.mark.parametrize("size", VIEWS)
def test_axe_finds_nothing_in_any_state(
    browser: Browser, short: bytes, tmp_path: Path, size: tuple[int, int, str]
) -> None:
    (tmp_path / "song.flac").write_bytes(song(15, format="FLAC"))
    (tmp_path / "cut.wav").write_bytes(song(2)[: 2**18])
    (tmp_path / "song.wav").write_bytes(short)
    clip = video(tmp_path / "clip.mp4", tmp_path / "song.wav")
    found: dict[str, list[str]] = {}
    with view(browser, *size):
        browser.run("location.reload()")
        found["empty"] = faults(browser)
        browser.choose("#files", tmp_path / "song.flac")
        wait_for(lambda: browser.run("return region.length !== null"), "the waveform")
        select(browser, "demo")
        browser.click("[value=part]")
        change_text(browser, "#to", "x")
        found["chosen"] = faults(browser)
        browser.click("#loudest")
        browser.click("#start")
        browser.choose("#files", clip)
        browser.click("[value=whole]")
        browser.click("#start")
        browser.choose("#files", tmp_path / "cut.wav")
        browser.click("#start")
        wait_for(lambda: "%" in card(browser, 2) and "ahead" in card(browser), "separating and waiting")
        found["waiting and separating"] = faults(browser)
        wait_for(lambda: "Done" in card(browser, 2) and "Use what is there" in card(browser), "done and failed")
        found["done and failed"] = faults(browser)
        browser.click("[aria-label='Listen to clip.mp4']")
        assert browser.run("return document.querySelector('#save-video').checkVisibility()")
        found["listening"] = faults(browser)
    assert not any(found.values()), found


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 768])
def test_the_page_fits_a_phone(browser: Browser, width: int, tmp_path: Path) -> None:
    browser.developer(
        "Emulation.setDeviceMetricsOverride", width=width, height=740, deviceScaleFactor=2, mobile=width < 768
    )
    try:
        browser.run("location.reload()")
        (tmp_path / f"{'a' * 120}.txt").write_text("words")
        select(browser, "demo")
        browser.choose("#files", tmp_path / f"{'a' * 120}.txt")
        browser.click("#start")
        wait_for(lambda: "is not audio" in card(browser), "the error")
        assert browser.run("return document.documentElement.scrollWidth") <= width
    finally:
        browser.developer("Emulation.clearDeviceMetricsOverride")
