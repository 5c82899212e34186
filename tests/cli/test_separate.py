"""Songs are separated, whatever their names; bad input is one clear line and exit code 2, without a partial file."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file, save_file

from helpers.command_line import DEMO, assert_refused, separate
from helpers.common import PROJECT, SONG, needs_ffmpeg, quick_first, slow, started
from separation.batch import run
from separation.cli.main import main
from separation.report import page as report

WEIGHTS = PROJECT / "weights" / "demo" / "demo.safetensors"
RATE = 44100


@pytest.fixture(scope="module")
def music() -> np.ndarray:
    """Three seconds of the demo song, [T, 2] float32."""
    return soundfile.read(SONG, dtype="float32", frames=3 * RATE)[0]


@pytest.fixture
def song(tmp_path: Path, music: np.ndarray) -> Path:
    path = tmp_path / "song.wav"
    soundfile.write(path, music[:RATE], RATE, subtype="FLOAT")
    return path


def bad_file(kind: str, path: Path, music: np.ndarray) -> None:
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("these are words, not sound\n" * 50)
    elif kind == "truncated mp3":
        whole = path.with_suffix(".whole")
        soundfile.write(whole, music, RATE, format="MP3")
        path.write_bytes(whole.read_bytes()[:-12_000])
        whole.unlink()
    elif kind in ("nan", "inf"):
        damaged = music.copy()
        damaged[2 * RATE, 1] = float(kind)
        soundfile.write(path, damaged, RATE, subtype="FLOAT", format="WAV")
    elif kind == "header only":
        soundfile.write(path, music[:0], RATE, format="WAV")


@pytest.mark.slow
def test_a_recipe_of_the_users_own_is_a_file(
    tmp_path: Path, song: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(
        "(voice): {max_fft: [vocals by demo, residual after drums, vocals by demo after drums with 2 shifts]}\n"
        "(drums): demo with tta\nsung: vocals by demo of voice\nband: residual"
    )
    assert separate(song, "-o", "out", "--recipe", "mine.yaml") == 0
    sung, band = (soundfile.read(f"out/song/{stem}.wav", dtype="float32")[0] for stem in ("sung", "band"))
    assert np.abs(sung + band - soundfile.read(song, dtype="float32")[0]).max() <= 1e-6
    assert sung.any() and sorted(path.name for path in Path("out/song").glob("*.wav")) == ["band.wav", "sung.wav"]
    capsys.readouterr()
    for text, words, more in (
        ("sung: demo with reverb", "recipe 'mine.yaml': sung: 'reverb' is not a view of the song: write", ()),
        ("sung: demo", "recipe 'mine.yaml', sung: demo does not give 'sung': choose from vocals, drums", ()),
        ("vocals: demo", "not 'all_4': leave the stems out", ("--stems", "all_4")),
        ("vocals: demo", "there is no recipe other.yaml: give the path of a .yaml file", ("--recipe", "other.yaml")),
    ):
        Path("mine.yaml").write_text(text)
        code = separate(song, "-o", "none", "--recipe", "mine.yaml", *more)
        assert_refused(code, capsys, Path("none"), words)


@pytest.mark.parametrize(
    "kind, words",
    [
        ("missing", ("song.bin", "does not exist")),
        ("empty", ("song.bin", "empty")),
        ("text", ("song.bin", "not audio")),
        ("truncated mp3", ("song.bin", "cut short")),
        ("nan", ("song.bin", "NaN", "2.0")),
        ("inf", ("song.bin", "Inf", "2.0")),
        ("header only", ("song.bin", "no samples")),
    ],
)
def test_a_bad_file_is_refused_in_one_line(
    kind: str, words: tuple[str, ...], tmp_path: Path, music: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "song.bin"
    bad_file(kind, bad, music)
    assert_refused(separate(bad, "-o", tmp_path / "out"), capsys, tmp_path / "out", *words)


def test_a_folder_that_cannot_be_written_is_refused(
    song: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    out = tmp_path / "file" / "out"
    with_file = separate(song, "-o", out)
    assert_refused(with_file, capsys, tmp_path / "never", "cannot write to", "file")


@pytest.mark.slow
@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="needs unshare for a small file system of its own",
)
def test_a_full_disk_is_one_line_and_leaves_no_file(song: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o size=1m tmpfs {disk}; {sys.executable} -m separation separate {song} -o {disk} "
        f"{shlex.join(DEMO)}; code=$?; find {disk} -mindepth 1; exit $code"
    )
    run = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, cwd=PROJECT)
    assert run.returncode == 2, run.stderr
    assert "No space left on device" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert run.stdout == ""  # find found nothing


def checkpoint_folder(tmp_path: Path) -> tuple[Path, dict]:
    """A folder of weights of the demo's that a test may damage, and the demo's YAML."""
    (tmp_path / "weights" / "demo").mkdir(parents=True)
    shutil.copy(WEIGHTS, tmp_path / "weights" / "demo")
    return tmp_path / "weights", yaml.safe_load((PROJECT / "configs" / "models" / "demo.yaml").read_text())


def test_an_incomplete_checkpoint_and_an_altered_one_are_refused(
    song: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, _ = checkpoint_folder(tmp_path)
    monkeypatch.setenv("SEPARATION_WEIGHTS", str(weights))
    path = weights / "demo" / "demo.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert_refused(
        separate(song, "-o", tmp_path / "out"), capsys, tmp_path / "out", "demo.safetensors", "bytes instead of"
    )
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert_refused(separate(song, "-o", tmp_path / "out"), capsys, tmp_path / "out", "demo.safetensors", "sha256")


def test_a_checkpoint_of_another_architecture_is_refused(
    song: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"encoder.weight": torch.zeros(3)}, other)
    code = separate(song, "-o", tmp_path / "out", "--model-name", "demo", "--model-path", str(other))
    assert_refused(code, capsys, tmp_path / "out", "other.safetensors", "another architecture", "encoder.weight")
    narrower = {key: value[:1] for key, value in load_file(WEIGHTS).items()}
    save_file({key: value.contiguous() for key, value in narrower.items()}, other)
    code = separate(song, "-o", tmp_path / "out", "--model-name", "demo", "--model-path", str(other))
    assert_refused(
        code, capsys, tmp_path / "out", "other.safetensors", "does not fit", "model.dim is 72, the weights have"
    )


def test_one_bad_song_does_not_stop_the_others(song: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.mp3").write_text("words")
    arguments = [str(tmp_path / "bad.mp3"), str(song), "-o", str(tmp_path / "out"), *DEMO, "--json"]
    assert main(["separate", *arguments]) == 2
    captured = capsys.readouterr()
    failed, report = map(json.loads, captured.out.splitlines())
    assert failed["song"] == str(tmp_path / "bad.mp3") and failed["status"] == "failed"
    assert failed["error"] in captured.err and "not audio" in failed["error"]
    assert report["song"] == str(song) and report["status"] == "done"
    assert all(Path(path).exists() for path in report["stems"].values())
    assert list(report["stems"]) == ["vocals", "instrumental"]
    assert captured.err.splitlines()[1:] == ["2 songs: 1 done, 1 failed"]


@pytest.mark.parametrize(
    "options",
    [("--stems", "all_6"), *map(slow, [(("--stems", "vocals_instrumental"),), (("--model-name", "demo"),)])],
)
def test_two_stems_are_two_files_that_add_up_to_the_song(
    options: tuple[str, ...], song: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert separate(song, "-o", tmp_path / "out", "--two-stems", "drums", "--json", *options) == 0
    report = json.loads(capsys.readouterr().out)
    folder = tmp_path / "out" / "song"
    assert report["stems"] == {"drums": str(folder / "drums.wav"), "no_drums": str(folder / "no_drums.wav")}
    assert report["times_realtime"] == pytest.approx(report["duration_seconds"] / report["elapsed_seconds"], rel=0.01)
    drums, rest, mixture = (soundfile.read(path)[0] for path in (*report["stems"].values(), song))
    assert np.abs(drums + rest - mixture).max() <= 1e-6
    assert np.abs(drums).max() > 0


@pytest.mark.slow
def test_a_part_of_a_song_is_written_beside_the_whole(
    tmp_path: Path, music: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    song, out = tmp_path / "a song.wav", tmp_path / "out"
    soundfile.write(song, music, RATE, subtype="FLOAT")
    assert separate(song, "-o", out) == 0
    assert separate(song, "-o", out, "--start", "0:01", "--end", "1.5", "--report", "--json") == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made["stems"]["vocals"] == str(out / "a song 1s-1.5s" / "vocals.wav") and made["duration_seconds"] == 0.5
    part, whole = (soundfile.read(out / name / "vocals.wav")[0] for name in ("a song 1s-1.5s", "a song"))
    assert np.array_equal(part, whole[RATE : RATE + RATE // 2])
    page = Path(made["page"]).read_text(encoding="utf-8")
    data = json.loads(page.split('id="song">')[1].split("</script>")[0])
    assert data["seconds"] == 0.5
    assert separate(song, "-o", out, "--start", "1", "--end", "1.5") == 0
    assert "done already" in capsys.readouterr().out
    assert separate(song, "-o", out, "--preview") == 0
    assert len(soundfile.read(out / "a song preview" / "vocals.wav")[0]) == len(music)
    for options, error in (
        (("--start", "5"), "error: a part from 5s starts after the song's end at 3s: choose an earlier start"),
        (("--start", "2", "--end", "1"), "a part from 2s to 1s is empty: choose an end after its start"),
        (("--preview", "--end", "1"), "a preview chooses its part of the song: leave out its start and end"),
    ):
        assert separate(song, "-o", out, *options) == 2
        assert error in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["a song", "a song 1s-1.5s", "a song preview"]


@pytest.mark.parametrize("options, asked", quick_first([(("--two-stems", "drums"), ("drums",)), ((), None)], 1))
def test_two_stems_load_only_the_specialist_that_they_need(
    options: tuple[str, ...], asked: tuple[str, ...] | None, song: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[tuple[str, ...] | None] = []
    load_model = run.load_model
    monkeypatch.setattr(
        run, "load_model", lambda name, *, stems, **rest: loads.append(stems) or load_model(name, **rest)
    )
    assert separate(song, "-o", tmp_path / "out", "--model-name", "demo", *options) == 0
    assert loads == [asked]


def test_a_missing_song_is_reported_before_a_missing_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEPARATION_WEIGHTS", str(tmp_path / "no weights"))
    code = main(["separate", str(tmp_path / "nothing.wav"), "-o", str(tmp_path / "out")])
    assert_refused(code, capsys, tmp_path / "out", "nothing.wav", "does not exist")


def test_a_name_of_dots_stays_below_the_output_folder(tmp_path: Path, song: Path) -> None:
    dots = song.rename(tmp_path / "...wav")
    assert separate(dots, "-o", tmp_path / "out") == 0
    assert (tmp_path / "out" / "...wav" / "vocals.wav").exists()


def test_a_stem_never_overwrites_the_song(song: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vocals").mkdir()
    song = song.rename(tmp_path / "vocals" / "vocals.wav")
    before = song.read_bytes()
    assert_refused(separate(song, "-o", tmp_path), capsys, tmp_path / "never", "overwrite the song", "vocals.wav")
    assert song.read_bytes() == before
    assert [path.name for path in tmp_path.rglob("*.wav")] == ["vocals.wav"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_no_unfinished_file(number: int, tmp_path: Path, music: np.ndarray) -> None:
    song = tmp_path / "song.wav"
    soundfile.write(song, np.tile(music, (40, 1)), RATE)
    with started("separate", song, "-o", tmp_path / "out", "--recipe", "demo") as run:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out/song/.separating-*/waveform-*")):
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.05)
        run.send_signal(number)
        assert run.wait(60) == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == ["song.wav"]


@pytest.mark.slow
def test_a_name_that_the_terminal_cannot_show_is_printed_as_escapes(tmp_path: Path, song: Path) -> None:
    song = song.rename(tmp_path / "🎵.wav")
    arguments = [sys.executable, "-m", "separation", "separate", song, "-o", tmp_path / "out", "--recipe", "demo"]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    run = subprocess.run(arguments, cwd=PROJECT, env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert b"\\U0001f3b5.wav" in run.stdout


@pytest.mark.parametrize(
    "name, format",
    quick_first([("song.mp3", "FLAC"), ('it\'s a "song" – 歌 🎵 .v1.wav', "WAV")], 1),
    ids=["flac named mp3", "odd name"],
)
def test_a_song_with_an_odd_name_is_separated(name: str, format: str, tmp_path: Path, music: np.ndarray) -> None:
    soundfile.write(tmp_path / name, music[:RATE], RATE, format=format)
    assert separate(tmp_path / name, "-o", tmp_path / "out") == 0
    stems = [soundfile.read(path)[0] for path in (tmp_path / "out" / Path(name).stem).glob("*.wav")]
    assert len(stems) == 2
    assert np.abs(sum(stems) - soundfile.read(tmp_path / name)[0]).max() <= 1e-6


@needs_ffmpeg
def test_m4a_is_decoded_with_ffmpeg(tmp_path: Path, song: Path) -> None:
    path = tmp_path / "song.m4a"
    subprocess.run(["ffmpeg", "-v", "error", "-i", song, path], check=True)
    assert separate(path, "-o", tmp_path / "out") == 0
    assert soundfile.info(tmp_path / "out" / "song" / "vocals.wav").frames >= RATE


@pytest.mark.slow
def test_a_report_is_written_beside_the_stems(
    song: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "out" / "song" / "stems.html"
    assert separate(song, "-o", tmp_path / "out", "--report") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"  {page}"
    assert '"name": "instrumental"' in page.read_text(encoding="utf-8")
    page.unlink()
    monkeypatch.setattr(report, "MAX_SECONDS", 0.5)
    assert separate(song, "-o", tmp_path / "out", "--report", "--json") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: cannot make the report of 'song.wav': 'song.wav' is longer than 0.5 s")
    assert all(Path(stem).exists() for stem in json.loads(captured.out)["stems"].values())
    assert not page.exists()
