import io
import os
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import torch

from helpers.sounds import disk_full_after, noise, waveform_of
from separation.audio.waveform import StoredSamples, Waveform, read_padded, sample_fault, silent, write_all
from separation.errors import OutputError


def test_a_waveform_returns_what_was_appended_at_any_position(tmp_path: Path) -> None:
    samples = noise(1000)
    with Waveform(tmp_path) as waveform:
        for block in samples.split([1, 0, 499, 500], dim=1):
            waveform.append(block)
        assert waveform.n_samples == 1000
        assert torch.equal(waveform.read(0, 1000), samples)
        assert torch.equal(waveform.read(998, 1000), samples[:, 998:])
        assert torch.equal(waveform.read(3, 700), samples[:, 3:700])
        assert waveform.read(1000, 1000).shape == (2, 0)
        waveform.append(samples)
        assert torch.equal(waveform.read(999, 1001), torch.cat([samples[:, -1:], samples[:, :1]], dim=1))


def test_reading_past_the_end_is_an_error(tmp_path: Path) -> None:
    with waveform_of(noise(10), tmp_path) as waveform, pytest.raises(ValueError, match="10"):
        waveform.read(5, 11)


def test_the_statistics_are_those_of_the_whole_mono_mixture(tmp_path: Path) -> None:
    samples = noise(100_000, level=1e-3) + 0.5  # a mean far above the deviation: sums of squares would cancel
    with Waveform(tmp_path) as waveform:
        for block in samples.split(777, dim=1):
            waveform.append(block)
        mono = samples.double().mean(dim=0)
        assert waveform.peak == samples.abs().max().item()
        assert waveform.mean == pytest.approx(mono.mean().item(), rel=1e-12)
        assert waveform.std == pytest.approx(mono.std().item(), rel=1e-9)


@pytest.mark.parametrize("n_samples", [0, 1])
def test_fewer_than_two_samples_have_no_deviation(n_samples: int, tmp_path: Path) -> None:
    with waveform_of(noise(n_samples), tmp_path) as waveform:
        assert waveform.std == 0.0


def test_closing_deletes_the_file_and_closing_twice_is_harmless(tmp_path: Path) -> None:
    waveform = Waveform(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    waveform.close()
    waveform.close()
    assert not list(tmp_path.iterdir())


def test_on_a_full_disk_the_error_says_what_to_do_and_earlier_samples_stay(tmp_path: Path) -> None:
    with Waveform(tmp_path) as waveform:
        waveform.append(noise(1000))
        with disk_full_after(10_000), pytest.raises(OutputError, match="free space there") as caught:
            waveform.append(noise(1000))
        assert str(tmp_path) in str(caught.value)
        assert waveform.n_samples == 1000
        assert torch.equal(waveform.read(0, 1000), noise(1000))


def test_a_reader_waits_for_samples_that_are_still_missing(tmp_path: Path) -> None:
    samples = noise(1000)
    with Waveform(tmp_path, total_samples=1000) as waveform, ThreadPoolExecutor() as threads:
        assert waveform.n_samples == 1000
        waveform.append(samples[:, :600])
        assert torch.equal(waveform.read(100, 600), samples[:, 100:600])
        assert not waveform.is_complete(0)
        rest = threads.submit(waveform.read, 500, 1000)
        assert wait([rest], timeout=0.1).not_done
        waveform.append(samples[:, 600:])
        assert torch.equal(rest.result(20), samples[:, 500:])
        assert waveform.is_complete(0)


def test_closing_ends_the_wait_for_samples(tmp_path: Path) -> None:
    waveform = Waveform(tmp_path, total_samples=1000)
    with ThreadPoolExecutor() as threads:
        rest = threads.submit(waveform.read, 500, 1000)
        assert wait([rest], timeout=0.1).not_done
        waveform.close()
        with pytest.raises(ValueError, match="closed"):
            rest.result(20)
    assert not list(tmp_path.iterdir())


def test_in_a_missing_folder_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="choose another folder"):
        Waveform(tmp_path / "missing")


def test_stored_samples_are_the_waveform_with_its_statistics_and_their_file_is_kept(tmp_path: Path) -> None:
    samples = noise(100_000)
    path = tmp_path / "stored"
    with waveform_of(samples, tmp_path) as waveform:
        path.write_bytes(b"".join(waveform.raw()))
        statistics = waveform.statistics
        mean, std, peak = waveform.mean, waveform.std, waveform.peak
    with Waveform(StoredSamples(io.FileIO(path), 100_000, statistics)) as stored:
        assert stored.is_complete(0) and stored.n_samples == 100_000
        assert torch.equal(stored.read(0, 100_000), samples)
        assert (stored.mean, stored.std, stored.peak) == (mean, std, peak)
    assert path.exists()


def test_a_file_that_another_program_cuts_short_is_an_error(tmp_path: Path) -> None:
    with waveform_of(noise(1000), tmp_path) as waveform:
        (file,) = tmp_path.iterdir()
        os.truncate(file, 100)
        with pytest.raises(OutputError, match="was cut short by another program: run again"):
            waveform.read(0, 1000)


def test_the_source_of_a_waveform_is_itself_or_the_one_that_it_was_resampled_from(tmp_path: Path) -> None:
    with waveform_of(noise(100), tmp_path, 48000) as source, Waveform(tmp_path, source=source) as waveform:
        assert (source.source_rate, source.source_samples) == (48000, 100)
        assert (waveform.source_rate, waveform.source_samples) == (48000, 100)


@pytest.mark.parametrize(
    "value, words", [(float("nan"), "NaN or Inf"), (float("-inf"), "NaN or Inf"), (-2e11, "a sample of -2e+11")]
)
def test_a_faulty_sample_is_described(value: float, words: str) -> None:
    assert sample_fault(value).startswith(words)


def test_reading_beyond_both_ends_gives_zeros(tmp_path: Path) -> None:
    samples = noise(10)
    with waveform_of(samples, tmp_path) as waveform:
        padded = read_padded(waveform, -3, 15)
        beyond = [read_padded(waveform, 12, 15), read_padded(waveform, -3, -1)]
    assert torch.equal(padded, torch.nn.functional.pad(samples, (3, 5)))
    assert torch.equal(beyond[0], torch.zeros(2, 3)) and torch.equal(beyond[1], torch.zeros(2, 2))


def test_silence_comes_in_blocks() -> None:
    blocks = list(silent(150_000, 3))
    assert [block.shape for block in blocks] == [(65536, 3), (65536, 3), (18_928, 3)]
    assert not any(block.any() for block in blocks)


def test_write_all_continues_after_a_partial_write() -> None:
    written = bytearray()

    def write_some(data: memoryview) -> int:
        written.extend(data[:3])
        return len(data[:3])

    write_all(write_some, b"0123456789")
    assert written == b"0123456789"
