"""A checkpoint of the user's own in the commands, and added by the documented steps."""

import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml

from helpers.common import PROJECT, slow
from helpers.own_checkpoint import COMMUNITY, own_model, put
from helpers.small_model import write_weights
from helpers.weights_server import Server
from separation.cli.main import main


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Models this small are slower with more threads, here and in the processes that a test starts."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def song(tmp_path: Path) -> Path:
    path = tmp_path / "song.wav"
    noise = np.random.default_rng(0).normal(0, 0.1, (4410, 2)).astype(np.float32)
    soundfile.write(path, noise, 44100, subtype="FLOAT")
    return path


def run(*arguments: object) -> int:
    return main([*map(str, arguments), "--device", "cpu", "--precision", "fp32"])


@pytest.mark.slow
def test_separate_accepts_weights_and_a_name_in_a_folder(
    tmp_path: Path, song: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "own", "x.ckpt", "x.yaml")
    monkeypatch.chdir(tmp_path / "own")
    given = {
        "path": ["--model-path", tmp_path / "own" / "x.ckpt"],
        "relative path": ["--model-path", "x.ckpt"],
        "folder": ["--model-dir", tmp_path, "--model-name", "own"],
        "pair": ["--model-dir", ".", "--model-name", "x"],
        "name and path": ["--model-name", "x.yaml", "--model-path", "x.ckpt"],
    }
    for name, options in given.items():
        assert run("separate", song, "-o", tmp_path / name, "--chunk-size", 4, "--overlap", 1, *options) == 0
        assert sorted(path.name for path in (tmp_path / name / "song").glob("*.wav")) == ["drums.wav", "vocals.wav"]
        drums, first = (soundfile.read(tmp_path / each / "song" / "drums.wav")[0] for each in (name, "path"))
        assert np.array_equal(drums, first) and drums.any()


@pytest.mark.parametrize(
    "options, words",
    [
        (
            ["--model-dir", "own"],
            "--model-dir needs --model-name and cannot be combined with --model-path: name a model in that folder",
        ),
        (["--model-dir", "own", "--model-name", "x", "--model-path", "x.ckpt"], "cannot be combined with --model-path"),
        (
            ["--model-dir", "own", "--model-name", "y"],
            "there is no model 'y' in own: put a folder y, y.yaml or y.ckpt there",
        ),
        (["--model-path", "own/x.yaml"], "--model-path own/x.yaml is a YAML file: give it as --model-name"),
        (["--model-path", "own/y.ckpt"], "there is no file "),
        (
            ["--model-path", "own/x.ckpt", "--stems", "all_4"],
            "--model-path gives all stems of one model and cannot be combined with --stems",
        ),
        (
            ["--model-name", "demo", "--stems", "vocals_instrumental"],
            "cannot be combined with --stems: leave one of them out",
        ),
        (
            ["--model-name", "demo", "--recipe", "standard"],
            "--model-name gives all stems of one model and cannot be combined with --recipe",
        ),
        slow((["--model-path", "alone.ckpt"], "alone.ckpt needs the YAML file that it was published with")),
    ],
)
def test_a_checkpoint_that_cannot_be_found_is_one_error(
    tmp_path: Path,
    song: Path,
    options: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put(tmp_path / "own", "x.ckpt", "x.yaml")
    put(tmp_path, "alone.ckpt")
    monkeypatch.chdir(tmp_path)
    for command in (["separate", song, "-o", "out"], ["bench"], ["bench", "--cold-start"]):
        assert run(*command, *options) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert captured.err.startswith("error: ") and words in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_bench_accepts_weights(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "x.ckpt", "x.yaml")
    weights = tmp_path / "x.ckpt"
    chunk = ["--chunk-size", 4, "--overlap", 1]
    assert run("bench", "--model-path", weights, *chunk, "--seconds", 1, "--runs", 1, "--json") == 0
    assert list(json.loads(capfd.readouterr().out)["models"]) == ["x"]
    assert run("bench", "--model-path", weights, "--random-weights") == 2
    assert "cannot be combined" in capfd.readouterr().err


@pytest.mark.slow
def test_a_cold_start_accepts_a_name_in_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "x.ckpt", "x.yaml")
    assert run("bench", "--cold-start", "--model-dir", tmp_path, "--model-name", "x", "--json") == 0
    assert json.loads(capfd.readouterr().out)["weight_bytes"] == (tmp_path / "x.ckpt").stat().st_size


# Documentation


def test_the_documented_steps_add_a_checkpoint(
    tmp_path: Path,
    models: Path,
    weights: Path,
    song: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    document = (PROJECT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    section = document.partition("\n## Add a checkpoint\n")[2].partition("\n## ")[0].replace("NAME", "made_up")
    steps = re.split(r"^\d\. ", section, flags=re.MULTILINE)[1:]
    assert len(steps) <= 7 and ".py" not in section
    commands = [shlex.split(line) for line in re.findall(r"`separation (.*?)`", "".join(steps))]

    published = tmp_path / "published.ckpt"
    server.content = write_weights(own_model().state_dict(), published).read_bytes()
    assert "SEPARATION_MODELS" in steps[0] and "made_up.yaml" in steps[1]
    (block,) = re.findall(r"```yaml\n(.*?)```", section, flags=re.DOTALL)
    lines = "\n".join(line[3:] for line in block.splitlines()).replace("https://example.com/made_up.ckpt", server.url)
    (models / "made_up.yaml").write_text(yaml.safe_dump(COMMUNITY) + lines)

    download, listing, separate, verify = commands
    assert main(download) == 0
    downloaded = weights / "made_up.ckpt"
    assert capsys.readouterr().out == f"{downloaded}\n"
    sha256 = hashlib.sha256(server.content).hexdigest()
    assert (weights / "checksums.lock").read_text() == f"{sha256} {len(server.content)} made_up.ckpt\n"
    assert [sha256 in message for message in caplog.messages] == [True]
    assert main(listing) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("* made_up "))
    assert row.split()[2:] == [f"{len(server.content) / 1e6:.0f}", "none", "stated", "vocals,", "drums"]
    soundfile.write(tmp_path / "song.mp3", soundfile.read(song)[0], 44100)
    monkeypatch.chdir(tmp_path)
    assert run(*separate) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "song").glob("*.wav")) == ["drums.wav", "vocals.wav"]

    capsys.readouterr()
    assert main(verify) == 0
    assert f"{downloaded}: right\n" in capsys.readouterr().out
