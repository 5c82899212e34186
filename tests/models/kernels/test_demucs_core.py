"""The Demucs family's faster layers equal those of the demucs package, here on the CPU."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.common import quick_first
from helpers.small_demucs import CHUNK_SAMPLES, KINDS, SOURCES, model_of, network, relative_error, song
from helpers.small_model import identity
from separation.models.htdemucs import DemucsModel, HybridDemucs

HYBRIDS = ("htdemucs", "hdemucs")

pytestmark = pytest.mark.usefixtures("one_thread")


def fused(model: DemucsModel, dtype: torch.dtype = torch.float32) -> HybridDemucs:
    """A copy of the model with the faster layers."""
    other = copy.deepcopy(model)
    assert isinstance(other, HybridDemucs)
    other.to_precision(dtype)
    other.fuse()
    assert all(type(each).__name__ == "HybridNetwork" for each in other.networks.values())
    return other


def chunks(length: int = CHUNK_SAMPLES, batch: int = 2) -> Tensor:
    return torch.stack([song(length + i)[:, :length] for i in range(batch)])


def decibels(got: Tensor, exact: Tensor) -> float:
    return float(10 * torch.log10(exact.square().sum() / (got - exact).square().sum()))


@torch.no_grad()
@pytest.mark.parametrize("length", quick_first([CHUNK_SAMPLES, CHUNK_SAMPLES - 1, 1025, 300, 1], 2))
@pytest.mark.parametrize("kind", HYBRIDS)
def test_in_float32_they_equal_the_package(kind: str, length: int) -> None:
    model = model_of([network(0, kind)], kind)
    error = relative_error(fused(model)(chunks(length)), model(chunks(length)))
    print(f"{kind}, {length} samples: {error:.1e}")
    assert error <= 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_long_chunks_on_which_an_lstm_runs_in_frames_equal_the_package() -> None:
    model = model_of([network(0, "hdemucs")], "hdemucs")
    x = chunks(300 * 1024, 1)
    assert relative_error(fused(model)(x), model(x)) <= 1e-5


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", HYBRIDS)
def test_in_half_precision_they_are_as_close_to_float32_as_autocast(kind: str) -> None:
    model = model_of([network(0, kind)], kind)
    exact = model(chunks())
    plain = copy.deepcopy(model)
    plain.prepare(torch.float16, attention="sdpa")
    for dtype in (torch.float16, torch.bfloat16):
        plain.to_precision(dtype)
        near, by_autocast = decibels(fused(model, dtype)(chunks()), exact), decibels(plain(chunks()), exact)
        print(f"{kind} in {dtype}: {near:.1f} dB, by autocast {by_autocast:.1f} dB")
        assert near > by_autocast - 1


@pytest.mark.slow
@torch.no_grad()
def test_specialists_and_averaged_networks_equal_the_package() -> None:
    nets = [network(seed) for seed in range(3)]
    model = model_of(nets, specialists=("bass", "other", "drums"))
    quick, exact = fused(model), model(chunks())
    assert relative_error(quick(chunks()), exact) <= 1e-5
    assert relative_error(quick.only(("drums",))(chunks()), exact[:, 2:]) <= 1e-5
    members = model_of(nets)
    assert relative_error(fused(members)(chunks()), members(chunks())) <= 1e-5


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_copy_in_float16_can_be_cast_to_bfloat16(kind: str) -> None:
    model = model_of([network(0, kind)], kind)
    half = fused(model, torch.float16)
    other = copy.deepcopy(half)
    other.to_precision(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.float16, torch.float32}
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16, torch.float32}
    exact = model(chunks())
    assert decibels(other(chunks()), exact) > decibels(fused(model, torch.bfloat16)(chunks()), exact) - 1
    assert decibels(half(chunks()), exact) > decibels(other(chunks()), exact) + 10


@torch.no_grad()
@pytest.mark.parametrize("kind", quick_first(HYBRIDS, 1))
def test_silence_stays_silent_and_near_silence_gives_finite_samples(kind: str) -> None:
    quick = fused(model_of([network(0, kind)], kind), torch.float16)
    assert not quick(torch.zeros(1, 2, CHUNK_SAMPLES)).any()
    click = torch.zeros(1, 2, CHUNK_SAMPLES)
    click[..., 0] = 1e-30
    assert quick(click).isfinite().all()


@pytest.mark.parametrize(
    "kind, changes, fault",
    [
        ("amplitudes", {}, "masks amplitudes"),
        ("hdemucs", {"multi_freqs": [0.25]}, "layers that are split into bands"),
        ("hdemucs", {"context_enc": 1}, "a context"),
        ("htdemucs", {"t_norm_first": False}, "the structure of its transformer"),
        ("htdemucs", {"t_emb": "cape"}, "the structure of its transformer"),
    ],
)
def test_unsupported_networks_stay_the_packages(
    kind: str, changes: dict[str, Any], fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    architecture, arguments = KINDS[kind]
    torch.manual_seed(0)
    model = architecture(architecture.Config(**(arguments | changes)), identity(SOURCES, name="odd")).eval()
    assert isinstance(model, HybridDemucs)
    before = model.networks["0"]
    model.to_precision(torch.float16)
    with caplog.at_level("INFO", logger="separation"):
        model.fuse()
    assert model.networks["0"] is before
    (message,) = (record.message for record in caplog.records)
    assert message.startswith("odd: using the demucs package's own layers (") and fault in message


@pytest.mark.parametrize("precision, replaced", [(torch.float16, True), (torch.float32, False)])
def test_they_replace_the_packages_networks_on_a_gpu_in_16_bits(precision: torch.dtype, replaced: bool) -> None:
    model = model_of([network(0)])
    model.prepare(precision, attention="sdpa")
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # fake tensors have another class
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to("cuda")
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert all(parameter.is_cuda for parameter in model.parameters())
    assert (type(model.networks["0"]).__name__ == "HybridNetwork") == replaced


class Watch(TorchDispatchMode):
    """Counts operations, and fails for those that make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert name not in ("_local_scalar_dense", "equal", "is_nonzero", "nonzero"), name
        self.count += not any(value.alias_info is not None for value in func._schema.returns)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("kind", quick_first(HYBRIDS, 1))
def test_a_forward_never_waits_and_has_few_operations(kind: str) -> None:
    model = model_of([network(0, kind)], kind)
    with Watch(), pytest.raises(AssertionError, match="_local_scalar_dense"):  # the package's networks do wait
        model(chunks())
    quick = fused(model, torch.float16)
    quick(chunks())
    with Watch() as watch:
        quick(chunks())
    print(f"{kind}: {watch.count} operations")
    assert kind == "hdemucs" or watch.count <= 170  # a CPU divides an LSTM into operations, a GPU has a kernel
