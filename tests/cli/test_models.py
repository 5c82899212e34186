"""Models are listed, shown, downloaded, verified and converted."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from helpers.small_model import write_yaml
from separation.checkpoints import catalogue
from separation.cli.main import main


def test_models_are_listed_as_a_table_and_as_json(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_converted_checkpoint_is_listed_and_verified_instead_of_the_original(
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
    assert capsys.readouterr().out == f"{converted}: right (converted from small.ckpt)\n"
    assert main(["models", "download", "small"]) == 0
    assert capsys.readouterr().out == f"{converted}\n"
    assert main(["models", "convert", str(checkpoint), str(converted)]) == 2
    assert "small.safetensors' already exists" in capsys.readouterr().err
    assert main(["models", "convert", "--overwrite", str(checkpoint), str(converted)]) == 0
    capsys.readouterr()
    assert main(["models", "convert", "--overwrite", str(tmp_path / "nothing.ckpt"), str(converted)]) == 2
    assert capsys.readouterr().err.startswith("error: there is no file")
