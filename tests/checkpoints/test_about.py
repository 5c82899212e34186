"""`models show` prints the facts about a checkpoint."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from helpers.common import PROJECT
from helpers.small_model import DOCUMENT, small_model, write_weights, write_yaml
from separation.checkpoints import catalogue
from separation.checkpoints.about import model_facts
from separation.checkpoints.load import load_model
from separation.cli.main import main


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert main(["models", "show", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_downloaded_model_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    facts = shown(capsys, "demo")
    path = PROJECT / "weights" / "demo" / "demo.safetensors"
    (file,) = facts.pop("files")
    assert file == {
        "name": "demo/demo.safetensors",
        "stem": None,
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "url": None,
        "mirrors": [],
        "path": str(path),
        "here": True,
    }
    model = load_model("demo", attention="sdpa")  # fused layers have no parameters
    assert facts == {
        "name": "demo",
        "architecture": "bs_roformer",
        "stems": list(model.stems),
        "sample_rate": 44100,
        "chunk_samples": 352_800,
        "overlap_samples": 176_400,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "published_stems": [],
        "residual": None,
        **catalogue.read_config("demo").facts.as_json(),
    }


@pytest.mark.parametrize(
    "name, architecture, parameters, chunk_samples",
    [
        ("bs_roformer_viperx_1297", "bs_roformer", 159_758_092, 352_800),
        ("htdemucs_ft", "htdemucs", 4 * 41_984_456, 343_980),
        ("scnet_xl_ihf", "scnet", 53_466_800, 485_100),
    ],
)
def test_a_model_is_shown_without_a_download(
    name: str, architecture: str, parameters: int, chunk_samples: int, weights: Path
) -> None:
    facts = model_facts(name)
    assert (facts["architecture"], facts["parameters"]) == (architecture, parameters)
    assert (facts["chunk_samples"], facts["overlap_samples"]) == (chunk_samples, chunk_samples // 2)
    for file, stated in zip(facts["files"], catalogue.read_config(name).files, strict=True):
        assert not file["here"] and file["url"].startswith("https://") and Path(file["path"]).is_relative_to(weights)
        assert (file["stem"], file["bytes"], file["sha256"]) == (stated.stem, stated.bytes, stated.sha256)
    assert not weights.exists()


@pytest.mark.parametrize("architecture", ["bs_roformer", None])
def test_a_users_own_model_is_shown_by_its_path(
    tmp_path: Path, architecture: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    write_yaml(tmp_path, drop=("files",) if architecture else ("files", "architecture"))
    weights = write_weights(small_model().state_dict(), tmp_path / "small.ckpt")
    facts = shown(capsys, weights)
    assert facts["architecture"] == "bs_roformer" and facts["stems"] == DOCUMENT["stems"]
    assert facts["parameters"] == sum(parameter.numel() for parameter in small_model().parameters())
    (file,) = facts["files"]
    assert (file["path"], file["bytes"], file["here"]) == (str(weights), weights.stat().st_size, True)
    assert (file["url"], file["sha256"], facts["licence"]) == (None, None, "not stated")


def test_without_json_the_facts_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "show", "htdemucs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "chunks        343980 samples (7.8 s), 171990 of overlap" in lines
    assert "parameters    41,984,456" in lines


def test_a_model_that_cannot_be_shown_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = write_yaml(tmp_path, audio={"chunk_size": "long"})
    for name, words in (("nonsense", "unknown model 'nonsense'"), (str(bad), "chunk_size must be a positive integer")):
        assert main(["models", "show", name]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1 and words in captured.err
