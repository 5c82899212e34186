"""SCNet with masks and with transformers equal the reference, ZFTurbo/Music-Source-Separation-Training at ccc011a."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.recorded import assert_as_recorded
from helpers.small_model import assert_chunks_are_alone, assert_half_precision_is_near, assert_near, identity
from helpers.small_unets import SMALL, SOURCES
from separation import InputError, Separator, load_model
from separation.engine.options import EngineOptions
from separation.models import ARCHITECTURES
from separation.models.scnet import SCNet

pytestmark = pytest.mark.usefixtures("one_thread")

TRANSFORMERS: dict[str, Any] = {"tran_heads": 2, "tran_dim_head": 16, "tran_rotary_embedding_dim": 16}
TWO = ("vocals", "other")
OTHER_BANDS = {"conv_depths": (1, 2, 3), "band_stride": (1, 2, 8), "band_kernel": (5, 4, 8)}
RECORDED = [
    ("scnet_masked", {}, 12_000, """
    2.493345 3.877507 3.278233 4.490062 0.002195126 -0.00150524 0.00866608 0.007887644 -0.003081714 -0.02282988
    0.01264084 -0.01561662 0.01590821 0.008907572 -0.0278174 0.009211155 -0.02154169 0.001169528 -0.006002564
    -0.006973364 -0.0308131 -0.04922679 0.01527947 -0.006890926 0.02372137 0.009745699 -0.008806436 -0.02695532
    """),
    ("scnet_masked", {"sources": TWO, "num_dplayer": 4, **OTHER_BANDS}, 12_927, """
    3.669297 3.005141 0.01835082 -0.01113912 -0.01157929 -0.00657821 0.005353595 -0.008688274 -0.001695043
    -0.01513179 0.01434652 -0.02116352 -0.007833192 0.0166152 0.01094387 -0.01358215 0.01328123 0.002766383
    -0.02400954 0.002486975 0.001753763 0.005530668 -0.01834469 -0.01683669 0.01108237 -0.006404459
    """),
    ("scnet_tran", TRANSFORMERS, 12_000, """
    29.75371 32.13821 33.50873 33.59271 0.3148672 0.08116941 -0.07976452 -0.04419072 -0.1032 0.3029906 -0.2757574
    -0.1550503 -0.5238174 -0.02801609 -0.1518521 -0.02329188 0.1249909 -0.01738034 0.0849331 -0.03523128 -0.1091801
    -0.02830815 -0.1226189 -0.119503 -0.01809245 -0.2073098 -0.03262479 -0.1558642
    """),
    ("scnet_tran", {**TRANSFORMERS, "sources": TWO, "tran_depth": 2, "tran_dim_head": 32, "num_dplayer": 4}, 12_927, """
    78.86124 78.03599 -1.002284 0.00464502 0.02490063 -0.05919092 0.04012015 0.1720918 -0.6811849 0.1860016
    -0.1994707 -0.1130729 -0.3281816 -0.38746 -0.2591145 0.3796139 0.5873343 0.07596574 0.259373 0.3126808
    0.07029281 0.2911792 0.2114326 0.2276851 -0.1344584 0.3673057
    """),
]  # fmt: skip


def make(kind: str, **hyper: Any) -> SCNet:
    torch.manual_seed(0)
    architecture: Any = ARCHITECTURES[kind]
    config = architecture.Config(**SMALL | hyper)
    return architecture(config, identity(config.sources, chunk_samples=12_000)).eval()


def made(kind: str) -> SCNet:
    return make(kind, **(TRANSFORMERS if kind == "scnet_tran" else {}))


KINDS = pytest.mark.parametrize("kind", ["scnet_masked", "scnet_tran"])


@pytest.mark.parametrize("kind, hyper, length, figures", RECORDED)
def test_output_equals_the_reference(kind: str, hyper: dict, length: int, figures: str) -> None:
    assert_as_recorded(make(kind, **hyper), length, figures)


@KINDS
def test_an_estimate_does_not_depend_on_the_other_chunks_of_the_batch(kind: str) -> None:
    assert_chunks_are_alone(made(kind))


@KINDS
@pytest.mark.parametrize("precision, decibels", [(torch.bfloat16, 25), (torch.float16, 40)])
def test_half_precision_stays_close_to_float32(kind: str, precision: torch.dtype, decibels: float) -> None:
    assert_half_precision_is_near(made(kind), precision, decibels)


@KINDS
def test_requested_stems_are_the_same_without_the_others(kind: str) -> None:
    model = made(kind)
    chunks = torch.randn(1, 2, 12_000) * 0.1
    with torch.inference_mode():
        assert_near(model.only(("vocals", "bass"))(chunks), model(chunks)[:, [3, 1]])


@KINDS
def test_the_part_without_fourier_transforms_gives_the_same(kind: str) -> None:
    model = made(kind)
    chunks = torch.randn(1, 2, 12_000) * 0.1
    with torch.inference_mode():
        padded = torch.nn.functional.pad(chunks, (0, model._missing(12_000)))
        spectrum = torch.view_as_real(model._stft.spectrogram(padded))
        (spectra,) = model.core(spectrum)
        got = model._stft.waveform(torch.view_as_complex(spectra.contiguous()), 12_000)
        expected = model(chunks)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_kernels_for_cpus_give_the_same_masks() -> None:
    model = made("scnet_masked")
    chunks = torch.randn(1, 2, 12_000) * 0.1
    with torch.inference_mode():
        expected = model(chunks)
        model.fuse_for_cpu()
        assert (model(chunks) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_transformers_fall_back_to_plain_layers_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "separation")
    path, _ = write_files(tmp_path, "scnet_tran")
    model = load_model(path, attention="auto")
    assert model._core is None and model.attention in ("sdpa", "einsum")
    why = "there are none for an SCNet with transformers"
    assert f"small: using plain layers ({why})" in caplog.messages
    with pytest.raises(
        InputError,
        match=f"small cannot use attention 'fused' ({why}): use auto".replace("(", r"\(").replace(")", r"\)"),
    ):
        load_model(path, attention="fused")


def write_files(folder: Path, kind: str) -> tuple[Path, SCNet]:
    """A community YAML that does not name its architecture, and its weights as their author's program stores them."""
    model = made(kind)
    hyper = SMALL | (TRANSFORMERS if kind == "scnet_tran" else {})
    document = {
        "audio": {"sample_rate": 44100, "chunk_size": 12_000, "num_channels": 2, "min_mean_abs": 0.0},
        "model": {key: list(value) if isinstance(value, tuple) else value for key, value in hyper.items()},
        "training": {"instruments": list(SOURCES), "target_instrument": None},
        "inference": {"num_overlap": 2, "normalize": False},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    unused = {"first_conv.weight": torch.ones(4, 4, 1, 1)} if kind == "scnet_tran" else {}
    torch.save({**model.state_dict(), **unused}, folder / "small.ckpt")
    return path, model


@KINDS
def test_a_published_yaml_and_its_weights_separate_a_song(tmp_path: Path, kind: str) -> None:
    path, expected = write_files(tmp_path, kind)
    model = load_model(path)
    assert type(model) is ARCHITECTURES[kind] and model.stems == SOURCES
    chunks = torch.randn(1, 2, 12_000) * 0.1
    with torch.inference_mode():
        wanted = expected(chunks)
        assert (model(chunks) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    stems = Separator.from_model(model, options=EngineOptions(batch_size=2)).separate(torch.randn(2, 30_000) * 0.1)
    assert list(stems) == list(SOURCES) and all(stem.shape == (2, 30_000) for stem in stems.values())
