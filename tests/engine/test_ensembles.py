"""ensembles: rules of other programs, computed block by block."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from separation.audio.waveform import BLOCK_SAMPLES
from separation.engine.ensembles import HOP_LENGTH, N_FFT, RULES, combined
from separation.engine.recipe_lines import RULES as NAMES
from separation.engine.song_waveforms import Samples

N_SAMPLES = BLOCK_SAMPLES + 2 * HOP_LENGTH
AT = [0, 1, 1023, 30000, 65535, 65536, 66559, 67583]  # the ends of the song and of the blocks
# The norm and the samples `[0, AT]` of the ensembles of three and four waveforms by these programs:
# nomadkaraoke/python-audio-separator at 0a644db, audio_separator/separator/ensembler.py, and
# ZFTurbo/Music-Source-Separation-Training at ccc011a, ensemble.py. Both agree, except in median_fft; there each has its
# own name. `uvr_max_spec` and `uvr_min_spec` of the first are max_fft and min_fft. `avg_fft` of both is the mean.
PUBLISHED: dict[tuple[str, int], tuple[float, list[float]]] = {
    ("median", 3): (
        37.134535,
        [0.003152, -0.033776, -0.0250013, -0.0800366, -0.0072286, 0.0062358, 0.1124148, -0.0471451],
    ),
    ("min", 3): (
        32.443080,
        [0.003152, -0.0256817, -0.0213716, -0.0743387, -0.0040468, -0.0003351, 0.08223, -0.0063821],
    ),
    ("max", 3): (
        42.326381,
        [-0.0073905, -0.0444621, -0.0651084, -0.0956443, -0.0520247, 0.0090251, 0.1233299, -0.0636993],
    ),
    ("median_fft", 3): (
        37.092587,
        [-0.0006366, -0.0363228, -0.033124, -0.0794752, -0.0141978, 0.004555, 0.1074582, -0.0378429],
    ),
    ("median_fft_msst", 3): (
        37.220162,
        [-0.0006366, -0.0348174, -0.0129758, -0.0894664, -0.0104544, 0.004555, 0.1036792, -0.0373554],
    ),
    ("min_fft", 3): (
        33.396859,
        [0.0097244, -0.0256139, -0.0366196, -0.0684112, -0.029869, 0.0029683, 0.0963116, -0.0507583],
    ),
    ("max_fft", 3): (
        41.156993,
        [-0.0166823, -0.038267, -0.0454757, -0.1016266, -0.011277, 0.0025818, 0.1169343, -0.0274012],
    ),
    ("mean", 3): (
        37.042587,
        [0.0005016, -0.0346399, -0.0371604, -0.0833399, -0.0211001, 0.0049753, 0.1059916, -0.0390755],
    ),
    ("median", 4): (
        37.014569,
        [0.0044477, -0.0297289, -0.0231865, -0.0878405, -0.0081114, 0.0029503, 0.1078907, -0.0389116],
    ),
    ("min", 4): (31.411624, [0.003152, -0.0157851, 0.0167764, -0.0743387, -0.0040468, -0.0003351, 0.08223, -0.0063821]),
    ("max", 4): (
        43.419236,
        [0.0425374, -0.0444621, -0.0651084, -0.1249284, -0.0520247, 0.0090251, 0.1233299, -0.0636993],
    ),
    ("median_fft", 4): (
        36.996318,
        [0.0104427, -0.0324874, -0.0201066, -0.089348, -0.015596, 0.0069191, 0.1079071, -0.0369286],
    ),
    ("median_fft_msst", 4): (
        37.043366,
        [0.0104427, -0.032896, -0.017341, -0.0977166, -0.0121687, 0.0069191, 0.1047665, -0.0385068],
    ),
    ("min_fft", 4): (
        32.536144,
        [0.016534, -0.0163855, -0.0122273, -0.0714181, -0.0232756, 0.0008957, 0.0884398, -0.0360055],
    ),
    ("max_fft", 4): (
        41.975502,
        [-0.0023693, -0.0299741, -0.040357, -0.1180202, -0.0069847, -0.0014179, 0.1199209, -0.0298643],
    ),
    ("mean", 4): (
        36.978644,
        [0.0110106, -0.0299262, -0.0236762, -0.093737, -0.0180736, 0.0024415, 0.1053353, -0.0369761],
    ),
}

Array = NDArray[np.float32]


def waveforms(n: int, n_samples: int = N_SAMPLES) -> list[Array]:
    """Waveforms `[2, T]` that have most of their samples in common."""
    generator = np.random.Generator(np.random.PCG64(0))
    common = generator.standard_normal((2, n_samples)) * 0.1
    return [(common + generator.standard_normal((2, n_samples)) * 0.02).astype(np.float32) for _ in range(n)]


def ensemble(rule: str, parts: list[Array]) -> Array:
    blocks = combined(rule, [Samples.of(torch.from_numpy(part)) for part in parts])
    return torch.cat(list(blocks), dim=-1).numpy()


def plain(rule: str, parts: list[Array]) -> Array:
    """The ensemble of whole songs in numpy, one frame after the other."""
    stacked = np.stack(parts).astype(np.float64)
    if not rule.endswith(("fft", "msst")):
        return chosen(rule, stacked).astype(np.float32)
    n_samples = stacked.shape[-1]
    n_frames = -(-n_samples // HOP_LENGTH) + 1
    audio = np.pad(stacked, ((0, 0), (0, 0), (HOP_LENGTH, n_frames * HOP_LENGTH - n_samples)))
    window = np.hanning(N_FFT + 1)[:-1]
    total, weights = np.zeros(audio.shape[1:]), np.zeros(audio.shape[-1])
    for frame in range(n_frames):
        here = slice(frame * HOP_LENGTH, frame * HOP_LENGTH + N_FFT)
        total[:, here] += np.fft.irfft(chosen(rule, np.fft.rfft(audio[..., here] * window))) * window
        weights[here] += window**2
    inner = slice(HOP_LENGTH, HOP_LENGTH + n_samples)
    return (total[:, inner] / weights[inner]).astype(np.float32)


def chosen(rule: str, parts: NDArray[np.float64] | NDArray[np.complex128]) -> NDArray[np.float64]:
    if rule in ("median", "median_fft_msst"):
        return np.median(parts, axis=0)
    if rule == "median_fft":
        return np.median(parts.real, axis=0) + 1j * np.median(parts.imag, axis=0)
    nearest = {"min": np.argmin, "max": np.argmax}[rule[:3]](np.abs(parts), axis=0)
    return np.take_along_axis(parts, nearest[None], axis=0)[0]


def test_every_rule_of_a_recipe_is_computed() -> None:
    assert tuple(RULES) == NAMES


@pytest.mark.parametrize("rule, n", PUBLISHED)
def test_an_ensemble_equals_those_of_audio_separator_and_msst(rule: str, n: int) -> None:
    norm, samples = PUBLISHED[rule, n]
    found = ensemble(rule, waveforms(n)) if rule in RULES else np.mean(waveforms(n), axis=0)
    assert np.linalg.norm(found.astype(np.float64)) == pytest.approx(norm, rel=1e-6)
    assert np.abs(found[0, AT] - samples).max() <= 3e-7


@pytest.mark.parametrize(
    "n_samples", [1, 1023, 1024, 1025, 5000, BLOCK_SAMPLES, BLOCK_SAMPLES + 1, BLOCK_SAMPLES + 1500]
)
@pytest.mark.parametrize("rule", RULES)
def test_an_ensemble_in_blocks_equals_the_plain_computation_on_the_whole_song(rule: str, n_samples: int) -> None:
    parts = waveforms(3, n_samples)
    errors = np.abs(ensemble(rule, parts) - plain(rule, parts))
    # A bin in which two parts are equal to seven digits may be taken from either. It changes the samples of its frame.
    assert (errors <= 1e-6).mean() >= 0.96 and errors.max() <= 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_the_ensemble_of_equal_waveforms_is_that_waveform_and_silence_stays_silent(rule: str) -> None:
    (part,) = waveforms(1, 3000)
    assert np.abs(ensemble(rule, [part, part, part]) - part).max() <= 1e-6
    assert not ensemble(rule, [part * 0, part * 0]).any()


@pytest.mark.parametrize("rule", ["min", "max", "min_fft", "max_fft"])
def test_of_equal_magnitudes_the_first_counts(rule: str) -> None:
    (part,) = waveforms(1, 3000)
    assert np.abs(ensemble(rule, [-part, part]) + part).max() <= 1e-6


def test_the_last_samples_of_a_song_do_not_explode() -> None:
    parts = waveforms(2, 5 * HOP_LENGTH - 1)  # a last frame that ends with the song would divide by (1e-5)²
    assert np.abs(ensemble("max_fft", parts)[:, -HOP_LENGTH:]).max() < 1.5 * np.abs(parts).max()


@pytest.mark.parametrize("rule", RULES)
def test_an_ensemble_does_not_depend_on_the_number_of_threads(rule: str) -> None:
    parts, n_threads = waveforms(3), torch.get_num_threads()
    with_all = ensemble(rule, parts)
    torch.set_num_threads(1)
    try:
        assert np.array_equal(ensemble(rule, parts), with_all)
    finally:
        torch.set_num_threads(n_threads)
