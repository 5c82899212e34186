"""What every architecture has in common."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from separation.errors import InputError
from separation.models.shapes import Shapes
from separation.models.stft import Window


@dataclass(frozen=True)
class Blueprint:
    """What a file of weights may say of its network, as those of the demucs package do: the class and its arguments."""

    class_name: str  # demucs.hdemucs.HDemucs
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A model's name, and the audio that it was trained on."""

    name: str
    stems: tuple[str, ...]  # S names, in the order of the estimates
    sample_rate: int  # hertz
    chunk_samples: int
    standardised: bool = False  # trained on tracks of zero mean and unit variance, whatever the architecture's default


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The checkpoint that a model was loaded from. Two models of the same origin have the same layers and weights."""

    architecture: str
    hyper_parameters: Mapping[str, str]
    stems: tuple[str, ...]  # of the whole checkpoint, in its order
    weights: Mapping[str, Callable[[], str]]  # a specialist's stem, else a number, to a function: the file's sha256


@dataclass(frozen=True, kw_only=True)
class Transform:
    """The STFT before a model's `core` and the inverse behind it, for chunks of one length; counts are of samples.

    Before: the chunk, with `zeros_after` zeros behind it, is extended by `padding` samples on both sides. Frames of
    `n_fft`, `hop_length` apart, are multiplied with the window, of `win_length` in the middle of the frame, and their
    Fourier transforms with `scale`; the lowest `bins` are given to the core.

    Behind: the core's result gets zeros for the bins above and for `zero_frames` frames on both sides. The frames'
    inverse transforms, divided by `scale`, times the window, are added `hop_length` apart, and the sum is divided by
    that of the squared windows; the chunk begins after `crop` samples.
    """

    n_fft: int
    hop_length: int
    win_length: int
    window: Window = "hann"
    scale: float
    bins: int
    zeros_after: int = 0
    padding: tuple[int, int]
    padding_mode: Literal["reflect", "constant"] = "reflect"
    zero_frames: int = 0
    crop: int

    @classmethod
    def centred(cls, *, n_fft: int, normalized: bool = False, bins: int | None = None, **values: Any) -> "Transform":
        """What `separation.models.stft.stft` and `istft` do."""
        half = n_fft // 2
        scale = n_fft**-0.5 if normalized else 1.0
        return cls(n_fft=n_fft, scale=scale, bins=bins or half + 1, padding=(half, half), crop=half, **values)


class SeparationModel(nn.Module):
    """Chunks of waveform `[B, C, T]` in float32 to estimates `[B, S, C, T]` in float32.

    A model is constructed without weights, from a Config and an Identity. `load` gives it weights, `prepare` the
    precision and the attention backend.
    """

    # A frozen dataclass of hyper-parameters under the community's names, and names that only training reads.
    Config: ClassVar[type]
    TRAINING_KEYS: ClassVar[frozenset[str]] = frozenset()
    # Keys of the YAML's `audio:` section that the Config takes as well, each with the field's name.
    AUDIO_KEYS: ClassVar[Mapping[str, str]] = {}
    # Regular expressions: a state dict is of this architecture if each matches (re.fullmatch) at least one of its keys.
    KEY_PATTERNS: ClassVar[tuple[str, ...]]
    # Another, of keys that some files hold and that are not read: what they hold follows from the Config.
    UNUSED_KEYS: ClassVar[str] = ""
    # What `to_precision` casts.
    CAST_LAYERS: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    # What is done to the track before chunking: nothing, its peak is scaled to 0.9, or its mono mixture to zero mean
    # and unit variance. A checkpoint's YAML can ask for the last.
    normalisation: Literal["none", "peak", "standard"] = "peak"
    # Whether the song's ends are extended by their reflection; if not, by silence.
    reflects_border: ClassVar[bool] = True
    # Whether `core` takes the chunks, beside the spectrogram or alone.
    core_takes_waveform: ClassVar[bool] = False
    # Whether chunks must have exactly `chunk_samples`; if not, the caller chooses.
    fixed_chunk: ClassVar[bool] = False
    channels: int  # C: 1 or 2
    least_samples: int = 1  # a shorter chunk cannot be extended by its own reflection
    has_int8: ClassVar[bool] = False  # whether `prepare` knows torch.int8, with the attention backend `fused`
    head_size: int | None = None  # features a head; None: the model has no attention that takes a backend
    precision: torch.dtype = torch.float32  # that it computes in
    attention: str | None = None  # the name of its attention backend
    origin: Origin | None = None  # None: the weights come from no checkpoint
    # Which of the network's outputs are computed, in the order of the estimates; none where it gives all or nothing.
    _outputs: tuple[int, ...] = ()

    def __init__(self, identity: Identity) -> None:
        super().__init__()
        self.name, self.stems = identity.name, identity.stems
        self.sample_rate, self.chunk_samples = identity.sample_rate, identity.chunk_samples
        if identity.standardised:
            self.normalisation = "standard"

    def load(self, weights: Mapping[str, Tensor], origin: Origin | None = None) -> None:
        """Take these tensors, one for each key of the state dict, as they are; from then on for inference alone."""
        self.load_state_dict(weights, strict=True, assign=True)
        self.eval().requires_grad_(False)
        self.origin = origin

    @classmethod
    def key_prefix(cls, part: str) -> str:
        """What stands before the keys of a file in this class: the file of one stem's specialist or, by its number."""
        return ""

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        """The hyper-parameters that weights of these shapes were made with, as far as they tell; None: they do not.

        Of a list it may be the length alone. Where they tell two ways, it is as in the Config.
        """
        return {}

    def follow(self, part: str, blueprint: Blueprint) -> None:
        """Rebuild the part of that file without weights as its own blueprint says, if the architecture knows such."""

    def input_samples(self, length: int) -> int | None:
        """How many samples the model is given for a chunk of which `length` lie in the song; None for a whole chunk."""
        return None

    def only(self, stems: tuple[str, ...]) -> Self:
        """The model as it gives at least these of its stems, on the same weights.

        What only the others need is then not computed, where the architecture has such parts.
        """
        if not self._outputs:
            return self
        fewer = copy.copy(self)  # shares the layers
        fewer._outputs = tuple(self._outputs[self.stems.index(stem)] for stem in stems)
        fewer.stems = stems
        return fewer

    def transform(self, length: int) -> Transform | None:
        """The STFT that `core` wants of chunks of that many samples; None if it takes the waveform alone.

        Raises InputError for a model that has no core.
        """
        raise self._no_core()

    def core(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The model without its STFT and inverse, in real numbers alone: what other runtimes can compute.

        The inputs are the spectrogram `[B, C, F, N, 2]` of `transform`, of real and imaginary parts, and for the Demucs
        family the chunks `[B, C, T]` behind it or alone. The outputs are the spectrograms `[B, S, C, F, N, 2]` and,
        where chunks were given, waveforms `[B, S, C, T]`, to which the spectrograms' inverse is added.
        """
        raise self._no_core()

    def _no_core(self) -> InputError:
        return InputError(f"{self.name} cannot be exported: its architecture has no part without a Fourier transform")

    def prepare(self, dtype: torch.dtype, *, attention: str | None = None) -> None:
        """Compute in this precision, with this attention backend.

        The backends of `separation.models.attention.LAYERS` replace layers by others that are made of the weights: for
        them, `load` comes first. For others `prepare` comes first, so that weights are read in the types of the state
        dict. Raises NotFusedError for layers that a backend of `LAYERS` does not know; the model is then as before.
        """
        if dtype != torch.float32:
            self.to_precision(dtype)
        self.attention = attention

    def fuse_for_gpu(self, dtype: torch.dtype) -> None:
        """Take the layers for a CUDA GPU in 16 bits, if the architecture has such, wherever the weights are.

        Raises NotFusedError for layers that those do not know; the model is then as before.
        """
        self.to_precision(dtype)

    def to_precision(self, dtype: torch.dtype) -> None:
        """Cast the linear layers or `CAST_LAYERS`; norms, rotary angles, STFT and the mask product stay in float32."""
        self.precision = dtype
        for module in self.modules():
            if isinstance(module, self.CAST_LAYERS):
                module.to(dtype)

    @property
    def is_half(self) -> bool:
        """Whether it computes in float16, whose largest number is 65504."""
        return self.precision == torch.float16

    def in_precision(self, dtype: torch.dtype) -> Self:
        """A copy of the model, with weights of its own, that computes in another of the 16-bit precisions."""
        other = copy.deepcopy(self)
        other.to_precision(dtype)
        return other

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether every weight is a finite number within the range of that type."""
        weights = [weight.detach() for weight in self.parameters() if weight.numel()]
        largest = torch._foreach_norm(weights, torch.inf)  # NaN where there is one
        return not weights or bool(torch.stack([norm.float() for norm in largest]).amax() <= torch.finfo(dtype).max)
