"""BS-Conformer and MelBand-Conformer equal the reference, ZFTurbo/Music-Source-Separation-Training at ccc011a."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.recorded import assert_as_recorded
from helpers.small_model import assert_half_precision_is_near, identity, write_weights
from helpers.variants import BANDS, HYPER, assert_batch_and_stems_are_alone, make_variant
from separation import load_model
from separation.models import ARCHITECTURES
from separation.models.kernels.native import NotFusedError
from separation.models.shapes import Shapes

SMALL: dict[str, Any] = {"dim": 32, "depth": 2, "stereo": True, "dim_head": 16, "heads": 2}
ONE = {"stereo": False, "depth": 1, "freq_conformer_depth": 1, "num_stems": 2}
NARROW = {"linear_conformer_depth": 1, "ff_mult": 2, "conv_expansion_factor": 1}
MEL = {"time_conformer_depth": 1, "num_stems": 2, "mask_estimator_depth": 2, "conv_kernel_size": 7}
RECORDED = [
    ("bs_conformer", {}, """
    6.261552 0.02419441 0.02310576 0.06672516 -0.0004075936 -0.007112839 0.07115249 -0.01443532 -0.007649444
    -0.01352425 -0.0658018 0.03376276 -0.01207404 -0.00144605 -0.02722436 -0.007432815 0.003785694 -0.009876434
    0.01418594 -0.01484796 0.03709897 -0.01237669 0.01641265 -0.02904636 0.04210065
    """),
    ("bs_conformer", {**ONE, **NARROW}, """
    4.117629 4.087199 -0.03010741 0.03837254 -0.03795607 0.009263139 0.04003567 -0.02448029 0.0005860237 -0.038164
    -0.04281966 0.006454453 -0.03051045 0.04622862 0.02648542 -0.03367047 -0.01747556 -0.0001131837 0.001423933
    -0.04002276 0.0184495 -0.07174416 0.05821284 0.02850405 -0.01881375 0.01319752
    """),
    ("mel_band_conformer", {**MEL, "skip_connection": True}, """
    4.413229 4.555876 0.005117697 0.001002005 -0.01253496 -0.03719352 -0.01076426 -0.003150457 -0.002185653
    0.01254048 -0.02055988 -0.006046908 0.000928265 0.03575338 -0.008998877 0.004688723 0.03181937 0.009216073
    -0.004056353 -0.0010973 -0.00524378 -0.01652127 0.01241535 0.001739613 0.02568972 -0.04434227
    """),
]  # fmt: skip


@pytest.mark.parametrize("kind, hyper, figures", RECORDED)
def test_output_equals_the_reference(kind: str, hyper: dict[str, Any], figures: str) -> None:
    architecture: Any = ARCHITECTURES[kind]
    config = architecture.Config(**SMALL | hyper)
    assert_as_recorded(architecture(config, identity(["a", "b"][: config.num_stems])), 12_000, figures)


def test_chunks_and_stems_do_not_depend_on_the_others() -> None:
    assert_batch_and_stems_are_alone("bs_conformer")


@pytest.mark.parametrize("precision, decibels", [(torch.bfloat16, 25), (torch.float16, 40)])
def test_half_precision_stays_close_to_float32(precision: torch.dtype, decibels: float) -> None:
    assert_half_precision_is_near(make_variant("bs_conformer"), precision, decibels)


@pytest.mark.parametrize("backend", ["fused", "triton"])
def test_the_kernels_refuse_it_and_leave_it_unchanged(backend: str) -> None:
    model, chunks = make_variant("bs_conformer"), torch.randn(1, 2, 3000)
    with torch.inference_mode():
        expected = model(chunks)
        with pytest.raises(NotFusedError, match="it does not support conformer"):
            model.prepare(torch.float32, attention=backend)
        assert torch.equal(model(chunks), expected)


@pytest.mark.parametrize("kind, hyper, _", RECORDED)
def test_the_shapes_of_weights_tell_the_hyper_parameters(kind: str, hyper: dict[str, Any], _: str) -> None:
    architecture: Any = ARCHITECTURES[kind]
    config = architecture.Config(**SMALL | hyper)
    state = architecture(config, identity(["a", "b"][: config.num_stems])).state_dict()
    found = architecture.sizes_in(Shapes({key: tuple(value.shape) for key, value in state.items()}), config)
    assert {key: value for key, value in found.items() if value not in (None, getattr(config, key))} == {}


@pytest.mark.parametrize("kind", ["bs_conformer", "mel_band_conformer"])
def test_a_yaml_that_names_no_architecture_loads(tmp_path: Path, kind: str) -> None:
    """Its structure is that of Music-Source-Separation-Training's config_vocals_bs_conformer.yaml and its like."""
    bands: dict[str, Any] = {"freqs_per_bands": BANDS} if kind == "bs_conformer" else {"num_bands": 10}
    sizes = {key: value for key, value in HYPER.items() if key != "freqs_per_bands"}
    sizes |= {"time_conformer_depth": 1, "freq_conformer_depth": 1}
    architecture: Any = ARCHITECTURES[kind]
    model = architecture(architecture.Config(**sizes, **bands), identity(["vocals"])).eval()
    weights = write_weights(model.state_dict(), tmp_path / "x.ckpt")
    off = {"sage_attention": False, "use_torch_checkpoint": False, "skip_connection": False, "conv_dropout": 0.0}
    document = {
        "audio": {"chunk_size": 8192, "dim_f": 1024, "dim_t": 801, "sample_rate": 44100, "min_mean_abs": 0.0},
        "model": sizes | {key: list(v) if isinstance(v, tuple) else v for key, v in bands.items()} | off,
        "training": {"instruments": ["vocals", "other"], "target_instrument": "vocals"},
        "inference": {"batch_size": 1, "num_overlap": 4, "normalize": False},
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    loaded, chunks = load_model(weights), torch.randn(1, 2, 5000)
    assert type(loaded) is architecture and loaded.attention != "fused"
    with torch.inference_mode():
        assert (loaded(chunks) - model(chunks)).abs().max() <= 1e-6
