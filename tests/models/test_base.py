"""The common code of all architectures."""

import pytest
import torch
from torch import Tensor

from helpers.small_model import identity, small_model
from separation.errors import InputError
from separation.models.base import SeparationModel, Transform
from separation.models.stft import Stft


class WithoutCore(SeparationModel):
    def forward(self, chunks: Tensor) -> Tensor:
        return chunks[:, None]


def test_a_model_has_its_identity_from_its_construction_on() -> None:
    model = WithoutCore(identity(("vocals",), name="plain", chunk_samples=4096))
    assert (model.name, model.stems, model.sample_rate, model.chunk_samples) == ("plain", ("vocals",), 44100, 4096)
    assert model.normalisation == "peak" and model.origin is None


def test_a_model_without_a_core_says_that_it_cannot_be_exported() -> None:
    model = WithoutCore(identity(name="plain"))
    for attempt in (lambda: model.transform(4096), lambda: model.core(torch.zeros(1))):
        with pytest.raises(InputError, match=r"^plain cannot be exported \(its architecture has no part .*\): choose"):
            attempt()


def test_a_model_without_parts_for_stems_always_returns_all_of_them() -> None:
    model = WithoutCore(identity())
    assert model.only(("drums",)) is model


def test_fewer_stems_share_the_weights() -> None:
    model = small_model()
    fewer = model.only((model.stems[1],))
    assert fewer.stems == (model.stems[1],) and len(model.stems) == 2
    assert next(fewer.parameters()) is next(model.parameters())


def test_only_linear_layers_are_cast() -> None:
    model = small_model()
    model.to_precision(torch.float16)
    assert model.is_half and {parameter.dtype for parameter in model.parameters()} == {torch.float16, torch.float32}
    assert all(
        module.weight.dtype == torch.float16 for module in model.modules() if isinstance(module, torch.nn.Linear)
    )


def test_a_copy_in_another_precision_leaves_the_model_as_it_is() -> None:
    model = small_model()
    model.to_precision(torch.float16)
    other = model.in_precision(torch.bfloat16)
    assert model.is_half and not other.is_half
    assert torch.bfloat16 in {parameter.dtype for parameter in other.parameters()}
    assert torch.bfloat16 not in {parameter.dtype for parameter in model.parameters()}


@pytest.mark.parametrize("value, fits", [(65504.0, True), (-65504.0, True), (65536.0, False), (torch.nan, False)])
def test_weights_fit_a_type_whose_range_none_of_them_exceeds(value: float, fits: bool) -> None:
    model = small_model()
    next(model.parameters()).data.flatten()[0] = value
    assert model.fits(torch.float16) == fits


def test_the_transform_of_an_stft_takes_its_sizes_and_centres_its_frames() -> None:
    stft = Stft(n_fft=64, hop_length=16, win_length=48, normalized=True, window="rectangular")
    assert Transform.of(stft, zeros_after=5) == Transform(
        n_fft=64,
        hop_length=16,
        win_length=48,
        window="rectangular",
        scale=1 / 8,
        bins=33,
        zeros_after=5,
        padding=(32, 32),
        crop=32,
    )
    assert Transform.of(stft, bins=20).bins == 20
