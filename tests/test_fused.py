"""fused: the layers in C++ equal their plain twins in PyTorch, and are done without where they cannot be had."""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from separation.checkpoints import load_model
from separation.errors import InputError
from separation.models import native
from separation.models.attention import choose_attention
from separation.models.bs_roformer import BSRoFormer, BSRoFormerConfig
from separation.models.fused import FusedBandSplit, FusedMaskEstimator, FusedTransformer
from separation.models.layers import BandSplit, MaskEstimator, RMSNorm, RotaryEmbedding, Transformer
from separation.models.native import NotFusedError


def _why_not() -> str:
    try:
        native.library()
    except NotFusedError as e:
        return str(e)
    return ""


needs_fused = pytest.mark.skipif(bool(_why_not()), reason=f"the fused layers are not to be had: {_why_not()}")


def with_random_gains(module: nn.Module) -> nn.Module:
    """Norm gains and biases of exactly one and zero would hide a mistake."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if name in ("gamma", "bias"):
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval().requires_grad_(False)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def make_transformer(dim: int, heads: int, dim_head: int, depth: int = 1) -> Transformer:
    torch.manual_seed(0)
    rotary = RotaryEmbedding(dim_head)
    transformer = Transformer(dim, depth=depth, heads=heads, dim_head=dim_head, rotary_embed=rotary, backend="einsum")
    with_random_gains(transformer)
    return transformer


@needs_fused
@pytest.mark.parametrize("sequences, tokens", [(1, 1), (3, 62), (30, 20), (2, 600), (5, 33)])
@pytest.mark.parametrize("dim, heads, dim_head", [(64, 2, 64), (72, 4, 32), (96, 3, 96)])
def test_a_fused_transformer_equals_the_plain_one(
    sequences: int, tokens: int, dim: int, heads: int, dim_head: int
) -> None:
    transformer = make_transformer(dim, heads, dim_head, depth=2)
    x = torch.randn(sequences, tokens, dim)
    with torch.inference_mode():
        expected = transformer(x) - x
        got = FusedTransformer(transformer)(x.clone()) - x
    assert relative_error(got, expected) < 0.01


@needs_fused
def test_a_fused_transformer_takes_either_axis_without_a_copy() -> None:
    transformer = make_transformer(64, 2, 32)
    x = torch.randn(40, 7, 64)
    with torch.inference_mode():
        expected = FusedTransformer(transformer)(x.transpose(0, 1).contiguous())
        got = FusedTransformer(transformer)(x.transpose(0, 1))
    assert torch.equal(got, expected)
    assert got.data_ptr() == x.data_ptr()


@needs_fused
def test_fused_attention_holds_for_scores_far_apart() -> None:
    transformer = make_transformer(64, 2, 32)
    transformer.layers[0][0].to_qkv.weight *= 30
    x = torch.randn(4, 70, 64)
    with torch.inference_mode():
        expected = transformer(x)
        got = FusedTransformer(transformer)(x.clone())
    assert torch.isfinite(got).all()
    assert relative_error(got, expected) < 0.05  # a score of 900 in bfloat16 is off by up to 2


@needs_fused
@pytest.mark.parametrize("linear_layers", [1, 2, 3])
def test_fused_bands_equal_the_plain_ones(linear_layers: int) -> None:
    torch.manual_seed(0)
    widths = (4,) * 5 + (516, 34, 130)
    split = with_random_gains(BandSplit(72, widths))
    norm = with_random_gains(RMSNorm(72))
    estimator = with_random_gains(MaskEstimator(72, widths, linear_layers=linear_layers, expansion=4))
    spectrum = torch.randn(2, 101, sum(widths))
    with torch.inference_mode():
        features = split(spectrum)
        assert relative_error(FusedBandSplit(split)(spectrum), features) < 0.005
        masks = estimator(norm(features))
        assert relative_error(FusedMaskEstimator(norm, estimator)(features), masks) < 0.008


def make_model(**hyper: int) -> BSRoFormer:
    torch.manual_seed(0)
    sizes = {"dim": 64, "depth": 2, "dim_head": 32, "heads": 2, "num_stems": 2}
    return with_random_gains(BSRoFormer(BSRoFormerConfig(**(sizes | hyper), stereo=True)))


@needs_fused
def test_a_fused_model_is_within_40_db_of_float32() -> None:
    model = make_model()
    chunks = torch.randn(2, 2, 40_000) * 0.1
    with torch.inference_mode():
        exact = model(chunks)
        model.prepare(torch.bfloat16, attention="fused")
        error = model(chunks) - exact
    assert 10 * torch.log10(exact.square().sum() / error.square().sum()) > 40


@needs_fused
def test_a_fused_models_samples_depend_neither_on_the_batch_nor_on_the_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model()
    model.prepare(torch.bfloat16, attention="fused")
    chunks = torch.randn(3, 2, 30_000) * 0.1
    with torch.inference_mode():
        together = model(chunks)
        assert torch.equal(torch.cat([model(chunk[None]) for chunk in chunks]), together)
        for threads in (1, 3, 8):
            monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
            assert torch.equal(model(chunks), together)


@needs_fused
def test_nan_is_not_lost_in_fused_layers() -> None:
    transformer = make_transformer(64, 2, 32)
    estimator = FusedMaskEstimator(
        RMSNorm(64), with_random_gains(MaskEstimator(64, (8, 8), linear_layers=2, expansion=1))
    )
    x = torch.randn(1, 50, 2, 64)
    x[0, 20, 1, 5] = torch.nan
    with torch.inference_mode():
        assert estimator(x)[0, 20, 8:].isnan().all() and not estimator(x)[0, :20].isnan().any()
        y = FusedTransformer(transformer)(x[0].transpose(0, 1).clone())
    assert y[1].isnan().all()
    assert not y[0].isnan().any()


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """A model's YAML and weights, of sizes that the fused layers do not know."""
    hyper = {"dim": 32, "depth": 1, "dim_head": 16, "heads": 2, "stereo": True}
    document = {
        "architecture": "bs_roformer",
        "stems": ["vocals"],
        "audio": {"sample_rate": 44100, "chunk_size": 4096},
        "model": hyper,
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(document))
    save_file(BSRoFormer(BSRoFormerConfig(**hyper)).state_dict(), tmp_path / "small.safetensors")
    return tmp_path / "small.yaml", tmp_path / "small.safetensors"


@needs_fused
def test_sizes_that_are_not_known_fall_back_and_the_reason_is_logged(
    small: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        model = load_model(small[0], checkpoint=small[1], precision="bf16")
    assert "attention itemwise (not fused: it does not know 2 heads of 16 on 32 features" in caplog.text
    with torch.inference_mode():
        assert torch.isfinite(model(torch.randn(1, 2, 4096))).all()
    with pytest.raises(InputError, match=r"cannot use attention 'fused' .* use auto"):
        load_model(small[0], checkpoint=small[1], precision="bf16", attention="fused")


# The library


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache folder, still empty, of a program that has not loaded the library yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path / "cache" / "music-separation"
    native.library.cache_clear()


@needs_fused
def test_the_library_is_compiled_once_and_kept(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native.library()
    (kept,) = fresh.iterdir()
    assert kept.suffix == ".so"
    native.library.cache_clear()
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    native.library()


@needs_fused
def test_a_cache_folder_that_cannot_be_written_is_done_without(fresh: Path) -> None:
    fresh.parent.write_text("a file in its place")
    native.library()
    assert len(list(fresh.parents[1].glob("music-separation-*/*.so"))) == 1


@needs_fused
def test_a_compiler_that_fails_is_named_with_what_it_says(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-std=c++1"))
    with pytest.raises(NotFusedError, match=r"^c\+\+ cannot compile fused\.cpp \(.*error.*-std=c\+\+1"):
        native.library()
    assert list(fresh.iterdir()) == []


def test_without_a_compiler_the_plain_layers_run_and_say_why(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(native, "bfloat16_instructions", lambda: "avx512_bf16")
    choice = choose_attention("auto", torch.device("cpu"), torch.bfloat16)
    assert choice.name == "itemwise"
    assert choice.reason.startswith("not fused: no C++ compiler (c++, g++ or clang++) is installed; ")


@pytest.mark.parametrize(
    "instructions, reason",
    [("", "has no AVX-512 BF16"), ("amx_bf16", "has amx_bf16, which PyTorch's own")],
)
def test_without_the_instructions_the_plain_layers_run_and_say_why(
    instructions: str, reason: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "bfloat16_instructions", lambda: instructions)
    choice = choose_attention("auto", torch.device("cpu"), torch.bfloat16)
    assert choice.name == "itemwise"
    assert f"not fused: the CPU {reason}" in choice.reason
