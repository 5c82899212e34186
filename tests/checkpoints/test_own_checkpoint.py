"""A checkpoint of the user's own is found by its weights, its folder or its name; the documented steps add one."""

import hashlib
import json
import re
import shlex
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from demucs.htdemucs import HTDemucs
from safetensors.torch import save_file

from helpers.common import PROJECT, quick_models
from helpers.small_model import DOCUMENT, HYPER_PARAMETERS, assert_same_model, chunks, small_model, write_weights
from helpers.weights_server import Server
from separation.checkpoints import catalogue
from separation.checkpoints.build import architectures_with, build, random_weights
from separation.checkpoints.catalogue import available, is_here, read_config
from separation.checkpoints.load import load_model
from separation.cli.main import main
from separation.errors import CheckpointError, RecipeError
from separation.models.bs_roformer import BSRoFormer

SIZES = {"freqs_per_bands": [25] * 41, "stft_n_fft": 2048, "stft_win_length": 2048, "stft_hop_length": 1024}
COMMUNITY = {
    "audio": DOCUMENT["audio"],
    "model": HYPER_PARAMETERS | SIZES,
    "training": {"instruments": ["Vocals", "Drums"], "target_instrument": None},
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Models this small only lose time to more."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def own_model() -> BSRoFormer:
    return small_model(**SIZES | {"freqs_per_bands": (25,) * 41})


def put(folder: Path, *names: str) -> None:
    """Files of these names: weights and YAML files that fit each other."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name.endswith((".yaml", ".yml")):
            (folder / name).write_text(yaml.safe_dump(COMMUNITY), encoding="utf-8")
        else:
            write_weights(own_model().state_dict(), folder / name)


# Weights, and the YAML beside them


@pytest.mark.parametrize(
    "config, others",
    [
        ("x.v1.yaml", ["other.yaml", "config_other.yaml"]),
        ("x.v1.yml", ["other.yaml"]),
        ("config_x.v1.yaml", ["other.yaml", "y.yaml"]),
        ("x.v1_config.yaml", ["other.yaml"]),
        ("x.v1.ckpt.yaml", ["other.yaml"]),
        ("model_data/mdx_c_configs/x.v1.yaml", ["other.yaml"]),  # as in UVR's folders
        ("config_of_some_roformer.yaml", []),
        ("whatever.yml", ["y.yaml", "y.ckpt", "config_z.yaml", "z.pth"]),  # the others belong to other weights
    ],
)
def test_weights_alone_find_their_yaml(tmp_path: Path, config: str, others: list[str]) -> None:
    put(tmp_path, "x.v1.ckpt", *others)
    put((tmp_path / config).parent, Path(config).name)
    assert read_config(tmp_path / "x.v1.ckpt").source == tmp_path / config
    model = load_model(tmp_path / "x.v1.ckpt")
    assert model.name == "x.v1" and model.stems == ("vocals", "drums")
    assert_same_model(model, own_model(), chunks(2048))


@pytest.mark.parametrize(
    "others, found",
    [
        ([], "there is no YAML"),
        (["y.yaml", "y.ckpt"], "there is no YAML"),
        (["a.yaml", "b.yml"], r"any of a\.yaml, b\.yml may be it"),
    ],
)
def test_weights_without_their_yaml_say_which_file_is_wanted_where(
    tmp_path: Path, others: list[str], found: str
) -> None:
    put(tmp_path, "x.ckpt", *others)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path / "x.ckpt")
    message = rf"^{tmp_path}/x\.ckpt needs the YAML .* published with, and {found}: put it into {tmp_path} as x\.yaml$"
    assert re.match(message, str(caught.value))


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^there is no file .*nothing\.ckpt: give a checkpoint's path"):
        load_model(tmp_path / "nothing.ckpt")


def test_weights_of_any_name_are_found_by_their_path(tmp_path: Path) -> None:
    put(tmp_path, "weights.final", "weights.yaml")
    assert load_model(tmp_path / "weights.final").name == "weights"


def test_weights_that_were_asked_for_go_before_those_of_the_yaml(tmp_path: Path) -> None:
    put(tmp_path, "x.ckpt")
    document = COMMUNITY | {"files": [{"name": "other.ckpt"}]}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(document))
    assert_same_model(load_model(tmp_path / "x.ckpt"), own_model(), chunks(2048))
    files = [{"name": f"{stem}.ckpt", "stem": stem} for stem in ("vocals", "drums")]
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(document | {"files": files}))
    with pytest.raises(
        CheckpointError, match=r"x\.yaml needs 2 files and .*x\.ckpt is only one: give the model's name"
    ):
        load_model(tmp_path / "x.ckpt")


# Folders and pairs, by a path without a suffix


@pytest.mark.parametrize(
    "names",
    [
        ("own/weights.ckpt", "own/config.yaml"),
        ("own/weights.pth", "own/weights.safetensors", "own/config.yml"),
        ("own.ckpt", "own.yaml", "other.ckpt", "other.yaml"),
        ("own.th", "config_own.yaml", "other.ckpt", "other.yaml"),
    ],
)
def test_a_folder_or_a_pair_is_found_by_its_name(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        put((tmp_path / name).parent, Path(name).name)
    model = load_model(tmp_path / "own")
    assert model.name == "own"
    assert_same_model(model, own_model(), chunks(2048))


@pytest.mark.parametrize(
    "names, message",
    [
        ((), r"own must have one weights file and one YAML, not neither"),
        (("a.ckpt", "b.ckpt", "a.yaml"), r"own must have one .*, not a\.yaml, a\.ckpt, b\.ckpt"),
        (("a.ckpt", "a.yaml", "b.yaml"), r"own must have one .*, not a\.yaml, b\.yaml, a\.ckpt"),
        (("a.ckpt",), r"own/a\.ckpt needs the YAML file that it was published with, and there is no YAML"),
        (("a.yaml",), r"own/a\.yaml names no weights files and no weights are beside it"),
    ],
)
def test_a_folder_that_is_no_model_says_what_it_lacks(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    put(tmp_path / "own", *names)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "own")


def test_a_name_that_is_in_no_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    put(tmp_path, "x.ckpt", "x.yaml")
    with pytest.raises(RecipeError, match=r"there is no model 'y' in .*: put a folder y, y\.yaml or y\.ckpt there$"):
        load_model(tmp_path / "y")


def test_a_name_in_the_catalogue_goes_before_a_file_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("some notes")
    assert read_config("demo").source == catalogue.CONFIGS / "demo.yaml"


# The architecture


@pytest.mark.parametrize("name", quick_models())
def test_the_names_of_weights_are_those_of_one_architecture(name: str) -> None:
    description = read_config(name)
    model = build(description)
    keys = [key.removeprefix(model.key_prefix("0")) for key in model.state_dict()]
    assert architectures_with(keys) == [description.architecture]


def test_weights_of_no_known_architecture_are_told_by_their_first_names(tmp_path: Path) -> None:
    put(tmp_path, "x.yaml")
    write_weights({f"encoder.{n}.weight": torch.zeros(2) for n in range(5)}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"x\.ckpt is of none of the architectures bs_roformer, .* \(its first "):
        load_model(tmp_path / "x.ckpt")
    with pytest.raises(
        CheckpointError, match=r"weights are encoder\.0\.weight, encoder\.1\.weight, encoder\.2\.weight\)"
    ):
        load_model(tmp_path / "x.ckpt")


def test_a_yaml_that_says_another_architecture_than_the_weights_is_told_so(tmp_path: Path) -> None:
    put(tmp_path, "x.yaml")
    write_weights(demucs_file(tmp_path / "demucs.safetensors").state_dict(), tmp_path / "x.ckpt")
    document = COMMUNITY | {"architecture": "bs_roformer"}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path / "x.ckpt")
    said = str(caught.value)
    assert "x.ckpt) is of the architecture htdemucs by the names of its weights, and" in said
    assert "x.yaml says bs_roformer (" in said and "of its keys are missing (" in said and "\n" not in said


def test_random_weights_need_hyper_parameters_that_tell_the_architecture(tmp_path: Path) -> None:
    put(tmp_path, "x.yaml")
    assert random_weights(tmp_path / "x.yaml").keys() == own_model().state_dict().keys()
    (tmp_path / "x.yaml").write_text(
        yaml.safe_dump(COMMUNITY | {"model": HYPER_PARAMETERS | SIZES | {"hyper_streams": 4}})
    )
    with pytest.raises(CheckpointError, match=r"x\.yaml does not tell its architecture \(none has all its keys\): add"):
        random_weights(tmp_path / "x.yaml")


# Files that describe themselves


def demucs_file(path: Path, **changes: Any) -> HTDemucs:
    """Write a network of demucs' own as demucs 4.1 does, with these changes of what it says of its arguments."""
    arguments = {"sources": ["drums", "bass"], "channels": 8, "bottom_channels": 0, "t_layers": 1, "t_heads": 2}
    arguments |= {"nfft": 2048, "samplerate": 44100}
    network = HTDemucs(**arguments, segment=Fraction(1, 4)).eval()
    kwargs = json.dumps(arguments | {"segment": {"_type": "fraction", "numerator": 1, "denominator": 4}} | changes)
    metadata = {"klass": "demucs.htdemucs.HTDemucs", "args": "[]", "kwargs": kwargs}
    save_file(network.state_dict(), path, metadata)
    return network


@torch.no_grad()
def test_a_safetensors_file_of_demucs_needs_no_yaml(tmp_path: Path) -> None:
    own = demucs_file(tmp_path / "0123abcd.safetensors")
    (tmp_path / "some_bag.yaml").write_text("models: ['0123abcd']\n")  # as Demucs has them beside its files
    model = load_model(tmp_path / "0123abcd.safetensors")
    assert (model.stems, model.chunk_samples, model.sample_rate) == (("drums", "bass"), 11025, 44100)
    assert torch.allclose(model(chunks(11025)), own(chunks(11025)), atol=1e-5)  # another attention


@pytest.mark.parametrize("segment", ["long", "1e999999999", "1/0", None, {"_type": "fraction", "numerator": "1"}])
def test_a_safetensors_file_that_describes_itself_otherwise_is_named(tmp_path: Path, segment: Any) -> None:
    demucs_file(tmp_path / "x.safetensors", segment=segment)
    with pytest.raises(CheckpointError, match=r"x\.safetensors has a damaged description of its network: put its YAML"):
        load_model(tmp_path / "x.safetensors")


def test_a_damaged_safetensors_file_without_a_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=r"x\.safetensors \(11 bytes\) is damaged, incomplete or not"):
        load_model(tmp_path / "x.safetensors")


# The user's own folder of models


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setenv("SEPARATION_MODELS", str(folder))
    return folder


def test_models_in_the_users_own_folder_have_names(models: Path, weights: Path) -> None:
    put(models, "pair.yaml", "pair.ckpt", "alone.yml", "config_b.yaml", "b.ckpt")
    put(models / "folder", "a.yaml", "b.ckpt")
    put(models / "empty")
    own = set(available()) - {path.stem for path in catalogue.CONFIGS.glob("*.yaml")}
    assert own == {"alone", "b", "folder", "pair"}
    assert is_here("pair") and is_here("folder") and not is_here("alone")
    assert [load_model(name).name for name in ("pair", "folder", "b")] == ["pair", "folder", "b"]
    with pytest.raises(RecipeError, match=r"unknown model 'nonsense': use one of alone, b, bs_roformer_"):
        load_model("nonsense")
    with pytest.raises(CheckpointError, match=r"models/empty must have one weights file and one YAML, not neither"):
        load_model("empty")


def test_a_yaml_there_that_cannot_be_read_does_not_hide_the_others(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(models, "a.yaml", "a.ckpt")
    (models / "z.yaml").write_text("services: []\n")
    assert main(["models", "list"]) == 2
    captured = capsys.readouterr()
    assert "a      " in captured.out and "demo  " in captured.out
    fault = f"{models / 'z.yaml'}: audio is missing: add it as a section"
    assert "\nz      " in captured.out and f"  error: {fault}\n" in captured.out
    assert captured.err == f"error: 1 of {len(available())} models cannot be used: z\n"
    assert main(["models", "list", "--json"]) == 2
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == available() and rows[-1] == {"name": "z", "error": fault}
    assert main(["models", "verify", "a"]) == 0
    said = f"{models / 'a.ckpt'}: here, but no sha256 is known to compare it with\n"
    assert capsys.readouterr().out == said


# The command line


@pytest.fixture
def song(tmp_path: Path) -> Path:
    path = tmp_path / "song.wav"
    noise = np.random.default_rng(0).normal(0, 0.1, (4410, 2)).astype(np.float32)
    soundfile.write(path, noise, 44100, subtype="FLOAT")
    return path


def run(*arguments: object) -> int:
    return main([*map(str, arguments), "--device", "cpu", "--precision", "fp32"])


def test_separate_takes_weights_alone_and_a_name_in_a_folder(
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
        (["--model-dir", "own"], "--model-dir needs --model-name, a name in that folder, and excludes --model-path"),
        (["--model-dir", "own", "--model-name", "x", "--model-path", "x.ckpt"], "excludes --model-path"),
        (
            ["--model-dir", "own", "--model-name", "y"],
            "there is no model 'y' in own: put a folder y, y.yaml or y.ckpt there",
        ),
        (["--model-path", "own/x.yaml"], "--model-path own/x.yaml is a YAML file: give that to --model-name"),
        (["--model-path", "own/y.ckpt"], "there is no file own/y.ckpt"),
        (["--model-path", "own/x.ckpt", "--stems", "all_4"], "--model-path gives all stems of one model, and does not"),
        (["--model-name", "demo", "--stems", "vocals_instrumental"], "does not take --stems: leave one of them out"),
        (["--model-name", "demo", "--recipe", "standard"], "--model-name gives all stems of one model, and does not"),
        (["--model-path", "alone.ckpt"], "alone.ckpt needs the YAML file that it was published with"),
    ],
)
def test_a_checkpoint_that_cannot_be_found_is_one_line(
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


def test_bench_takes_weights_alone_and_a_name_in_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "x.ckpt", "x.yaml")
    weights = tmp_path / "x.ckpt"
    chunk = ["--chunk-size", 4, "--overlap", 1]
    assert run("bench", "--model-path", weights, *chunk, "--seconds", 1, "--runs", 1, "--json") == 0
    assert list(json.loads(capfd.readouterr().out)["models"]) == ["x"]
    assert run("bench", "--model-path", weights, "--random-weights") == 2
    assert "exclude each other" in capfd.readouterr().err


@pytest.mark.slow
def test_a_cold_start_takes_a_name_in_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "x.ckpt", "x.yaml")
    assert run("bench", "--cold-start", "--model-dir", tmp_path, "--model-name", "x", "--json") == 0
    assert json.loads(capfd.readouterr().out)["weight_bytes"] == (tmp_path / "x.ckpt").stat().st_size


# The documents


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
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("made_up "))
    assert row.split()[1:] == ["here", f"{len(server.content) / 1e6:.0f}", "MB", "?", "vocals,", "drums"]
    soundfile.write(tmp_path / "song.mp3", soundfile.read(song)[0], 44100)
    monkeypatch.chdir(tmp_path)
    assert run(*separate) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "song").glob("*.wav")) == ["drums.wav", "vocals.wav"]

    capsys.readouterr()
    assert main(verify) == 0
    assert f"{downloaded}: right\n" in capsys.readouterr().out
