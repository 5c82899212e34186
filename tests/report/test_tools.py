"""The listening page's tools in a browser: loops, tempo and pitch, and saved mixes."""

import base64
import io
import math
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from helpers.axe import VIEWS, faults, view
from helpers.browser import Browser
from helpers.common import needs_chromium
from helpers.served_process import wait_for
from separation.analysis.facts import SongAnalysis
from separation.report.page import Report, write_report
from separation.web.responses import HEADERS

pytestmark = [needs_chromium, pytest.mark.slow]

RATE = 44100
SECONDS = 12  # two segments
HERTZ = 441  # whole periods in each tenth of a second
LEAD = RATE // 100
STEMS = ("vocals", "drums", "bass")

KEPT = "return player.scheduled.filter(piece => piece.at === 1).length > 2"  # the first of a pass, thrice

Samples = NDArray[np.float64]


def tone(hertz: float, seconds: float, level: float = 0.25) -> Samples:
    return level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vocals are a sine. Drums and bass are noise and its negative, which cancel out if they play in sync."""
    folder = tmp_path_factory.mktemp("song")
    noise = 0.1 * np.random.default_rng(0).standard_normal(SECONDS * RATE)
    sounds = dict(zip(("mixture", *STEMS), (sine := tone(HERTZ, SECONDS), sine, noise, -noise), strict=True))
    for name, samples in sounds.items():
        soundfile.write(folder / f"{name}.wav", np.stack([samples, samples], axis=1), RATE, subtype="FLOAT")
    files = {name: folder / f"{name}.wav" for name in STEMS}
    analysis = SongAnalysis(128.04, "E major", {})
    write_report(Report("A song", folder / "mixture.wav", files, analysis=analysis), folder / "stems.html")
    return folder / "stems.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser, page: Path, tmp_path: Path) -> Iterator[Browser]:
    """The page, just opened; downloads go to `tmp_path`. At the end, its console must be empty."""
    chromium.console(), chromium.requests()
    chromium.developer("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    chromium.open(page)
    yield chromium
    assert chromium.console() == []
    asked = {url for url in chromium.requests() if not url.startswith(("data:", "chrome:", "blob:"))}
    assert asked == {page.resolve().as_uri()}


def stretched(browser: Browser, tracks: list[Samples], *, tempo: float = 1, semitones: float = 0) -> list[Samples]:
    """What the page makes of these tracks at a tempo and a pitch."""
    script = """const [texts, tempo, semitones] = arguments;
        const inputs = texts.map(text => new Float32Array(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer));
        const other = Object.assign(new StretchedSound(), { tempo, semitones });
        other.read = async (tracks, from, to) => tracks.flatMap(track => [1, 1].map(() =>
            Float32Array.from({ length: to - from }, (_, i) => inputs[track][from + i] ?? 0)));
        return (async () => {
            const outputs = inputs.map(() => []);
            for await (const { channels } of other.pieces([...inputs.keys()], 0, inputs[0].length, 0)) {
                outputs.forEach((parts, track) => parts.push(channels[2 * track]));
            }
            other.end();
            return outputs.map(parts => {
                const bytes = new Uint8Array(parts.reduce(joined).buffer);
                let text = "";
                for (let i = 0; i < bytes.length; i += 9999) {
                    text += String.fromCharCode(...bytes.subarray(i, i + 9999));
                }
                return btoa(text);
            });
        })()"""
    texts = [base64.b64encode(samples.astype(np.float32).tobytes()).decode() for samples in tracks]
    answers = browser.run(script, texts, tempo, semitones)
    return [np.frombuffer(base64.b64decode(text), np.float32).astype(float) for text in answers]


def part_at(samples: Samples, hertz: float) -> complex:
    """The part of the samples at a frequency: its amplitude and phase."""
    window = np.hanning(len(samples))
    turned = samples * np.exp(-2j * np.pi * hertz / RATE * np.arange(len(samples)))
    return complex(2 * (window * turned).sum() / window.sum())


@pytest.mark.parametrize(
    "tempo, semitones", [(0.5, 0), (1.5, 0), (1, 12), (1, -12), (0.8, 0.37), (1.5, -12), (0.5, 12)]
)
@pytest.mark.parametrize("hertz", [110, 1000])
def test_a_tone_has_the_chosen_pitch_and_length_its_level_and_no_click(
    hertz: float, tempo: float, semitones: float, browser: Browser
) -> None:
    (samples,) = stretched(browser, [tone(hertz, 3)], tempo=tempo, semitones=semitones)
    assert len(samples) == round(3 * RATE / tempo)
    expected = hertz * 2 ** (semitones / 12)
    middle = samples[RATE // 4 : -RATE // 4]
    half = len(middle) // 2
    parts = part_at(middle[:half], expected), part_at(middle[half : 2 * half], expected)
    drift = np.angle(parts[1] / parts[0] * np.exp(-2j * np.pi * expected / RATE * half))  # in half the time
    cents = 1200 * math.log2(1 + drift / half * RATE / (2 * np.pi) / expected)
    assert cents == pytest.approx(0, abs=0.2)
    assert [20 * math.log10(abs(part) / 0.25) for part in parts] == pytest.approx([0, 0], abs=0.05)
    bend = 0.25 * (2 * np.pi * expected / RATE) ** 2  # of the sine; a click is a sharper one
    assert np.abs(np.diff(middle, 2)).max() == pytest.approx(bend, rel=0.05, abs=1e-4)


@pytest.mark.parametrize("tempo, semitones", [(0.5, 0), (0.75, 0), (1.25, 0), (1, 5), (1, -5)])
def test_attacks_stay_in_time_and_sharp(tempo: float, semitones: float, browser: Browser) -> None:
    random, times = np.random.default_rng(0), np.arange(0.5, 3.5, 0.25)
    tracks = np.zeros((2, 4 * RATE))
    for track in tracks:  # two drums
        drum = 0.5 * random.standard_normal(4000) * np.exp(-np.arange(4000) / 600)
        for time in times:
            track[round(time * RATE) :][:4000] += drum
    outputs = stretched(browser, list(tracks), tempo=tempo, semitones=semitones)
    reach = round(0.1 / tempo * RATE)
    for time in times:
        at = round(time / tempo * RATE)
        energies = [np.cumsum(samples[at - reach : at + reach] ** 2) for samples in outputs]
        begins = [np.searchsorted(energy, 0.1 * energy[-1]) - reach for energy in energies]
        assert all(abs(each) < 0.008 * RATE for each in begins) and abs(begins[0] - begins[1]) < 0.005 * RATE
        for energy in energies:
            assert energy[reach - RATE // 200] < 0.05 * energy[-1]  # what sounds 5 ms before it, and earlier


def test_tracks_stay_aligned(browser: Browser) -> None:
    noise = np.random.default_rng(0).standard_normal(2 * RATE) * 0.1
    first, second, lone = stretched(browser, [noise, -noise, noise], tempo=0.8, semitones=3)
    assert np.abs(first).max() > 0.1 and np.abs(first + second).max() < 1e-6 and np.abs(first - lone).max() == 0


def test_silence_stays_silent_and_a_song_of_one_sample_plays(browser: Browser) -> None:
    assert not stretched(browser, [np.zeros(RATE)], tempo=0.7, semitones=-3)[0].any()
    assert len(stretched(browser, [np.ones(1)], tempo=0.7)[0]) == 1


def test_the_sound_is_untouched_until_tempo_or_pitch_change(browser: Browser) -> None:
    script = """return (async () => {
        const decoded = await sound.decoded(0, 0, 12), lead = song.lead * song.rate, outputs = [];
        for await (const { channels } of sound.pieces([0], 0, 9 * song.rate, 0)) outputs.push(channels[0]);
        const whole = outputs.reduce(joined), expected = decoded.getChannelData(0).subarray(lead, lead + 9 * song.rate);
        return [whole.length, whole.every((sample, i) => sample === expected[i]), sound.worker === null];
    })()"""
    assert browser.run(script) == [9 * RATE, True, True]


# --- what a user does


def position(browser: Browser) -> float:
    return float(browser.run("return player.position"))


def loop(browser: Browser) -> list[float] | None:
    found = browser.run("return loopSeconds()")
    return None if found is None else [round(seconds, 3) for seconds in found]


def enter(browser: Browser, selector: str, value: str) -> None:
    """Type into a field and leave it."""
    element = browser.find(selector)
    browser.run("arguments[0].focus(); arguments[0].select()", element)
    for character in value:
        browser.press(character)
    browser.press("\ue007")
    browser.run("arguments[0].blur()", element)


def drag(browser: Browser, selector: str, start: float, end: float, pointer: str = "mouse") -> None:
    """Drag over an element from one share of its width to another."""
    element = browser.find(selector)
    box = browser.run(
        "arguments[0].scrollIntoView({block: 'center'}); return arguments[0].getBoundingClientRect()", element
    )
    places = [{"x": round((share - 0.5) * box["width"]), "y": 10} for share in (start, (start + end) / 2, end)]
    moves = [{"type": "pointerMove", "duration": 20, "origin": element, **place} for place in places]
    steps = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
    action = {"type": "pointer", "id": pointer, "parameters": {"pointerType": pointer}, "actions": steps}
    browser.command("actions", actions=[action])


def recorded(browser: Browser, name: str, until: str) -> Samples:
    """Wait for a condition. Returns the last 0.74 s of a track's sound."""
    script = f"""const recorder = player.tracks.find(track => track.name === arguments[0]).analyser;
        const samples = new Float32Array(recorder.fftSize = 32768);
        return new Promise(resolve => {{
            const timer = setInterval(() => {{
                if (!({until})) return;
                clearInterval(timer);
                recorder.getFloatTimeDomainData(samples);
                resolve([...samples]);
            }}, 5);
        }})"""
    return np.array(browser.run(script, name))


def saved(browser: Browser, folder: Path) -> Samples:
    """Save a mix and read it: `[T, 2]`."""
    browser.click("#save")
    path = folder / "A song mix.wav"
    wait_for(path.exists, "the mix", seconds=60)
    samples, rate = soundfile.read(path)
    assert rate == RATE and soundfile.info(path).subtype == "PCM_16"
    return np.asarray(samples)


def test_screen_readers_hear_what_keys_do(browser: Browser) -> None:
    said = []
    for key in ("2", "2", "0", "a", "x"):
        browser.press(key)
        said.append(browser.run("return document.querySelector('#now[role=status]').textContent"))
    assert said == ["drums muted", "drums not muted", "mixture solo", "Loop from 0:00.0 to 0:12.0", "No loop"]


def test_keys_set_and_clear_the_loop(browser: Browser) -> None:
    browser.run("player.seek(2)")
    browser.press("a")
    assert loop(browser) == [2, SECONDS]
    browser.run("player.seek(5)")
    browser.press("b")
    assert loop(browser) == [2, 5]
    assert position(browser) == 2  # from the end, it goes on at the start
    assert [browser.run(f"return document.getElementById('{id}').value") for id in ("from", "to")] == [
        "0:02.0",
        "0:05.0",
    ]
    browser.press("x")
    assert loop(browser) is None
    browser.run("player.seek(3)")
    browser.press("b")
    assert loop(browser) == [0, 3]


def test_the_loops_ends_are_typed(browser: Browser) -> None:
    enter(browser, "#from", "0:03.5")
    assert loop(browser) == [3.5, SECONDS]
    enter(browser, "#to", "4,25")
    assert loop(browser) == [3.5, 4.25]
    enter(browser, "#to", "x")
    assert loop(browser) == [3.5, 4.25]
    assert browser.run("return document.getElementById('to').value") == "0:04.2"
    enter(browser, "#from", "9:00")  # later than the end: the ends change places
    assert loop(browser) == [4.25, SECONDS]
    browser.click("#clear")
    assert loop(browser) is None and browser.run("return document.getElementById('clear').disabled")


@pytest.mark.parametrize("pointer", ["mouse", "touch"])
def test_dragging_on_a_lane_draws_a_loop_that_all_lanes_show(browser: Browser, pointer: str) -> None:
    drag(browser, ".track:nth-of-type(2) .lane", 0.75, 0.25, pointer)
    start, end = loop(browser) or [0, 0]
    assert start == pytest.approx(0.25 * SECONDS, abs=0.1) and end == pytest.approx(0.75 * SECONDS, abs=0.1)
    assert position(browser) == pytest.approx(start, abs=1e-3)
    script = """return [...document.querySelectorAll(".lane")].map(lane => {
        const style = getComputedStyle(lane, "::before");
        return [parseFloat(style.left) / lane.clientWidth, parseFloat(style.right) / lane.clientWidth];
    })"""
    assert browser.run(script) == [pytest.approx([start / SECONDS, 1 - end / SECONDS], abs=0.01)] * 4
    drag(browser, ".track:nth-of-type(1) .lane", 0.75, 0.5, pointer)  # moves the end
    assert loop(browser) == pytest.approx([start, 0.5 * SECONDS], abs=0.1)
    browser.click(".track:nth-of-type(1) .lane", at=0.9)  # goes there; the loop stays
    assert position(browser) == pytest.approx(0.9 * SECONDS, abs=0.1) and loop(browser) is not None


@pytest.mark.parametrize("tempo", [1, 0.8])
def test_a_loop_has_no_gap_and_no_click(browser: Browser, tempo: float) -> None:
    browser.run("sound.tempo = arguments[0]; setLoop(1, 2)", tempo)
    browser.click("#play")
    wait_for(lambda: browser.run(KEPT), "the loop's pieces", seconds=20)  # on a busy machine, the first have gaps
    browser.run("return new Promise(done => setTimeout(done, 3000))")
    for _ in range(2):
        samples = recorded(browser, "vocals", "1.2 < player.position && player.position < 1.4")
        browser.run("return new Promise(done => setTimeout(done, 500))")  # until the next pass
        # The sine's top is in each 6 ms. At 80 %, the cross-fade meets it a quarter of a period off.
        assert np.abs(samples).reshape(-1, 256).max(axis=1).min() > (0.23 if tempo == 1 else 0.17)
        assert np.abs(np.diff(samples, 2)).max() < 0.002  # the sine's: 0.001
        assert 1 <= position(browser) <= 2


def test_a_position_after_the_loop_plays_to_the_end_and_one_before_plays_into_it(browser: Browser) -> None:
    browser.run("setLoop(1, 1.5); player.seek(11.7)")
    browser.click("#play")
    wait_for(lambda: browser.run("return !player.playing"), "the end", seconds=20)
    assert position(browser) == SECONDS
    browser.run("player.seek(0.6); player.play()")
    assert position(browser) < 1
    wait_for(lambda: position(browser) > 1.2, "the loop", seconds=20)
    for _ in range(10):
        browser.run("return new Promise(done => setTimeout(done, 100))")
        assert 1 <= position(browser) <= 1.5


def test_tempo_and_pitch_change_what_plays_and_what_is_shown(browser: Browser) -> None:
    about = "return document.getElementById('about').textContent"
    assert browser.run(about) == "0:12 · 3 stems · 128.0 BPM · E major"
    enter(browser, "[aria-label='Tempo in percent']", "80")
    enter(browser, "[aria-label='Pitch in semitones']", "2")
    assert browser.run(about) == "0:12 · 3 stems · 128.0 → 102.4 BPM · E major → F♯ major"
    assert browser.run("return [tempo, pitch].map(each => each.ariaValueText)") == ["80 percent", "+2 semitones"]
    browser.click("#play")
    samples = recorded(browser, "vocals", "player.position > 1")
    assert abs(part_at(samples, HERTZ * 2 ** (2 / 12))) == pytest.approx(0.25, abs=0.005)
    times = "return [player.context.currentTime, player.position]"
    first = browser.run(times)
    browser.run("return new Promise(done => setTimeout(done, 1000))")
    second = browser.run(times)
    assert (second[1] - first[1]) / (second[0] - first[0]) == pytest.approx(0.8, abs=0.01)
    enter(browser, "[aria-label='Pitch in semitones']", "-0.3")
    assert browser.run(about).endswith("E major −30 cents")
    enter(browser, "[aria-label='Tempo in percent']", "1000")
    assert browser.run("return sound.tempo") == 1.5
    browser.run("tempo.ondblclick(); pitch.ondblclick()")
    assert browser.run(about) == "0:12 · 3 stems · 128.0 BPM · E major"


@pytest.mark.parametrize(
    "key, shown",
    [
        ("Bb minor", ["B♭ minor", "B♭ minor → B minor", "B♭ minor → G♯ minor", "B♭ minor"]),
        ("Bb major", ["B♭ major", "B♭ major → B major", "B♭ major → A♭ major", "B♭ major"]),
        ("G# minor", ["G♯ minor", "G♯ minor → A minor", "G♯ minor → F♯ minor", "G♯ minor"]),
        ("A# major", ["A♯ major", "A♯ major → B major", "A♯ major → A♭ major", "A♯ major"]),  # in older records
    ],
)
def test_keys_are_spelt_as_musicians_spell_them(browser: Browser, key: str, shown: list[str]) -> None:
    browser.run(f"globalThis.before = song.key; song.key = {key!r}")
    try:
        assert browser.run("return [0, 1, -2, 12].map(transposed)") == shown
    finally:
        browser.run("song.key = before")


def test_tracks_play_in_sync_at_another_tempo_and_pitch(browser: Browser) -> None:
    browser.run("change({ tempo: 1.2, semitones: -4 })")
    browser.click("[aria-label='Mute vocals']")
    script = """player.connect();
        player.output.connect(player.tracks[0].analyser = player.context.createAnalyser())"""  # in the mixture's place
    browser.run(script)
    browser.click("#play")
    assert np.abs(recorded(browser, "mixture", "player.position > 1.5")).max() < 1e-3
    assert np.abs(recorded(browser, "bass", "player.position > 1.5")).max() > 0.2


def test_a_saved_mix_is_the_sum_at_the_chosen_levels(browser: Browser, tmp_path: Path, page: Path) -> None:
    browser.run("player.set(player.tracks[2], { muted: true }); player.set(player.tracks[1], { volume: 0.5 })")
    samples = saved(browser, tmp_path)
    assert len(samples) == SECONDS * RATE
    pieces = dict(
        re.findall(r'<script type="text/plain" id="sound-(\d-\d)">([^<]*)<', page.read_text(encoding="utf-8"))
    )
    decoded = {name: soundfile.read(io.BytesIO(base64.b64decode(text)))[0] for name, text in pieces.items()}
    expected = (0.25 * decoded["1-0"] + decoded["3-0"])[RATE // 10 :][: 10 * RATE]
    assert np.abs(samples[: 10 * RATE] - expected).max() < 1e-3  # rounding, and two MP3 decoders


def test_a_saved_mix_is_of_the_loop_at_the_chosen_tempo_and_pitch(browser: Browser, tmp_path: Path) -> None:
    browser.run("setLoop(9, 11); change({ tempo: 0.8, semitones: 12 }); player.set(player.tracks[1], { solo: true })")
    samples = saved(browser, tmp_path)
    assert len(samples) == 2.5 * RATE
    assert abs(part_at(samples[:, 0], 2 * HERTZ)) == pytest.approx(0.25, abs=0.002)
    assert np.abs(np.diff(samples[:, 0], 2)).max() < 0.0045  # the sine's: 0.0039


def test_a_mix_beyond_full_scale_is_saved_quieter_instead_of_clipped(browser: Browser, tmp_path: Path) -> None:
    browser.run("setLoop(1, 2); player.tracks[1].volume = 3; player.set(player.tracks[1], { solo: true })")  # 2.25
    samples = saved(browser, tmp_path)
    assert np.abs(samples).max() == pytest.approx(1, abs=1e-3)
    assert abs(part_at(samples[:, 0], HERTZ)) == pytest.approx(1, abs=0.05)  # clipped, it would be 1.2


def test_saving_can_be_cancelled_and_needs_an_audible_track(browser: Browser, tmp_path: Path) -> None:
    start = (
        "change({ tempo: 0.5 }); const save = document.getElementById('save'); save.click(); return save.textContent"
    )
    assert browser.run(start) == "Cancel (0 %)"
    assert browser.run("document.getElementById('save').click(); return mixdown.isCancelled")
    wait_for(lambda: browser.run("return mixdown === null"), "the end of the mix", seconds=20)
    browser.run("for (const track of player.tracks) player.set(track, { muted: true })")
    browser.click("#save")
    assert "unmute" in browser.run("return document.getElementById('status').textContent")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("width, height, scheme", VIEWS)
def test_axe_finds_nothing(browser: Browser, page: Path, width: int, height: int, scheme: str) -> None:
    with view(browser, width, height, scheme):
        browser.open(page)
        assert faults(browser) == []
        browser.run(
            "setLoop(3, 6); change({ tempo: 0.8, semitones: 2 }); player.set(player.tracks[2], { muted: true })"
        )
        assert faults(browser) == []
        assert browser.run("return document.documentElement.scrollWidth") <= width


def test_tempo_changes_under_the_local_servers_policy_too(chromium: Browser, page: Path) -> None:
    class Handler(SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            for name, value in HEADERS.items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(page.parent))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            chromium.console()
            chromium.open(f"http://127.0.0.1:{server.server_address[1]}/stems.html")
            assert np.abs(stretched(chromium, [tone(HERTZ, 1)], tempo=0.8)[0]).max() == pytest.approx(0.25, abs=0.01)
            assert chromium.console() == []
        finally:
            server.shutdown()
