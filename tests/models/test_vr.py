"""VR networks equal an independent implementation, and their spectrograms those of Ultimate Vocal Remover."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.common import quick_first
from helpers.recorded import drawn_chunks, figures_of
from helpers.small_model import assert_near, identity
from helpers.vr_bands import BANDS, USED, config_of, vr_weights
from separation import Separator
from separation.checkpoints.build import build
from separation.checkpoints.catalogue import read_config
from separation.engine.options import EngineOptions
from separation.evaluation.metrics import sdr
from separation.models.vr import CHANNELS, VR, VRConfig, bands_of, resampled, waves_of

# One band of few bins, for quick tests
TINY: dict[str, Any] = {
    "bins": 64,
    "rates": (44100,),
    "hop_lengths": (64,),
    "n_ffts": (128,),
    "crop_starts": (0,),
    "crop_stops": (64,),
    "hpf_starts": (0,),
    "hpf_stops": (0,),
    "lpf_starts": (0,),
    "lpf_stops": (0,),
    "pre_filter_start": 63,
    "pre_filter_stop": 64,
    "channels": ("stereo",),
}


def tiny(**changes: Any) -> VR:
    network = {"nout": 4, "window_frames": 320, "chunk_size": 64 * 64} | changes
    config = VRConfig(sample_rate=44100, **TINY, **network)
    model = VR(config, identity(("vocals", "instrumental"), chunk_samples=config.chunk_size))
    model.load(vr_weights(model.state_dict()))
    return model


@pytest.mark.parametrize(
    "network, arch",
    quick_first(
        [
            ({"nout": 16}, 31191),
            ({"nout": 16, "aspp_layers": 7}, 33966),
            ({"nout": 8, "nout_lstm": 16}, 51000),
            ({"nout": 16, "nout_lstm": 32}, 51000),
        ],
        2,
    ),
    ids=str,
)
def test_masks_equal_the_independent_implementation(network: dict[str, int], arch: int) -> None:
    package = "pymss_core.modules.vocal_remover.uvr_lib_v5.vr_network"
    module = pytest.importorskip(f"{package}.{'nets_new' if 'nout_lstm' in network else 'nets'}", reason="needs pymss")
    torch.manual_seed(0)
    theirs: Any = (
        module.CascadedNet(128, arch, **network)
        if "nout_lstm" in network
        else module.determine_model_capacity(128, arch)
    )
    weights = vr_weights(theirs.state_dict())
    weights |= {key: weights[key.replace("conv7", "conv6")] for key in weights if "conv7" in key}  # one layer twice
    theirs.load_state_dict(weights)
    theirs.eval()
    ours = tiny(**network)
    ours.load({key: value for key, value in weights.items() if not key.startswith("aux")})
    magnitudes = torch.rand(2, 2, 65, 96)
    with torch.inference_mode():
        expected, got = theirs(magnitudes), ours._mask(magnitudes)
    assert expected.std() > 0.001 and got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_network_of_five_scales_has_the_layers_of_the_published_ones() -> None:
    """A sixth branch and a fifth scale: 132,5 million bytes, as in UVR's list of sizes (129,605 KiB)."""
    with torch.device("meta"):
        model = VR(config_of("4band_v3", nout=16, aspp_layers=6, deep=True), identity(("a", "b")))
    assert model.state_dict()["stg3_full_band_net.dec5.conv.conv.0.weight"].shape == (512, 1536, 3, 3)
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) == pytest.approx(129_605 * 1024, rel=0.002)


# Norm and samples of the spectrogram of `drawn_chunks((1, 2, T))` for T samples at the last band's rate, real and
# imaginary parts in turn. By python-audio-separator 0.47.1 (uvr_lib_v5/spec_utils.py, with librosa 0.11 and polyphase
# resampling).
RECORDED = {
    "2band_32000": (
        14080,
        "389.0165 -0.01893287 0.4955916 0.799861 -0.01938587 0.6408781 -2.14776 0.08389848 -0.6762 0.7485188 2.076093 "
        "0.876761 0 0.1290739 -0.343124 0.3919394 -0.2614872 -0.7831986 2.110057 -0.416047 -0.4929995 -0.6009911 "
        "-0.8210612 -2.4625 0",
    ),
    "3band_44100_msb2": (
        17280,
        "326.2231 0.4364465 0.6665165 0.7240456 0.1712311 -1.544032 0.7556168 -0.5196964 1.45235 0.06369557 1.234548 "
        "-2.196411 1.21892 -1.211038 -0.4838495 -1.376487 0.8822033 -1.57355 -0.1994469 0.748736 -1.573103 0.08765688 "
        "-1.857041 -0.07190432 0",
    ),
    "4band_v3_sn": (
        19200,
        "345.6655 0.1192538 0.08986448 0.2420642 0.2826203 0.4864882 -0.6273822 -0.1314374 -4.608645 -0.2711047 "
        "-0.5434796 -1.137473 -1.560711 0.7530964 -0.1607819 -0.4722754 0.5236349 -0.9955229 1.102213 -0.9031829 "
        "-0.2676665 -0.0996353 -2.054188 1.014277 0",
    ),
}


@pytest.mark.parametrize("bands", RECORDED)
def test_a_spectrogram_equals_that_of_ultimate_vocal_remover(bands: str) -> None:
    length, figures = RECORDED[bands]
    lstm = 16 if bands.startswith("4band_v3") else 0
    config = config_of(bands, nout=8, nout_lstm=lstm)
    spectrum = bands_of(drawn_chunks((1, 2, length)), config)[0]
    got, expected = figures_of(torch.view_as_real(spectrum)[None, None]), [float(each) for each in figures.split()]
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    assert np.abs(np.subtract(got[1:], expected[1:])).max() <= 1e-5 * np.abs(expected[1:]).max()


# Norm of each stem and samples of the stems of `drawn_chunks((2, 30_000))` with 200 silent samples at both ends; the
# last 48 are missing. By the same program: spectrogram, patches of 320 frames, masks and inverse.
RECORDED_SONG = (
    "12.06374 11.95957 0 0.01589146 0.01425538 -0.01339777 -0.0464436 0.02401687 -0.05581298 0.06204268 -0.07773866 "
    "0.01138856 -0.05324512 0.03712308 0.04877506 -0.01882951 -0.04671874 0.04132579 -0.03010254 0.02195219 0.02215341 "
    "0.04929031 -0.005172721 -0.08424848 0.01878912 0"
)


def test_a_song_of_several_chunks_equals_that_of_ultimate_vocal_remover() -> None:
    model = tiny(nout=8, nout_lstm=16, chunk_size=192 * 64)
    song = drawn_chunks((2, 30_000))
    song[:, :200], song[:, -200:] = 0, 0
    stems = Separator.from_model(model).separate(song)
    got = figures_of(torch.stack(list(stems.values()))[None, ..., : 30_000 - 48])
    expected = [float(each) for each in RECORDED_SONG.split()]
    assert np.abs(np.subtract(got[:2], expected[:2])).max() <= 1e-5 * max(expected[:2])
    assert np.abs(np.subtract(got[2:], expected[2:])).max() <= 1e-5 * np.abs(expected[2:]).max()


@pytest.mark.parametrize("network", [{}, {"nout": 8, "nout_lstm": 16}], ids=str)
def test_a_song_equals_the_same_network_over_the_spectrogram_of_the_whole_song(network: dict[str, int]) -> None:
    """The plain way: the whole song's spectrogram, then a mask for every 64 frames, then the inverse."""
    model = tiny(**network)
    config, n_frames, margin = model.config, 100, 160
    song = torch.randn(2, n_frames * 64) * 0.1
    song[:, :128], song[:, -128:] = 0, 0
    spectrum = bands_of(F.pad(song[None], (margin * 64, 2 * margin * 64)), config)
    peak, masks = spectrum.abs().amax(), torch.zeros(spectrum.shape)
    sharpened = torch.where(torch.arange(65) < 64, 1 + 0.1 / 3, 1.1)[:, None]  # with aggression 0.05
    with torch.inference_mode():
        for first in range(margin, margin + n_frames, config.kept_frames):
            seen = spectrum[..., first - config.offset :][..., : config.window_frames].abs() / peak
            mask = model._mask(seen) ** sharpened
            masks[..., first : first + config.kept_frames] = mask[..., config.offset :][..., : config.kept_frames]
        expected = waves_of((spectrum * masks)[:, None], config)[0, 0, :, margin * 64 :][:, : song.shape[1]]
    assert_near(Separator.from_model(model).separate(song)["vocals"], expected)


@pytest.mark.parametrize("bands", USED)
def test_the_bands_add_up_to_the_song(bands: str) -> None:
    """Where no filter fades, what is split into bands and added up again is the song, but for a published inverse."""
    sizes = BANDS[bands]
    hop, rate = sizes["hop_lengths"][-1], sizes["rates"][-1]
    for lstm in (0, 16):
        config = config_of(bands, nout=8, nout_lstm=lstm)
        time = torch.arange(100 * hop) / rate
        song = torch.stack([torch.sin(2 * np.pi * 1000 * time), torch.sin(2 * np.pi * 1500 * time + 1)])[None] / 2
        restored = waves_of(bands_of(song, config)[:, None], config)[:, 0]
        forward, back = (np.array(matrix) for matrix in CHANNELS[config.channels[-1]])
        expected = torch.from_numpy(back @ forward).float() @ song
        middle = slice(10_000, song.shape[-1] - 10_000)
        assert sdr(expected[..., middle], restored[..., middle]) > 15


@pytest.mark.parametrize("rates", [(44100, 14700), (7350, 14700), (44100, 32000), (32000, 44100), (32000, 6000)])
def test_resampling_equals_scipys(rates: tuple[int, int]) -> None:
    song = torch.randn(2, rates[0] // 50)
    shared = np.gcd(*rates)
    signal = pytest.importorskip("scipy.signal")  # takes a second to import
    expected = signal.resample_poly(song.double().numpy(), rates[1] // shared, rates[0] // shared, axis=-1)
    got = resampled(song, *rates)
    assert got.shape == expected.shape == (2, rates[1] // 50)
    assert np.abs(got.numpy() - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("network", quick_first([{}, {"nout": 8, "nout_lstm": 16}], 1), ids=str)
def test_a_song_does_not_depend_on_the_batch_size_or_the_level(network: dict[str, int]) -> None:
    model = tiny(**network)
    mixture = torch.randn(2, 12_000) * torch.linspace(0, 0.1, 12_000)

    def separate(song: Tensor, batch_size: int) -> dict[str, Tensor]:
        return Separator.from_model(model, options=EngineOptions(batch_size=batch_size)).separate(song)

    stems = separate(mixture, 1)
    assert list(stems) == ["vocals", "instrumental"] and all(stem.shape == mixture.shape for stem in stems.values())
    for stem, other in separate(mixture, 4).items():
        assert (stems[stem] - other).abs().max() <= 1e-5 * other.abs().max()
    for stem, other in separate(mixture / 8, 1).items():  # as the magnitudes are relative to the song's largest
        assert (stems[stem] / 8 - other).abs().max() <= 1e-5 * other.abs().max()
    assert not any(stem.any() for stem in separate(torch.zeros(2, 5000), 1).values())


def test_both_stems_are_the_song_but_for_its_highest_bins() -> None:
    model = tiny()
    time = torch.arange(12_000) / 44100
    mixture = torch.stack([torch.sin(2 * np.pi * 900 * time), torch.sin(2 * np.pi * 1300 * time)]) / 4
    stems = Separator.from_model(model).separate(mixture)
    assert sdr(mixture[:, 500:-500], (stems["vocals"] + stems["instrumental"])[:, 500:-500]) > 60
    assert sdr(mixture, stems["vocals"] + stems["instrumental"]) > 30  # clicks at both ends have all frequencies
    only = model.only(("instrumental",))
    chunk = torch.randn(1, 2, model.config.input_samples) * 0.1
    with torch.inference_mode():
        assert_near(only(chunk), model(chunk)[:, 1:])


@pytest.mark.parametrize("precision, decibels", [(torch.bfloat16, 25), (torch.float16, 40)])
@pytest.mark.parametrize("network", quick_first([{}, {"nout": 8, "nout_lstm": 16}], 1), ids=str)
def test_half_precision_stays_close_to_float32(network: dict, precision: torch.dtype, decibels: float) -> None:
    model = tiny(**network)
    chunk = torch.randn(1, 2, model.config.input_samples) * 0.1
    with torch.inference_mode():
        exact = model(chunk)
        model.prepare(precision)
        assert sdr(exact, model(chunk)) > decibels


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rates": (44100, 44100)}, "one entry for each band"),
        ({"channels": ("mono",)}, "unknown channels 'mono'"),
        ({"crop_stops": (65,)}, "more than 64 bins"),
        ({"window_frames": 300}, "a multiple of 32"),
        ({"chunk_size": 64 * 65}, "is 65 frames and must be at most 64"),
        ({"chunk_size": 64 * 64 - 1}, "not a whole number of frames"),
        ({"num_stems": 1}, "gives 2 stems"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VRConfig(**{"sample_rate": 44100, "nout": 4, "window_frames": 320, "chunk_size": 64 * 64} | TINY | changes)


def test_the_public_checkpoint_has_its_published_size(tmp_path: Path) -> None:
    description = read_config("vr_deecho_dereverb_foxjoy")
    model = build(description, ())
    n_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert description.files[0].bytes is not None and 0 < description.files[0].bytes - n_bytes < 300_000
