"""A mix is the sum of sound files at their levels, right to the last bit of a float."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from helpers.common import read
from separation.audio.excerpt import Excerpt
from separation.audio.mix import write_mix
from separation.errors import AudioError, InputError

RATE = 44100
N_SAMPLES = 70_001  # more than a block


def stem(path: Path, n_samples: int, *, rate: int = RATE) -> NDArray[np.float32]:
    """Write noise in the format of the file's name. Returns it as it is in the file."""
    samples = np.random.default_rng(n_samples).uniform(-0.9, 0.9, (n_samples, 2))
    soundfile.write(path, samples, rate, subtype="FLOAT" if path.suffix == ".wav" else "PCM_24")
    return read(path)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
@pytest.mark.parametrize("levels", [(0.3, 1.7), (1.0,)])
@pytest.mark.parametrize("rate", [RATE, 48000])
def test_the_sum_is_exact_and_as_long_as_the_stems(
    tmp_path: Path, suffix: str, levels: tuple[float, ...], rate: int
) -> None:
    files = {tmp_path / f"{number}.{suffix}": level for number, level in enumerate(levels)}
    stems = [stem(path, N_SAMPLES, rate=rate) for path in files]
    write_mix(files, tmp_path / "mix.wav", tags={"title": "Song (mix)"})
    expected = sum(level * samples.astype(np.float64) for samples, level in zip(stems, levels, strict=True))
    assert np.array_equal(read(tmp_path / "mix.wav"), np.asarray(expected).astype(np.float32))
    with soundfile.SoundFile(tmp_path / "mix.wav") as file:
        assert (file.samplerate, file.subtype, file.title) == (rate, "FLOAT", "Song (mix)")
    assert {path.name for path in tmp_path.iterdir()} == {"mix.wav", *(path.name for path in files)}


def test_a_part_has_the_samples_of_the_whole_and_shorter_files_end_in_silence(tmp_path: Path) -> None:
    long, short = stem(tmp_path / "long.wav", N_SAMPLES), stem(tmp_path / "short.wav", RATE)
    files = {tmp_path / "short.wav": 1.0, tmp_path / "long.wav": 1.0}
    whole = long.copy()
    whole[:RATE] += short
    for part, start, stop in ((Excerpt(), 0, N_SAMPLES), (Excerpt(0.9, 1.1), 39_690, 48_510), (Excerpt(1), RATE, None)):
        write_mix(files, tmp_path / "mix.wav", part=part)
        np.testing.assert_array_equal(read(tmp_path / "mix.wav"), whole[start:stop])
    with pytest.raises(InputError, match=r"starts after the song's end at 1.587s"):
        write_mix(files, tmp_path / "mix.wav", part=Excerpt(2))


def test_a_file_that_is_gone_is_an_error_that_leaves_nothing_behind(tmp_path: Path) -> None:
    stem(tmp_path / "here.wav", 100)
    with pytest.raises(AudioError, match=r"'gone.wav' does not exist"):
        write_mix({tmp_path / "here.wav": 1.0, tmp_path / "gone.wav": 1.0}, tmp_path / "mix.wav")
    assert [path.name for path in tmp_path.iterdir()] == ["here.wav"]
