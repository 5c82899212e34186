"""A CUDA GPU gives the stems that the CPU gives, whatever its memory holds, and gives its memory back."""

from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor

from conftest import SONG
from separation import EstimateError, ModelPool, Separator, chunking
from separation.chunking import ChunkPlan, separate
from separation.metrics import sdr
from separation.models.attention import BACKENDS, choose_attention, einsum_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

GPU = torch.device("cuda")
# The SDR in dB that the same stems have at least, computed another way in that precision.
NEAR = {"fp32": 60.0, "bf16": 40.0, "fp16": 50.0}
PRECISIONS = list(NEAR)
PLAN = ChunkPlan(4000, 1000)


@pytest.fixture(scope="module")
def clip() -> Tensor:
    """Ten seconds of the demo song, [2, T]."""
    audio, _ = soundfile.read(SONG, dtype="float32", frames=441_000)
    return torch.from_numpy(audio.T.copy())


def stems(clip: Tensor, device: torch.device, precision: str, **options: int) -> dict[str, Tensor]:
    pool = ModelPool(str(device), precision)
    return Separator("demo", "all_6", pool=pool, chunk_seconds=4, overlap_seconds=2, **options).separate(clip)


def two_stems(batch: Tensor) -> Tensor:
    return torch.stack([batch * 0.5, batch.flip(-1)], dim=1)


def run(mixture: Tensor, model=two_stems, batch_size: int = 4) -> Tensor:
    """The estimates of a model that runs on the GPU."""
    blocks = separate(
        model, lambda a, b: mixture[:, a:b], mixture.shape[1], PLAN, n_stems=2, batch_size=batch_size, device=GPU
    )
    return torch.cat(list(blocks), dim=-1)


@pytest.mark.parametrize("precision, error", [(torch.float32, 1e-3), (torch.bfloat16, 0.02), (torch.float16, 0.02)])
@pytest.mark.parametrize("shape", [(62, 8, 801, 64), (801, 8, 62, 64), (2, 8, 336, 48), (5, 4, 100, 32)])
def test_every_backend_that_works_equals_the_plain_definition(
    precision: torch.dtype, error: float, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, *shape, device=GPU)
    expected = einsum_attention(q, k, v)
    for name in {choose_attention("auto", GPU, precision, shape[-1]).name, "sdpa"}:
        got = BACKENDS[name](q.to(precision), k.to(precision), v.to(precision)).float()
        assert (got - expected).norm() <= error * expected.norm()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_stems_are_those_of_the_cpu(clip: Tensor, precision: str) -> None:
    expected = stems(clip, torch.device("cpu"), "fp32")
    for stem, got in stems(clip, GPU, precision).items():
        assert sdr(expected[stem], got) > NEAR[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_batch_changes_the_stems_by_no_more_than_the_rounding(clip: Tensor, precision: str) -> None:
    expected = stems(clip, GPU, precision, batch_size=1)
    for batch_size in (2, 5, 8):
        for stem, got in stems(clip, GPU, precision, batch_size=batch_size).items():
            assert sdr(expected[stem], got) > NEAR[precision]


def test_the_same_song_gives_the_same_samples(clip: Tensor) -> None:
    first, second = (stems(clip, GPU, "auto", batch_size=3) for _ in range(2))
    assert all(torch.equal(first[stem], second[stem]) for stem in first)


def test_working_ahead_changes_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = torch.randn(2, 100_000)
    ahead = run(mixture)
    monkeypatch.setattr(chunking, "_is_asynchronous", lambda device: False)
    assert torch.equal(run(mixture), ahead)
    cpu = separate(two_stems, lambda a, b: mixture[:, a:b], 100_000, PLAN, n_stems=2)
    assert (torch.cat(list(cpu), dim=-1) - ahead).abs().max() <= 1e-6


def test_a_batch_for_which_the_memory_is_missing_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture, unit_bytes = torch.randn(2, 100_000), 2**28
    expected = run(mixture)
    sizes: list[int] = []

    def model(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        torch.empty(len(batch), unit_bytes, dtype=torch.uint8, device=GPU)
        return two_stems(batch)

    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved(GPU) + 2.5 * unit_bytes
    if torch.cuda.mem_get_info(GPU)[0] < 3 * unit_bytes:
        pytest.skip("needs 768 MiB of free memory on the GPU")
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(GPU).total_memory)
    try:
        result = run(mixture, model, batch_size=8)
        assert sizes[:3] == [8, 4, 2]
        assert max(sizes[2:]) == 2
        assert torch.equal(result, expected)
        unit_bytes *= 4
        with pytest.raises(EstimateError, match=r"the memory of cuda:\d does not hold one chunk of 4000 samples"):
            run(mixture, model)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_batch_that_is_chosen_needs_the_memory_that_was_reckoned(clip: Tensor) -> None:
    pool = ModelPool("cuda", "auto")
    options = {"pool": pool, "chunk_seconds": 4, "overlap_seconds": 3}
    Separator("demo", "all_6", **options).separate(clip)
    (need,) = pool.chunk_bytes.values()
    before = torch.cuda.memory_allocated(GPU)
    torch.cuda.reset_peak_memory_stats(GPU)
    Separator("demo", "all_6", **options, batch_size=8).separate(clip)
    assert 0 < torch.cuda.max_memory_allocated(GPU) - before <= 1.25 * 8 * need


@pytest.mark.parametrize("end", ["finished", "an error", "given up"])
def test_a_songs_memory_is_given_back(clip: Tensor, tmp_path: Path, end: str) -> None:
    class StopError(Exception):
        pass

    def stop(share: float, stage: str) -> None:
        if end == "given up" and share > 0.5:
            raise StopError

    separator = Separator("demo", "all_6", pool=ModelPool("cuda"), chunk_seconds=4, overlap_seconds=2)
    song = tmp_path / "song.wav"
    soundfile.write(song, clip.T.numpy(), 44100, subtype="FLOAT")
    separator.separate_file(song, tmp_path)  # windows and workspaces are made once
    before = torch.cuda.memory_allocated(GPU)
    if end == "an error":
        separator.models["demo"].register_forward_hook(lambda module, inputs, estimates: estimates / 0)
        with pytest.raises(EstimateError):
            separator.separate_file(song, tmp_path)
    elif end == "given up":
        with pytest.raises(StopError):
            separator.separate_file(song, tmp_path, progress=stop)
    else:
        separator.separate_file(song, tmp_path)
    assert torch.cuda.memory_allocated(GPU) == before
