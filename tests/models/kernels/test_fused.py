"""The layers in C++ equal their references in PyTorch, and unsupported ones fall back to these."""

import copy
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.arm import ArmKernels, needs_arm
from helpers.common import slow
from helpers.fused import every_kind, needs_fused, use_kind
from helpers.small_model import identity
from separation.checkpoints.load import load_model
from separation.cpu import KINDS, Kind
from separation.device import choose
from separation.errors import InputError
from separation.evaluation.metrics import sdr
from separation.models import ARCHITECTURES
from separation.models.attention import einsum_attention, fused_attention
from separation.models.kernels.fused import FusedBandSplit, FusedMaskEstimator, FusedTransformer
from separation.models.kernels.native import library
from separation.models.layers import Attention, BandSplit, MaskEstimator, RMSNorm, RotaryEmbedding, Transformer
from separation.models.roformer import RoFormer


def with_random_gains(module: nn.Module) -> nn.Module:
    """Change norm gains and biases, since a mistake would not show with ones and zeros."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if name in ("gamma", "bias"):
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval().requires_grad_(False)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def make_transformer(dim: int, heads: int, dim_head: int, depth: int = 1, *, with_all: bool = False) -> Transformer:
    """With `with_all`, the transformer has the parts of some checkpoints: an output norm and biases of attention."""
    torch.manual_seed(0)
    sizes = {"heads": heads, "dim_head": dim_head, "positions": RotaryEmbedding(dim_head)}
    make_attention = partial(Attention, dim, **sizes, backend="einsum")
    transformer = Transformer(dim, depth=depth, make_attention=make_attention, norm_output=with_all)
    if with_all:
        biases = nn.Parameter(torch.zeros(3 * heads * dim_head)), nn.Parameter(torch.zeros(dim))
        for attention, _ in transformer.layers:
            attention.add_biases(*biases)
    with_random_gains(transformer)
    return transformer


ERRORS = {torch.float32: 2e-6, torch.bfloat16: 0.01}


def float_precisions(kind: Kind) -> list[torch.dtype]:
    return [dtype for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")) if name in kind.precisions]


def all_precisions(kind: Kind) -> list[torch.dtype]:
    return [*float_precisions(kind), *([torch.int8] if "int8" in kind.precisions else [])]


@needs_fused
@every_kind
@pytest.mark.parametrize("sequences, tokens", [(1, 1), (3, 62), (30, 20), (2, 300), (5, 33)])
@pytest.mark.parametrize("sizes", [(64, 2, 64), (72, 4, 32), (96, 3, 96)])  # features, heads, features per head
@pytest.mark.parametrize("with_all", [False, True])
def test_a_fused_transformer_equals_the_reference(
    kind: Kind,
    sequences: int,
    tokens: int,
    sizes: tuple[int, int, int],
    with_all: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_kind(kind, monkeypatch)
    transformer = make_transformer(*sizes, depth=2, with_all=with_all)
    x = torch.randn(sequences, tokens, sizes[0])
    with torch.inference_mode():
        expected = transformer(x) - x
        for precision in float_precisions(kind):
            got = FusedTransformer(transformer, precision)(x.clone()) - x
            assert relative_error(got, expected) < ERRORS[precision], precision


class Rounded(nn.Module):
    """A linear layer whose operands are integers up to a limit, times a scale per column of weights and per row of x.

    Behind a norm, with its gain in the weights; otherwise what it is given has the precision of attention.
    """

    def __init__(self, linear: nn.Linear, limit: int, given: torch.dtype, gain: Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.bias = rounded(linear.weight * (1 if gain is None else gain), limit), linear.bias
        self.limit, self.given = limit, given if gain is None else torch.float32

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(rounded(x.to(self.given).float(), self.limit), self.weight, self.bias)


def rounded(x: Tensor, limit: int) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / limit
    return (x / scale).round() * scale


def with_rounded_operands(transformer: Transformer, limit: int, floats: torch.dtype) -> Transformer:
    """The reference for the fused layers with int8. `floats` is the precision of attention."""
    reference = copy.deepcopy(transformer)
    make = partial(Rounded, limit=limit, given=floats)
    for attention, feed_forward in reference.layers:
        norm, up, _, _, down = feed_forward.net
        attention.to_qkv = make(attention.to_qkv, gain=attention.norm.gamma)
        attention.to_gates = make(attention.to_gates, gain=attention.norm.gamma)
        attention.to_out[0] = make(attention.to_out[0])
        feed_forward.net[1], feed_forward.net[4] = make(up, gain=norm.gamma), make(down)
        attention.norm.gamma.fill_(1), norm.gamma.fill_(1)
        attention.attend = lambda *qkv: einsum_attention(*(each.to(floats).float() for each in qkv))
    return reference


def make_transformer_of_one_part(part: str, dim: int, heads: int, dim_head: int) -> Transformer:
    """The other part adds nothing: otherwise the rounding of one part would change the input of the other."""
    transformer = make_transformer(dim, heads, dim_head, with_all=True)
    attention, feed_forward = transformer.layers[0]
    other = feed_forward.net[4] if part == "attention" else attention.to_out[0]
    other.weight.zero_(), other.bias.zero_()
    transformer.norm = nn.Identity()
    return transformer


def tokens_of_three_levels(sequences: int, tokens: int, dim: int) -> Tensor:
    levels = torch.tensor([1e-3, 0.1, 10.0])[torch.arange(tokens) % 3, None]
    return torch.randn(sequences, tokens, dim) * levels


PARTS = {"attention": 0.005, "feed-forward": 0.001}  # the error that is allowed in int8; without rounding it is 0.01


@needs_fused
@every_kind
@pytest.mark.parametrize("part, error", PARTS.items())
@pytest.mark.parametrize("sequences, tokens", [(1, 1), (3, 62), (2, 300), (5, 33)])
@pytest.mark.parametrize("sizes", [(64, 2, 64), (72, 4, 32), (96, 3, 96)])  # features, heads, features per head
def test_a_fused_transformer_in_int8_equals_a_plain_one_with_rounded_operands(
    kind: Kind,
    part: str,
    error: float,
    sequences: int,
    tokens: int,
    sizes: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "int8" not in kind.precisions:
        pytest.skip(f"{kind.name} has no integer kernel")
    limit = use_kind(kind, monkeypatch).functions.integer_limit()
    transformer = make_transformer_of_one_part(part, *sizes)
    x = tokens_of_three_levels(sequences, tokens, sizes[0])
    with torch.inference_mode():
        expected = with_rounded_operands(transformer, limit, float_precisions(kind)[-1])(x) - x
        got = FusedTransformer(transformer, torch.int8)(x.clone()) - x
    assert relative_error(got, expected) < error


@pytest.mark.slow
@needs_arm
@pytest.mark.parametrize("kind", [pytest.param(kind, id=kind.name) for kind in KINDS if kind.machine == "aarch64"])
def test_the_kernels_for_arm_equal_the_references_on_an_emulated_cpu(kind: Kind, tmp_path: Path) -> None:
    kernels = ArmKernels(kind, tmp_path)
    transformer = make_transformer(64, 2, 32, with_all=True)
    transformer.norm = nn.Identity()
    x = torch.randn(2, 33, 64)
    with torch.inference_mode():
        for dtype in float_precisions(kind):
            got = kernels.transformer(transformer, x, dtype) - x
            assert relative_error(got, transformer(x) - x) < ERRORS[dtype], dtype
            q, k, v = torch.randn(3, 2, 2, 33, 32).to(dtype)
            expected = einsum_attention(*(each.float() for each in (q, k, v)))
            assert relative_error(kernels.attention(q, k, v), expected) < ERRORS[dtype], dtype
        if "int8" not in kind.precisions:
            return
        x = tokens_of_three_levels(2, 33, 64)
        for part, error in PARTS.items():
            transformer = make_transformer_of_one_part(part, 64, 2, 32)
            reference = with_rounded_operands(transformer, kernels.integer_limit(), float_precisions(kind)[-1])
            got = kernels.transformer(transformer, x, torch.int8) - x
            assert relative_error(got, reference(x) - x) < error, part


@needs_fused
@every_kind
def test_a_fused_transformer_takes_either_axis_without_a_copy(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kind(kind, monkeypatch)
    transformer = make_transformer(64, 2, 32)
    for precision in all_precisions(kind):
        x = torch.randn(40, 7, 64)
        with torch.inference_mode():
            expected = FusedTransformer(transformer, precision)(x.transpose(0, 1).contiguous())
            got = FusedTransformer(transformer, precision)(x.transpose(0, 1))
        assert torch.equal(got, expected)
        assert got.data_ptr() == x.data_ptr()


@needs_fused
@every_kind
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3)])
def test_fused_attention_takes_tensors_in_any_order_in_memory(
    kind: Kind, order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`order` is that of batch, heads, tokens and features in memory."""
    use_kind(kind, monkeypatch)
    shape = (3, 4, 37, 64)
    back = [order.index(axis) for axis in range(4)]

    def tensor(seed: int, dtype: torch.dtype) -> Tensor:
        numbers = torch.randn([shape[axis] for axis in order], generator=torch.Generator().manual_seed(seed))
        return numbers.to(dtype).permute(back)

    for dtype in float_precisions(kind):
        q, k, v = (tensor(seed, dtype) for seed in range(3))
        assert q.shape == shape
        expected = einsum_attention(*(each.float() for each in (q, k, v)))
        assert relative_error(fused_attention(q, k, v), expected) < ERRORS[dtype]
        assert relative_error(fused_attention(q, tensor(1, dtype).contiguous(), v), expected) < ERRORS[dtype]


@needs_fused
def test_fused_attention_supports_scores_that_differ_widely() -> None:
    transformer = make_transformer(64, 2, 32)
    transformer.layers[0][0].to_qkv.weight *= 30
    x = torch.randn(4, 70, 64)
    with torch.inference_mode():
        expected = transformer(x)
        for precision in float_precisions(library().kind):
            got = FusedTransformer(transformer, precision)(x.clone())
            assert torch.isfinite(got).all()
            assert relative_error(got, expected) < 0.05  # a score of 900 in bfloat16 is off by up to 2


@needs_fused
@every_kind
@pytest.mark.parametrize("linear_layers", [1, 2, 3])
def test_fused_bands_equal_the_reference(kind: Kind, linear_layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kind(kind, monkeypatch)
    torch.manual_seed(0)
    widths = (4,) * 5 + (516, 35, 130)
    split = with_random_gains(BandSplit(72, widths))
    norm = with_random_gains(RMSNorm(72))
    estimator = with_random_gains(MaskEstimator(72, widths, linear_layers=linear_layers, expansion=4))
    spectrum = torch.randn(2, 101, sum(widths))
    with torch.inference_mode():
        features = split(spectrum)
        for precision in float_precisions(kind):
            assert relative_error(FusedBandSplit(split, precision)(spectrum), features) < ERRORS[precision]
            for each in (norm, nn.Identity()):
                masks = estimator(each(features))
                got = FusedMaskEstimator(each, estimator, precision)(features)
                assert relative_error(got, masks) < ERRORS[precision]


def make_model(family: str, **hyper: int) -> RoFormer:
    torch.manual_seed(0)
    sizes = {"dim": 64, "depth": 2, "dim_head": 32, "heads": 2, "num_stems": 2}
    architecture: Any = ARCHITECTURES[family]
    return with_random_gains(architecture(architecture.Config(**(sizes | hyper), stereo=True), identity()))


FAMILIES = pytest.mark.parametrize(
    "family, hyper",
    [
        ("bs_roformer", {}),
        slow(("bs_roformer", {"use_shared_bias": True, "skip_connection": True, "depth": 3})),
        slow(("mel_band_roformer", {})),
        ("mel_band_roformer", {"mask_estimator_depth": 2, "time_transformer_depth": 2, "skip_connection": True}),
    ],
)


def skip_without(precision: torch.dtype) -> None:
    if precision not in all_precisions(kind := library().kind):
        pytest.skip(f"the kernels for {kind.name} do not compute in {precision}")


PRECISIONS = pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.int8])


@needs_fused
@FAMILIES
@pytest.mark.parametrize("precision, decibels", [(torch.float32, 105), (torch.bfloat16, 40), (torch.int8, 33)])
def test_a_fused_model_is_close_to_float32(
    family: str, hyper: dict[str, Any], precision: torch.dtype, decibels: float
) -> None:
    skip_without(precision)
    model = make_model(family, **hyper)
    chunks = torch.randn(2, 2, 20_000) * 0.1
    with torch.inference_mode():
        exact = model(chunks)
        model.prepare(precision, attention="fused")
        assert sdr(exact, model(chunks)) > decibels


@needs_fused
@FAMILIES
@PRECISIONS
def test_a_fused_model_depends_neither_on_the_batch_nor_on_the_threads(
    family: str, hyper: dict[str, Any], precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without(precision)
    model = make_model(family, **hyper)
    model.prepare(precision, attention="fused")
    chunks = torch.randn(3, 2, 15_000) * 0.1
    with torch.inference_mode():
        together = model(chunks)
        assert torch.equal(torch.cat([model(chunk[None]) for chunk in chunks]), together)
        for threads in (1, 3, 8):
            monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
            assert torch.equal(model(chunks), together)


@needs_fused
@every_kind
def test_fused_layers_propagate_nan(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kind(kind, monkeypatch)
    transformer = make_transformer(64, 2, 32, with_all=True)
    plain = with_random_gains(MaskEstimator(64, (8, 8), linear_layers=2, expansion=1))
    x = torch.randn(1, 50, 2, 64)
    x[0, 20, 1, 5] = torch.nan
    for precision in all_precisions(kind):
        with torch.inference_mode():
            for norm in (RMSNorm(64), nn.Identity()):
                masks = FusedMaskEstimator(norm, plain, precision)(x)
                assert masks[0, 20, 8:].isnan().all() and not masks[0, :20].isnan().any()
            y = FusedTransformer(transformer, precision)(x[0].transpose(0, 1).clone())
        assert y[1].isnan().all()
        assert not y[0].isnan().any()


@needs_fused
@pytest.mark.parametrize("family", ["bs_roformer", "mel_band_roformer"])
@pytest.mark.parametrize(
    "hyper, reason",
    [
        ({"dim_head": 16}, "it does not support 2 heads of 16 on 32 features"),
        ({"dim_head": 32, "linear_transformer_depth": 1}, "it does not support linear attention"),
        ({"dim_head": 32, "use_pope": True}, "it does not support polar positions"),
    ],
)
def test_unsupported_layers_fall_back_and_the_reason_is_logged(
    family: str, hyper: dict[str, int], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hyper = {"dim": 32, "depth": 1, "heads": 2, "stereo": True} | hyper
    audio = {"sample_rate": 44100, "chunk_size": 4096}
    path, weights = tmp_path / "small.yaml", tmp_path / "small.safetensors"
    path.write_text(yaml.safe_dump({"architecture": family, "stems": ["vocals"], "audio": audio, "model": hyper}))
    architecture: Any = ARCHITECTURES[family]
    save_file(architecture(architecture.Config(**hyper), identity(["vocals"])).state_dict(), weights)
    with caplog.at_level(logging.INFO):
        model = load_model(path, checkpoint=weights, precision="fp32")
    assert f"attention sdpa (not fused: {reason}" in caplog.text
    with torch.inference_mode():
        assert torch.isfinite(model(torch.randn(1, 2, 4096))).all()
    with pytest.raises(InputError, match=r"cannot use attention 'fused' .* use auto"):
        load_model(path, checkpoint=weights, precision="fp32", attention="fused")


@needs_fused
def test_int8_is_used_only_if_requested_and_only_by_fused_layers(caplog: pytest.LogCaptureFixture) -> None:
    chunk = torch.randn(1, 2, 40_000, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.inference_mode():
        estimates = {name: load_model("demo", precision=name) for name in ("int8", "bf16", "fp32")}
        got = {name: model(chunk)[0].flatten(0, 1) for name, model in estimates.items()}
    precisions = {name: model.precision for name, model in estimates.items()}
    assert precisions == {"int8": torch.int8, "bf16": torch.bfloat16, "fp32": torch.float32}
    assert 40 < sdr(got["fp32"], got["int8"]) < 70  # above, it would be another float
    assert 40 < sdr(got["fp32"], got["bf16"]) < 70
    assert caplog.text == ""
    plain = load_model("demo", precision="int8", attention="einsum")
    assert caplog.messages == ["demo computes in floats, not in int8 (attention einsum: requested)"]
    assert plain.precision == choose("cpu").precision != torch.int8
