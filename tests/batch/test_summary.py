"""The summary of a run has a row for every song, as CSV and on a page that can be sorted."""

import csv
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.axe import VIEWS, faults, view
from helpers.browser import Browser
from helpers.command_line import assert_refused, separate, separating, write_songs
from helpers.common import below, needs_chromium
from separation.analysis.facts import Loudness, SongAnalysis
from separation.batch import separate as one_song
from separation.batch.job import Outcome
from separation.batch.summary import COLUMNS, Summary, check, write
from separation.batch.urls import Url
from separation.errors import InputError, OutputError

ANALYSIS = SongAnalysis(127.96, "F# minor", {"mixture": Loudness(-14.2, 3.0, -0.5)})
FACTS = {"duration_seconds": 200.0, "elapsed_seconds": 50.0, "gain": 0.5}
SOURCE = {"bytes": 4, "sha256": "ab"}


def done(name: str, folder: Path = Path("out")) -> Outcome:
    stems = {stem: folder / name / f"{stem}.wav" for stem in ("vocals", "no_vocals")}
    page = folder / name / "stems.html"
    return Outcome(Path(name), "done", "", stems, FACTS, ANALYSIS, page, ["it clips", "it is mono"], SOURCE, tries=2)


OUTCOMES = [
    done("a, \"b\" & 'c'.wav"),
    replace(done("=1+1.wav"), status="skipped", analysis=None, page=None, warnings=[], tries=0),
    Outcome(Path("-x.wav"), "failed", "=cmd is not audio", tries=1),
    Outcome(Path("é\n<b>\udce9.wav"), "left"),
    replace(done("u.wav"), path=Url("s3", "music", "u.wav"), stems={"vocals": Url("s3", "out", "u/vocals.wav")}),
]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_the_csv_file_has_a_row_for_each_song_and_no_formula(tmp_path: Path) -> None:
    write(Summary(OUTCOMES, "demo"), tmp_path / "summary.csv", overwrite=False)
    content = (tmp_path / "summary.csv").read_bytes()
    assert content.startswith(b"\xef\xbb\xbfsong,status,") and content.count(b"\r\n") == 6
    first, skipped, failed, left, remote = rows(tmp_path / "summary.csv")
    assert list(first) == [*COLUMNS, "vocals_file", "no_vocals_file"]
    assert first["song"] == "a, \"b\" & 'c'.wav" and first["vocals_file"] == "out/a, \"b\" & 'c'.wav/vocals.wav"
    assert first == first | {
        "status": "done",
        "tries": "2",
        "error": "",
        "warnings": "it clips; it is mono",
        "duration_seconds": "200.0",
        "times_realtime": "4.0",
        "recipe": "demo",
        "gain": "0.5",
        "tempo_bpm": "128.0",
        "key": "F# minor",
        "integrated_lufs": "-14.2",
        "song_bytes": "4",
        "song_sha256": "ab",
    }
    assert (skipped["song"], skipped["tempo_bpm"], skipped["page"]) == ("./=1+1.wav", "", "")
    assert (failed["song"], failed["error"], failed["gain"]) == ("./-x.wav", "'=cmd is not audio", "")
    assert (left["song"], left["status"]) == ("é\n<b>\\udce9.wav", "left")
    assert (remote["song"], remote["vocals_file"]) == ("s3://music/u.wav", "s3://out/u/vocals.wav")


def test_the_song_from_stdin_keeps_its_name(tmp_path: Path) -> None:
    write(Summary([Outcome(Path("-"), "done")]), tmp_path / "summary.csv", overwrite=False)
    assert rows(tmp_path / "summary.csv")[0]["song"] == "-"


def test_the_page_names_what_failed_first_and_links_relative_to_itself(tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    outcomes = [replace(done("a #1?.wav", tmp_path / "out"), path=Path("javascript:x.wav")), *OUTCOMES]
    write(Summary(outcomes, "<i>", 100.0), folder / "summary.html", overwrite=False)
    text = (folder / "summary.html").read_text(encoding="utf-8")
    order = [text.index(f'<b class="{status}">') for status in ("failed", "left", "done", "skipped")]
    assert order == sorted(order)
    assert 'href="../out/a%20%231%3F.wav/vocals.wav"' in text and "é\\n&lt;b&gt;\\udce9.wav" in text
    assert "<dt>Done</dt><dd>3</dd>" in text and "<dt>Music</dt><dd>10:00</dd>" in text
    assert "6.0 × real-time" in text and "&lt;i&gt;" in text and "<i>" not in text
    assert ">F♯ minor<" in text
    assert 'href="s3:' not in text and "<span>vocals</span>" in text


def test_an_empty_run_and_one_without_analysis_have_pages(tmp_path: Path) -> None:
    for number, outcomes in enumerate(([], [Outcome(Path("x.wav"), "failed", "no")])):
        write(Summary(outcomes), tmp_path / f"{number}.html", overwrite=False)
        text = (tmp_path / f"{number}.html").read_text(encoding="utf-8")
        assert "Tempo" not in text and "real-time" not in text


def test_only_own_files_are_replaced(tmp_path: Path) -> None:
    own, other = tmp_path / "own.csv", tmp_path / "other.html"
    other.write_text("mine")
    for _ in range(2):
        write(Summary(OUTCOMES), own, overwrite=False)
        check([own], overwrite=False)
    own.write_text("edited")
    for path in (own, other):
        before = path.read_text()
        with pytest.raises(OutputError, match="is not a file that this program wrote"):
            check([path], overwrite=False)
        with pytest.raises(OutputError, match="is not a file that this program wrote"):
            write(Summary(OUTCOMES), path, overwrite=False)
        assert path.read_text() == before
    check([own, other], overwrite=True)
    write(Summary(OUTCOMES), other, overwrite=True)
    assert other.read_text(encoding="utf-8").startswith("<!doctype html>")
    for paths, words in (
        ([tmp_path / "x.txt"], "is neither .csv nor .html"),
        ([tmp_path / "x.csv", tmp_path / "x.csv"], "is given twice"),
    ):
        with pytest.raises(InputError, match=words):
            check(paths, overwrite=False)
    assert not (tmp_path / "new").exists()
    check([tmp_path / "new" / "x.csv"], overwrite=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_command_writes_both_kinds_also_when_it_is_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_songs(tmp_path / "music", "1.wav", "2.wav")
    (tmp_path / "music" / "bad.mp3").write_text("words")
    table, page = tmp_path / "out" / "all.csv", tmp_path / "out" / "all.html"
    command: tuple[Any, ...] = (tmp_path / "music", "-o", tmp_path / "out", "--summary", table, "--summary", page)
    separated = one_song.Separator.separate_file

    def interrupted(self: Any, path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "2.wav":
            raise KeyboardInterrupt
        return separated(self, path, *arguments, **options)

    monkeypatch.setattr(one_song.Separator, "separate_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        separate(*command)
    assert {Path(row["song"]).name: row["status"] for row in rows(table)} == {
        "1.wav": "done",
        "2.wav": "left",
        "bad.mp3": "left",
    }
    monkeypatch.undo()
    assert separate(*command) == 2
    found = {Path(row["song"]).name: row for row in rows(table)}
    assert {name: (row["status"], row["tries"]) for name, row in found.items()} == {
        "1.wav": ("skipped", "0"),
        "2.wav": ("done", "1"),
        "bad.mp3": ("failed", "1"),
    }
    assert found["1.wav"]["song_sha256"] and Path(found["2.wav"]["vocals_file"]).exists()
    assert 'href="1/vocals.wav"' in page.read_text(encoding="utf-8")


def test_a_file_in_the_way_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_songs(tmp_path, "1.wav")
    (tmp_path / "mine.csv").write_text("mine")
    code = separate(tmp_path / "1.wav", "-o", tmp_path / "out", "--summary", tmp_path / "mine.csv")
    assert_refused(code, capsys, tmp_path / "out", "mine.csv", "is not a file that this program wrote")


@pytest.mark.slow
def test_a_signal_leaves_a_summary_of_what_was_done(tmp_path: Path) -> None:
    write_songs(tmp_path / "music", "1.wav", "2.wav", seconds=20)
    with separating(tmp_path / "music", "-o", tmp_path / "out", "--json", "--summary", tmp_path / "s.csv") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["status"] == "done"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert [row["status"] for row in rows(tmp_path / "s.csv")] == ["done", "left"] and not below(
        tmp_path, ".separating-*"
    )


@needs_chromium
@pytest.mark.slow
def test_the_page_is_sorted_by_keyboard_and_axe_finds_nothing(tmp_path: Path) -> None:
    long = [done(f"{'long name ' * 9}{number}.wav") for number in range(3)]
    write(Summary([*OUTCOMES, *long], "demo", 60.0), tmp_path / "summary.html", overwrite=False)
    (tmp_path / "profile").mkdir()
    with Browser(tmp_path / "profile") as browser:
        for width, height, scheme in VIEWS:
            with view(browser, width, height, scheme):
                browser.open(tmp_path / "summary.html")
                assert faults(browser) == []
                assert browser.run("return document.documentElement.scrollWidth") <= width
        status = "return [...document.querySelectorAll('tbody b')].map(cell => cell.textContent)"
        assert browser.run(status) == ["failed", "left", "done", "done", "done", "done", "done", "skipped"]
        for key, expected in (("\ue007", "ascending"), (" ", "descending")):  # Enter, Space
            browser.run("document.querySelectorAll('thead button')[2].focus()")
            browser.press(key)
            heads = "return document.querySelectorAll('thead th')[2].getAttribute('aria-sort')"
            assert browser.run(heads) == expected
            cells = "return [...document.querySelectorAll('tbody td:nth-child(3)')].map(cell => +cell.textContent)"
            tries = browser.run(cells)
            assert tries == sorted(tries, reverse=expected == "descending")
        browser.run("document.querySelectorAll('thead button')[5].click()")
        speeds = browser.run("return [...document.querySelectorAll('tbody tr')].map(row => row.cells[5].textContent)")
        assert speeds[-2:] == ["", ""] and all(speeds[:-2])
