"""chunk_plan: how songs are cut into chunks and batches, and how chunks are read at a song's ends."""

import pytest
import torch

from separation.engine.chunk_plan import Chunk, ChunkPlan, fades, read_extended
from separation.engine.song_waveforms import Samples
from separation.errors import InputError


@pytest.mark.parametrize("overlap", [-1, 4, 8, 12])
def test_an_overlap_that_is_not_smaller_than_the_chunk_is_refused(overlap: int) -> None:
    with pytest.raises(InputError, match=f"^an overlap of {overlap} samples does not fit a chunk of 4 samples: choose"):
        ChunkPlan(4, overlap)


def test_a_chunk_without_samples_is_refused() -> None:
    with pytest.raises(InputError, match="a chunk of 0 samples"):
        ChunkPlan(0, 0)


@pytest.mark.parametrize("reflects_border", [True, False])
@pytest.mark.parametrize("chunk, overlap", [(16, 8), (16, 15), (16, 0), (15, 7), (1, 0)])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
def test_the_chunks_keep_every_sample_of_the_song_and_none_outside(
    length: int, chunk: int, overlap: int, reflects_border: bool
) -> None:
    plan = ChunkPlan(chunk, overlap, reflects_border)
    found = list(plan.chunks(length))
    assert [each.start for each in found] == list(plan.starts(length))
    kept = {sample for each in found for sample in range(each.kept_start, each.kept_stop)}
    assert kept == set(range(length))


def test_a_reflected_border_puts_the_first_chunk_before_the_song() -> None:
    first, second = ChunkPlan(8, 4).chunks(4)
    assert first == Chunk(start=-4, kept_start=0, kept_stop=4, read_start=-4, read_length=8)
    assert (second.start, second.kept_start, second.kept_stop) == (0, 0, 4)


def test_without_a_reflected_border_a_short_last_chunk_is_centred_in_what_the_model_needs() -> None:
    plan = ChunkPlan(8, 0, reflects_border=False, input_samples=lambda length: 6 if length < 8 else None)
    assert list(plan.chunks(10)) == [Chunk(0, 0, 8, 0, 8), Chunk(8, 8, 10, 6, 6)]
    assert plan.whole_chunk_input_samples == 8


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 100])
def test_chunks_whose_estimates_spill_over_them_lie_side_by_side_around_the_song(length: int) -> None:
    plan = ChunkPlan(8, 0, reflects_border=False, input_samples=lambda length: length + 10, spill_samples=3)
    found = list(plan.chunks(length))
    assert [each.start for each in found] == list(range(-8, length + 3, 8))
    for each in found:
        assert (each.read_start, each.read_length) == (each.start - 5, 18)
        assert each.kept_start == max(0, each.start - 3) and each.kept_stop == min(length, each.start + 11)
    assert all(each.kept_start < each.kept_stop for each in found)


def test_batches_hold_consecutive_chunks_that_are_read_at_the_same_length() -> None:
    plan = ChunkPlan(8, 0, reflects_border=False, input_samples=lambda length: 6 if length < 8 else None)
    batches = plan.batches(8 * 5 + 2, batch_size=4)
    assert [[chunk.start for chunk in batch.chunks] for batch in batches] == [[0, 8, 16, 24], [32], [40]]
    assert [batch.size for batch in batches] == [4, 4, 1]


@pytest.mark.parametrize("n_chunks, size", [(1, 1), (2, 2), (3, 4), (5, 8), (20, 8)])
def test_a_song_of_few_chunks_has_batches_of_the_next_power_of_two(n_chunks: int, size: int) -> None:
    assert {batch.size for batch in ChunkPlan(10, 0).batches(10 * n_chunks, batch_size=8)} == {size}


def test_the_border_is_reflected_and_beyond_it_is_silence() -> None:
    song = Samples.of(torch.arange(1.0, 5.0)[None])  # 1 2 3 4
    assert read_extended(song, -2, 6, border=2).tolist() == [[3, 2, 1, 2, 3, 4, 3, 2]]
    assert read_extended(song, -5, 4, border=5).tolist() == [[0, 0, 4, 3, 2, 1, 2, 3, 4]]
    assert read_extended(song, 1, 3, border=2).tolist() == [[2, 3]]
    assert read_extended(Samples.of(torch.ones(1, 1)), -2, 3, border=2).tolist() == [[0, 0, 1, 0, 0]]


def test_fades_are_never_zero_and_sum_to_a_constant_over_the_overlap() -> None:
    for overlap in (1, 2, 7, 50):
        weights = fades(100, overlap)
        assert weights.min() > 0
        assert (weights[:overlap] + weights[-overlap:] - 1).abs().max() < 1e-6


def test_fades_take_at_most_half_a_chunk() -> None:
    assert fades(4, 3).tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1 / 3])
    assert fades(4, 0).tolist() == [1, 1, 1, 1]
