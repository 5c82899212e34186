"""cog.yaml, predict.py as Cog's static parser sees it, the Predictor called from Python, and Cog's real server."""

import ast
import base64
import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import soundfile
import torch
import yaml
from cog import CancelationException
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

import predict
from conftest import PROJECT, SHARED
from separation import separator
from separation.catalogue import fetch, files_for, read_config
from separation.checkpoints import convert, load_model
from separation.errors import AudioError, InputError, RecipeError
from separation.models.base import SeparationModel
from separation.recipes import load_recipe
from served_process import Server
from small_model import chunks, small_model, write_yaml

SCHEMA = SHARED / "schema" / "cog_config_schema_v1.0.json"
SONG = PROJECT / "weights" / "demo" / "song.flac"
STEMS = {
    "vocals_instrumental": ["vocals", "instrumental"],
    "all_4": ["vocals", "drums", "bass", "other"],
    "all_6": ["vocals", "drums", "bass", "guitar", "piano", "other"],
}
# The published contract: (name, type, keywords of Input). The first six never change.
INPUTS: list[tuple[str, str, dict[str, Any]]] = [
    ("audio", "Path", {"description": "Audio file to separate (WAV, MP3, FLAC, OGG, etc.)"}),
    (
        "stems",
        "str",
        {
            "description": "Which stems to extract",
            "default": "vocals_instrumental",
            "choices": ["vocals_instrumental", "all_4", "all_6"],
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
            "description": "Give only this stem and the rest of the song (such as no_vocals); stems is then ignored",
            "default": "none",
            "choices": ["none", "vocals", "drums", "bass", "other"],
        },
    ),
    (
        "recipe",
        "str",
        {
            "description": "Models: standard for quality, demo for a quick rough try, default leaves it to the server",
            "default": "default",
            "choices": ["default", "standard", "demo"],
        },
    ),
]
QUICK = {"stems": "vocals_instrumental", "output_format": "wav", "chunk_size": 4, "overlap": 1, "sample_rate": 44100}
QUICK |= {"mp3_bitrate": 320, "two_stems": "none", "recipe": "default"}
# What `parseProgressFromLogs` of npm `replicate` reads: percent, something between bars, done/total.
PROGRESS_LINE = re.compile(r"\s*(\d+)%\s*\|.+?\|\s*(\d+)/(\d+)")
METRICS = ["audio_seconds", "times_realtime", "model_load_seconds", "device", "peak_memory_mib"]


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
    assert build["cuda"] == "13.0"
    assert build["python_version"] == "3.11"
    assert build["python_requirements"] == "requirements.txt"
    assert "python_packages" not in build
    assert "ffmpeg" in build["system_packages"]
    assert config["predict"] == "predict.py:Predictor"
    pins = (PROJECT / "requirements.txt").read_text(encoding="utf-8").split()
    assert f"cog=={build['sdk_version']}" in pins


def test_exactly_the_weights_of_recipe_standard_are_baked_each_with_its_sha256(config: dict[str, Any]) -> None:
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
        assert "\n" not in run["command"].strip()  # Cog refuses it
        curl, check, *rest = run["command"].split(" && ")
        downloaded = re.fullmatch(r"curl .*--fail .*--output (\S+) (\S+)", curl)
        checked = re.fullmatch(r'echo "([0-9a-f]{64})  (\S+)" \| sha256sum -c', check)
        assert downloaded and checked
        path, sha256 = checked[2], checked[1]
        assert downloaded[1] == path
        baked.append((downloaded[2], sha256, path))
        if path.endswith(".safetensors"):
            (size_bytes,) = (file.bytes for file in files if file.sha256 == sha256)
            assert rest == [f"touch -d @0 {path}", f'echo "{sha256} {size_bytes} 0" > {path}.verified']
        else:
            written, *rest = rest
            assert written.endswith(f'" {path} {path.removesuffix(".ckpt")}.safetensors {sha256}')
            assert rest == [f"chmod 644 {path.removesuffix('.ckpt')}.safetensors", f"rm {path}"]
    assert set(baked) == needed
    assert len(baked) == len(needed)


def run_in_build(command: str, folder: Path, content: bytes) -> subprocess.CompletedProcess[str]:
    """Run one of the image's build commands in `folder` in place of /weights, with a curl that brings this content."""
    (folder / "content").write_bytes(content)
    curl = folder / "curl"
    curl.write_text(f"""#!/bin/sh
while [ "$1" != --output ]; do shift; done
mkdir -p "$(dirname "$2")" && cp '{folder}/content' "$2"
""")
    curl.chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["sh", "-c", command.replace("/weights/", f"{folder}/weights/")],
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


@pytest.mark.parametrize("nesting", [None, "state_dict"])
def test_the_images_converted_checkpoint_loads_without_its_source_and_without_a_checksum(
    config: dict[str, Any], weights: Path, tmp_path: Path, nesting: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = small_model().state_dict()
    angles = [key for key in state if key.endswith("rotary_embed.freqs")]
    state |= dict.fromkeys(angles, state[angles[0]])  # shared, which safetensors refuses
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
        assert by_image.metadata() == by_command.metadata() | {"source_name": file.name}
        assert set(by_image.keys()) == set(by_command.keys())
    monkeypatch.setattr(hashlib, "file_digest", None)  # calling it would be an error
    model = load_model(write_yaml(tmp_path, files=[{"name": file.name, "sha256": sha256}]))
    assert torch.equal(model(chunks()), small_model()(chunks()))


def test_the_images_other_weights_are_not_hashed_again(
    config: dict[str, Any], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"weights" * 1000
    sha256 = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(hashlib, "file_digest", None)  # calling it would be an error
    for file in read_config("htdemucs_ft").files[:3]:
        (command,) = (run["command"] for run in config["build"]["run"] if f"{file.sha256}  " in run["command"])
        command = command.replace(str(file.sha256), sha256).replace(str(file.bytes), str(len(content)))
        ran = run_in_build(command, tmp_path, content)
        assert ran.returncode == 0, ran.stderr
        baked = dataclasses.replace(file, bytes=len(content), sha256=sha256)
        assert fetch(baked) == weights / file.name
        os.utime(weights / file.name)  # changed: now it would be hashed
        with pytest.raises(TypeError):
            fetch(baked)


# predict.py as Cog's static parser sees it


def methods() -> dict[str, ast.FunctionDef]:
    tree = ast.parse((PROJECT / "predict.py").read_text(encoding="utf-8"))
    (predictor,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Predictor")
    assert [ast.unparse(base) for base in predictor.bases] == ["BasePredictor"]
    return {node.name: node for node in predictor.body if isinstance(node, ast.FunctionDef)}  # no async ones


def inputs() -> list[tuple[ast.arg, ast.Call]]:
    arguments = methods()["predict"].args
    assert not (arguments.posonlyargs or arguments.kwonlyargs or arguments.vararg or arguments.kwarg)
    calls = []
    for call in arguments.defaults:
        assert isinstance(call, ast.Call) and ast.unparse(call.func) == "Input" and not call.args
        calls.append(call)
    return list(zip(arguments.args[1:], calls, strict=True))


def plain_literal(node: ast.expr) -> Any:
    if isinstance(node, ast.List):
        return [plain_literal(item) for item in node.elts]
    assert isinstance(node, ast.Constant), f"{ast.unparse(node)} in line {node.lineno} is not a plain literal"
    return node.value


def test_the_signature_is_the_contract_in_plain_literals() -> None:
    found = [
        (
            argument.arg,
            ast.unparse(argument.annotation),
            {word.arg: plain_literal(word.value) for word in call.keywords},
        )
        for argument, call in inputs()
        if argument.annotation is not None
    ]
    assert found == INPUTS
    returned = methods()["predict"].returns
    assert returned is not None and ast.unparse(returned) == "List[Path]"


def test_no_comment_and_no_joined_strings_stand_in_an_input() -> None:
    with (PROJECT / "predict.py").open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type != tokenize.NL]
    for _, call in inputs():
        assert call.end_lineno is not None and call.end_col_offset is not None
        start, end = (call.lineno, call.col_offset), (call.end_lineno, call.end_col_offset)
        kinds = [token.type for token in tokens if start <= token.start < end]
        assert set(kinds) <= {tokenize.NAME, tokenize.OP, tokenize.STRING, tokenize.NUMBER}
        assert (tokenize.STRING, tokenize.STRING) not in list(itertools.pairwise(kinds))


def test_setup_and_predict_are_plain_methods() -> None:
    for name in ("setup", "predict"):
        method = methods()[name]
        assert not method.decorator_list
        assert not any(isinstance(node, ast.Yield | ast.YieldFrom | ast.Await) for node in ast.walk(method))


# The Predictor called from Python


def song(seconds: float, *, gain: float = 1.0) -> bytes:
    """The start of the demo song as a float WAV file."""
    audio, rate = soundfile.read(SONG, dtype="float32", frames=int(seconds * 44100))
    file = io.BytesIO()
    soundfile.write(file, audio * np.float32(gain), rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def read(file: Path | bytes) -> NDArray[np.float32]:
    return soundfile.read(io.BytesIO(file) if isinstance(file, bytes) else file, dtype="float32", always_2d=True)[0]


def stem_folders(temporary: Path) -> list[Path]:
    return list(temporary.glob("stems-*"))


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that temporary files go to."""
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


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    path = tmp_path / "song.wav"
    path.write_bytes(song(1))
    return path


@pytest.mark.parametrize("stems, format, rate", [("vocals_instrumental", "wav", 44100), ("all_4", "flac", 48000.0)])
def test_a_str_and_floats_for_ints_are_taken(
    predictor: predict.Predictor, audio: Path, stems: str, format: str, rate: float
) -> None:
    files = predictor.predict(str(audio), stems, format, 8.0, 1.0, rate, 192.0, "none", "default")
    assert [file.name for file in files] == [f"{stem}.{format}" for stem in STEMS[stems]]
    assert {soundfile.info(file).frames for file in files} == {int(rate)}


@pytest.mark.parametrize("stems", STEMS)
@pytest.mark.parametrize("format", ["wav", "mp3", "flac"])
def test_every_choice_gives_files_that_decode_in_the_contracts_order(
    predictor: predict.Predictor, audio: Path, stems: str, format: str
) -> None:
    files = predictor.predict(audio, **QUICK | {"stems": stems, "output_format": format})
    assert [file.name for file in files] == [f"{stem}.{format}" for stem in STEMS[stems]]
    assert {read(file).shape for file in files} == {(44100, 2)}


@pytest.mark.parametrize("bitrate", [128, 192, 320.0])
def test_mp3_files_have_the_asked_bitrate(predictor: predict.Predictor, tmp_path: Path, bitrate: float) -> None:
    audio = tmp_path / "song.wav"
    audio.write_bytes(song(4))
    files = predictor.predict(audio, **QUICK | {"output_format": "mp3", "mp3_bitrate": bitrate})
    for file in files:
        assert file.stat().st_size * 8 / 4000 == pytest.approx(bitrate, rel=0.05)


@pytest.mark.parametrize("stem", ["vocals", "drums", "bass", "other"])
def test_two_stems_are_that_stem_and_the_song_without_it_whatever_stems_says(
    predictor: predict.Predictor, audio: Path, stem: str
) -> None:
    files = predictor.predict(audio, **QUICK | {"two_stems": stem, "stems": "all_6"})
    assert [file.name for file in files] == [f"{stem}.wav", f"no_{stem}.wav"]
    assert np.abs(read(files[0]) + read(files[1]) - read(audio)).max() <= 1e-6


def test_the_figures_of_a_prediction_are_recorded_with_their_units(
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


def test_each_predictions_folder_goes_when_the_next_begins(
    predictor: predict.Predictor, audio: Path, temporary: Path
) -> None:
    first = predictor.predict(audio, **QUICK)
    assert stem_folders(temporary) == [first[0].parent]
    second = predictor.predict(audio, **QUICK)
    assert stem_folders(temporary) == [second[0].parent]
    assert not first[0].parent.exists()


@pytest.mark.parametrize(
    "content, changes, error, sentence",
    [
        (b"words, words, words\n" * 100, {}, AudioError, r"'song\.wav' is not audio"),
        (b"", {}, AudioError, r"'song\.wav' is empty"),
        (None, {"overlap": 4}, InputError, r"overlap \(4 s\) must be smaller than the chunk size \(4 s\)"),
        (None, {"stems": "all_5"}, RecipeError, "'all_5'"),
        (None, {"output_format": "ogg"}, InputError, "'ogg'"),
    ],
)
def test_a_failed_prediction_says_why_leaves_no_folder_and_the_next_is_right(
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


def test_a_cancelled_prediction_leaves_no_folder(
    predictor: predict.Predictor, audio: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancel(log: object, share: float, stage: str) -> None:
        assert stem_folders(temporary) != []
        if share > 0:
            raise CancelationException

    monkeypatch.setattr(predict._ProgressLog, "__call__", cancel)
    with pytest.raises(CancelationException):
        predictor.predict(audio, **QUICK)
    assert stem_folders(temporary) == []


def test_the_log_is_progress_that_npm_replicate_reads_and_names_no_path(
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


class EvenModel(SeparationModel):
    """Gives each of its stems an equal share of the mixture."""

    def __init__(self, name: str, stems: tuple[str, ...]) -> None:
        super().__init__()
        self.name, self.stems, self.sample_rate, self.chunk_samples, self.channels = name, stems, 44100, 352_800, 2
        self.runs = 0

    def forward(self, chunks: Tensor) -> Tensor:
        self.runs += 1
        return torch.stack([chunks / len(self.stems)] * len(self.stems), dim=1)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[EvenModel]:
    """The models that the engine loads from here on, in order; each is an EvenModel of that name."""
    models: list[EvenModel] = []

    def load_model(name: str, *, stems: tuple[str, ...], **_: Any) -> EvenModel:
        models.append(EvenModel(name, stems))
        return models[-1]

    monkeypatch.setattr(separator, "load_model", load_model)
    return models


def test_setup_loads_and_runs_what_vocals_and_all_4_need_and_all_6_loads_its_own_once(
    audio: Path, temporary: Path, loaded: list[EvenModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEPARATION_RECIPE", raising=False)
    predictor = predict.Predictor()
    predictor.setup()
    expected = [("bs_roformer_viperx_1297", ("vocals",)), ("htdemucs_ft", ("drums", "bass", "other"))]
    assert [(model.name, model.stems) for model in loaded] == expected
    assert [model.runs for model in loaded] == [1, 1]
    for stems in ("vocals_instrumental", "all_4", "all_6", "all_6"):
        predictor.predict(audio, **QUICK | {"stems": stems})
    expected.append(("htdemucs_6s", ("drums", "bass", "guitar", "piano", "other")))
    assert [(model.name, model.stems) for model in loaded] == expected


def test_a_prediction_may_choose_another_recipe_for_itself_alone(
    audio: Path, temporary: Path, loaded: list[EvenModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEPARATION_RECIPE", "demo")
    predictor = predict.Predictor()
    predictor.setup()
    for recipe in ("standard", "default", "demo"):
        predictor.predict(audio, **QUICK | {"recipe": recipe})
    assert [model.name for model in loaded] == ["demo", "bs_roformer_viperx_1297"]
    assert [model.runs for model in loaded] == [3, 1]


def test_two_stems_run_no_model_that_they_do_not_need(
    audio: Path, temporary: Path, loaded: list[EvenModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEPARATION_RECIPE", raising=False)
    predictor = predict.Predictor()
    predictor.setup()
    predictor.predict(audio, **QUICK | {"two_stems": "drums", "stems": "all_6"})
    assert [(model.name, model.runs) for model in loaded] == [("bs_roformer_viperx_1297", 1), ("htdemucs_ft", 2)]
    predictor.predict(audio, **QUICK | {"two_stems": "vocals"})
    assert [model.runs for model in loaded] == [2, 2]


# Cog's real server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server"), SEPARATION_RECIPE="demo") as server:
        assert server.health()["status"] == "READY", server.log.read_text()
        yield server


def decoded(uri: str) -> tuple[str, NDArray[np.float32]]:
    """The media type and the samples of a data URI."""
    head, _, content = uri.partition(";base64,")
    return head.removeprefix("data:"), read(base64.b64decode(content))


def test_the_server_answers_a_song_alone_with_stems_that_add_up_to_it(server: Server) -> None:
    prediction = server.predict(song(3))
    assert prediction["status"] == "succeeded"
    stems = [decoded(uri) for uri in prediction["output"]]
    assert [kind for kind, _ in stems] == ["audio/wav"] * 2
    assert [samples.shape for _, samples in stems] == [(132_300, 2)] * 2
    assert np.abs(stems[0][1] + stems[1][1] - read(song(3))).max() <= 1e-6
    assert np.abs(stems[0][1]).max() > 0
    lines = prediction["logs"].splitlines()
    assert lines[:2] == ["decoding", f"  0%|{' ' * 20}| 0/20"]
    assert lines[-2:] == ["done", f"100%|{'█' * 20}| 20/20"]


def test_the_servers_answer_carries_the_figures_of_the_prediction(server: Server) -> None:
    figures = server.predict(song(3))["metrics"]
    assert set(METRICS) <= set(figures)
    assert figures["audio_seconds"] == 3.0
    assert 0.99 < figures["times_realtime"] / (3 / figures["predict_time"]) < 5  # predict_time holds a little more
    assert 0 < figures["model_load_seconds"] < 60
    assert re.fullmatch(r"cpu|mps|cuda(:\d+)?", figures["device"])
    assert 100 < figures["peak_memory_mib"] < 100_000


def test_the_server_gives_two_stems_in_mp3_of_the_asked_bitrate(server: Server) -> None:
    prediction = server.predict(song(3), two_stems="drums", output_format="mp3", mp3_bitrate=128, recipe="demo")
    assert prediction["status"] == "succeeded", prediction["error"]
    assert len(prediction["output"]) == 2
    for uri in prediction["output"]:
        head, _, content = uri.partition(";base64,")
        assert head == "data:audio/mpeg"
        assert len(base64.b64decode(content)) * 8 / 3000 == pytest.approx(128, rel=0.06)


def test_the_server_gives_six_stems_of_another_format_and_says_that_they_were_scaled(server: Server) -> None:
    loud = song(1, gain=16)
    prediction = server.predict(loud, stems="all_6", output_format="flac", chunk_size=4.0, overlap=1, sample_rate=48000)
    assert prediction["status"] == "succeeded"
    stems = [decoded(uri) for uri in prediction["output"]]
    assert [samples.shape for _, samples in stems] == [(48_000, 2)] * 6
    assert max(np.abs(samples).max() for _, samples in stems) == pytest.approx(1, abs=1e-3)
    assert "all stems are scaled by" in prediction["logs"]
    assert len(stem_folders(server.temporary)) == 1


@pytest.mark.parametrize(
    "content, inputs, sentence",
    [
        (b"words, words, words\n" * 100, {}, "is not audio"),
        (b"", {}, "is empty (0 bytes)"),
        (None, {"chunk_size": 4, "overlap": 8}, "overlap (8 s) must be smaller than the chunk size (4 s)"),
    ],
)
def test_the_server_fails_a_bad_prediction_with_one_sentence(
    server: Server, content: bytes | None, inputs: dict[str, Any], sentence: str
) -> None:
    prediction = server.predict(song(1) if content is None else content, **inputs)
    assert prediction["status"] == "failed"
    assert sentence in prediction["error"]
    assert "\n" not in prediction["error"] and str(server.temporary) not in prediction["error"]
    assert prediction["logs"] in ("", f"decoding\n  0%|{' ' * 20}| 0/20\n")
    assert stem_folders(server.temporary) == []


def test_a_server_without_weights_and_network_says_at_once_which_file_is_missing(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: a connection is refused
        proxy = f"http://127.0.0.1:{closed.getsockname()[1]}"
        started = time.monotonic()
        environment = {"SEPARATION_RECIPE": "standard", "SEPARATION_WEIGHTS": str(weights), "https_proxy": proxy}
        with Server(tmp_path, **environment) as server:
            health = server.health()
            assert health["status"] == "SETUP_FAILED"
            assert time.monotonic() - started < 60
            assert "model_bs_roformer_ep_317_sdr_12.9755.ckpt is not in" in health["setup"]["logs"]
            assert "python -m separation models download bs_roformer_viperx_1297" in health["setup"]["logs"]
            assert server.request("POST", "/predictions", {"input": {"audio": "x"}})[0] == 503
