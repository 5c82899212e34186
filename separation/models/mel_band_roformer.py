"""MelBand-RoFormer (Wang, Lu and Won 2023, arXiv:2310.01809), in the community's checkpoint layout.

Its bands are those of a mel filter bank, in which neighbours overlap. A bin's mask is the mean of its bands' masks.
"""

import atexit
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from itertools import chain
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from separation.models.base import Identity
from separation.models.roformer import RoFormer, RoFormerConfig, band_widths, mask_layers_in
from separation.models.shapes import Shapes

# What `sizes_in` tries, the most common values first.
SAMPLE_RATES = (44100, 48000, 32000, 24000, 22050, 16000)  # hertz
FFT_SIZES = (1024, 2048, 4096, 512, 8192)
MOST_BANDS = 256


@cache
def mel_bands(num_bands: int, n_fft: int, sample_rate: int) -> tuple[range, ...]:
    """The bins of each band: those where librosa's mel filter is positive. A band may be empty.

    The first band also has the first bin and the last band the last one, where the filters are zero.
    """
    with warnings.catch_warnings(action="ignore"):  # librosa warns about empty bands
        filters = _librosas_filters().mel(sr=sample_rate, n_fft=n_fft, n_mels=num_bands) > 0
    filters[0, 0] = filters[-1, -1] = True
    bins = [np.flatnonzero(band).tolist() for band in filters]
    return tuple(range(band[0], band[-1] + 1) if band else range(0) for band in bins)


def _librosas_filters() -> ModuleType:
    """Import librosa only when it is needed, because that takes a second."""
    try:
        import librosa.filters
    except RuntimeError:  # numba finds no cache folder if the package and the home folder are read-only
        import numba

        folder = tempfile.mkdtemp(prefix="numba-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        numba.config.CACHE_DIR = folder  # type: ignore[attr-defined]
        import librosa.filters
    return librosa.filters


@cache
def _places(num_bands: int, n_fft: int, sample_rate: int, device: torch.device) -> tuple[Tensor, ...]:
    """Index tables: the bin at each place of the concatenated bands, then the first and the last place of each bin.

    A bin that belongs to only one band has the same first and last place. No bin belongs to more than two bands.
    """
    bins = list(chain.from_iterable(mel_bands(num_bands, n_fft, sample_rate)))
    last = {k: place for place, k in enumerate(bins)}
    first = {k: place for place, k in reversed([*enumerate(bins)])}
    tables = bins, [first[k] for k in range(len(first))], [last[k] for k in range(len(last))]
    with torch.inference_mode(False):
        return tuple(torch.tensor(table, device=device) for table in tables)


@dataclass(frozen=True, kw_only=True)
class MelBandRoFormerConfig(RoFormerConfig):
    """The hyper-parameters, with the names that community YAML files use in their `model:` section."""

    num_bands: int = 60
    sample_rate: int = 44100  # hertz, for the mel scale
    mask_estimator_depth: int = 1  # hidden layers, one fewer than linear layers

    def __post_init__(self) -> None:
        if not all(mel_bands(self.num_bands, self.stft_n_fft, self.sample_rate)):
            raise ValueError(
                f"num_bands {self.num_bands} is too many for stft_n_fft {self.stft_n_fft}, since a band has no bin: "
                "use fewer"
            )


class MelBandRoFormer(RoFormer):
    """Chunks of waveform `[B, C, T]` to estimates `[B, S, C, T]`; see RoFormer."""

    Config: ClassVar[type] = MelBandRoFormerConfig
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (
        r"band_split\.to_features\..*",
        r"layers\.\d+\.\d+\.layers\.\d+\.0\.to_qkv\.weight",
        r"layers\.\d+\.\d+\.norm\.gamma",
    )
    more_mask_layers: ClassVar[int] = 1  # linear layers of a mask estimator beyond `mask_estimator_depth`
    # Tables that `mel_bands` gives.
    UNUSED_KEYS: ClassVar[str] = "freq_indices|freqs_per_band|num_freqs_per_band|num_bands_per_freq"

    def __init__(self, config: MelBandRoFormerConfig, identity: Identity, *, attention: str = "sdpa") -> None:
        scale = config.num_bands, config.stft_n_fft, config.sample_rate
        super().__init__(
            config,
            identity,
            [len(band) for band in mel_bands(*scale)],
            mask_layers=config.mask_estimator_depth + self.more_mask_layers,
            norm_output=True,
            attention=attention,
        )
        self._scale = scale

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        widths = band_widths(shapes)
        found: dict[str, Any] = {"num_bands": len(widths)}
        own = {"sample_rate": config.sample_rate, "stft_n_fft": config.stft_n_fft, "stereo": config.stereo}
        # The Config's values come first, then those that differ in one of them.
        choices = [
            own,
            own | {"stereo": not config.stereo},
            *(own | {"stft_n_fft": n_fft} for n_fft in FFT_SIZES),
            *(own | {"sample_rate": sample_rate} for sample_rate in SAMPLE_RATES),
        ]
        for choice in choices if 0 < len(widths) <= MOST_BANDS else ():
            bands = mel_bands(len(widths), choice["stft_n_fft"], choice["sample_rate"])
            if tuple((4 if choice["stereo"] else 2) * len(band) for band in bands) == widths:
                found |= choice
                break
        return (
            super().sizes_in(shapes, config)
            | found
            | {"mask_estimator_depth": mask_layers_in(shapes) - cls.more_mask_layers}
        )

    def _bands(self, bins: Tensor) -> Tensor:
        return bins.index_select(2, _places(*self._scale, bins.device)[0]).flatten(2)

    def _bins(self, bands: Tensor) -> Tensor:
        _, first, last = _places(*self._scale, bands.device)
        bands = bands.unflatten(2, (-1, 2 * self.channels))
        return (bands.index_select(2, first) + bands.index_select(2, last)) / 2
