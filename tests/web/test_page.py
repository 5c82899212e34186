"""The local page in a browser: what a user does with it and sees."""

import base64
import io
import signal
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from helpers.axe import VIEWS, faults, view
from helpers.browser import Browser
from helpers.common import SONG, STEMS, needs_chromium, read, song
from helpers.page_server import MAX_MIB, Process, song_queue
from helpers.served_process import wait_for
from separation import Separator
from separation.audio.options import OutputOptions
from separation.engine.options import EngineOptions
from separation.web.queue import KEEP_SECONDS
from separation.web.serve import Server


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
    asked = {url for url in chromium.requests() if not url.startswith(("data:", "chrome:"))}
    assert all(url.startswith(server.url) for url in asked), asked


def select(browser: Browser, **choice: str) -> None:
    for name, value in choice.items():
        script = """const select = document.getElementById(arguments[0]); select.value = arguments[1];
            select.dispatchEvent(new Event("change", { bubbles: true })); return select.value"""
        assert browser.run(script, name, value) == value


def card(browser: Browser, number: int = 0) -> str:
    """The text of a song's card; number 0 is the newest."""
    return str(browser.run("return document.querySelectorAll('li')[arguments[0]]?.innerText ?? ''", number))


def downloaded(path: Path) -> bytes:
    wait_for(path.exists, f"the download of {path.name}", seconds=20)
    return path.read_bytes()


@needs_chromium
@pytest.mark.slow
def test_a_song_can_be_chosen_separated_heard_and_downloaded(browser: Browser, server: Process, tmp_path: Path) -> None:
    select(browser, recipe="demo", stems="all_6", format="flac")
    assert browser.run("return document.querySelector('#start').disabled")
    browser.choose("input", SONG)
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
    browser.click("[aria-label='Download drums: song.flac']")
    np.testing.assert_array_equal(read(downloaded(tmp_path / "song - drums.flac")), read(files["drums"]))
    browser.click("[aria-label='Download all as zip: song.flac']")
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
    wait_for(lambda: not list(server.temporary.glob("separation-*/*/stems/guitar.flac")), "its removal")


@needs_chromium
@pytest.mark.slow
def test_dropped_songs_queue_up_and_can_be_cancelled(browser: Browser, short: bytes) -> None:
    select(browser, recipe="demo", format="mp3")
    script = """const transfer = new DataTransfer();
        for (const [name, text] of arguments[0]) {
            transfer.items.add(new File([Uint8Array.from(atob(text), c => c.charCodeAt(0))], name));
        }
        document.querySelector("h1").dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}))"""

    long, brief = (base64.b64encode(content).decode() for content in (song(15, format="FLAC"), short))
    browser.run(script, [["<b>1</b>.flac", long], ["2.wav", brief]])
    assert browser.run("return document.querySelector('#chosen').textContent").startswith("2 files")
    browser.press("\ue007")  # Enter: the drop has focused the button
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
    select(browser, recipe="demo")
    full = """const asked = fetch, full = () => Promise.resolve(new Response("20 songs are waiting", {status: 503}));
        globalThis.refused = 0;
        globalThis.fetch = (path, how) => how.method === "POST" && ++refused < 3 ? full() : asked(path, how)"""
    browser.run(full)
    (tmp_path / "song.flac").write_bytes(short)
    browser.choose("input", tmp_path / "song.flac")
    browser.click("#start")
    wait_for(lambda: browser.run("return refused") == 1, "the refusal")
    assert "Waiting to upload" in card(browser)
    wait_for(lambda: "Done" in card(browser), "the end of the song")
    assert browser.run("return refused") == 3


@needs_chromium
@pytest.mark.slow
def test_a_wrong_file_and_an_oversized_file_show_their_errors(browser: Browser, tmp_path: Path) -> None:
    select(browser, recipe="demo")
    (tmp_path / "words.txt").write_text("words, not sound\n" * 50)
    (tmp_path / "big.wav").write_bytes(bytes(MAX_MIB * 2**20 + 1))
    browser.choose("input", tmp_path / "words.txt")
    browser.click("#start")
    wait_for(lambda: "'words.txt' is not audio" in card(browser), "the error")
    browser.choose("input", tmp_path / "big.wav")
    browser.click("#start")
    wait_for(lambda: "'big.wav' has more than 3 MiB" in card(browser), "the other message")
    assert "Failed to load resource" in browser.console()[0]  # Chromium logs the refusal


@needs_chromium
@pytest.mark.slow
def test_the_page_reports_a_stopped_server_and_notices_its_return(chromium: Browser, tmp_path: Path) -> None:
    (tmp_path / "song.flac").write_bytes(song(15, format="FLAC"))
    (tmp_path / "work").mkdir()
    server = Process(tmp_path / "work")
    chromium.open(server.url)
    select(chromium, recipe="demo")
    chromium.choose("input", tmp_path / "song.flac")
    chromium.click("#start")
    wait_for(lambda: "%" in card(chromium), "the beginning of its separation")
    assert server.stop(signal.SIGINT) == (0, "")
    wait_for(lambda: chromium.run("return !document.querySelector('#lost').hidden"), "the page's notice", seconds=20)
    assert "does not respond" in chromium.run("return document.querySelector('#lost').textContent")
    with Server("127.0.0.1", int(server.host.split(":")[1]), song_queue(tmp_path / "work")) as again:
        threading.Thread(target=again.serve_forever, args=(0.02,)).start()
        try:
            wait_for(lambda: "no longer on the server" in card(chromium), "the notice that it is gone", seconds=20)
            assert chromium.run("return document.querySelector('#lost').hidden")
        finally:
            again.shutdown()
    chromium.console()


@needs_chromium
@pytest.mark.slow
def test_every_control_has_a_label_and_the_hint_names_the_download(browser: Browser) -> None:
    names = [browser.label(selector) for selector in ("input", "#stems", "#recipe", "#format", "#start")]
    assert names == ["Drop songs here, or choose files", "Stems", "Recipe", "Format", "Separate"]
    select(browser, recipe="standard", stems="all_4")
    hint = "return document.querySelector('#hint').textContent"
    assert "of weights" in browser.run(hint) or all(
        browser.run(f"return options.recipes.standard.{choice}.download") == 0 for choice in STEMS
    )
    select(browser, recipe="demo")
    assert browser.run(hint) == "demo: fast but rough, for trying out the program."
    assert f"{KEEP_SECONDS // 60} minutes" in browser.run("return document.querySelector('#limits').textContent")
    for selector in ("input", "#stems", "#recipe", "#format"):
        browser.press("\ue004")
        assert browser.run("return document.activeElement === document.querySelector(arguments[0])", selector)


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width, height, scheme", VIEWS)
def test_axe_finds_nothing_on_the_empty_page(browser: Browser, width: int, height: int, scheme: str) -> None:
    with view(browser, width, height, scheme):
        assert faults(browser) == []


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
        select(browser, recipe="demo")
        browser.choose("input", tmp_path / f"{'a' * 120}.txt")
        browser.click("#start")
        wait_for(lambda: "is not audio" in card(browser), "the error")
        assert browser.run("return document.documentElement.scrollWidth") <= width
    finally:
        browser.developer("Emulation.clearDeviceMetricsOverride")
