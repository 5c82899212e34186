"""The command line: bad input is one clear line and exit code 2 without a partial file; odd input gives right stems."""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file, save_file

from helpers.common import PROJECT, needs_ffmpeg, quick_first, started
from helpers.small_model import write_yaml
from separation.checkpoints import catalogue
from separation.checkpoints import load as checkpoints
from separation.cli.main import build_parser, main
from separation.report import page as report

DEMO = PROJECT / "weights" / "demo"
RATE = 44100


@pytest.fixture(scope="module")
def music() -> np.ndarray:
    """Three seconds of the demo song, [T, 2] float32."""
    return soundfile.read(DEMO / "song.flac", dtype="float32", frames=3 * RATE)[0]


@pytest.fixture
def song(tmp_path: Path, music: np.ndarray) -> Path:
    path = tmp_path / "song.wav"
    soundfile.write(path, music[:RATE], RATE, subtype="FLOAT")
    return path


def separate(song: Path, out: Path, *options: str) -> int:
    recipe = () if "--model-name" in options else ("--recipe", "demo")
    try:
        return main(["separate", str(song), "-o", str(out), *recipe, "--device", "cpu", *options])
    except SystemExit as e:  # argparse
        return int(str(e.code))


def assert_refused(code: int, capsys: pytest.CaptureFixture[str], out: Path, *words: str) -> None:
    """Exit code 2, one line on stderr that has the words, and nothing written."""
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]
    assert captured.out == ""
    assert not out.exists()


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
    assert_refused(separate(bad, tmp_path / "out"), capsys, tmp_path / "out", *words)


@pytest.mark.parametrize(
    "options, words",
    [
        (("--overlap", "8"), ("overlap (8 s)", "the chunk of demo (8 s)", "a smaller overlap, or auto")),
        (("--overlap", "half"), ("--overlap", "'half' must be auto or a whole number of seconds")),
        (("--chunk-size", "4", "--overlap", "5"), ("overlap", "chunk size")),
        (("--chunk-size", "31"), ("chunk size 31 s", "4 to 30")),
        (("--recipe", "nonsense"), ("nonsense", "demo, standard, sw")),
        (("--two-stems", "kazoo"), ("'kazoo'", "vocals, instrumental, drums, bass, other, guitar, piano")),
        (("--two-stems", "kazoo", "--model-name", "demo"), ("'kazoo'", "vocals, drums, bass, guitar, piano, other")),
        (("--stems", "all_7"), ("all_7", "all_4, all_6, vocals_instrumental")),
        (("--format", "ogg"), ("ogg", "wav")),
        (("--mp3-bitrate", "17", "--format", "mp3"), ("17", "320")),
        (("--batch-size", "-1"), ("--batch-size", "'-1'", "whole number")),
        (("--batch-size", "0"), ("batch size 0", "whole number")),
        (("--device", "abacus"), ("abacus", "auto, cpu, cuda")),
        (("--model-name", "nonsense"), ("nonsense", "htdemucs")),
        (("--no-such-option",), ("--no-such-option", "--help")),
        (("--flac-depth", "24"), ("--flac-depth means nothing for --format wav",)),
        (("--mp3-bitrate", "320"), ("--mp3-bitrate means nothing for --format wav",)),
        (("--format", "flac", "--wav-depth", "32f"), ("--wav-depth means nothing for --format flac", "choose wav")),
        (("--format", "flac", "--mp3-bitrate", "320"), ("--mp3-bitrate means nothing for --format flac",)),
        (("--format", "mp3", "--wav-depth", "16"), ("--wav-depth means nothing for --format mp3",)),
        (("--format", "mp3", "--flac-depth", "16"), ("--flac-depth means nothing for --format mp3",)),
        (("--format", "flac", "--flac-depth", "32f"), ("--flac-depth", "32f", "16", "24")),
        (("--ray", "auto", "--workers", "2"), ("--ray does not take --workers",)),
        (
            ("--model-name", "hdemucs_mmi", "--attention", "sdpa"),
            ("--attention means nothing for hdemucs_mmi", "leave it out"),
        ),
        (("--model-name", "htdemucs", "--precision", "int8"), ("--precision int8 means nothing for htdemucs",)),
        (
            ("--precision", "int8", "--attention", "sdpa"),
            ("--precision int8 needs --attention fused or auto, not sdpa",),
        ),
        (("--model-name", "htdemucs", "--chunk-size", "9"), ("--chunk-size alone means nothing for htdemucs",)),
    ],
)
def test_an_option_that_cannot_be_used_is_refused_in_one_line(
    options: tuple[str, ...], words: tuple[str, ...], song: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(separate(song, tmp_path / "out", *options), capsys, tmp_path / "out", *words)


def with_empty_values(parser: argparse.ArgumentParser, *command: str) -> Iterator[tuple[list[str], str]]:
    """A command line for each argument that takes a value, with an empty one, and the argument's name."""
    positionals = 0
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from with_empty_values(sub, *command, name)
        elif action.option_strings and action.nargs != 0:
            yield [*command, action.option_strings[0], ""], "/".join(action.option_strings)
        elif not action.option_strings:
            yield [*command, *["x"] * positionals, ""], str(action.metavar)
            positionals += 1


@pytest.mark.parametrize("arguments, name", [*with_empty_values(build_parser())], ids=lambda value: " ".join(value))
def test_no_argument_may_be_empty(
    arguments: list[str],
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a path it would be the current folder, and as an address every one of this machine."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(arguments)
    told = capsys.readouterr().err
    assert left.value.code == 2
    assert told.startswith(f"error: argument {name}: ") and told.count("\n") == 1, told


def test_a_folder_that_cannot_be_written_is_refused(
    song: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    out = tmp_path / "file" / "out"
    with_file = separate(song, out)
    assert_refused(with_file, capsys, tmp_path / "never", "cannot write to", "file")


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
        f"--recipe demo --device cpu; code=$?; find {disk} -mindepth 1; exit $code"
    )
    run = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, cwd=PROJECT)
    assert run.returncode == 2, run.stderr
    assert "No space left on device" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert run.stdout == ""  # find found nothing


def checkpoint_folder(tmp_path: Path) -> tuple[Path, dict]:
    """A folder of weights of the demo's that a test may damage, and the demo's YAML."""
    (tmp_path / "weights" / "demo").mkdir(parents=True)
    shutil.copy(DEMO / "demo.safetensors", tmp_path / "weights" / "demo")
    return tmp_path / "weights", yaml.safe_load((PROJECT / "configs" / "models" / "demo.yaml").read_text())


def test_half_a_checkpoint_and_an_altered_one_are_refused(
    song: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, _ = checkpoint_folder(tmp_path)
    monkeypatch.setenv("SEPARATION_WEIGHTS", str(weights))
    path = weights / "demo" / "demo.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert_refused(separate(song, tmp_path / "out"), capsys, tmp_path / "out", "demo.safetensors", "bytes instead of")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert_refused(separate(song, tmp_path / "out"), capsys, tmp_path / "out", "demo.safetensors", "sha256")


def test_a_checkpoint_of_another_architecture_is_refused(
    song: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"encoder.weight": torch.zeros(3)}, other)
    code = separate(song, tmp_path / "out", "--model-name", "demo", "--model-path", str(other))
    assert_refused(code, capsys, tmp_path / "out", "other.safetensors", "another architecture", "encoder.weight")
    narrower = {key: value[:1] for key, value in load_file(DEMO / "demo.safetensors").items()}
    save_file({key: value.contiguous() for key, value in narrower.items()}, other)
    code = separate(song, tmp_path / "out", "--model-name", "demo", "--model-path", str(other))
    assert_refused(
        code, capsys, tmp_path / "out", "other.safetensors", "does not fit", "model.dim is 72, the weights have"
    )


def test_one_bad_song_does_not_stop_the_others(song: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.mp3").write_text("words")
    arguments = [str(tmp_path / "bad.mp3"), str(song), "-o", str(tmp_path / "out"), "--recipe", "demo", "--json"]
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
    "options", [("--stems", "all_6"), ("--stems", "vocals_instrumental"), ("--model-name", "demo")]
)
def test_two_stems_are_two_files_that_add_up_to_the_song(
    options: tuple[str, ...], song: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert separate(song, tmp_path / "out", "--two-stems", "drums", "--json", *options) == 0
    report = json.loads(capsys.readouterr().out)
    folder = tmp_path / "out" / "song"
    assert report["stems"] == {"drums": str(folder / "drums.wav"), "no_drums": str(folder / "no_drums.wav")}
    assert report["times_realtime"] == pytest.approx(report["duration_seconds"] / report["elapsed_seconds"], rel=0.01)
    drums, rest, mixture = (soundfile.read(path)[0] for path in (*report["stems"].values(), song))
    assert np.abs(drums + rest - mixture).max() <= 1e-6
    assert np.abs(drums).max() > 0


@pytest.mark.parametrize("options, asked", [(("--two-stems", "drums"), ["drums"]), ((), None)])
def test_of_a_named_models_specialists_two_stems_ask_for_one(
    options: tuple[str, ...], asked: list[str] | None, song: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[list[str] | None] = []
    load_model = checkpoints.load_model
    monkeypatch.setattr(
        checkpoints, "load_model", lambda name, *, stems, **rest: loads.append(stems) or load_model(name, **rest)
    )
    assert separate(song, tmp_path / "out", "--model-name", "demo", *options) == 0
    assert loads == [asked]


def test_a_song_that_is_not_there_is_reported_before_a_checkpoint_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEPARATION_WEIGHTS", str(tmp_path / "no weights"))
    code = main(["separate", str(tmp_path / "nothing.wav"), "-o", str(tmp_path / "out")])
    assert_refused(code, capsys, tmp_path / "out", "nothing.wav", "does not exist")


def test_a_name_of_dots_stays_below_the_output_folder(tmp_path: Path, song: Path) -> None:
    dots = song.rename(tmp_path / "...wav")
    assert separate(dots, tmp_path / "out") == 0
    assert (tmp_path / "out" / "...wav" / "vocals.wav").exists()


def test_a_stem_never_takes_the_place_of_the_song(
    song: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vocals").mkdir()
    song = song.rename(tmp_path / "vocals" / "vocals.wav")
    before = song.read_bytes()
    assert_refused(separate(song, tmp_path), capsys, tmp_path / "never", "overwrite the song", "vocals.wav")
    assert song.read_bytes() == before
    assert [path.name for path in tmp_path.rglob("*.wav")] == ["vocals.wav"]


@pytest.mark.parametrize("number", quick_first([signal.SIGTERM, signal.SIGINT, signal.SIGHUP], 1))
def test_a_signal_in_mid_song_leaves_no_file(number: int, tmp_path: Path, music: np.ndarray) -> None:
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


def test_a_name_that_the_terminal_cannot_show_is_no_error(tmp_path: Path, song: Path) -> None:
    song = song.rename(tmp_path / "🎵.wav")
    arguments = [sys.executable, "-m", "separation", "separate", song, "-o", tmp_path / "out", "--recipe", "demo"]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    run = subprocess.run(arguments, cwd=PROJECT, env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert b"\\U0001f3b5.wav" in run.stdout


@pytest.mark.parametrize(
    "name, format",
    [("song.mp3", "FLAC"), ('it\'s a "song" – 歌 🎵 .v1.wav', "WAV")],
    ids=["flac named mp3", "odd name"],
)
def test_an_odd_name_is_no_matter(name: str, format: str, tmp_path: Path, music: np.ndarray) -> None:
    soundfile.write(tmp_path / name, music[:RATE], RATE, format=format)
    assert separate(tmp_path / name, tmp_path / "out") == 0
    stems = [soundfile.read(path)[0] for path in (tmp_path / "out" / Path(name).stem).glob("*.wav")]
    assert len(stems) == 2
    assert np.abs(sum(stems) - soundfile.read(tmp_path / name)[0]).max() <= 1e-6


@needs_ffmpeg
def test_m4a_goes_through_ffmpeg(tmp_path: Path, song: Path) -> None:
    path = tmp_path / "song.m4a"
    subprocess.run(["ffmpeg", "-v", "error", "-i", song, path], check=True)
    assert separate(path, tmp_path / "out") == 0
    assert soundfile.info(tmp_path / "out" / "song" / "vocals.wav").frames >= RATE


@pytest.mark.parametrize(
    "arguments, words",
    [
        *(
            (("bench", "--cold-start", *other), f"--cold-start does not take {other[0]}")
            for other in (
                ("--runs", "2"),
                ("--seconds", "9"),
                ("--random-weights",),
                ("--batch-size", "2"),
                ("--chunk-size", "9"),
                ("--overlap", "2"),
                ("--attention", "sdpa"),
            )
        ),
        (("bench", "--random-weights", "--model-name", "demo", "--model-path", "x.ckpt"), "exclude each other"),
        (("bench", "--model-name", "mdx_extra", "--attention", "sdpa"), "--attention means nothing for mdx_extra"),
        (("bench", "--model-name", "htdemucs", "--chunk-size", "9"), "--chunk-size alone means nothing for htdemucs"),
        (
            ("evaluate", "--references", ".", "--model-name", "scnet_xl_ihf", "--attention", "sdpa"),
            "--attention means nothing for scnet_xl_ihf",
        ),
        (("export", "demo", "x.onnx", "--random-weights", "--model-path", "x.ckpt"), "exclude each other"),
        *(
            (("evaluate", "--references", ".", "--estimates", ".", *other), f"--estimates does not take {other[0]}")
            for other in (
                ("--recipe", "sw"),
                ("--stems", "all_4"),
                ("--model-name", "demo"),
                ("--model-dir", "x"),
                ("--model-path", "x.ckpt"),
                ("--chunk-size", "9"),
                ("--overlap", "2"),
                ("--batch-size", "2"),
                ("--attention", "sdpa"),
                ("--device", "cpu"),
                ("--precision", "fp32"),
            )
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_option_that_another_makes_meaningless_is_refused_in_one_line(
    arguments: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(main(arguments), capsys, tmp_path / "out", words)


def test_the_models_are_listed_as_a_table_and_as_json(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "list"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "HERE", "SIZE", "ARCHITECTURE", "STEMS"]
    rows = {line.split()[0]: (line, text) for line, text in zip(lines[::2], lines[1::2], strict=True)}
    assert list(rows) == catalogue.available()
    row, _ = rows["bs_roformer_viperx_1297"]
    assert row.split()[1:] == ["-", "639", "MB", "bs_roformer", "vocals"]
    assert all(text.startswith("    quality: ") and "; licence: " in text for _, text in rows.values())
    assert rows["demo"][0].split()[1:5] == ["here", "9", "MB", "bs_roformer"]
    assert row.index("bs_roformer ") == header.index("ARCHITECTURE")

    assert main(["models", "list", "--json"]) == 0
    found = {entry["name"]: entry for entry in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(found) == list(rows)
    assert found["demo"]["here"] and not found["htdemucs_ft"]["here"]
    assert found["htdemucs_ft"]["bytes"] == 4 * 84025440
    assert found["demo"]["stems"] == ["vocals", "drums", "bass", "guitar", "piano", "other"]
    assert set(found["demo"]) == {"name", "architecture", "stems", "bytes", "here", "licence", "quality"}


def test_models_are_verified_by_name_or_all_that_are_here(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "verify", "demo"]) == 0
    assert "demo.safetensors: right" in capsys.readouterr().out
    assert main(["models", "verify"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "demo.safetensors: right" in line
    assert main(["models", "verify", "nonsense", "htdemucs", "demo"]) == 2
    captured = capsys.readouterr()
    assert "demo.safetensors: right" in captured.out
    unknown, missing = captured.err.splitlines()
    assert unknown.startswith("error: unknown model 'nonsense': use one of ")
    assert missing.endswith("955717e8.safetensors is missing: run `python -m separation models download htdemucs`")
    assert main(["models", "download", "nonsense", "demo"]) == 2
    captured = capsys.readouterr()
    assert captured.out.endswith("demo.safetensors\n") and captured.err.startswith("error: unknown model 'nonsense'")
    viperx = weights / "model_bs_roformer_ep_317_sdr_12.9755.ckpt"
    weights.mkdir()
    viperx.write_bytes(b"altered")
    assert main(["models", "verify"]) == 2
    captured = capsys.readouterr()
    assert "demo.safetensors: right" in captured.out
    assert captured.err.startswith(f"error: {viperx} has 7 bytes instead of 639,331,213: delete it, then run")


def test_a_converted_checkpoint_is_listed_and_verified_in_its_place(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "small.ckpt"
    torch.save({"gain": torch.zeros(2)}, checkpoint)
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    monkeypatch.setattr(catalogue, "CONFIGS", tmp_path)
    write_yaml(tmp_path, files=[{"name": "small.ckpt", "sha256": sha256, "url": "http://127.0.0.1:1/"}])
    assert main(["models", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["small", "-", "?"]
    converted = weights / "small.safetensors"
    assert main(["models", "convert", str(checkpoint), str(converted)]) == 0
    assert capsys.readouterr().out == f"{converted}\n"
    assert main(["models", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["small", "here"]
    assert main(["models", "verify", "small"]) == 0
    assert capsys.readouterr().out == f"{converted}: made from the right small.ckpt\n"
    assert main(["models", "download", "small"]) == 0
    assert capsys.readouterr().out == f"{converted}\n"
    assert main(["models", "convert", str(checkpoint), str(converted)]) == 2
    assert "small.safetensors' already exists" in capsys.readouterr().err
    assert main(["models", "convert", "--overwrite", str(checkpoint), str(converted)]) == 0
    capsys.readouterr()
    assert main(["models", "convert", "--overwrite", str(tmp_path / "nothing.ckpt"), str(converted)]) == 2
    assert capsys.readouterr().err.startswith("error: there is no file")


def test_a_report_lies_beside_the_stems(
    song: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "out" / "song" / "stems.html"
    assert separate(song, tmp_path / "out", "--report") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"  {page}"
    assert '"name": "instrumental"' in page.read_text(encoding="utf-8")
    page.unlink()
    monkeypatch.setattr(report, "MAX_SECONDS", 0.5)
    assert separate(song, tmp_path / "out", "--report", "--json") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: cannot make the report of 'song.wav': 'song.wav' is longer than 0.5 s")
    assert all(Path(stem).exists() for stem in json.loads(captured.out)["stems"].values())
    assert not page.exists()


@pytest.mark.slow
def test_the_demo_separates_scores_and_draws(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONWARNINGS": "error"}
    run = subprocess.run(
        [sys.executable, "-m", "separation", "demo", "-o", tmp_path, "--precision", "fp32"],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    assert "times real-time" in run.stdout
    assert (tmp_path / "stems.svg").exists()
    assert "SDR 10." in (tmp_path / "stems.html").read_text(encoding="utf-8")
    assert len(list(tmp_path.rglob("*.wav"))) == 8


@pytest.mark.parametrize("own, expected", [(None, "passive"), ("active", "active")])
def test_threads_wait_asleep_unless_the_user_says_otherwise(own: str | None, expected: str) -> None:
    code = """
import os, runpy, sys
sys.argv = ["separation", "models", "list"]
try:
    runpy.run_module("separation", run_name="__main__")
except SystemExit:
    assert "torch" not in sys.modules  # which reads the variable when it is imported
    print(os.environ["OMP_WAIT_POLICY"])
"""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": own} if own else {}
    run = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1:] == [expected], run.stderr


def test_output_that_nobody_reads_to_its_end_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    with started("models", "list") as run:
        assert run.stdout and run.stderr
        assert run.stdout.readline()
        run.stdout.close()
        assert (run.stderr.read(), run.wait(60)) == ("", 1)
