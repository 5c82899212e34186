"""The interface and the common code of all architectures."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from separation.errors import InputError
from separation.models.shapes import Shapes
from separation.models.stft import Stft, Window

# How a track is scaled before chunking: not at all, to a peak of 0.9, so that its mono mixture has zero mean and unit
# variance, or to a largest `spectral_peak` of 1.
Normalisation = Literal["none", "peak", "standard", "spectrum"]


@dataclass(frozen=True)
class Blueprint:
    """A file's own description of its network, as the demucs package stores it: the class and its arguments."""

    class_name: str  # such as demucs.hdemucs.HDemucs
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A model's name, its stems, and the audio on which it was trained."""

    name: str
    stems: tuple[str, ...]  # S names, in the order of the estimates
    sample_rate: int  # hertz
    chunk_samples: int
    standardised: bool = False  # trained on tracks of zero mean and unit variance, whatever the architecture's default
    residual: str | None = None  # the name of the mixture minus the estimates, if it has one


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The checkpoint that a model was loaded from. Two models of the same origin have the same layers and weights."""

    architecture: str
    hyper_parameters: Mapping[str, str]
    stems: tuple[str, ...]  # of the whole checkpoint, in its order
    weights: Mapping[str, Callable[[], str]]  # a specialist's stem, else a number, to a function: the file's sha256


@dataclass(frozen=True, kw_only=True)
class Transform:
    """The STFT before a model's `core` and its inverse after it, for chunks of one length. Counts are in samples.

    Before the core: `zeros_after` zeros are appended to the chunk, and both ends are extended by `padding`. Frames of
    `n_fft`, `hop_length` apart, are multiplied by a window of `win_length` in the middle of the frame. Their Fourier
    transforms are multiplied by `scale`. The core takes the lowest `bins`.

    After the core: the missing bins and `zero_frames` frames at both ends are filled with zeros. The inverse transforms
    are divided by `scale`, multiplied by the window and added `hop_length` apart; the sum is divided by the sum of the
    squared windows. The chunk starts after `crop` samples.
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
    def of(cls, stft: Stft, *, bins: int | None = None, zeros_after: int = 0) -> "Transform":
        """The transform that `stft` computes, of all bins or of the lowest ones."""
        half = stft.n_fft // 2
        return cls(
            n_fft=stft.n_fft,
            hop_length=stft.hop_length,
            win_length=stft.win_length,
            window=stft.window,
            scale=stft.n_fft**-0.5 if stft.normalized else 1.0,
            bins=bins or half + 1,
            zeros_after=zeros_after,
            padding=(half, half),
            padding_mode=stft.padding_mode,
            crop=half,
        )


class SeparationModel(nn.Module):
    """Chunks of waveform `[B, C, T]` in float32 to estimates `[B, S, C, T]` in float32.

    A model is constructed without weights, from a Config and an Identity. `load` sets its weights, `prepare` its
    precision and attention backend. `separation.load_model` does all of this.

    Attributes:
        name: the name of its checkpoint.
        stems: the names of the S estimates, in order.
        residual: the name of the mixture minus the estimates, if it has one.
        sample_rate: of the audio that it takes and gives, in hertz.
        chunk_samples: T, the length of the chunks that it was trained on.
        channels: C, 1 or 2.
        least_samples: the smallest T; shorter chunks cannot be extended by their own reflection.
        fixed_chunk: whether T must be `chunk_samples`.
        restores: whether the estimates are the whole mixture, restored, and not parts of it.
        precision: in which it computes.
        attention: the name of its attention backend, if it has one.
        origin: the checkpoint that its weights come from, if any.
    """

    # A frozen dataclass of hyper-parameters with the community's names, and the names that only training uses.
    Config: ClassVar[type]
    TRAINING_KEYS: ClassVar[frozenset[str]] = frozenset()
    # Keys of the YAML's `audio:` section that the Config needs too, mapped to the names of its fields.
    AUDIO_KEYS: ClassVar[Mapping[str, str]] = {}
    # Regular expressions. A state dict has this architecture if each of them matches (re.fullmatch) one of its keys.
    KEY_PATTERNS: ClassVar[tuple[str, ...]]
    # For an architecture whose weights have the names of the one that it extends: a weight with another shape.
    TELLING_WEIGHT: ClassVar[str] = ""
    # A regular expression for keys that some files contain and that are ignored: their values follow from the Config.
    UNUSED_KEYS: ClassVar[str] = ""
    # The layers that `to_precision` casts.
    CAST_LAYERS: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    # A checkpoint's YAML can request "standard".
    normalisation: Normalisation = "peak"
    # Whether the song's ends are extended by their reflection, or else by silence.
    reflects_border: ClassVar[bool] = True
    # How far a chunk's estimates reach beyond it on both sides, if those of chunks side by side are to be added up.
    # 0: chunks overlap, and their estimates are cross-faded.
    spill_samples: int = 0
    # Whether `core` takes the chunks, in addition to the spectrogram or alone.
    core_takes_waveform: ClassVar[bool] = False
    # Whether chunks must have exactly `chunk_samples`. Otherwise the caller chooses their length.
    fixed_chunk: ClassVar[bool] = False
    # Whether the estimates are the whole mixture, restored, and not parts of it.
    restores: ClassVar[bool] = False
    channels: int  # C: 1 or 2
    least_samples: int = 1  # shorter chunks cannot be extended by their own reflection
    has_int8: ClassVar[bool] = False  # whether `prepare` supports torch.int8, with the attention backend `fused`
    head_size: int | None = None  # features per head; None if no attention of the model takes a backend
    precision: torch.dtype = torch.float32  # in which the model computes
    attention: str | None = None  # the name of its attention backend
    cpu_kind: str | None = None  # the kind of CPU whose kernels it uses, if any: kinds round differently
    origin: Origin | None = None  # None if the weights do not come from a checkpoint
    # The indices of the computed outputs, in the order of the estimates. Empty if they are not computed separately.
    _outputs: tuple[int, ...] = ()

    def __init__(self, identity: Identity) -> None:
        super().__init__()
        self.name: str = identity.name
        self.stems: tuple[str, ...] = identity.stems
        self.residual: str | None = identity.residual
        self.sample_rate: int = identity.sample_rate
        self.chunk_samples: int = identity.chunk_samples
        if identity.standardised:
            self.normalisation = "standard"

    if TYPE_CHECKING:  # torch.nn.Module's takes and returns anything

        def __call__(self, chunks: Tensor) -> Tensor: ...

    def load(self, weights: Mapping[str, Tensor], origin: Origin | None = None) -> None:
        """Use these tensors, one for each key of the state dict, as the weights, without copying. Disables training."""
        self.load_state_dict(weights, strict=True, assign=True)
        self.eval().requires_grad_(False)
        self.origin = origin

    @classmethod
    def key_prefix(cls, part: str) -> str:
        """The prefix of a file's keys in the state dict. `part` is a specialist's stem, else the file's number."""
        return ""

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        """Infer hyper-parameters from the shapes of weights. None means that the shapes do not determine the value.

        For a list, the value may be only its length. If several values fit, the Config's is one of them and is taken.
        """
        return {}

    def rebuild(self, part: str, blueprint: Blueprint) -> None:
        """Rebuild a part, without weights, from its file's blueprint. Does nothing if the architecture has none."""

    def input_samples(self, length: int) -> int | None:
        """How many samples the model needs for a chunk with `length` samples of the song. None means a whole chunk."""
        return None

    def spectral_peak(self, chunk: Tensor) -> float:
        """The largest magnitude in a chunk `[1, C, T]` on the CPU, without its margins; of the waveform by default."""
        return float(chunk.abs().amax())

    def only(self, stems: tuple[str, ...]) -> Self:
        """A model with the same weights that returns at least these of its stems.

        If the architecture has separate parts for stems, it does not compute the others.
        """
        if not self._outputs:
            return self
        fewer = copy.copy(self)  # shares the layers
        fewer._outputs = tuple(self._outputs[self.stems.index(stem)] for stem in stems)
        fewer.stems = stems
        return fewer

    def transform(self, length: int) -> Transform | None:
        """The STFT that `core` needs for chunks of `length` samples; None if it takes only the waveform.

        Raises InputError for a model without a core.
        """
        raise self._no_core()

    def core(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The model without its STFT and inverse STFT, in real numbers, so that other runtimes can compute it.

        The inputs are the spectrogram of `transform`, `[B, C, F, N, 2]` with real and imaginary parts, and for the
        Demucs family the chunks `[B, C, T]`; plain Demucs takes only these. The outputs are the spectrograms
        `[B, S, C, F, N, 2]` and, if there are chunks, waveforms `[B, S, C, T]` to which their inverse is to be added.
        """
        raise self._no_core()

    def _no_core(self) -> InputError:
        fault = "its architecture has no part without a Fourier transform"
        return InputError(f"{self.name} cannot be exported ({fault}): choose another model")

    def prepare(self, dtype: torch.dtype, *, attention: str | None = None) -> None:
        """Set the precision and the attention backend.

        The `LAYER_BACKENDS` of models/attention.py build new layers from the weights, so `load` must come before. With
        any other backend `load` comes after, and reads the weights in the types of the state dict.

        Raises NotFusedError for layers that the backend does not support; the model is then unchanged.
        """
        if dtype != torch.float32:
            self.to_precision(dtype)
        self.attention = attention

    def fuse_for_gpu(self, dtype: torch.dtype) -> None:
        """Use the architecture's layers for a CUDA GPU in 16 bits, if it has any, even if the weights are not on a GPU.

        Raises NotFusedError for unsupported layers; the model is then unchanged.
        """
        self.to_precision(dtype)

    def fuse_for_cpu(self) -> None:
        """Use the architecture's layers for CPUs, if it has any beside those of the attention backend.

        Call it after `load` and `prepare`. Unsupported layers stay as they are, and the log says why.
        """

    def to_precision(self, dtype: torch.dtype) -> None:
        """Cast `CAST_LAYERS`. Norms, rotary angles, the STFT and the mask product stay in float32."""
        self.precision = dtype
        for module in self.modules():
            if isinstance(module, self.CAST_LAYERS):
                module.to(dtype)

    @property
    def is_half(self) -> bool:
        """Whether the model computes in float16, which overflows above 65504."""
        return self.precision == torch.float16

    def in_precision(self, dtype: torch.dtype) -> Self:
        """A copy of the model, with its own weights, that computes in another 16-bit precision."""
        other = copy.deepcopy(self)
        other.to_precision(dtype)
        return other

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether every weight is finite and within the range of that type."""
        weights = [weight.detach() for weight in self.parameters() if weight.numel()]
        largest = torch._foreach_norm(weights, torch.inf)  # propagates NaN
        return not weights or bool(torch.stack([norm.float() for norm in largest]).amax() <= torch.finfo(dtype).max)
