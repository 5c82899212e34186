"""`tune` through the command line: what it prints, the page that it writes, and what it refuses."""

import json
from pathlib import Path

import pytest

from helpers.candidate_models import put_candidate
from helpers.command_line import assert_refused, files_in
from helpers.common import SONG, quick_first
from separation.cli.main import main
from separation.system.record import RECORD

OPTIONS = ["--device", "cpu", "--precision", "fp32", "--seconds", "1"]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models of a user's own; the demo model is here too."""
    monkeypatch.setenv("SEPARATION_MODELS", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    put_candidate(tmp_path / "models", "one", residual="rest")
    put_candidate(tmp_path / "models", "two", seed=1, residual="rest")
    return tmp_path / "models"


def tune(*arguments: str | Path) -> int:
    return main(["tune", str(SONG), *OPTIONS, *map(str, arguments)])


@pytest.mark.slow
def test_the_downloaded_models_are_compared(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune("--stem", "vocals", "--recipe", "demo", "--json") == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    candidates = {each["name"]: each for each in found["candidates"]}
    assert list(candidates) == ["demo", "one", "two", "recipe demo"]
    assert candidates["demo"]["pairs_db"]["recipe demo"] == "inf"
    assert candidates["demo"]["agreement_db"] == candidates["recipe demo"]["agreement_db"]
    assert all(each["seconds"] > 0 and each["song_seconds"] > 0 for each in candidates.values())
    assert found["audio_seconds"] == 1 and found["stem"] == "vocals" and not found["failed"]
    assert "mel_band_roformer_kim" in [model for each in found["missing"] for model in each["models"]]
    assert found["page"] == str(Path("tune", "song", "vocals.html"))
    assert files_in(Path("tune")) == [f"song/{RECORD}", "song/vocals.html"]


def test_people_get_a_table_and_how_to_get_more_models(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune("--task", "vocals", "-o", "out", "--blind") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("vocals of song.flac from ")
    assert [line.split()[0] for line in lines[1:4]] == ["candidate", "one", "two"]
    assert "not that it is good" in lines[4]
    assert lines[5] == f"page to listen blind: {Path('out', 'song', 'vocals.html')}"
    assert lines[6].startswith("not downloaded, and so not compared; `separation models download NAME` gets one:")
    assert len(lines) == 6 + 1 + 10 + 1 and lines[-1].endswith(" more: see `separation models list --stem vocals`")
    page = Path("out", "song", "vocals.html").read_text(encoding="utf-8")
    assert '"key"' in page and '"one"' not in page


@pytest.mark.slow
def test_the_task_and_the_stem_may_be_what_a_model_leaves(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune("--stem", "rest", "-o", "out") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:4]] == ["candidate", "one", "two"]
    assert tune("--stem", "rest", "-o", "out") == 0  # replaces its own page


@pytest.mark.slow
def test_a_model_that_fails_is_left_out_and_named(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (models / "one.safetensors").write_bytes(b"no weights")
    assert tune("--stem", "rest", "-o", "out") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: one is left out: ") and captured.err.count("\n") == 1
    assert Path("out", "song", "rest.html").is_file()


@pytest.mark.parametrize(
    "arguments, words",
    quick_first(
        [
            ((), "there is no task and no stem to compare models for: add --task vocals, or --stem drums"),
            (("--task", "nonsense"), "nonsense"),
            (("--task", "vocals", "--stem", "kazoo"), "no model for vocals gives the stem 'kazoo'"),
            (("--task", "karaoke"), "no model that gives lead_vocals is downloaded"),
            (("--stem", "rest", "--recipe", "none"), "unknown recipe 'none'"),
            (("--stem", "rest", "--seconds", "61"), "seconds is 61: choose a whole number from 1 to 60"),
            (("--stem", "rest", "--device", "abacus"), "abacus"),
        ],
        3,
    ),
)
def test_what_cannot_be_compared_is_one_clear_line(
    arguments: tuple[str, ...], words: str, models: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(tune(*arguments, "-o", "out"), capsys, Path("out"), words)


@pytest.mark.slow
def test_a_users_file_is_never_replaced(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = Path("out", "song", "rest.html")
    page.parent.mkdir(parents=True)
    page.write_text("mine")
    assert tune("--stem", "rest", "-o", "out") == 2
    assert "already exists" in capsys.readouterr().err and page.read_text() == "mine"
    assert tune("--stem", "rest", "-o", "out", "--overwrite") == 0
    assert "<html" in page.read_text(encoding="utf-8")
