"""Models are listed, shown, downloaded, verified and converted."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from helpers.small_model import write_yaml
from separation.checkpoints import catalogue
from separation.checkpoints.facts import TASKS
from separation.cli.main import main
from separation.cli.models_table import COLUMNS

SHIPPED = sorted(path.stem for path in catalogue.CONFIGS.glob("*.yaml"))


def test_models_are_listed_by_task_as_a_table_and_by_name_as_json(
    weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "list"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "MB", "LICENCE", "STEMS"]
    assert max(map(len, lines)) <= COLUMNS
    assert sorted(line[2:].split()[0] for line in lines if line[:2] in ("  ", "* ") and line[2:3] != "i") == (
        catalogue.available()
    )
    assert [line.split(":")[0] for line in lines if ": " in line] == [
        task for task in TASKS if any(catalogue.read_config(name).facts.tasks[0] == task for name in SHIPPED)
    ]
    row = next(line for line in lines if " bs_roformer_viperx_1297 " in line)
    assert row.split()[1:] == ["639", "none", "stated", "vocals", "(instrumental)"]
    assert next(line for line in lines if line.startswith("* demo ")).split()[2:4] == ["9", "permissive"]
    assert lines[-1] == "* is downloaded"

    assert main(["models", "list", "--json"]) == 0
    found = {entry["name"]: entry for entry in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(found) == catalogue.available()
    assert found["demo"]["here"] and not found["htdemucs_ft"]["here"]
    assert found["htdemucs_ft"]["bytes"] == 4 * 84025440
    assert found["demo"]["stems"] == ["vocals", "drums", "bass", "guitar", "piano", "other"]
    facts = set(catalogue.read_config("demo").facts.as_json())
    assert set(found["demo"]) == {"name", "architecture", "stems", "residual", "bytes", "here"} | facts
    assert "Logic" in found["bs_roformer_sw"]["warning"] and found["demo"]["warning"] is None


def test_a_filtered_list_is_sorted_by_the_figures_of_one_test_set(
    weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--stem", "vocals", "--licence", "permissive", "--sort", "quality"]
    assert main(["models", "list", *chosen]) == 0
    header, *rows, _, here, note, without = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "VOCALS", "MB", "LICENCE", "STEMS"]
    figures = [row[2:].split()[1] for row in rows]
    measured = [float(figure) for figure in figures if figure != "-"]
    assert measured == sorted(measured, reverse=True) and len(measured) >= 2
    assert set(figures[len(measured) :]) == {"-"}  # models without a figure come last
    assert (here, note) == ("* is downloaded", "VOCALS is the SDR of vocals in dB on MVSEP Multisong")
    assert without == "-: no published figure on MVSEP Multisong; such a model may still be better"
    assert main(["models", "list", *chosen, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["name"] for each in found] == [row[2:].split()[0] for row in rows]


@pytest.mark.slow
def test_a_filter_that_no_model_passes_says_so(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--json"]):
        assert main(["models", "list", "--here", "--task", "crowd", *more]) == 0
        captured = capsys.readouterr()
        words = "no model passes all of these filters: 1 would without --task, 1 would without --here\n"
        assert (captured.out, captured.err) == ("", words)
    assert main(["models", "list", "--here", "--task", "crowd", "--licence", "permissive"]) == 0
    assert capsys.readouterr().err == "no model passes all of these filters: 1 would without --task\n"


def test_a_word_that_no_model_has_is_an_error_with_the_close_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "list", "--task", "karaokee"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown task 'karaokee': use karaoke, or another of vocals, ")


def test_models_are_verified_by_name_or_if_downloaded(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "verify", "demo"]) == 0
    assert "demo.safetensors: right" in capsys.readouterr().out
    assert main(["models", "verify"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "demo.safetensors: right" in line
    assert main(["models", "verify", "nonsense", "htdemucs", "demo"]) == 2
    captured = capsys.readouterr()
    assert "demo.safetensors: right" in captured.out
    unknown, missing = captured.err.splitlines()
    assert unknown.startswith("error: unknown model 'nonsense': use a name that ")
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


def test_a_converted_checkpoint_is_listed_and_verified_instead_of_the_original(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "small.ckpt"
    torch.save({"gain": torch.zeros(2)}, checkpoint)
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    monkeypatch.setattr(catalogue, "CONFIGS", tmp_path)
    write_yaml(tmp_path, files=[{"name": "small.ckpt", "sha256": sha256, "url": "http://127.0.0.1:1/"}])
    assert main(["models", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[3].split()[:2] == ["small", "?"]
    converted = weights / "small.safetensors"
    assert main(["models", "convert", str(checkpoint), str(converted)]) == 0
    assert capsys.readouterr().out == f"{converted}\n"
    assert main(["models", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[3].split()[:2] == ["*", "small"]
    assert main(["models", "verify", "small"]) == 0
    assert capsys.readouterr().out == f"{converted}: right (converted from small.ckpt)\n"
    assert main(["models", "download", "small"]) == 0
    assert capsys.readouterr().out == f"{converted}\n"
    assert main(["models", "convert", str(checkpoint), str(converted)]) == 2
    assert "small.safetensors' already exists" in capsys.readouterr().err
    assert main(["models", "convert", "--overwrite", str(checkpoint), str(converted)]) == 0
    capsys.readouterr()
    assert main(["models", "convert", "--overwrite", str(tmp_path / "nothing.ckpt"), str(converted)]) == 2
    assert capsys.readouterr().err.startswith("error: there is no file")


@pytest.mark.parametrize("command", ["show", "download", "verify"])
def test_a_recipe_in_place_of_a_model_is_an_error_that_names_its_models(
    command: str, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", command, "standard"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: standard is a recipe, not a model: name its models, ")
    assert set(said.rpartition(", ")[2].split()) == {"bs_roformer_viperx_1297", "htdemucs_ft", "htdemucs_6s", "drumsep"}
    assert main(["models", command, "nonsense"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown model 'nonsense'")
