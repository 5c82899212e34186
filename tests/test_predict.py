"""cog.yaml, the inputs of predict.py, and the Predictor called from Python."""

import asyncio
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import soundfile
import torch
import yaml
from cog.types import URLPath
from safetensors import safe_open
from torch import Tensor

import predict
from helpers.cog_rules import read_runner
from helpers.common import METRICS, PROGRESS_LINE, PROJECT, QUICK, SHARED, SONG, STEMS, quick_first, read, slow, song
from helpers.house import imports, modules
from helpers.served_process import SETUP_STEPS
from helpers.small_model import assert_same_model, chunks, identity, small_model, write_yaml
from separation import analyse, device
from separation.checkpoints.catalogue import files_for, read_config
from separation.checkpoints.convert import convert
from separation.checkpoints.download import fetch
from separation.checkpoints.load import load_model
from separation.engine import pool
from separation.engine.cache import chosen_cache
from separation.engine.recipes import load_recipe
from separation.errors import AudioError, InputError, RecipeError
from separation.models.base import SeparationModel

SCHEMA = SHARED / "schema" / "cog_config_schema_v1.0.json"
# The published contract: (name, type, keywords of Input). The first six never change.
INPUTS: list[tuple[str, str, dict[str, Any]]] = [
    (
        "audio",
        "Path",
        {"description": "Audio file to separate (WAV, MP3, FLAC, OGG, etc.)", "accept": "audio/*,video/*"},
    ),
    (
        "stems",
        "str",
        {
            "description": "Which stems to extract",
            "default": "vocals_instrumental",
            "choices": ["vocals_instrumental", "all_4", "all_6", "drum_kit"],
        },
    ),
    (
        "output_format",
        "str",
        {"description": "Output audio format", "default": "wav", "choices": ["wav", "mp3", "flac"]},
    ),
    ("chunk_size", "int", {"description": "Processing chunk size in seconds", "default": 8, "ge": 4, "le": 30}),
    ("overlap", "int", {"description": "Overlap between chunks in seconds", "default": 4, "ge": 1, "le": 8}),
    ("sample_rate", "int", {"description": "Output sample rate", "default": 44100, "choices": [44100, 48000]}),
    (
        "mp3_bitrate",
        "int",
        {
            "description": "Bitrate in kbit/s if the output format is mp3",
            "default": 320,
            "choices": [128, 192, 320],
        },
    ),
    (
        "two_stems",
        "str",
        {
            "description": "Give only this stem and the song minus it (no_vocals), made as for stems if that has it",
            "default": "none",
            "choices": ["none", "vocals", "drums", "bass", "other", "guitar", "piano"],
        },
    ),
    (
        "recipe",
        "str",
        {
            "description": "Models: standard or sw for quality, demo for a rough try, default leaves it to the server",
            "default": "default",
            "choices": ["default", "standard", "sw", "demo"],
        },
    ),
    ("start", "float", {"description": "Separate only from this second of the song on", "default": 0, "ge": 0}),
    (
        "end",
        "float",
        {"description": "Separate only up to this second; 0 means the end of the song", "default": 0, "ge": 0},
    ),
    ("preview", "bool", {"description": "Separate only the loudest 30 seconds", "default": False}),
    (
        "analyse",
        "bool",
        {"description": "Also find tempo, key and loudness, given as metrics of the prediction", "default": False},
    ),
]


# cog.yaml


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return yaml.safe_load((PROJECT / "cog.yaml").read_text(encoding="utf-8"))


@pytest.mark.skipif(not SCHEMA.exists(), reason="needs Cog's schema in the shared folder beside the checkout")
def test_cog_yaml_is_valid_against_cogs_schema(config: dict[str, Any]) -> None:
    jsonschema.Draft7Validator(json.loads(SCHEMA.read_text(encoding="utf-8"))).validate(config)


def test_the_image_has_what_the_project_needs(config: dict[str, Any]) -> None:
    build = config["build"]
    assert build["gpu"] is True
    assert build["cuda"] == "12.8"
    assert build["python_version"] == "3.11"
    assert build["python_requirements"] == "requirements.txt"
    assert {"ffmpeg", "gcc"} <= set(build["system_packages"])
    assert config["run"] == "predict.py:Predictor"
    pins = (PROJECT / "requirements.txt").read_text(encoding="utf-8").split()
    assert f"cog=={build['sdk_version']}" in pins


def test_the_image_has_no_package_beyond_the_ten_that_the_running_container_does_not_import() -> None:
    ten = {"cog", "torch", "torchaudio", "numpy", "librosa", "soundfile", "pyyaml", "einops"}
    ten |= {"rotary-embedding-torch", "demucs"}
    pins = {line.partition("==")[0] for line in (PROJECT / "requirements.txt").read_text().split()}
    reached, imported = {"predict"}, set[str]()
    while new := {name for module in reached for name in imports(modules()[module]) if name in modules()} - reached:
        reached |= new
    for module in reached:
        imported |= {name.partition(".")[0] for name in imports(modules()[module])}
    assert ten < pins
    assert pins - ten <= imported


def test_kernels_compiled_before_the_build_are_copied_into_the_image(config: dict[str, Any]) -> None:
    folder = dict(entry.split("=", 1) for entry in config["environment"])["SEPARATION_KERNELS"]
    copied = (PROJECT / ".dockerignore").read_text(encoding="utf-8").split()
    assert folder == "/src/weights/kernels" and copied.index("!weights/kernels") > copied.index("weights/*")


def test_the_image_has_exactly_the_checked_weights_of_standard_without_the_drum_kit(
    config: dict[str, Any],
) -> None:
    folder = dict(entry.split("=", 1) for entry in config["environment"])["SEPARATION_WEIGHTS"]
    files = {
        file
        for choice in STEMS
        for name, stems in load_recipe("standard", choice).models.items()
        for file in files_for(read_config(name), stems)
    }
    needed = {(file.url, file.sha256, f"{folder}/{file.name}") for file in files}
    baked = []
    for run in config["build"]["run"]:
        assert "\n" not in run["command"].strip()  # Cog rejects line breaks
        download, check, *rest = without_mount(run["command"]).split(" && ")
        downloaded = re.fullmatch(
            r'{ echo "(?P<check>[^"]+)" \| sha256sum -c --status '
            r"\|\| curl .*--fail .*--output (?P<path>/downloads/(?P<name>\S+)) (?P<url>\S+); }",
            download,
        )
        checked = re.fullmatch(r'echo "(?P<check>(?P<sha256>[0-9a-f]{64})  (?P<path>\S+))" \| sha256sum -c', check)
        assert downloaded and checked
        assert downloaded["check"] == checked["check"] and downloaded["path"] == checked["path"]
        sha256 = checked["sha256"]
        (file,) = (file for file in files if file.sha256 == sha256)
        assert Path(file.name).name == downloaded["name"]
        path = f"{folder}/{file.name}"
        baked.append((downloaded["url"], sha256, path))
        if path.endswith(".safetensors"):
            inside = str(Path(path).parent)
            assert rest == [
                f"mkdir -p {inside}",
                f"cp {downloaded['path']} {path}",
                f'echo "{sha256} {file.bytes} 0" > {path}.verified',
                f"chmod 644 {path}",
                f"touch -d @0 {path} {path}.verified {inside} {folder}",
            ]
        else:
            made = f"{path.removesuffix('.ckpt')}.safetensors"
            assert rest[0] == f"mkdir -p {folder}"
            assert rest[1].startswith('python -B -c "')  # no bytecode in the layer
            assert rest[1].endswith(f'" {downloaded["path"]} {made} {sha256}')
            assert rest[2:] == [f"chmod 644 {made}", f"touch -d @0 {made} {folder}"]
    assert set(baked) == needed
    assert len(baked) == len(needed)


def without_mount(command: str) -> str:
    """A build command as the shell gets it, without the cache mount before it, which Docker reads."""
    mount = "--mount=type=cache,target=/downloads "
    assert command.startswith(mount)
    return command.removeprefix(mount).strip()


def run_in_build(command: str, folder: Path, content: bytes) -> subprocess.CompletedProcess[str]:
    """Run a build command in `folder` instead of /weights, with a curl that delivers this content."""
    (folder / "content").write_bytes(content)
    (folder / "downloads").mkdir(exist_ok=True)
    curl = folder / "curl"
    curl.write_text(f"""#!/bin/sh
while [ "$1" != --output ]; do shift; done
cp '{folder}/content' "$2" && echo "$2" >> '{folder}/downloaded'
""")
    curl.chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["sh", "-c", re.sub('(?<![^ "])/(weights|downloads)(?=/| |$)', rf"{folder}/\1", without_mount(command))],
        env=os.environ | {"PATH": path, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_altered_download_fails_the_build(config: dict[str, Any], tmp_path: Path) -> None:
    for run in config["build"]["run"]:
        ran = run_in_build(run["command"], tmp_path, b"altered")
        assert ran.returncode != 0
        assert "FAILED" in ran.stdout
    assert not [path for path in (tmp_path / "weights").rglob("*") if path.suffix == ".verified"]


@pytest.mark.slow
@pytest.mark.parametrize("nesting", [None, "state_dict"])
def test_the_converted_checkpoint_of_the_image_loads_without_its_source_or_a_checksum(
    config: dict[str, Any], weights: Path, tmp_path: Path, nesting: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = small_model().state_dict()
    angles = [key for key in state if key.endswith("rotary_embed.freqs")]
    state |= dict.fromkeys(angles, state[angles[0]])  # shared tensors, which safetensors refuses
    saved = tmp_path / "saved.ckpt"
    torch.save({nesting: state} if nesting else state, saved)
    sha256 = hashlib.sha256(saved.read_bytes()).hexdigest()
    (file,) = read_config("bs_roformer_viperx_1297").files
    (command,) = (run["command"] for run in config["build"]["run"] if f"{file.sha256}  " in run["command"])
    ran = run_in_build(command.replace(str(file.sha256), sha256), tmp_path, saved.read_bytes())
    assert ran.returncode == 0, ran.stderr
    name = Path(file.name).with_suffix(".safetensors").name
    assert [path.name for path in weights.iterdir()] == [name]
    assert (weights / name).stat().st_mode & 0o777 == 0o644
    convert(saved, tmp_path / "by_command.safetensors")
    with (
        safe_open(weights / name, framework="pt") as by_image,
        safe_open(tmp_path / "by_command.safetensors", framework="pt") as by_command,
    ):
        assert by_image.metadata() == {"source_sha256": sha256}  # more would be in random order
        assert set(by_image.keys()) == set(by_command.keys())
    monkeypatch.setattr(hashlib, "file_digest", None)  # fails if it is called
    model = load_model(write_yaml(tmp_path, files=[{"name": file.name, "sha256": sha256}]))
    assert_same_model(model, small_model(), chunks())


@pytest.mark.parametrize("line", [slow(0), -1], ids=["converted", "unchanged"])
def test_a_second_build_downloads_nothing_and_makes_the_same_files(
    config: dict[str, Any], tmp_path: Path, line: int
) -> None:
    saved = io.BytesIO()
    torch.save(small_model().state_dict(), saved)
    content = saved.getvalue()
    command = config["build"]["run"][line]["command"]
    command = re.sub("[0-9a-f]{64}", hashlib.sha256(content).hexdigest(), command)
    made = []
    for _ in range(2):
        ran = run_in_build(command, tmp_path, content)
        assert ran.returncode == 0, ran.stderr
        found = sorted((tmp_path / "weights").rglob("*"))
        made.append([(path, path.stat().st_mtime, path.is_dir() or path.read_bytes()) for path in found])
        assert (tmp_path / "weights").stat().st_mtime == 0
        shutil.rmtree(tmp_path / "weights")
    assert made[0] == made[1]
    assert sum(path.suffix == ".safetensors" for path, *_ in made[0]) == 1
    assert {time for _, time, _ in made[0]} == {0}
    assert len((tmp_path / "downloaded").read_text().split()) == 1


def test_an_altered_file_among_the_downloads_is_downloaded_again(config: dict[str, Any], tmp_path: Path) -> None:
    content = b"weights" * 1000
    command = re.sub("[0-9a-f]{64}", hashlib.sha256(content).hexdigest(), config["build"]["run"][-1]["command"])
    assert run_in_build(command, tmp_path, b"altered").returncode != 0
    assert run_in_build(command, tmp_path, content).returncode == 0


def test_the_other_weights_of_the_image_are_not_hashed_again(
    config: dict[str, Any], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"weights" * 1000
    sha256 = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(hashlib, "file_digest", None)  # fails if it is called
    for file in read_config("htdemucs_ft").files[:3]:
        (command,) = (run["command"] for run in config["build"]["run"] if f"{file.sha256}  " in run["command"])
        command = command.replace(str(file.sha256), sha256).replace(str(file.bytes), str(len(content)))
        ran = run_in_build(command, tmp_path, content)
        assert ran.returncode == 0, ran.stderr
        baked = dataclasses.replace(file, bytes=len(content), sha256=sha256)
        assert fetch(baked) == weights / file.name
        os.utime(weights / file.name)  # touched, so it would be hashed again
        with pytest.raises(TypeError):
            fetch(baked)


# predict.py as seen by Cog's static parser; tests/served/test_schema.py has the rest


def test_the_inputs_are_the_contract() -> None:
    source = (PROJECT / "predict.py").read_text(encoding="utf-8")
    found = [(name, kind, keywords) for name, (kind, keywords) in read_runner(source, "Predictor").inputs.items()]
    assert found == INPUTS


# The Predictor called from Python


def stem_folders(temporary: Path) -> list[Path]:
    return list(temporary.glob("stems-*"))


def song_folders(temporary: Path) -> list[Path]:
    return list(temporary.glob("song-*"))


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder for temporary files."""
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        yield folder


@pytest.fixture(scope="module")
def predictor(temporary: Path) -> predict.Predictor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEPARATION_RECIPE", "demo")
        predictor = predict.Predictor()
        predictor.setup()
    return predictor


def test_setup_prints_how_long_each_step_took(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEPARATION_RECIPE", "demo")
    predict.Predictor().setup()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(SETUP_STEPS)
    assert all(re.fullmatch(step, line) for step, line in zip(SETUP_STEPS, lines, strict=True))


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    path = tmp_path / "song.wav"
    path.write_bytes(song(1))
    return path


@pytest.mark.parametrize(
    "stems, format, rate", quick_first([("vocals_instrumental", "wav", 44100), ("all_4", "flac", 48000.0)], 1)
)
def test_floats_are_accepted_for_ints(
    predictor: predict.Predictor, audio: Path, stems: str, format: str, rate: float
) -> None:
    files = predictor.predict(audio, stems, format, 8.0, 1.0, rate, 192.0, "none", "default")
    assert [file.name for file in files] == [f"{stem}.{format}" for stem in STEMS[stems]]
    assert {soundfile.info(file).frames for file in files} == {int(rate)}


@pytest.mark.parametrize("stems", STEMS)
@pytest.mark.parametrize("format", quick_first(["wav", "mp3", "flac"], 1))
def test_every_choice_gives_decodable_files_in_the_order_of_the_contract(
    predictor: predict.Predictor, audio: Path, stems: str, format: str
) -> None:
    files = predictor.predict(audio, **QUICK | {"stems": stems, "output_format": format})
    assert [file.name for file in files] == [f"{stem}.{format}" for stem in STEMS[stems]]
    assert {read(file).shape for file in files} == {(44100, 2)}


def test_estimates_are_cached_only_if_the_environment_says_so(
    predictor: predict.Predictor, audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert predictor.cache is None
    monkeypatch.setenv("SEPARATION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(predictor, "cache", chosen_cache(default=False))
    first = [file.read_bytes() for file in predictor.predict(audio, **QUICK | {"output_format": "flac"})]
    kept = sorted((tmp_path / "cache").glob("*.*"))
    assert len(kept) == 2
    assert [file.read_bytes() for file in predictor.predict(audio, **QUICK | {"output_format": "flac"})] == first
    assert sorted((tmp_path / "cache").glob("*.*")) == kept


@pytest.mark.parametrize("bitrate", quick_first([128, 192, 320.0], 1))
def test_mp3_files_have_the_requested_bitrate(predictor: predict.Predictor, tmp_path: Path, bitrate: float) -> None:
    audio = tmp_path / "song.wav"
    audio.write_bytes(song(4))
    files = predictor.predict(audio, **QUICK | {"output_format": "mp3", "mp3_bitrate": bitrate})
    for file in files:
        assert file.stat().st_size * 8 / 4000 == pytest.approx(bitrate, rel=0.05)


@pytest.mark.parametrize("stem", quick_first(["vocals", "drums", "bass", "other", "guitar", "piano"], 2))
def test_two_stems_are_the_stem_and_the_rest_of_the_song_whatever_stems_says(
    predictor: predict.Predictor, audio: Path, stem: str
) -> None:
    files = predictor.predict(audio, **QUICK | {"two_stems": stem, "stems": "all_4"})
    assert [file.name for file in files] == [f"{stem}.wav", f"no_{stem}.wav"]
    assert np.abs(read(files[0]) + read(files[1]) - read(audio)).max() <= 1e-6


@pytest.mark.slow
def test_the_inputs_have_their_defaults_for_callers_from_python_too(predictor: predict.Predictor, audio: Path) -> None:
    assert [file.name for file in predictor.predict(audio)] == ["vocals.wav", "instrumental.wav"]
    with pytest.raises(TypeError, match="'audio'"):
        predictor.predict(stems="all_4")


@pytest.mark.parametrize(
    "inputs, start, stop", quick_first([({"start": 1.5, "end": 3}, 1.5, 3), ({"start": 2}, 2, 5)], 1)
)
def test_a_part_of_a_song_has_the_samples_of_the_whole_song(
    predictor: predict.Predictor, tmp_path: Path, inputs: dict[str, float], start: float, stop: float
) -> None:
    audio = tmp_path / "song.wav"
    audio.write_bytes(song(5))
    whole = [read(file) for file in predictor.predict(audio, **QUICK)]
    parts = [read(file) for file in predictor.predict(audio, **QUICK | inputs)]
    for stem, part in zip(whole, parts, strict=True):
        assert np.array_equal(part, stem[int(start * 44100) : int(stop * 44100)])


@pytest.mark.slow
def test_a_preview_is_the_loudest_half_minute(predictor: predict.Predictor, tmp_path: Path) -> None:
    audio = tmp_path / "song.wav"
    samples = np.full((40 * 8000, 1), 0.01, dtype=np.float32)
    samples[5 * 8000 : 35 * 8000] = 0.2
    soundfile.write(audio, samples, 8000)
    vocals, instrumental = (read(file) for file in predictor.predict(audio, **QUICK | {"preview": True}))
    assert len(vocals) == 30 * 44100
    assert (vocals + instrumental)[44100:-44100] == pytest.approx(0.2, abs=0.001)


@pytest.mark.slow
def test_an_analysis_is_among_the_metrics_without_what_cannot_be_told(
    predictor: predict.Predictor, audio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: dict[str, Any] = {}
    monkeypatch.setattr(predictor, "record_metric", figures.__setitem__)
    files = predictor.predict(SONG, **QUICK | {"analyse": True})
    expected = analyse(SONG, {file.stem: file for file in files})
    assert expected.tempo_bpm and expected.key
    lufs = expected.loudness["mixture"].integrated_lufs
    assert lufs and list(figures)[: len(METRICS)] == METRICS
    found = {name: value for name, value in figures.items() if name not in METRICS}
    assert found == {"tempo_bpm": round(expected.tempo_bpm, 2), "key": expected.key, "loudness_lufs": round(lufs, 2)}
    figures.clear()
    soundfile.write(audio, np.zeros((44100, 2)), 44100)
    predictor.predict(audio, **QUICK | {"analyse": True})
    assert list(figures) == METRICS


def test_the_metrics_of_a_prediction_are_recorded_in_their_units(
    predictor: predict.Predictor, audio: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: dict[str, Any] = {}
    monkeypatch.setattr(predictor, "record_metric", figures.__setitem__)
    monkeypatch.setattr(predictor.pool, "load_seconds", {"demo": 1.25, "not used": 100.0})
    monkeypatch.setattr(predict, "peak_memory_bytes", lambda device: 3 * 2**20)
    predictor.predict(audio, **QUICK)
    assert list(figures) == METRICS
    assert 0.01 < figures.pop("times_realtime") < 1000
    assert figures == {
        "audio_seconds": 1.0,
        "model_load_seconds": 1.25,
        "device": str(predictor.pool.choice.device),
        "peak_memory_mib": 3.0,
    }


def test_a_predictions_folder_is_removed_when_the_next_one_starts(
    predictor: predict.Predictor, audio: Path, temporary: Path
) -> None:
    first = predictor.predict(audio, **QUICK)
    assert stem_folders(temporary) == [first[0].parent]
    second = predictor.predict(audio, **QUICK)
    assert stem_folders(temporary) == [second[0].parent]
    assert not first[0].parent.exists()


@pytest.mark.parametrize(
    "content, changes, error, sentence",
    quick_first(
        [
            (b"words, words, words\n" * 100, {}, AudioError, r"'song\.wav' is not audio"),
            (b"", {}, AudioError, r"'song\.wav' is empty"),
            (None, {"overlap": 4}, InputError, r"overlap \(4 s\) must be smaller than the chunk size \(4 s\)"),
            (None, {"stems": "all_5"}, RecipeError, "'all_5'"),
            (None, {"stems": "drum_kit"}, RecipeError, "'demo' has no stems 'drum_kit': choose one of all_4, all_6, v"),
            (None, {"output_format": "wma"}, InputError, "'wma'"),
            (None, {"start": 3, "end": 2}, InputError, "a part from 3s to 2s is empty"),
            (None, {"start": 2}, InputError, "starts after the song's end at 1s"),
            (None, {"start": 1, "preview": True}, InputError, "a preview chooses its part of the song"),
        ],
        5,
    ),
)
def test_a_failed_prediction_says_why_and_does_not_affect_the_next(
    predictor: predict.Predictor,
    audio: Path,
    temporary: Path,
    content: bytes | None,
    changes: dict[str, Any],
    error: type[Exception],
    sentence: str,
) -> None:
    mixture = read(audio)
    if content is not None:
        audio.write_bytes(content)
    with pytest.raises(error, match=sentence) as caught:
        predictor.predict(audio, **QUICK | changes)
    assert "\n" not in str(caught.value)
    assert str(audio.parent) not in str(caught.value)
    assert stem_folders(temporary) == []
    audio.write_bytes(song(1))
    vocals, instrumental = (read(file) for file in predictor.predict(audio, **QUICK))
    assert np.abs(vocals + instrumental - mixture).max() <= 1e-6


def test_a_cancelled_prediction_leaves_no_folder(predictor: predict.Predictor, tmp_path: Path, temporary: Path) -> None:
    audio = tmp_path / "song.wav"
    audio.write_bytes(song(20))
    before = set(stem_folders(temporary))

    async def cancelled() -> None:
        prediction = asyncio.create_task(predictor.run(audio, **QUICK))
        while not (prediction.done() or set(stem_folders(temporary)) - before):
            await asyncio.sleep(0.01)
        prediction.cancel()
        await prediction

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())
    assert set(stem_folders(temporary)) <= before and song_folders(temporary) == []


def test_the_log_is_progress_for_npm_replicate_and_names_no_path(
    predictor: predict.Predictor, tmp_path: Path, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audio = tmp_path / "song.wav"
    audio.write_bytes(song(10))
    predictor.predict(audio, **QUICK)
    shown = capsys.readouterr()
    assert shown.err == "" and shown.out.endswith("\n")
    assert str(temporary) not in shown.out and str(tmp_path) not in shown.out
    lines = shown.out.splitlines()
    stages = [line for line in lines if not PROGRESS_LINE.match(line)]
    assert stages == ["decoding", "demo", "writing vocals", "writing instrumental", "done"]
    assert lines[0] == "decoding"
    matches = [match for line in lines if (match := PROGRESS_LINE.match(line))]
    percents = [int(match[1]) for match in matches]
    assert percents[0] == 0 and percents[-1] == 100
    assert percents == sorted(set(percents)) and len(percents) > 4
    assert all(int(match[1]) == 100 * int(match[2]) // int(match[3]) for match in matches)


@pytest.mark.parametrize(
    "audio", ["/etc/passwd", str(SONG), "file:///etc/passwd", b"/etc/passwd", 3, None, "x" * 10**6]
)
def test_an_audio_that_is_not_a_path_is_refused_and_named(
    predictor: predict.Predictor, temporary: Path, audio: object
) -> None:
    with pytest.raises(InputError, match=r"^audio is .*: give a URL .*or a file$") as caught:
        predictor.predict(audio, **QUICK)  # type: ignore[arg-type]
    assert repr(audio)[:100] in str(caught.value) and len(str(caught.value)) < 200
    assert stem_folders(temporary) == song_folders(temporary) == []


@pytest.fixture
def upload(predictor: predict.Predictor) -> Callable[[bytes], URLPath]:
    """Makes what Cog passes for a data URI."""
    return lambda content: URLPath(source="data:", filename="song.wav", fileobj=io.BytesIO(content))


def test_an_upload_is_separated_and_then_deleted(
    predictor: predict.Predictor, temporary: Path, upload: Callable[[bytes], URLPath]
) -> None:
    audio = upload(song(1))
    assert audio.convert() is audio  # Cog calls this; the upload stays unread
    files = predictor.predict(audio, **QUICK)
    assert np.abs(read(files[0]) + read(files[1]) - read(song(1))).max() <= 1e-6
    assert stem_folders(temporary) == [files[0].parent] and song_folders(temporary) == []


@pytest.mark.parametrize("name", quick_first(["", ".", "..", "....wav"], 2))
def test_an_upload_without_a_name_or_named_with_dots_is_separated(
    predictor: predict.Predictor, temporary: Path, name: str
) -> None:
    audio = URLPath(source="data:", filename=name, fileobj=io.BytesIO(song(0.3)))
    files = predictor.predict(audio, **QUICK)
    assert [path.name for path in files] == ["vocals.wav", "instrumental.wav"]
    assert song_folders(temporary) == []


def test_an_upload_is_accepted_up_to_the_limit_and_refused_beyond_it(
    temporary: Path, upload: Callable[[bytes], URLPath], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEPARATION_RECIPE", "demo")
    monkeypatch.setenv("SEPARATION_MAX_MIB", "0.5")
    predictor = predict.Predictor()
    predictor.setup()
    content = song(1).ljust(2**19, b"\0")
    assert len(predictor.predict(upload(content), **QUICK)) == 2
    with pytest.raises(AudioError, match=r"^'song\.wav' has more than 0\.5 MiB, the limit here: send a smaller file$"):
        predictor.predict(upload(content + b"\0"), **QUICK)
    assert song_folders(temporary) == []


class EvenModel(SeparationModel):
    """Gives each stem an equal share of the mixture."""

    channels = 2

    def __init__(self, name: str, stems: tuple[str, ...]) -> None:
        super().__init__(identity(stems, name=name, chunk_samples=200_000))
        self.runs, self.length = 0, 0

    def forward(self, chunks: Tensor) -> Tensor:
        self.runs, self.length = self.runs + 1, chunks.shape[-1]
        return torch.stack([chunks / len(self.stems)] * len(self.stems), dim=1)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[EvenModel]:
    """The models that the engine loads from now on, in order, each an EvenModel."""
    models: list[EvenModel] = []

    def load_model(name: str, *, stems: tuple[str, ...], **_: Any) -> EvenModel:
        models.append(EvenModel(name, stems))
        return models[-1]

    monkeypatch.setattr(pool, "load_model", load_model)
    return models


@pytest.mark.parametrize("name", ["SEPARATION_MAX_SECONDS", "SEPARATION_MAX_MIB"])
def test_setup_fails_if_a_limit_is_not_a_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "3h")
    with pytest.raises(InputError, match=f"^{name} is '3h': set it to a number above 0, or leave it out$"):
        predict.Predictor().setup()


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch can use a GPU here")
def test_setup_fails_with_the_drivers_version_if_pytorch_cannot_use_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia0").touch()
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  515.105.01  Release\n")
    monkeypatch.setattr(device, "NVIDIA_DEVICES", tmp_path)
    monkeypatch.setattr(device, "NVIDIA_VERSION", tmp_path / "version")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(InputError, match=r"cannot use this machine's NVIDIA GPU with driver 515\.105\.01 \("):
        predict.Predictor().setup()


@pytest.mark.parametrize("name", ["SEPARATION_LOCAL_URLS", "SEPARATION_PRIVATE_URLS"])
def test_setup_fails_if_a_switch_is_neither_on_nor_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "yes")
    with pytest.raises(InputError, match=f"^{name} is 'yes': set it to on or off, or leave it out$"):
        predict.Predictor().setup()


@pytest.fixture
def with_standard(temporary: Path, loaded: list[EvenModel], monkeypatch: pytest.MonkeyPatch) -> predict.Predictor:
    """A predictor without environment variables."""
    monkeypatch.delenv("SEPARATION_RECIPE", raising=False)
    predictor = predict.Predictor()
    predictor.setup()
    return predictor


def test_setup_warms_up_the_models_of_all_4_and_all_6_loads_its_own_once(
    audio: Path, with_standard: predict.Predictor, loaded: list[EvenModel]
) -> None:
    expected = [("bs_roformer_viperx_1297", ("vocals",)), ("htdemucs_ft", ("drums", "bass", "other"))]
    assert [(model.name, model.stems) for model in loaded] == expected
    assert [model.runs for model in loaded] == [1, 1]
    for stems in ("vocals_instrumental", "all_4", "all_6", "all_6"):
        with_standard.predict(audio, **QUICK | {"stems": stems})
    expected.append(("htdemucs_6s", ("drums", "bass", "guitar", "piano", "other")))
    assert [(model.name, model.stems) for model in loaded] == expected


@pytest.fixture
def with_viperx(
    temporary: Path, loaded: list[EvenModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> predict.Predictor:
    """A predictor of the demo recipe that also has BS-RoFormer's weights, but no others of the standard recipe."""
    monkeypatch.setenv("SEPARATION_RECIPE", "demo")
    monkeypatch.setenv("SEPARATION_WEIGHTS", str(tmp_path))
    (tmp_path / read_config("bs_roformer_viperx_1297").files[0].name).touch()
    predictor = predict.Predictor()
    predictor.setup()
    return predictor


def test_a_prediction_may_choose_a_recipe_without_affecting_others(
    audio: Path, with_viperx: predict.Predictor, loaded: list[EvenModel]
) -> None:
    for recipe in ("standard", "default", "demo"):
        with_viperx.predict(audio, **QUICK | {"recipe": recipe})
    assert [model.name for model in loaded] == ["demo", "bs_roformer_viperx_1297"]
    assert [model.runs for model in loaded] == [3, 1]


@pytest.mark.parametrize(
    "changes",
    [{"stems": "all_4"}, {"stems": "all_6"}, {"stems": "drum_kit"}, {"two_stems": "drums"}, {"two_stems": "guitar"}],
)
def test_a_recipe_with_missing_weights_is_refused_unless_it_is_the_servers_own(
    audio: Path,
    with_viperx: predict.Predictor,
    loaded: list[EvenModel],
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sentence = "^recipe 'standard' is not on this server, which runs 'demo': leave recipe at 'default'$"
    with pytest.raises(RecipeError, match=sentence):
        with_viperx.predict(audio, **QUICK | changes | {"recipe": "standard"})
    assert [model.name for model in loaded] == ["demo"]
    monkeypatch.setenv("SEPARATION_RECIPE", "standard")
    with_viperx.setup()
    assert "downloading" not in capsys.readouterr().out
    with_viperx.predict(audio, **QUICK | changes | {"recipe": "standard"})
    assert len(loaded) > 2
    assert "\ndownloading the weights of " in "\n" + capsys.readouterr().out


@pytest.mark.parametrize(
    "chunk_size, overlap, samples", [(8, 4, 200_000), (8, 3, 8 * 44100), (9, 4, 9 * 44100), (4, 1, 4 * 44100)]
)
def test_a_model_runs_on_its_own_chunks_by_default_and_on_requested_ones_otherwise(
    audio: Path,
    with_standard: predict.Predictor,
    loaded: list[EvenModel],
    chunk_size: int,
    overlap: int,
    samples: int,
) -> None:
    assert [model.length for model in loaded] == [200_000, 200_000]  # during setup
    with_standard.predict(audio, **QUICK | {"chunk_size": chunk_size, "overlap": overlap})
    assert loaded[0].length == samples


def test_two_stems_run_only_the_models_they_need(
    audio: Path, with_standard: predict.Predictor, loaded: list[EvenModel]
) -> None:
    with_standard.predict(audio, **QUICK | {"two_stems": "drums"})
    assert [(model.name, model.runs) for model in loaded] == [("bs_roformer_viperx_1297", 1), ("htdemucs_ft", 2)]
    with_standard.predict(audio, **QUICK | {"two_stems": "vocals"})
    assert [model.runs for model in loaded] == [2, 2]
    with_standard.predict(audio, **QUICK | {"two_stems": "drums", "stems": "all_6"})
    assert [(model.name, model.stems, model.runs) for model in loaded[2:]] == [("htdemucs_6s", ("drums",), 1)]


def test_the_drum_kit_is_separated_from_the_drums_by_a_model_loaded_on_first_use(
    audio: Path, with_standard: predict.Predictor, loaded: list[EvenModel]
) -> None:
    files = with_standard.predict(audio, **QUICK | {"stems": "drum_kit"})
    kit = ("kick", "snare", "toms", "hihat", "cymbals")
    assert [file.name for file in files] == [f"{stem}.wav" for stem in kit]
    assert [(model.name, model.stems, model.runs) for model in loaded[2:]] == [("drumsep", kit, 1)]
    for file in files:
        assert np.abs(read(file) - read(audio) / 15).max() <= 1e-6  # a fifth of a third of the song
