"""chunking: any model, any length, exact reconstruction, cross-faded chunk borders, flat memory."""

import pytest
import torch
from torch import Tensor

from separation.chunking import ChunkPlan, chunks, fades, read_extended, separate
from separation.errors import EstimateError, InputError


def identity(batch: Tensor) -> Tensor:
    return batch.unsqueeze(1)


def run(mixture: Tensor, plan: ChunkPlan, model=identity, n_stems: int = 1, **options) -> Tensor:
    blocks = separate(
        model, lambda start, stop: mixture[:, start:stop], mixture.shape[1], plan, n_stems=n_stems, **options
    )
    return torch.cat(list(blocks), dim=-1)


@pytest.mark.parametrize("reflects_border", [True, False])
@pytest.mark.parametrize("chunk, overlap", [(16, 8), (16, 4), (16, 12), (16, 15), (16, 0), (15, 7), (1, 0), (100, 50)])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 100, 257])
def test_an_identity_model_returns_its_input(length: int, chunk: int, overlap: int, reflects_border: bool) -> None:
    mixture = torch.randn(2, length)
    for batch_size in (1, 3):
        result = run(mixture, ChunkPlan(chunk, overlap, reflects_border), batch_size=batch_size)
        assert result.shape == (1, 2, length)
        assert (result[0] - mixture).abs().max() <= 1e-6


def test_every_second_and_overlap_of_the_contract_reconstructs_a_song() -> None:
    rate = 100  # samples a second: the plan only knows samples
    mixture = torch.randn(2, 61 * rate + 17)
    for chunk_seconds in range(4, 31):
        for overlap_seconds in range(1, min(chunk_seconds, 9)):
            plan = ChunkPlan(chunk_seconds * rate, overlap_seconds * rate)
            assert (run(mixture, plan)[0] - mixture).abs().max() <= 1e-6


@pytest.mark.parametrize("overlap", [4, 8, 12, 16])
def test_overlap_not_below_the_chunk_is_refused(overlap: int) -> None:
    with pytest.raises(InputError, match="overlap"):
        ChunkPlan(4, overlap)


def test_a_gain_error_in_one_chunk_is_cross_faded_and_never_stepped() -> None:
    calls = 0

    def second_chunk_louder(batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return batch.unsqueeze(1) * (2.0 if calls == 2 else 1.0)

    mixture = torch.ones(1, 1000)
    result = run(mixture, ChunkPlan(200, 100), second_chunk_louder)[0, 0]
    steps = result.diff().abs()
    assert result.max() == pytest.approx(2.0, abs=0.02)
    assert steps.max() <= 1.0 / 100 + 1e-4  # the whole gain error spread over the overlap


@pytest.mark.parametrize("batch_size", [2, 3, 5, 64])
def test_batch_size_does_not_change_a_sample(batch_size: int) -> None:
    mixture = torch.randn(2, 1234)

    def model(batch: Tensor) -> Tensor:
        return torch.stack([batch.sin(), batch * batch.mean(-1, keepdim=True)], dim=1)

    plan = ChunkPlan(128, 40)
    assert torch.equal(run(mixture, plan, model, 2), run(mixture, plan, model, 2, batch_size=batch_size))


def test_chunks_of_silence_are_not_computed_and_give_silence() -> None:
    seen = []

    def model(batch: Tensor) -> Tensor:
        seen.append(batch.shape[0])
        return batch.unsqueeze(1) + 0.5

    mixture = torch.zeros(2, 1000)
    mixture[:, 800:] = 0.3
    result = run(mixture, ChunkPlan(100, 50), model, batch_size=4)
    assert result[..., :700].abs().max() == 0
    assert sum(seen) < len(list(chunks(ChunkPlan(100, 50), 1000)))
    assert run(torch.zeros(2, 1000), ChunkPlan(100, 50), model).abs().max() == 0


def test_offset_and_scale_are_undone() -> None:
    mixture = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.2
    seen: list[Tensor] = []

    def model(batch: Tensor) -> Tensor:
        seen.append(batch)
        return batch.unsqueeze(1)

    result = run(mixture, ChunkPlan(500, 0, False), model, offset=0.2, scale=0.1)
    assert seen[0].std() == pytest.approx(1.0, rel=0.1)
    assert (result[0] - mixture).abs().max() <= 1e-6


def test_nan_out_is_an_error_that_says_where() -> None:
    def model(batch: Tensor) -> Tensor:
        return batch.unsqueeze(1) / 0

    with pytest.raises(EstimateError, match="between samples 0 and"):
        run(torch.ones(1, 50), ChunkPlan(20, 10), model)


def test_memory_does_not_grow_with_the_song() -> None:
    largest, furthest = 0, 0

    def read(start: int, stop: int) -> Tensor:
        nonlocal largest, furthest
        largest, furthest = max(largest, stop - start), max(furthest, stop)
        return torch.ones(1, stop - start)

    plan = ChunkPlan(100, 50)
    samples = 0
    for block in separate(identity, read, 100_000, plan, n_stems=1, batch_size=2):
        assert block.shape[:2] == (1, 1)
        assert block.shape[-1] <= plan.chunk_samples + 2 * plan.chunk_hop
        samples += block.shape[-1]
        assert furthest <= samples + plan.chunk_samples  # nothing is read long before it is needed
    assert samples == 100_000
    assert largest <= plan.chunk_samples


def test_progress_rises_to_the_number_of_chunks_and_raising_from_it_cancels() -> None:
    calls: list[tuple[int, int]] = []
    run(torch.ones(1, 1000), ChunkPlan(100, 50), batch_size=4, progress=lambda done, total: calls.append((done, total)))
    assert calls[0][0] == 0 and calls[-1][0] == calls[-1][1]
    assert calls == sorted(calls)

    class StopError(Exception):
        pass

    def cancel(done: int, total: int) -> None:
        if done:
            raise StopError

    with pytest.raises(StopError):
        run(torch.ones(1, 1000), ChunkPlan(100, 50), progress=cancel)


def test_the_border_is_reflected_and_beyond_it_lies_silence() -> None:
    song = torch.arange(1.0, 5.0)[None]  # 1 2 3 4

    def read(start: int, stop: int) -> Tensor:
        return song[:, start:stop]

    assert read_extended(read, -2, 6, 4, border=2).tolist() == [[3, 2, 1, 2, 3, 4, 3, 2]]
    assert read_extended(read, -5, 4, 4, border=5).tolist() == [[0, 0, 4, 3, 2, 1, 2, 3, 4]]
    assert read_extended(lambda a, b: song[:, :1][:, a:b], -2, 3, 1, border=2).tolist() == [[0, 0, 1, 0, 0]]


def test_fades_are_never_zero_and_sum_to_a_constant_over_the_overlap() -> None:
    for overlap in (1, 2, 7, 50):
        weights = fades(100, overlap)
        assert weights.min() > 0
        assert (weights[:overlap] + weights[-overlap:] - 1).abs().max() < 1e-6
