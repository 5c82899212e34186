"""RoFormers with value residuals equal their references.

These are lucidrains/BS-RoFormer at 87576b9 (0.5.1) and ZFTurbo/Music-Source-Separation-Training at ccc011a.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.recorded import assert_as_recorded
from helpers.small_model import identity, write_weights
from helpers.variants import (
    BANDS,
    HYPER,
    assert_batch_and_stems_are_alone,
    assert_published_files_load,
    make_variant,
)
from separation import load_model
from separation.checkpoints.build import build
from separation.checkpoints.catalogue import read_config
from separation.errors import CheckpointError
from separation.models import ARCHITECTURES
from separation.models.kernels.native import NotFusedError

KINDS = ["bs_roformer_value_residual", "bs_roformer_experimental", "mel_band_roformer_experimental"]
SMALL: dict[str, Any] = {"dim": 32, "depth": 2, "stereo": True, "dim_head": 16, "heads": 2}
DEEP = {"num_stems": 2, "stereo": False, "time_transformer_depth": 2, "depth": 3, "stft_hop_length": 1024}
SKIPS = {"stereo": False, "depth": 3, "skip_connection": True, "freq_transformer_depth": 2, "mlp_expansion_factor": 2}
LEARNS = {"use_value_residual_learning": True, "num_stems": 2}
RECORDED = [
    ("bs_roformer_value_residual", {}, 12_288, """
    5.534181 0.008342655 -0.06479664 0.003607491 -0.03740477 0.001861638 0.02955304 -0.005886955 -0.01103124
    0.007015384 0.004733786 0.01341645 0.01793829 -0.05454109 0.003806774 -0.002608832 0.0006226701 0.03319294
    -0.0006042757 -0.01826826 0.02165048 -0.02919646 0.02377302 -0.01039788 -0.03676641
    """),
    ("bs_roformer_value_residual", {**DEEP, "mask_estimator_depth": 1}, 12_288, """
    8.938411 8.951201 0.03165788 0.03698204 0.06530779 0.0481658 -0.01612015 -0.008101775 -0.1776051 0.009851529
    0.03523608 -0.1056188 -0.09893978 0.02005688 0.05216505 0.1203 0.08591919 0.0624538 0.009410889 -0.03870414
    0.04384514 0.006606256 0.06457541 0.1180485 -0.08347969 -0.04211371
    """),
    ("bs_roformer_experimental", LEARNS, 12_000, """
    6.678086 6.500961 0.04031716 -0.03313465 -0.09039572 -0.03538333 -0.01674316 0.01727397 -0.005364029 0.001508275
    0.03487932 -0.003424869 -0.01592909 -0.05452958 0.01401964 -0.01989843 0.03566665 0.02426045 0.01888871
    0.01680702 -0.01301392 0.00606844 0.02682439 0.006280907 -0.02348514 -0.01702209
    """),
    ("bs_roformer_experimental", SKIPS, 12_000, """
    4.993905 -0.01092986 -0.05883363 -0.01724356 0.01492854 0.02378509 0.05171819 -0.02042025 0.0163468 0.02838265
    0.03197561 0.04038739 -0.01770295 -0.03423217 -0.002090053 0.03964075 0.02030101 0.01463965 -0.04529399
    -0.03493928 0.009099172 0.01692573 0.03510355 -0.03662953 -0.01061246
    """),
    ("mel_band_roformer_experimental", {**LEARNS, "mask_estimator_depth": 2}, 12_000, """
    4.024127 3.916781 0.00926922 -0.001087808 -0.02528029 -0.01210263 0.0139691 0.005628036 0.01524144 0.02649426
    0.01740223 -0.023822 -0.02103791 0.008728123 -0.0005029305 -0.02311769 0.01813838 -0.006495149 0.005433818
    -0.01667235 0.0327538 0.009148444 0.00310925 0.0008328384 -0.02215353 -0.005063242
    """),
]  # fmt: skip


@pytest.mark.parametrize("kind, hyper, length, figures", RECORDED)
def test_output_equals_the_reference(kind: str, hyper: dict[str, Any], length: int, figures: str) -> None:
    architecture: Any = ARCHITECTURES[kind]
    config = architecture.Config(**SMALL | hyper)
    assert_as_recorded(architecture(config, identity(["a", "b"][: config.num_stems])), length, figures)


def test_the_published_model_has_the_size_of_its_file() -> None:
    description = read_config("bs_roformer_inst_value_residual_unwa")
    model = build(description)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert weights == 98_262_588
    assert 0 < (description.files[0].bytes or 0) - 4 * weights < 500 * len(model.state_dict())


def test_chunks_and_stems_do_not_depend_on_the_others() -> None:
    assert_batch_and_stems_are_alone("bs_roformer_value_residual")


@pytest.mark.parametrize("backend", ["fused", "triton"])
def test_the_kernels_refuse_it_and_leave_it_unchanged(backend: str) -> None:
    model, chunks = make_variant("bs_roformer_value_residual", depth=2), torch.randn(1, 2, 3000)
    with torch.inference_mode():
        expected = model(chunks)
        with pytest.raises(NotFusedError, match="it does not support transformer with first values"):
            model.prepare(torch.float32, attention=backend)
        assert torch.equal(model(chunks), expected)


def test_a_published_pair_loads_as_it_is(tmp_path: Path) -> None:
    assert_published_files_load("bs_roformer_value_residual", tmp_path, depth=2)


@pytest.mark.parametrize("bands", ["bs", "mel"])
def test_the_experimental_ones_are_recognised_by_keys_of_their_yaml(tmp_path: Path, bands: str) -> None:
    name = "bs_roformer_experimental" if bands == "bs" else "mel_band_roformer_experimental"
    sizes: dict[str, Any] = {"freqs_per_bands": BANDS} if bands == "bs" else {"num_bands": 10}
    hyper = {key: value for key, value in HYPER.items() if key != "freqs_per_bands"} | {"depth": 2}
    keys = {"use_value_residual_learning": True, "num_residual_streams": 1}
    architecture: Any = ARCHITECTURES[name]
    model = architecture(architecture.Config(**hyper, **sizes, **keys), identity(["vocals"])).eval()
    weights = write_weights(model.state_dict(), tmp_path / "x.ckpt")
    document = {
        "audio": {"chunk_size": 8192, "sample_rate": 44100},
        "model": hyper
        | {key: list(value) if isinstance(value, tuple) else value for key, value in sizes.items()}
        | keys,
        "training": {"instruments": ["vocals", "other"], "target_instrument": "vocals"},
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    assert type(load_model(weights)) is architecture
    document["model"] |= {"num_residual_streams": 4}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(CheckpointError, match="num_residual_streams must be 1: versions of the package"):
        load_model(weights)
