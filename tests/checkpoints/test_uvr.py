"""The models of Ultimate Vocal Remover need no YAML, as in that program: a hash of the file is enough."""

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.small_model import DOCUMENT, identity, small_model, write_yaml
from helpers.vr_bands import config_of
from separation import CheckpointError, load_model
from separation.checkpoints import uvr
from separation.checkpoints.catalogue import CONFIGS, read_config
from separation.models.vr import VR

onnx = pytest.importorskip("onnx", reason="needs onnx")

from helpers.mdx_nets import MDXNetGraph  # noqa: E402  # needs onnx


def know(monkeypatch: pytest.MonkeyPatch, kind: str, path: Path, entry: Any) -> None:
    """Add a file to the table."""
    table = {key: dict(value) for key, value in uvr._table().items()}
    table[kind][uvr.hash_of(path)] = entry
    monkeypatch.setattr(uvr, "_table", lambda: table)


def test_the_hash_is_the_md5_of_the_last_ten_million_bytes(tmp_path: Path) -> None:
    content = bytes(range(251)) * 45_000
    for length in (0, 1000, 10_240_000, len(content)):
        (tmp_path / "x").write_bytes(content[:length])
        assert uvr.hash_of(tmp_path / "x") == hashlib.md5(content[:length][-10_240_000:]).hexdigest()


def test_the_table_has_plausible_entries() -> None:
    table = uvr._table()
    hashes = [key for kind in ("mdx_net", "yaml", "vr") for key in table[kind]]
    assert len(hashes) == len(set(hashes)) == 118 and all(re.fullmatch("[0-9a-f]{32}", each) for each in hashes)
    for entry in table["mdx_net"].values():
        assert entry.keys() == {"stem", "n_fft", "compensate"} and 0.9 < entry["compensate"] < 2
    assert all(entry["bands"] in table["vr_bands"] for entry in table["vr"].values())
    assert set(table["configs"]) <= set(table["yaml"].values())
    assert all((CONFIGS / f"{name}.yaml").is_file() for name in table["configs"].values())


def test_a_known_mdx_net_needs_no_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = MDXNetGraph().write(tmp_path / "Kim.onnx", frames=256)
    know(monkeypatch, "mdx_net", path, {"stem": "no_crowd", "n_fft": 7680, "compensate": 1.02})
    (tmp_path / "other.yaml").write_text("audio: {}", encoding="utf-8")  # of another model
    monkeypatch.setenv("SEPARATION_MODELS", str(tmp_path))
    for name in (path, "Kim"):
        model: Any = load_model(name)
        assert model.stems == ("no_crowd",) and model.config.compensate == 1.02
        assert model.chunk_samples == 1024 * 255 - 7680


def test_an_unknown_mdx_net_says_which_lines_its_yaml_needs(tmp_path: Path) -> None:
    path = MDXNetGraph().write(tmp_path / "mine.onnx")
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    said = str(caught.value)
    assert "mine.yaml with the lines `stems: [vocals]` and `audio: {n_fft: 6144}`" in said and "at least 62" in said
    lines = re.findall("`(.*?)`", said)
    path.with_suffix(".yaml").write_text("\n".join(lines), encoding="utf-8")
    assert read_config(path).chunk_samples == 1024 * 15 - 6144
    model: Any = load_model(path)
    assert model.stems == ("vocals",) and model.config.n_fft == 6144 and model.config.compensate == 1


@pytest.mark.parametrize("folder", ["", "model_data/mdx_c_configs"])
def test_a_known_checkpoint_finds_its_yaml_under_its_own_name(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(small_model().state_dict(), tmp_path / "renamed.ckpt")
    know(monkeypatch, "yaml", tmp_path / "renamed.ckpt", "model_small.yaml")
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    write_yaml(tmp_path, drop=("files",)).rename(tmp_path / folder / "model_small.yaml")
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"audio": {}}), encoding="utf-8")
    (tmp_path / "another.yaml").write_text(yaml.safe_dump({"audio": {}}), encoding="utf-8")
    assert load_model(tmp_path / "renamed.ckpt").stems == tuple(DOCUMENT["stems"])


def test_a_known_checkpoint_without_its_yaml_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(small_model().state_dict(), tmp_path / "renamed.ckpt")
    know(monkeypatch, "yaml", tmp_path / "renamed.ckpt", "model_small.yaml")
    with pytest.raises(CheckpointError, match=r"renamed\.ckpt needs the YAML file model_small\.yaml"):
        load_model(tmp_path / "renamed.ckpt")


def test_a_known_checkpoint_uses_this_projects_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(small_model().state_dict(), tmp_path / "renamed.ckpt")
    know(monkeypatch, "yaml", tmp_path / "renamed.ckpt", "config_vocals_mel_band_roformer_kim.yaml")
    description = read_config(tmp_path / "renamed.ckpt")
    assert description.source == CONFIGS / "mel_band_roformer_kim.yaml"
    assert [file.name for file in description.files] == [str(tmp_path / "renamed.ckpt")]


def vr_network(folder: Path, **network: Any) -> Path:
    """The weights of a VR network as they are published."""
    torch.manual_seed(0)
    config = config_of("1band_sr44100_hl512_nf1024", **network)
    model = VR(config, identity(("vocals", "instrumental"), chunk_samples=config.chunk_size))
    path = folder / "5_HP-Karaoke-UVR.pth"
    torch.save(model.state_dict() | {"aux1_out.weight": torch.zeros(2, 4, 1, 1)}, path)
    return path


@pytest.mark.parametrize("network", [{"nout": 4, "aspp_layers": 7}, {"nout": 4, "deep": True}], ids=str)
def test_a_known_vr_network_needs_no_yaml(
    tmp_path: Path, network: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = vr_network(tmp_path, **network)
    know(monkeypatch, "vr", path, {"stem": "no_echo", "bands": "1band_sr44100_hl512_nf1024"})
    model: Any = load_model(path)
    assert model.stems == ("no_echo", "echo") and model.chunk_samples == 256 * 512
    assert {name: getattr(model.config, name) for name in network} == network and not model.config.is_vocal


def test_an_unknown_vr_network_says_which_lines_its_yaml_needs(tmp_path: Path) -> None:
    path = vr_network(tmp_path, nout=8, nout_lstm=8)
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    lines = re.findall("`(.*?)`", str(caught.value))
    assert lines == ["stems: [vocals, instrumental]", "model: {bands: 4band_v3}"]
    path.with_suffix(".yaml").write_text("\n".join(lines).replace("4band_v3", "none"), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"unknown bands 'none': use one of 1band_sr16000_hl512, .*, 4band_v3"):
        load_model(path)
    path.with_suffix(".yaml").write_text(
        "\n".join(lines).replace("4band_v3", "1band_sr44100_hl512_nf1024"), encoding="utf-8"
    )
    model: Any = load_model(path)
    assert model.stems == ("vocals", "instrumental") and model.config.nout_lstm == 8


@pytest.mark.parametrize("stem, is_vocal", [("Vocals", True), ("brass", True), ("instrumental", False)])
def test_the_first_stem_of_an_unknown_vr_network_tells_how_its_mask_is_sharpened(
    tmp_path: Path, stem: str, is_vocal: bool
) -> None:
    path = vr_network(tmp_path, nout=4)
    path.with_suffix(".yaml").write_text(
        f"stems: [{stem}, rest]\nmodel: {{bands: 1band_sr44100_hl512_nf1024}}", encoding="utf-8"
    )
    assert read_config(path).hyper_parameters["is_vocal"] == is_vocal


def test_bands_for_weights_of_another_network_are_an_error(tmp_path: Path) -> None:
    torch.save(small_model().state_dict(), tmp_path / "x.pth")
    (tmp_path / "x.yaml").write_text("stems: [vocals]\nmodel: {bands: 4band_v3}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"x\.pth is not a VR network"):
        load_model(tmp_path / "x.pth")
