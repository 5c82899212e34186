"""Apollo equals an independent implementation, which equals its authors' network (JusperLee/Apollo at b17bf53)."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.common import quick_first
from helpers.recorded import drawn_weights
from helpers.small_model import assert_chunks_are_alone, assert_half_precision_is_near, assert_near, identity
from separation import CheckpointError, InputError, Separator, load_model
from separation.checkpoints.build import build
from separation.checkpoints.catalogue import read_config
from separation.engine.options import EngineOptions
from separation.models.apollo import Apollo, ApolloConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"sr": 44_100, "win": 20, "feature_dim": 32, "layer": 2}


def make(**changes: Any) -> Apollo:
    config = ApolloConfig(**SMALL | changes)
    model = Apollo(config, identity(["restored"], chunk_samples=8_000))
    model.load(drawn_weights(model.state_dict()))
    return model


@pytest.mark.parametrize(
    "changes, length",
    quick_first(
        [({}, 8_000), ({"sr": 16_000, "win": 11, "feature_dim": 48, "layer": 1}, 8_123), ({"feature_dim": 64}, 20_000)],
        1,
    ),
)
def test_output_equals_the_independent_implementation(changes: dict, length: int) -> None:
    reference = pytest.importorskip("pymss_core.modules.look2hear.apollo", reason="needs pymss-core")
    ours = make(**changes)
    theirs = reference.Apollo(**SMALL | changes).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected and all(key.endswith(("cos_freq", "sin_freq")) for key in missing)
    chunks = torch.randn(2, 1, length) * 0.1
    with torch.inference_mode():
        expected = theirs(chunks)[:, None]
        assert (ours(chunks) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_an_estimate_does_not_depend_on_the_other_chunks_of_the_batch() -> None:
    assert_chunks_are_alone(make())


@pytest.mark.parametrize("precision, decibels", [(torch.bfloat16, 30), (torch.float16, 45)])
def test_half_precision_stays_close_to_float32(precision: torch.dtype, decibels: float) -> None:
    assert_half_precision_is_near(make(), precision, decibels)


def write_files(folder: Path, **changes: Any) -> Path:
    """A community YAML, and the weights as their authors' program stores them."""
    model = make()
    document = {
        "audio": {"chunk_size": 8_000, "num_channels": 2, "sample_rate": 44_100, "min_mean_abs": 0.0},
        "model": SMALL | changes,
        "training": {"instruments": ["restored", "addition"], "target_instrument": "restored"},
        "inference": {"batch_size": 1, "num_overlap": 4},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    tables = {f"net.{i}.band_net.{wave}_freq": torch.ones(100, 4) for i in range(2) for wave in ("cos", "sin")}
    saved = {"model_name": "Apollo", "state_dict": {**model.state_dict(), **tables}, "model_args": {"n_sample_rate": 2}}
    torch.save(saved, folder / "small.bin")
    return path


def test_a_published_yaml_and_its_weights_restore_a_song(tmp_path: Path) -> None:
    model = load_model(write_files(tmp_path))
    assert isinstance(model, Apollo) and model.stems == ("restored",) and model.restores
    song = torch.randn(2, 20_000) * 0.1
    separators = [Separator.from_model(model, options=EngineOptions(batch_size=size)) for size in (1, 3)]
    restored, same = (separator.separate(song) for separator in separators)
    assert list(restored) == ["restored"] and restored["restored"].shape == song.shape
    assert_near(same["restored"], restored["restored"])
    assert not separators[0].separate(torch.zeros(2, 9_000))["restored"].any()


def test_a_restored_song_is_not_a_part_of_the_song(tmp_path: Path) -> None:
    model = load_model(write_files(tmp_path))
    with pytest.raises(
        InputError, match=r"^small restores the song .*'restored' leaves no other stem: leave two_stems out$"
    ):
        Separator.from_model(model, two_stems="restored")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"feature_dim": 48}, r"model\.feature_dim is 48, the weights have 32"),
        ({"feature_dim": 40}, "feature_dim is 40, no multiple of 16"),
        ({"win": 3}, "win is 3 ms, too short for 80 bands"),
    ],
)
def test_an_invalid_configuration_is_a_one_line_error(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(write_files(tmp_path, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("apollo_lq_mp3_restoration", 16_539_308),
        ("apollo_uni_lew", 36_604_076),
        ("apollo_vocals_baicai", 48_434_348),
    ],
)
def test_the_public_checkpoints_have_so_many_parameters(name: str, parameters: int) -> None:
    description = read_config(name)
    model = build(description)
    assert isinstance(model, Apollo) and description.stems == ("restored",) and description.residual is None
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    (file,) = description.files
    tables = 2 * 100 * (model.output[0][0].weight.numel() // 8) * len(model.net)  # of the rotary embeddings
    assert file.bytes is not None and 4 * (parameters + tables) <= file.bytes <= 1.005 * 4 * (parameters + tables)
