"""SCNet has the community's layout and equals an independent implementation."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.small_model import assert_chunks_are_alone, assert_half_precision_is_near, assert_near, identity
from helpers.small_unets import SMALL, SOURCES, XL_IHF, small_scnet
from separation import CheckpointError, Separator, load_model
from separation.checkpoints.build import build
from separation.checkpoints.catalogue import read_config
from separation.engine.options import EngineOptions
from separation.models.scnet import SCNet, SCNetConfig


def make_pair(**hyper: Any) -> tuple[SCNet, torch.nn.Module]:
    """This project's model and the independent implementation, with the same random weights."""
    reference = pytest.importorskip("pymss_core.modules.scnet", reason="needs pymss-core")
    torch.manual_seed(0)
    theirs = reference.SCNet(**hyper).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)  # a mistake would not show with gains of exactly one
    with torch.device("meta"):
        ours = SCNet(SCNetConfig(**hyper), identity(hyper["sources"]))
    ours.load(theirs.state_dict())
    return ours, theirs


@pytest.mark.filterwarnings("ignore:A window was not provided")  # the other implementation means a window of ones
@pytest.mark.parametrize(
    "length, changes",
    [
        (12_800, {}),  # there is one frame more than hops, and the number of frames must be even
        (12_928, {}),
        (12_927, {}),
        (12_000, {**XL_IHF, "num_dplayer": 4}),
        (12_000, {"sources": ("vocals", "other"), "normalized": False}),
        (12_000, {"audio_channels": 1, "dims": (2, 8, 16), "compress": 2, "conv_kernel": 5, "expand": 2}),
        (12_000, {"nfft": 4096, "hop_size": 1024, "win_size": 4096, "band_SR": (0.225, 0.372, 0.403)}),
        (12_000, {"win_size": 400, "band_stride": (1, 2, 8), "band_kernel": (5, 4, 8), "conv_depths": (1, 2, 3)}),
    ],
)
def test_output_equals_the_independent_implementation(length: int, changes: dict) -> None:
    ours, theirs = make_pair(**SMALL | changes)
    chunks = torch.randn(2, ours.channels, length) * 0.1
    with torch.inference_mode():
        got = ours(chunks)
        expected = theirs(chunks)
    assert got.shape == expected.shape == (2, len(ours.stems), ours.channels, length)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:A window was not provided")
@pytest.mark.parametrize(
    "changes", [{"num_dplayer": 8, "dims": (4, 64, 128, 256), **XL_IHF}, {}], ids=["XL IHF", "SCNet"]
)
def test_output_equals_the_independent_implementation_at_full_width(changes: dict) -> None:
    ours, theirs = make_pair(sources=SOURCES, **changes)
    chunks = torch.randn(1, 2, 44_100) * 0.1
    with torch.inference_mode():
        got = ours(chunks)
        expected = theirs(chunks)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "name, parameters, normalised",
    [
        ("scnet_xl_ihf", 53_466_800, False),
        ("scnet", 10_578_768, True),
        ("scnet_huge_4stem_aname", 65_292_464, False),
    ],
)
def test_the_public_checkpoints_have_so_many_parameters(name: str, parameters: int, normalised: bool) -> None:
    description = read_config(name)
    model = build(description, ())
    assert isinstance(model, SCNet) and model.config.sources == description.stems
    assert description.standardised == normalised
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("precision, decibels", [(torch.bfloat16, 30), (torch.float16, 45)])
def test_half_precision_stays_close_to_float32(precision: torch.dtype, decibels: float) -> None:
    assert_half_precision_is_near(small_scnet(), precision, decibels)


def test_an_estimate_does_not_depend_on_the_other_chunks_of_the_batch() -> None:
    assert_chunks_are_alone(small_scnet())


def test_requested_stems_are_the_same_without_the_others() -> None:
    model = small_scnet()
    chunks = torch.randn(1, 2, 12_000) * 0.1
    fewer = model.only(("bass", "other", "vocals")).only(("vocals", "bass"))
    with torch.inference_mode():
        expected, got = model(chunks), fewer(chunks)
    assert fewer.stems == ("vocals", "bass") and model.stems == SOURCES
    assert_near(got, expected[:, [3, 1]])


def write_files(folder: Path, *, inference: dict | None = None, **model: Any) -> tuple[Path, Path]:
    """A community YAML and its weights."""
    hyper = {key: list(value) if isinstance(value, tuple) else value for key, value in (SMALL | model).items()}
    document = {
        "architecture": "scnet",
        "audio": {"sample_rate": 44100, "chunk_size": 12_000, "num_channels": 2, "min_mean_abs": 0.0},
        "model": hyper,
        "training": {"instruments": list(SOURCES), "target_instrument": None},
        "inference": inference or {},
    }
    path, weights = folder / "small.yaml", folder / "small.ckpt"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    torch.save(small_scnet().state_dict(), weights)
    return path, weights


def test_int8_falls_back_to_the_precision_of_auto(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, weights = write_files(tmp_path)
    models = [load_model(path, checkpoint=weights, precision=precision) for precision in ("auto", "int8")]
    chunks = torch.randn(1, 2, 12_000) * 0.1
    with torch.inference_mode():
        assert torch.equal(*(model(chunks) for model in models))
    assert models[0].precision == models[1].precision
    assert caplog.messages == ["small computes in floats, not in int8 (int8 is for RoFormers)"]


def test_a_song_is_separated_in_chunks(tmp_path: Path) -> None:
    path, weights = write_files(tmp_path, hop_size=256)
    separator = Separator.from_model(
        load_model(path, checkpoint=weights), options=EngineOptions(chunk_seconds=4, overlap_seconds=1)
    )
    stems = separator.separate(torch.randn(2, 200_000) * 0.1)
    assert list(stems) == list(SOURCES) and all(stem.shape == (2, 200_000) for stem in stems.values())
    assert not any(stem.any() for stem in separator.separate(torch.zeros(2, 200_000)).values())


@pytest.mark.parametrize("normalize", [False, True])
def test_the_track_is_normalised_if_the_yaml_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, normalize: bool
) -> None:
    path, weights = write_files(tmp_path, inference={"normalize": normalize, "num_overlap": 4})
    model = load_model(path, checkpoint=weights)
    seen: list[torch.Tensor] = []

    def identity(chunks: torch.Tensor) -> torch.Tensor:
        seen.append(chunks)
        return chunks[:, None].expand(-1, 4, -1, -1)

    monkeypatch.setattr(model, "forward", identity)
    mixture = torch.randn(2, 100_000) * 0.1 + 0.02
    stems = Separator.from_model(model, options=EngineOptions(chunk_seconds=8, overlap_seconds=4)).separate(mixture)
    mono = mixture.mean(0)
    expected = (mixture - mono.mean()) / mono.std() if normalize else mixture
    # Two threads may compute the chunks in any order. Only the first has the whole song, after its border.
    assert min((chunk[0, :, 4 * 44_100 :][:, :100_000] - expected).abs().max() for chunk in seen) <= 1e-5
    assert all((stem - mixture).abs().max() <= 1e-5 for stem in stems.values())


@pytest.mark.parametrize(
    "model, message",
    [
        ({"dims": [8, 16]}, "dims starts with 8, not with .* 4: correct it"),
        ({"band_stride": [1, 4]}, "band_stride has 2 values: use one for each of the 3 bands"),
        ({"num_dplayer": 3}, "num_dplayer is 3, .*: use an even number"),
        ({"sources": ["vocals", "other"]}, "names 4 stems and num_stems is 2"),
        ({"dims": [4, 8, 12, 20]}, r"small\.ckpt\) does not fit .*: model\.dims is \[4, 8, 12, 20\], the weights have"),
    ],
)
def test_an_invalid_configuration_is_a_one_line_error(tmp_path: Path, model: dict, message: str) -> None:
    path, weights = write_files(tmp_path, **model)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(path, checkpoint=weights)
    assert "\n" not in str(caught.value)
