"""gpu_models: models are made ready once, in batches that fit, with a spare for overflows."""

from typing import Any

import pytest
import torch

from helpers.small_separators import random_model
from separation import EstimateError
from separation.engine import gpu_models
from separation.engine.gpu_models import GpuModels
from separation.evaluation.metrics import sdr
from separation.models.base import SeparationModel


class Gpu:
    """Stands in for a GPU that holds batches of `room` chunks; nothing is computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fitting: int) -> None:
        self.room = 99
        self.measured: list[tuple[int, int]] = []
        self.captured: list[tuple[str, tuple[int, ...]]] = []
        monkeypatch.setattr(gpu_models, "chunk_memory_bytes", self._measure)
        monkeypatch.setattr(gpu_models, "fitting_batch_size", lambda n_bytes, gpu: fitting)
        monkeypatch.setattr(gpu_models, "captured", self._capture)

    def _measure(self, model: object, channels: int, samples: int, device: torch.device) -> int:
        self.measured.append((channels, samples))
        return 700

    def _capture(self, name: str, model: Any, shape: tuple[int, ...], device: torch.device) -> Any:
        self.captured.append((name, shape))
        if shape[0] > self.room:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return model


def test_a_model_is_made_ready_once_for_each_shape_of_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, models, device = Gpu(monkeypatch, 8), GpuModels(), torch.device("cuda")
    model = random_model(("left", "right"))
    ready = models.get(model, 1000, "auto", device)
    assert (ready.model, ready.batch_size, ready.n_stems, ready.device) == (model, 8, 2, device)
    assert models.get(model, 1000, "auto", device) is ready
    assert models.get(model.only(("right",)), 1000, "auto", device) is not ready
    assert models.get(model, 2000, "auto", device).batch_size == 8
    assert models.get(model, 1000, 3, device).batch_size == 3
    assert gpu.measured == [(2, 1000), (2, 1000), (2, 2000), (2, 1000)]
    assert gpu.captured == [
        ("random", (size, 2, samples)) for size, samples in ((8, 1000),) * 2 + ((8, 2000), (3, 1000))
    ]
    models.forget("random")
    assert models.get(model, 1000, "auto", device) is not ready


def test_if_memory_is_short_the_batch_is_halved_for_this_song_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu, models, model = Gpu(monkeypatch, 8), GpuModels(), random_model(("left",))
    sizes = []
    for gpu.room in (2, 4, 8, 2):  # the last comes too late to matter
        sizes.append(models.get(model, 1000, "auto", torch.device("cuda")).batch_size)
    assert sizes == [2, 4, 8, 8]
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned[:2] == [
        f"the GPU's memory does not hold a batch of {size} chunks: continuing with batches of {size // 2}"
        for size in (8, 4)
    ]
    gpu.room = 0
    with pytest.raises(EstimateError, match="the memory of cuda does not hold one chunk of 2000 samples"):
        models.get(model, 2000, "auto", torch.device("cuda"))


def test_the_least_recently_used_models_do_not_stay_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, 8)
    monkeypatch.setattr(gpu_models, "MAX_READY", 2)
    models, model = GpuModels(), random_model(("left",))
    for samples in (1000, 2000, 1000, 3000):
        models.get(model, samples, "auto", torch.device("cuda"))
    assert [kind[2] for kind in models.ready] == [1000, 3000]


def test_the_spare_of_a_float16_model_is_one_bfloat16_copy_and_a_warning_names_the_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    models, model, chunk = GpuModels(), random_model(("left",)), torch.randn(1, 2, 44_100) * 0.1
    with torch.inference_mode():
        exact = model(chunk)
        model.to_precision(torch.float16)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        spare = models.spare(model)
        assert isinstance(spare, SeparationModel) and not spare.is_half and model.is_half
        assert sdr(exact, spare(chunk)) > 30
    assert spare.is_half is False and {weight.dtype for weight in spare.parameters()} == {torch.float32, torch.bfloat16}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert models.spare(model) is spare
    warned = [record.getMessage() for record in caplog.records]
    assert warned == ["random: NaN or Inf in float16: the rest of this song is computed in bfloat16"] * 2


def test_only_a_float16_model_is_made_ready_with_a_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, 8)
    models, model = GpuModels(), random_model(("left",))
    assert models.get(model, 1000, "auto", torch.device("cuda")).spare is None
    model.to_precision(torch.float16)
    spare = models.get(model, 2000, "auto", torch.device("cuda")).spare
    assert spare is not None and spare() is models.spare(model)


def test_a_spare_that_does_not_fit_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def copy(model: SeparationModel, dtype: torch.dtype) -> SeparationModel:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SeparationModel, "in_precision", copy)
    with pytest.raises(EstimateError, match="second copy of random, in bfloat16: choose precision bf16"):
        GpuModels().spare(random_model(("left",)))
