"""Finding checkpoints: by a name, a weights file, a folder, or in the user's own folder of models."""

import json
import re
from pathlib import Path

import pytest
import yaml

from helpers.common import quick_first
from helpers.own_checkpoint import COMMUNITY, own_model, put
from helpers.small_model import assert_same_model, chunks
from separation.checkpoints import catalogue
from separation.checkpoints.catalogue import available, files_for, is_here, read_config
from separation.checkpoints.load import load_model
from separation.cli.main import main
from separation.errors import CheckpointError, RecipeError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_unknown_model_is_an_error_that_says_where_the_names_are(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"unknown model 'nonsense': use a name that `.* models list` prints, or the path"
    ):
        read_config("nonsense")
    with pytest.raises(
        RecipeError, match=r"unknown model 'roformer_kim': use mel_band_roformer_kim, or mel_\w+, or mel_\w+, or a name"
    ):
        read_config("roformer_kim")
    with pytest.raises(RecipeError, match=r"there is no model 'demo' in \.\./models: put a folder demo, "):
        read_config("../models/demo")
    with pytest.raises(RecipeError, match="there is no file"):
        read_config(tmp_path / "nonsense.yaml")


@pytest.mark.parametrize("name", ["x" * 300, "folder/" + "x" * 300, "a\0b", "x" * 5000 + ".yaml"])
def test_a_name_that_no_file_can_have_is_an_error(name: str) -> None:
    with pytest.raises((RecipeError, CheckpointError)) as caught:
        read_config(name)
    assert "\n" not in str(caught.value)


def test_a_name_in_the_catalogue_takes_precedence_over_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text("some notes")
    assert read_config("demo").source == catalogue.CONFIGS / "demo.yaml"


def test_a_stem_that_is_named_twice_needs_its_file_once() -> None:
    files = files_for(read_config("htdemucs_ft"), ["bass", "drums", "bass"])
    assert [file.stem for file in files] == ["bass", "drums"]


# Weights, and the YAML beside them


@pytest.mark.parametrize(
    "config, others",
    quick_first(
        [
            ("x.v1.yaml", ["other.yaml", "config_other.yaml"]),
            ("x.v1.yml", ["other.yaml"]),
            ("config_x.v1.yaml", ["other.yaml", "y.yaml"]),
            ("x.v1_config.yaml", ["other.yaml"]),
            ("x.v1.ckpt.yaml", ["other.yaml"]),
            ("model_data/mdx_c_configs/x.v1.yaml", ["other.yaml"]),  # as in UVR's folders
            ("config_of_some_roformer.yaml", []),
            ("whatever.yml", ["y.yaml", "y.ckpt", "config_z.yaml", "z.pth"]),  # the others belong to y and z
        ],
        3,
    ),
)
def test_weights_find_their_yaml(tmp_path: Path, config: str, others: list[str]) -> None:
    put(tmp_path, "x.v1.ckpt", *others)
    put((tmp_path / config).parent, Path(config).name)
    assert read_config(tmp_path / "x.v1.ckpt").source == tmp_path / config
    model = load_model(tmp_path / "x.v1.ckpt")
    assert model.name == "x.v1" and model.stems == ("vocals", "drums")
    assert_same_model(model, own_model(), chunks(2048))


@pytest.mark.parametrize("config", ["x.v1.yaml", "x.v1.ckpt.yaml", "config_x.v1.yml"])
def test_a_yaml_finds_the_weights_that_it_is_named_after(tmp_path: Path, config: str) -> None:
    put(tmp_path, "a.ckpt", "x.v1.pth", "x.v1.ckpt", config)
    assert read_config(tmp_path / config).files[0].name == str(tmp_path / "x.v1.ckpt")


@pytest.mark.parametrize(
    "others, found",
    [
        ([], "there is no YAML"),
        (["y.yaml", "y.ckpt"], "there is no YAML"),
        (["a.yaml", "b.yml"], r"any of a\.yaml, b\.yml may be it"),
    ],
)
def test_an_error_says_where_to_put_the_yaml_of_weights(tmp_path: Path, others: list[str], found: str) -> None:
    put(tmp_path, "x.ckpt", *others)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path / "x.ckpt")
    message = rf"^{tmp_path}/x\.ckpt needs the YAML .* published with, and {found}: put it into {tmp_path} as x\.yaml$"
    assert re.match(message, str(caught.value))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^there is no file .*nothing\.ckpt: give a checkpoint's path"):
        load_model(tmp_path / "nothing.ckpt")


def test_weights_with_any_suffix_are_found_by_their_path(tmp_path: Path) -> None:
    put(tmp_path, "weights.final", "weights.yaml")
    assert load_model(tmp_path / "weights.final").name == "weights"


def test_requested_weights_take_precedence_over_the_files_in_the_yaml(tmp_path: Path) -> None:
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
def test_the_error_for_an_unusable_folder_says_what_is_missing(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    put(tmp_path / "own", *names)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "own")


def test_a_missing_model_says_which_files_would_be_found(tmp_path: Path) -> None:
    put(tmp_path, "x.ckpt", "x.yaml")
    with pytest.raises(RecipeError, match=r"there is no model 'y' in .*: put a folder y, y\.yaml or y\.ckpt there$"):
        load_model(tmp_path / "y")


# The user's own folder of models


def test_models_in_the_users_own_folder_have_names(models: Path, weights: Path) -> None:
    put(models, "pair.yaml", "pair.ckpt", "alone.yml", "config_b.yaml", "b.ckpt")
    put(models / "folder", "a.yaml", "b.ckpt")
    put(models / "empty")
    own = set(available()) - {path.stem for path in catalogue.CONFIGS.glob("*.yaml")}
    assert own == {"alone", "b", "folder", "pair"}
    assert is_here("pair") and is_here("folder") and not is_here("alone")
    assert [load_model(name).name for name in ("pair", "folder", "b")] == ["pair", "folder", "b"]
    with pytest.raises(RecipeError, match="unknown model 'pairs': use pair, or a name that"):
        load_model("pairs")
    with pytest.raises(CheckpointError, match=r"models/empty must have one weights file and one YAML, not neither"):
        load_model("empty")


def test_an_invalid_yaml_does_not_hide_the_other_models(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(models, "a.yaml", "a.ckpt")
    (models / "z.yaml").write_text("services: []\n")
    assert main(["models", "list"]) == 2
    captured = capsys.readouterr()
    assert "\nmodels without a task\n* a  " in captured.out and "\n* demo  " in captured.out
    fault = f"{models / 'z.yaml'}: audio is missing: add it as a section"
    assert f"\nz  error: {fault}\n" in captured.out
    assert captured.err == f"error: 1 of {len(available())} models cannot be used: check z\n"
    assert main(["models", "list", "--json"]) == 2
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == available() and rows[-1] == {"name": "z", "error": fault}
    assert main(["models", "verify", "a"]) == 0
    said = f"{models / 'a.ckpt'}: here, but its sha256 is not known\n"
    assert capsys.readouterr().out == said
