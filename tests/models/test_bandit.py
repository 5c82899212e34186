"""BandIt and BandIt v2 equal their authors' networks and load as published.

The figures come from Music-Source-Separation-Training at ccc011a, whose networks are those of kwatcharasupat/bandit at
04fbcc0 and kwatcharasupat/bandit-v2 at d5563d9. (pymss-core scales the spectrogram by another norm.)
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.recorded import assert_as_recorded
from helpers.small_model import assert_near, identity
from separation import CheckpointError, Separator, load_model
from separation.checkpoints.build import build
from separation.checkpoints.catalogue import read_config
from separation.engine.options import EngineOptions
from separation.evaluation.metrics import sdr
from separation.models import ARCHITECTURES
from separation.models.bandit import Bandit, BanditV2, musical_bands

pytestmark = pytest.mark.usefixtures("one_thread")

STEMS = ("speech", "music", "sfx")
SMALL: dict[str, Any] = {
    "stems": STEMS,
    "n_bands": 16,
    "n_sqm_modules": 2,
    "emb_dim": 12,
    "rnn_dim": 8,
    "mlp_dim": 20,
    "rnn_type": "GRU",
    "n_fft": 512,
    "win_length": 512,
    "hop_length": 128,
}
PUBLISHED = {"n_fft": 2048, "win_length": 2048, "hop_length": 512}  # the reference of `bandit` has no other transform
OTHER_V2 = {"rnn_type": "LSTM", "n_bands": 8, "use_freq_weights": False, "bidirectional": False, "hop_length": 200}
OTHER = {"rnn_type": "LSTM", "fs": 48_000, "n_bands": 24, "stems": ("vocals", "other"), "use_freq_weights": False}
RECORDED = [
    ("bandit_v2", {"pad_mode": "reflect"}, 6_000, """
    2.049733 2.065782 2.060175 -0.006218489 0.01474889 0.014294 0.007632355 -0.02700432 0.02547053 0.02171881
    -0.02052309 0.003216724 0.02322095 -0.02309555 0.0034694 -0.01591747 -0.02174106 -0.004309263 0.01656876
    -0.01376286 -0.01406158 -0.008036125 0.007974236 -0.008783797 -0.02831231 0.01169963 -0.02578484
    """),
    ("bandit_v2", {**OTHER_V2, "n_fft": 1024, "win_length": 1024}, 6_123, """
    3.458602 3.369693 3.271711 -0.02498027 0.07439261 0.03394071 0.01634489 -0.01836612 0.008761316 -0.004280447
    -0.05020762 -0.01886811 -0.01243298 0.07808313 -0.01682073 -0.002920346 -0.02717274 0.04320283 -0.01232746
    -0.03048642 0.003319263 0.03631156 -0.007539778 -0.01220804 -0.01673064 -0.01930211 -0.01193201
    """),
    ("bandit", PUBLISHED, 6_000, """
    2.200572 2.21326 2.173403 -0.02542614 0.002602244 0.005654769 0.004597503 0.0009001864 -0.0317039 0.0245993
    0.01982685 -0.006012311 -0.02376197 -0.02126181 0.02148724 -0.003434453 0.004562197 0.008096977 0.02993785
    -0.02000401 0.006253158 0.01920173 0.01687965 -0.03303461 -0.002851051 0.003002367 0.02202456
    """),
    ("bandit", {**PUBLISHED, **OTHER}, 6_123, """
    4.089509 4.103438 -0.006202111 0.07742375 0.03996719 0.05537288 0.02156044 -0.02783243 -0.01502797 0.02928679
    -0.07491333 0.01249765 0.009964542 0.0001500841 0.03132716 -0.04385521 -0.01300406 -0.00789403 0.01788879
    0.04630452 -0.01839344 0.05449828 -0.0243514 -0.02587131 -0.02021404 0.07154314
    """),
]  # fmt: skip
KINDS = pytest.mark.parametrize("kind", ["bandit", "bandit_v2"])


def make(kind: str, *, sample_rate: int = 44_100, **changes: Any) -> Bandit:
    torch.manual_seed(0)
    architecture: Any = ARCHITECTURES[kind]
    config = architecture.Config(**SMALL | changes)
    return architecture(config, identity(config.stems, chunk_samples=6_000, sample_rate=sample_rate)).eval()


@pytest.mark.parametrize("kind, hyper, length, figures", RECORDED)
def test_output_equals_the_authors_network(kind: str, hyper: dict, length: int, figures: str) -> None:
    assert_as_recorded(make(kind, **hyper), length, figures)


@pytest.mark.parametrize("n_bands, n_fft, sample_rate", [(64, 2048, 44_100), (64, 2048, 48_000), (24, 1024, 44_100)])
def test_bands_cover_all_bins_and_overlap(n_bands: int, n_fft: int, sample_rate: int) -> None:
    bands = musical_bands(n_bands, n_fft, sample_rate)
    assert len(bands) == n_bands
    assert {bin for band in bands for bin in band} == set(range(n_fft // 2 + 1))
    assert all(low.stop > high.start for low, high in pairwise(bands))


@KINDS
def test_an_estimate_does_not_depend_on_the_other_chunks_of_the_batch(kind: str) -> None:
    model = make(kind)
    chunks = torch.randn(3, 1, 6_000) * torch.tensor([0.01, 0.1, 1.0])[:, None, None]
    with torch.inference_mode():
        alone = torch.cat([model(chunk[None]) for chunk in chunks])
        together = model(chunks)
    for one, each in zip(alone, together, strict=True):
        assert (one - each).abs().max() <= 1e-5 * one.abs().max()


@KINDS
@pytest.mark.parametrize("precision, decibels", [(torch.bfloat16, 30), (torch.float16, 45)])
def test_half_precision_stays_close_to_float32(kind: str, precision: torch.dtype, decibels: float) -> None:
    model = make(kind)
    chunks = torch.randn(1, 1, 6_000) * 0.1
    with torch.inference_mode():
        exact = model(chunks)
        model.prepare(precision)
        assert sdr(exact, model(chunks)) > decibels


@KINDS
def test_requested_stems_are_the_same_without_the_others(kind: str) -> None:
    model = make(kind)
    chunks = torch.randn(1, 1, 6_000) * 0.1
    with torch.inference_mode():
        assert_near(model.only(("sfx", "speech"))(chunks), model(chunks)[:, [2, 0]])


def write_files(folder: Path, kind: str, **changes: Any) -> Path:
    """A community YAML, and the weights with the buffers and copies that the authors' programs store."""
    model = make(kind, **{} if "emb_dim" in changes else changes)
    arguments = {key: list(value) if isinstance(value, tuple) else value for key, value in (SMALL | changes).items()}
    off = {"hidden_activation_kwargs": None, "wkwargs": None, "power": None, "treat_channel_as_feature": True}
    rate = 48_000 if kind == "bandit_v2" else 44_100
    document: dict[str, Any] = {
        "audio": {"chunk_size": 6_000, "num_channels": 2, "sample_rate": rate, "min_mean_abs": 0.0},
        "training": {"instruments": list(STEMS), "target_instrument": None},
        "inference": {"num_overlap": 4},
    }
    state = model.state_dict() | {"stft.window": torch.hann_window(512), "istft.window": torch.hann_window(512)}
    if kind == "bandit_v2":
        document |= {"cls": "Bandit", "kwargs": arguments | off | {"in_channels": 1, "band_type": "musical"}}
        state |= {
            f"mask_estim.speech.norm_mlp.0.combined.0.{name}": state[f"mask_estim.speech.norm_mlp.0.norm.{name}"]
            for name in ("weight", "bias")
        }
        state["mask_estim.speech.freq_weights/0"] = torch.ones(3).double()
    else:
        document |= {"name": "MultiMask", "model": arguments | off | {"in_channel": 1, "band_specs": "musical"}}
        state["bsrnn.mask_estim.speech.freq_weights/0"] = torch.ones(3).double()
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    prefixed = {f"model.{key}": value for key, value in state.items()}
    torch.save({"state_dict": prefixed if kind == "bandit_v2" else state}, folder / "small.chpt")
    return path


@KINDS
def test_a_published_yaml_and_its_weights_separate_each_channel_of_a_song(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(write_files(tmp_path, kind))
    assert type(model) is ARCHITECTURES[kind] and model.stems == STEMS and model.channels == 1
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    song = torch.randn(2, 20_000) * 0.1
    stems, same, mirrored = (
        Separator.from_model(model, options=EngineOptions(batch_size=size)).separate(each)
        for size, each in ((1, song), (3, song), (1, song.flip(0)))
    )
    assert list(stems) == list(STEMS) and all(stem.shape == song.shape for stem in stems.values())
    for name, stem in stems.items():
        assert_near(same[name], stem)
        assert_near(mirrored[name].flip(0), stem)


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("bandit", {"rnn_type": "RNN"}, "rnn_type is RNN, and only GRU or LSTM is supported"),
        ("bandit", {"band_specs": "mel"}, "the bands are 'mel', and only 'musical' is supported"),
        ("bandit", {"in_channel": 2}, "in_channel is 2, but the network is for one channel"),
        ("bandit_v2", {"hidden_activation": "Foo"}, "hidden_activation is Foo, and only Tanh or "),
        ("bandit_v2", {"complex_mask": False}, "complex_mask is False, and only True is supported"),
        ("bandit_v2", {"emb_dim": 20}, r"model\.emb_dim is 20, the weights have 12"),
        ("bandit", {"n_bands": 1}, "n_bands 1 does not fit n_fft 512"),
    ],
)
def test_an_invalid_configuration_is_a_one_line_error(tmp_path: Path, kind: str, changes: dict, message: str) -> None:
    path = write_files(tmp_path, kind)
    document = yaml.safe_load(path.read_text())
    document["kwargs" if kind == "bandit_v2" else "model"] |= changes
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_another_class_is_refused(tmp_path: Path) -> None:
    path = write_files(tmp_path, "bandit_v2")
    path.write_text(path.read_text().replace("cls: Bandit", "cls: Banquet"), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"cls is 'Banquet': use one of Bandit$"):
        read_config(path)


@pytest.mark.parametrize(
    "name, kind, rate", [("bandit_plus_dnr", Bandit, 44_100), ("bandit_v2_multi", BanditV2, 48_000)]
)
def test_the_public_checkpoints_have_so_many_parameters(name: str, kind: type, rate: int) -> None:
    description = read_config(name)
    model = build(description)
    assert type(model) is kind and model.sample_rate == rate
    assert sum(parameter.numel() for parameter in model.parameters()) == 37_022_688
