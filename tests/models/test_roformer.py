"""Both RoFormers have the community's layouts and equal an independent implementation."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from helpers.common import slow
from helpers.small_model import identity
from separation.checkpoints.load import load_model
from separation.errors import CheckpointError
from separation.models import ARCHITECTURES
from separation.models.roformer import RoFormer

peer = pytest.importorskip("pymss_core.modules.bs_roformer", reason="needs pymss-core")
PEERS = {"bs_roformer": peer.BSRoformer, "mel_band_roformer": peer.MelBandRoformer}
PEER_DEFAULTS = {
    "time_transformer_depth": 1,
    "freq_transformer_depth": 1,
    "zero_dc": False,
}  # where the peer's defaults differ
FAMILIES = pytest.mark.parametrize("family", PEERS)

BANDS_1024 = (4,) * 32 + (8,) * 16 + (32,) * 8 + (1,)  # 513 bins
STEMS = ("drums", "bass", "vocals")
SMALL: dict[str, Any] = {"dim": 32, "depth": 2, "dim_head": 16, "heads": 4}


def make_model(family: str, **hyper: Any) -> RoFormer:
    torch.manual_seed(0)
    architecture: Any = ARCHITECTURES[family]
    config = architecture.Config(**({"stereo": True} | SMALL | hyper))
    return architecture(config, identity(STEMS[: config.num_stems])).eval()


def make_pair(family: str, **hyper: Any) -> tuple[RoFormer, torch.nn.Module]:
    """This project's model and the peer's, with the same random weights."""
    torch.manual_seed(0)
    if family == "mel_band_roformer":  # only with these does the peer build the community's mask MLPs
        theirs_alone = {"match_input_audio_length": True, "mlp_hidden_layers": hyper.get("mask_estimator_depth", 1)}
    else:
        theirs_alone = {}
    theirs = PEERS[family](**(PEER_DEFAULTS | hyper | theirs_alone)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:  # a mistake would not show with gains of exactly one
                parameter.add_(torch.randn_like(parameter) * 0.02)
    architecture: Any = ARCHITECTURES[family]
    with torch.device("meta"):
        ours = architecture(architecture.Config(**hyper), identity())
    ours.load(theirs.state_dict())
    return ours, theirs


def largest_relative_error(ours: RoFormer, theirs: torch.nn.Module, chunks: Tensor) -> float:
    with torch.inference_mode():
        got = ours(chunks)
        expected = theirs(chunks).reshape(got.shape)
    assert got.shape == (len(chunks), theirs.num_stems, *chunks.shape[1:])
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "family, hyper",
    [
        ("bs_roformer", {"stereo": True, "stft_hop_length": 441}),
        slow(("bs_roformer", {"stereo": False, "num_stems": 4})),
        ("bs_roformer", {"stereo": True, "num_stems": 4, "stft_hop_length": 512, "mask_estimator_depth": 3}),
        slow(("bs_roformer", {"stft_hop_length": 1024, "mask_estimator_depth": 1, "mlp_expansion_factor": 2})),
        (
            "bs_roformer",
            {
                "stereo": True,
                "stft_n_fft": 1024,
                "stft_win_length": 1024,
                "stft_hop_length": 256,
                "freqs_per_bands": BANDS_1024,
            },
        ),
        ("bs_roformer", {"stereo": True, "time_transformer_depth": 2, "freq_transformer_depth": 2, "zero_dc": True}),
        ("bs_roformer", {"stereo": True, "stft_normalized": True, "stft_win_length": 1024}),
        slow(("bs_roformer", {"stereo": True, "depth": 4, "skip_connection": True})),
        ("bs_roformer", {"stereo": True, "num_stems": 2, "use_shared_bias": True}),
        ("bs_roformer", {"stereo": True, "use_pope": True, "mlp_expansion_factor": 2}),
        ("mel_band_roformer", {"stereo": True, "stft_hop_length": 441, "mask_estimator_depth": 2}),
        ("mel_band_roformer", {"stereo": False, "num_stems": 4}),
        slow(
            (
                "mel_band_roformer",
                {"stereo": True, "num_stems": 2, "mask_estimator_depth": 3, "mlp_expansion_factor": 2},
            )
        ),
        slow(
            (
                "mel_band_roformer",
                {"stft_n_fft": 1024, "stft_win_length": 1024, "stft_hop_length": 256, "num_bands": 40},
            )
        ),
        (
            "mel_band_roformer",
            {"stereo": True, "time_transformer_depth": 2, "freq_transformer_depth": 2, "zero_dc": True},
        ),
        slow(("mel_band_roformer", {"stereo": True, "stft_normalized": True, "sample_rate": 22050})),
        slow(("mel_band_roformer", {"stereo": True, "depth": 4, "skip_connection": True})),
    ],
    ids=lambda value: (
        value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items() if k[:5] != "freqs")
    ),
)
def test_the_estimates_equal_the_independent_implementations(family: str, hyper: dict[str, Any]) -> None:
    ours, theirs = make_pair(family, **(SMALL | hyper))
    chunks = torch.randn(2, ours.channels, 12_000) * 0.1
    assert largest_relative_error(ours, theirs, chunks) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, hyper, parameters",
    [
        ("bs_roformer", {"dim": 512, "depth": 12, "stft_hop_length": 441}, 159_758_092),
        ("bs_roformer", {"dim": 256, "depth": 12, "num_stems": 6, "use_shared_bias": True}, 174_658_356),
        ("mel_band_roformer", {"dim": 384, "depth": 6, "stft_hop_length": 441, "mask_estimator_depth": 2}, 228_202_852),
    ],
)
def test_the_estimates_equal_the_independent_implementations_at_full_width(
    family: str, hyper: dict[str, Any], parameters: int
) -> None:
    ours, theirs = make_pair(family, stereo=True, **hyper)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == parameters
    assert largest_relative_error(ours, theirs, torch.randn(1, 2, 44_100) * 0.1) <= 1e-5


@FAMILIES
def test_keys_tell_the_architectures_apart(family: str) -> None:
    for hyper in ({}, {"linear_transformer_depth": 1}, {"num_stems": 3, "time_transformer_depth": 2}):
        keys = make_model(family, **hyper).state_dict().keys()
        for name in PEERS:
            patterns = ARCHITECTURES[name].KEY_PATTERNS
            assert all(any(re.fullmatch(pattern, key) for key in keys) for pattern in patterns) == (name == family)


def test_tables_beside_the_weights_in_a_file_are_ignored(tmp_path: Path) -> None:
    state = make_model("mel_band_roformer").state_dict()
    tables = {"freq_indices": torch.arange(9), "num_bands_per_freq": torch.ones(1025)}
    document = {
        "architecture": "mel_band_roformer",
        "stems": ["vocals"],
        "audio": {"sample_rate": 44100, "chunk_size": 8192},
        "model": SMALL | {"stereo": True, "match_input_audio_length": True, "sage_attention": False},
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(document))
    torch.save(state | tables, tmp_path / "x.ckpt")
    loaded = load_model(tmp_path / "x.yaml", checkpoint=tmp_path / "x.ckpt")
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    torch.save(state | {"freqs_per_person": torch.ones(1)}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"1 of its keys are unexpected \(freqs_per_person\)"):
        load_model(tmp_path / "x.yaml", checkpoint=tmp_path / "x.ckpt")


def test_linear_transformers_have_the_communitys_keys_and_come_first() -> None:
    model = make_model("bs_roformer", depth=1, linear_transformer_depth=1)
    assert len(model.layers[0]) == 3
    assert sorted(key for key, _ in model.layers[0][0].named_parameters() if ".0.0." in f".{key}") == [
        "layers.0.0.norm.gamma",
        "layers.0.0.temperature",
        "layers.0.0.to_out.1.weight",
        "layers.0.0.to_qkv.0.weight",
    ]
    seen: list[tuple[int, ...]] = []
    for transformer in model.layers[0]:
        transformer.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    with torch.inference_mode():
        model(torch.randn(2, 2, 5120))
    assert seen == [(2, 11 * 62, 32), (2 * 62, 11, 32), (2 * 11, 62, 32)]  # all tokens, along time, along bands


@FAMILIES
@pytest.mark.parametrize("precision, decibels", [(torch.bfloat16, 35), (torch.float16, 50)])
def test_half_precision_stays_close_to_float32(family: str, precision: torch.dtype, decibels: float) -> None:
    model = make_model(family, linear_transformer_depth=1)
    chunks = torch.randn(1, 2, 12_000) * 0.1
    with torch.inference_mode():
        exact = model(chunks)
        model.to_precision(precision)
        error = model(chunks) - exact
    assert {p.dtype for name, p in model.named_parameters() if "gamma" in name or "embed" in name} == {torch.float32}
    assert 10 * torch.log10(exact.square().sum() / error.square().sum()) > decibels


@FAMILIES
def test_an_estimate_does_not_depend_on_the_other_chunks_of_the_batch(family: str) -> None:
    model = make_model(family, num_stems=2, linear_transformer_depth=1)
    chunks = torch.randn(3, 2, 20_000) * 0.1
    with torch.inference_mode():
        alone = torch.cat([model(chunk[None]) for chunk in chunks])
        together = model(chunks)
    assert (alone - together).abs().max() <= 1e-6


@FAMILIES
def test_requested_stems_are_the_same_without_the_others(family: str) -> None:
    model = make_model(family, num_stems=3)
    chunks = torch.randn(1, 2, 8_000)
    with torch.inference_mode():
        every = model(chunks)
        fewer = model.only(("vocals", "drums"))
        assert fewer.stems == ("vocals", "drums")
        assert torch.equal(fewer(chunks), every[:, [2, 0]])
        assert torch.equal(fewer.only(("drums",))(chunks), every[:, [0]])


@FAMILIES
def test_the_estimate_scales_with_the_input_and_silence_stays_silent(family: str) -> None:
    model = make_model(family)
    chunks = torch.randn(1, 2, 20_000) * 0.5
    with torch.inference_mode():
        assert (model(chunks * 1e-3) * 1e3 - model(chunks)).abs().max() <= 1e-5
        assert torch.equal(model(torch.zeros(1, 2, 20_000)), torch.zeros(1, 1, 2, 20_000))
