"""BS-RoFormer: the community's layout key for key, and parity with an independent implementation."""

import pytest
import torch

from separation.models.bs_roformer import BSRoFormer, BSRoFormerConfig
from separation.models.layers import RotaryEmbedding

reference = pytest.importorskip("pymss_core.modules.bs_roformer.bs_roformer", reason="needs pymss-core")

BANDS_1024 = (4,) * 32 + (8,) * 16 + (32,) * 8 + (1,)  # 513 bins


def make_pair(**hyper) -> tuple[BSRoFormer, torch.nn.Module]:
    """This project's model and the reference with the same random weights."""
    torch.manual_seed(0)
    theirs = reference.BSRoformer(**({"time_transformer_depth": 1, "freq_transformer_depth": 1} | hyper)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:  # norm gains of exactly one would hide a mistake
                parameter.add_(torch.randn_like(parameter) * 0.02)
    config = BSRoFormerConfig(**hyper)
    with torch.device("meta"):
        ours = BSRoFormer(config)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours.eval(), theirs


@pytest.mark.parametrize(
    "hyper",
    [
        {"stereo": True, "stft_hop_length": 441},
        {"stereo": False, "num_stems": 4},
        {"stereo": True, "num_stems": 4, "stft_hop_length": 512, "mask_estimator_depth": 3},
        {"stereo": False, "stft_hop_length": 1024, "mask_estimator_depth": 1, "mlp_expansion_factor": 2},
        {
            "stereo": True,
            "stft_n_fft": 1024,
            "stft_win_length": 1024,
            "stft_hop_length": 256,
            "freqs_per_bands": BANDS_1024,
        },
        {"stereo": True, "time_transformer_depth": 2, "freq_transformer_depth": 2, "heads": 2, "zero_dc": True},
        {"stereo": True, "stft_normalized": True, "stft_win_length": 1024},
    ],
    ids=lambda hyper: ",".join(f"{key}={value}" for key, value in hyper.items() if key != "freqs_per_bands"),
)
def test_output_equals_the_independent_implementation(hyper: dict) -> None:
    ours, theirs = make_pair(**({"dim": 32, "depth": 2, "dim_head": 16, "heads": 4} | hyper))
    chunks = torch.randn(2, ours.channels, 12_000) * 0.1
    with torch.inference_mode():
        got = ours(chunks)
        expected = theirs(chunks).reshape(got.shape)
    assert got.shape == (2, hyper.get("num_stems", 1), ours.channels, 12_000)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_output_equals_the_independent_implementation_at_full_width() -> None:
    ours, theirs = make_pair(dim=512, depth=12, stereo=True, stft_hop_length=441)
    assert sum(parameter.numel() for parameter in ours.parameters()) == 159_758_092
    chunks = torch.randn(1, 2, 44_100) * 0.1
    with torch.inference_mode():
        got = ours(chunks)
        expected = theirs(chunks).reshape(got.shape)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def small_model(**hyper) -> BSRoFormer:
    torch.manual_seed(0)
    return BSRoFormer(
        BSRoFormerConfig(**({"dim": 32, "depth": 2, "dim_head": 16, "heads": 4, "stereo": True} | hyper))
    ).eval()


def test_rotary_embedding_equals_the_rotary_embedding_torch_package() -> None:
    from rotary_embedding_torch import RotaryEmbedding as Reference

    x = torch.randn(2, 4, 50, 16)
    assert (RotaryEmbedding(16)(x) - Reference(dim=16).rotate_queries_or_keys(x)).abs().max() <= 1e-5


@pytest.mark.parametrize("precision, decibels", [(torch.bfloat16, 35), (torch.float16, 50)])
def test_half_precision_stays_near_float32(precision: torch.dtype, decibels: float) -> None:
    model = small_model()
    chunks = torch.randn(1, 2, 12_000) * 0.1
    with torch.inference_mode():
        exact = model(chunks)
        model.to_precision(precision)
        error = model(chunks) - exact
    assert 10 * torch.log10(exact.square().sum() / error.square().sum()) > decibels


def test_the_estimate_does_not_depend_on_the_chunks_beside_it() -> None:
    model = small_model(num_stems=2)
    chunks = torch.randn(3, 2, 20_000) * 0.1
    with torch.inference_mode():
        alone = torch.cat([model(chunk[None]) for chunk in chunks])
        together = model(chunks)
    assert (alone - together).abs().max() <= 1e-6


def test_the_estimate_scales_with_the_input() -> None:
    model = small_model()
    chunks = torch.randn(1, 2, 20_000) * 0.5
    with torch.inference_mode():
        assert (model(chunks * 1e-3) * 1e3 - model(chunks)).abs().max() <= 1e-5


def test_bands_that_do_not_fill_the_spectrum_are_an_error_with_both_counts() -> None:
    with pytest.raises(ValueError, match=r"adds up to 10 bins.*1025"):
        BSRoFormerConfig(dim=8, depth=1, freqs_per_bands=(5, 5))
