"""BandIt and BandIt v2 for speech, music and effects in films (Watcharasupat et al. 2023, arXiv:2309.02539, and 2024,
arXiv:2407.07275), in their authors' checkpoint layouts.

The spectrogram is split into overlapping bands, an equal share of an octave each. RNNs run along frames and along
bands in turns. An MLP for each band gives its share of a stem's complex mask. The network is for one channel.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, cast

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from separation.models.base import Identity, Normalisation, SeparationModel
from separation.models.layers import LayerNorm
from separation.models.shapes import Shapes, quotient
from separation.models.stft import Stft, make_window

CPU = torch.device("cpu")
ACTIVATIONS: dict[str, type[nn.Module]] = {
    name: getattr(nn, name) for name in ("Tanh", "ReLU", "GELU", "SiLU", "ELU", "LeakyReLU", "Sigmoid", "Identity")
}
RNNS: dict[str, type[nn.GRU | nn.LSTM]] = {"GRU": nn.GRU, "LSTM": nn.LSTM}
GATES = {3: "GRU", 4: "LSTM"}
BUFFERS = r"i?stft\.window|(bsrnn\.)?mask_estim\.[^.]+\.freq_weights/\d+"  # of both layouts


@cache
def musical_bands(n_bands: int, n_fft: int, sample_rate: int) -> tuple[range, ...]:
    """The bins of each band. Their centres are equal shares of an octave apart, from the second bin to the last."""
    bin_hertz = sample_rate / n_fft
    lowest, highest = bin_hertz, sample_rate / 2
    reach = 2.0 ** (np.log2(highest / lowest) / n_bands)
    semitones = [12 * (np.log2(hertz) - np.log2(440.0)) + 69 for hertz in (lowest, highest)]
    centres = 440.0 * 2.0 ** ((np.linspace(max(0, semitones[0]), semitones[1], n_bands) - 69) / 12)
    first = np.floor(centres / reach / bin_hertz).astype(int)
    last = np.ceil(centres * reach / bin_hertz).astype(int)
    first[0], last[-1] = 0, n_fft // 2
    return tuple(range(int(low), min(int(high), n_fft // 2) + 1) for low, high in zip(first, last, strict=True))


@cache
def bin_shares(bands: tuple[range, ...], device: torch.device) -> Tensor:
    """One over the number of bands that a bin belongs to, `[F]`."""
    counts = np.zeros(bands[-1].stop)
    for band in bands:
        counts[band.start : band.stop] += 1
    with torch.inference_mode(False):
        return torch.from_numpy(1 / counts).float().to(device)


@dataclass(frozen=True, kw_only=True)
class BanditCommon:
    """The hyper-parameters that both versions have by the same names."""

    stems: tuple[str, ...]
    n_bands: int = 64
    fs: int = 44100  # hertz, for the bands
    normalize_channel_independently: bool = False
    n_sqm_modules: int = 12  # pairs of RNNs
    emb_dim: int = 128
    rnn_dim: int = 256
    bidirectional: bool = True
    rnn_type: str = "LSTM"
    mlp_dim: int = 512
    hidden_activation: str = "Tanh"
    complex_mask: bool = True
    n_fft: int = 2048
    win_length: int = 2048
    hop_length: int = 512
    window_fn: str = "hann_window"
    center: bool = True
    normalized: bool = True
    pad_mode: str = "constant"  # what the STFT extends the ends with
    onesided: bool = True

    def __post_init__(self) -> None:
        supported: dict[str, tuple[Any, ...]] = {
            "rnn_type": tuple(RNNS),
            "hidden_activation": tuple(ACTIVATIONS),
            "pad_mode": ("constant", "reflect"),
            "window_fn": ("hann_window",),
            "center": (True,),
            "onesided": (True,),
            "complex_mask": (True,),
            "normalize_channel_independently": (False, None),
        }
        for name, values in supported.items():
            if (value := getattr(self, name)) not in values:
                choices = " or ".join(str(each) for each in values if each is not None)
                raise ValueError(f"{name} is {value}, and only {choices} is supported: use the author's program")
        if self.n_bands < 2 or not all(musical_bands(self.n_bands, self.n_fft, self.fs)):
            raise ValueError(f"n_bands {self.n_bands} does not fit n_fft {self.n_fft}: correct one")

    @property
    def num_stems(self) -> int:
        return len(self.stems)


@dataclass(frozen=True, kw_only=True)
class BanditConfig(BanditCommon):
    """The hyper-parameters, with the names that YAML files use in their `model:` section."""

    in_channel: int = 1
    band_specs: str = "musical"
    use_freq_weights: bool = True
    mult_add_mask: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_kind("in_channel", self.in_channel, self.band_specs)
        if self.mult_add_mask:
            raise ValueError("mult_add_mask is true, which is not supported: use the author's program")


@dataclass(frozen=True, kw_only=True)
class BanditV2Config(BanditCommon):
    """The hyper-parameters, with the names that YAML files use in their `kwargs:` section."""

    in_channels: int = 1
    band_type: str = "musical"
    use_freq_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_kind("in_channels", self.in_channels, self.band_type)


def _check_kind(name: str, channels: int, bands: str) -> None:
    if channels != 1:
        raise ValueError(f"{name} is {channels}, but the network is for one channel: correct it")
    if "musical" not in bands:
        raise ValueError(f"the bands are {bands!r}, and only 'musical' is supported: use the author's program")


class Bandit(SeparationModel):
    """Chunks of waveform `[B, 1, T]` to estimates `[B, S, 1, T]`, both float32."""

    Config: ClassVar[type] = BanditConfig
    TRAINING_KEYS = frozenset(
        {
            "freeze_encoder",
            "normalize_input",
            "require_no_gap",
            "require_no_overlap",
            "treat_channel_as_feature",  # makes no difference for one channel
        }
    )
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (
        r"bsrnn\.band_split\.norm_fc_modules\.0\.fc\.weight",
        r"bsrnn\.mask_estim\..*",
    )
    UNUSED_KEYS: ClassVar[str] = BUFFERS
    CAST_LAYERS: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.GRU, nn.LSTM)
    normalisation: Normalisation = "none"
    ROOT: ClassVar[str] = "bsrnn."  # of the state dict's keys
    RNN_STEP: ClassVar[int] = 1  # between the indices of RNNs there
    BAND_FEATURES: ClassVar[str] = "(ri f)"  # real parts come before imaginary parts

    def __init__(self, config: Any, identity: Identity) -> None:
        super().__init__(identity)
        self.config = config
        self.channels = 1
        self.least_samples: int = config.n_fft // 2 + 1 if config.pad_mode == "reflect" else 1
        self._stft = Stft(
            n_fft=config.n_fft,
            hop_length=config.hop_length,
            win_length=config.win_length,
            padding_mode="reflect" if config.pad_mode == "reflect" else "constant",
        )
        self._scale = make_window("hann", config.win_length, CPU).double().square().sum().item() ** -0.5
        self._bands = musical_bands(config.n_bands, config.n_fft, config.fs)
        sizes = [2 * len(band) for band in self._bands]  # real and imaginary parts
        self._set_layers(
            band_split=nn.ModuleDict(
                {"norm_fc_modules": nn.ModuleList(self._norm_and_linear(size, config.emb_dim) for size in sizes)}
            ),
            tf_model=nn.ModuleDict(
                {
                    "seqband": nn.ModuleDict(
                        {str(i * self.RNN_STEP): ResidualRNN(config) for i in range(2 * config.n_sqm_modules)}
                    )
                }
            ),
            mask_estim=nn.ModuleDict(
                {
                    stem: nn.ModuleDict({"norm_mlp": nn.ModuleList(MaskMLP(config, size) for size in sizes)})
                    for stem in config.stems
                }
            ),
        )
        self._outputs = tuple(range(config.num_stems))

    def _set_layers(self, **layers: nn.Module) -> None:
        self.bsrnn: nn.ModuleDict = nn.ModuleDict(layers)

    @property
    def _layers(self) -> Any:
        return self.bsrnn

    @staticmethod
    def _norm_and_linear(size_in: int, size: int) -> nn.Module:
        return NormAndLinear(size_in, size)

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        rnn, root = f"{cls.ROOT}tf_model.seqband.0.rnn", re.escape(cls.ROOT)
        rnn_dim = shapes.size(f"{rnn}.weight_hh_l0", 1)
        gates = quotient(shapes.size(f"{rnn}.weight_hh_l0", 0), rnn_dim)
        return {
            "stems": shapes.count(root + r"mask_estim\.([^.]+)\..*"),
            "n_bands": shapes.count(root + r"band_split\.norm_fc_modules\.(\d+)\..*"),
            "n_sqm_modules": quotient(shapes.count(root + r"tf_model\.seqband\.(\d+)\..*"), 2),
            "emb_dim": shapes.size(f"{cls.ROOT}tf_model.seqband.0.norm.weight", 0),
            "rnn_dim": rnn_dim,
            "rnn_type": GATES.get(gates or 0),
            "bidirectional": f"{rnn}.weight_hh_l0_reverse" in shapes,
            "mlp_dim": shapes.size(f"{cls.ROOT}mask_estim.{config.stems[0]}.norm_mlp.0.hidden.0.weight", 0),
        }

    def forward(self, chunks: Tensor) -> Tensor:
        length = chunks.shape[-1]
        spectrum = self._stft.spectrogram(chunks)[:, 0]  # [B, F, N]
        features = self._features(torch.view_as_real(spectrum))
        stems = [self.config.stems[index] for index in self._outputs]
        spectra = [spectrum * torch.view_as_complex(self._mask(stem, features)) for stem in stems]
        return torch.stack([self._stft.waveform(each, length) for each in spectra], dim=1)[:, :, None]

    def _features(self, spectrum: Tensor) -> Tensor:
        """Spectrogram `[B, F, N, 2]` to `[B, K, N, D]`."""
        if self.config.normalized:
            spectrum = spectrum * self._scale
        split = zip(self._bands, self._layers["band_split"]["norm_fc_modules"], strict=True)
        bands = [
            layer(rearrange(spectrum[:, band.start : band.stop], f"b f n ri -> b n {self.BAND_FEATURES}"))
            for band, layer in split
        ]
        x = torch.stack(bands, dim=1)
        for rnn in self._layers["tf_model"]["seqband"].values():
            x = rnn(x).transpose(1, 2)
        return x

    def _mask(self, stem: str, features: Tensor) -> Tensor:
        """One stem's mask `[B, F, N, 2]`: the sum of a bin's masks of all its bands, times the bin's share."""
        batch, _, frames, _ = features.shape
        mask = features.new_zeros(batch, self.config.n_fft // 2 + 1, frames, 2)
        mlps = self._layers["mask_estim"][stem]["norm_mlp"]
        for band, mlp, x in zip(self._bands, mlps, features.unbind(1), strict=True):
            mask[:, band.start : band.stop] += rearrange(mlp(x), "b n (f ri) -> b f n ri", ri=2)
        if self.config.use_freq_weights:
            mask *= bin_shares(self._bands, mask.device)[:, None, None]
        return mask


class BanditV2(Bandit):
    """BandIt v2; see Bandit."""

    Config = BanditV2Config
    TRAINING_KEYS = Bandit.TRAINING_KEYS | {
        f"{part}_precisions" for part in ("stft", "bandsplit", "tf_model", "mask_estim")
    }
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (
        r"band_split\.norm_fc_modules\.0\.combined\.1\.weight",
        r"mask_estim\..*",
    )
    UNUSED_KEYS: ClassVar[str] = BUFFERS + r"|mask_estim\..*\.combined\..*"  # the same weights by other names
    ROOT: ClassVar[str] = ""
    RNN_STEP: ClassVar[int] = 2
    BAND_FEATURES: ClassVar[str] = "(f ri)"

    def _set_layers(self, **layers: nn.Module) -> None:
        for name, layer in layers.items():
            self.add_module(name, layer)

    @property
    def _layers(self) -> Any:
        return self._modules

    @staticmethod
    def _norm_and_linear(size_in: int, size: int) -> nn.Module:
        return CombinedNormAndLinear(size_in, size)


class NormAndLinear(nn.Module):
    """A norm and a linear layer, `[..., size_in] -> [..., size]` in float32."""

    def __init__(self, size_in: int, size: int) -> None:
        super().__init__()
        self.norm: LayerNorm = LayerNorm(size_in)
        self.fc: nn.Linear = nn.Linear(size_in, size)

    def forward(self, x: Tensor) -> Tensor:
        return as_float(self.fc, self.norm(x))


class CombinedNormAndLinear(nn.Module):
    """The same with other names of weights."""

    def __init__(self, size_in: int, size: int) -> None:
        super().__init__()
        self.combined: nn.Sequential = nn.Sequential(LayerNorm(size_in), nn.Linear(size_in, size))

    def forward(self, x: Tensor) -> Tensor:
        norm, linear = self.combined
        return as_float(cast(nn.Linear, linear), norm(x))


class ResidualRNN(nn.Module):
    """A norm, an RNN along the third axis and a linear layer, added to the input, `[B, P, Q, D] -> [B, P, Q, D]`."""

    def __init__(self, config: BanditCommon) -> None:
        super().__init__()
        directions = 1 + bool(config.bidirectional)
        self.norm: LayerNorm = LayerNorm(config.emb_dim)
        self.rnn: nn.GRU | nn.LSTM = RNNS[config.rnn_type](
            config.emb_dim, config.rnn_dim, bidirectional=directions == 2
        )
        self.fc: nn.Linear = nn.Linear(config.rnn_dim * directions, config.emb_dim)

    def forward(self, x: Tensor) -> Tensor:
        sequences = rearrange(self.norm(x).to(self.fc.weight.dtype), "b p q d -> q (b p) d")
        y = as_float(self.fc, self.rnn(sequences)[0])
        return x + rearrange(y, "q (b p) d -> b p q d", b=len(x))


class MaskMLP(nn.Module):
    """A band's part of a stem's mask, `[B, N, D] -> [B, N, size]` in float32."""

    def __init__(self, config: BanditCommon, size: int) -> None:
        super().__init__()
        activation = ACTIVATIONS[config.hidden_activation]()
        self.norm: LayerNorm = LayerNorm(config.emb_dim)
        self.hidden: nn.Sequential = nn.Sequential(nn.Linear(config.emb_dim, config.mlp_dim), activation)
        self.output: nn.Sequential = nn.Sequential(nn.Linear(config.mlp_dim, 2 * size), nn.GLU(dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        first = cast(nn.Linear, self.hidden[0])
        mask: Tensor = self.output(self.hidden(self.norm(x).to(first.weight.dtype))).float()
        return mask


def as_float(linear: nn.Linear, x: Tensor) -> Tensor:
    """The output of a linear layer in float32, whatever the layer's precision."""
    y: Tensor = linear(x.to(linear.weight.dtype))
    return y.float()
