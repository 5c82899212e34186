"""What a YAML file says about a checkpoint, checked and turned into a `Checkpoint`.

The YAML has the community's sections as they are published (`audio`, `model`, `training`, …). This project adds
`architecture`, `stems`, `residual`, `files` (name, url, mirrors, bytes, sha256, stem) and what `facts.py` reads. A
user's own YAML may lack all of these: its weights lie beside it, and the rest follows from `training` and the weights.

Nothing here imports PyTorch, which takes a second: `separation models list` answers at once.
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from separation.checkpoints.chunk_choice import ChunkChoice
from separation.checkpoints.facts import FACTS, Facts, facts_in
from separation.checkpoints.keys import refuse_unknown, section, take
from separation.checkpoints.lora import Lora, lora_in
from separation.documents import CONTROL, DocumentError, quoted, read_yaml
from separation.errors import CheckpointError, RecipeError

KEYS = {"architecture", "stems", "residual", "files", "audio", "model"} | FACTS
COMMUNITY_SECTIONS = {"training", "inference", "augmentations", "loss_multistft", "lora"}
CLASSES = {"Bandit": "bandit_v2"}  # architectures by `cls`, whose arguments are in the section `kwargs`
AUDIO_KEYS = {"sample_rate", "chunk_size", "dim_f", "dim_t", "hop_length", "n_fft", "num_channels", "min_mean_abs"}
FIXED_CHUNKS = {
    "demucs",
    "demucs_v2",
    "hdemucs",
    "htdemucs",
    "mdx23c",
    "experimental_mdx23c_stht",
    "mdx_net",
    "vr",
}  # architectures that take chunks of one length only
SIDE_BY_SIDE = {"vr"}  # of those, architectures whose chunks do not overlap
WITH_INT8 = {  # architectures that can compute in int8
    "bs_roformer",
    "bs_roformer_hyperace",
    "bs_roformer_fno",
    "bs_roformer_large_v2",
    "mel_band_roformer",
}
WITH_ATTENTION = WITH_INT8 | {
    "bs_roformer_value_residual",
    "bs_roformer_experimental",
    "mel_band_roformer_experimental",
    "bs_siamese_roformer",
    "mini_bs_roformer",
    "bs_conformer",
    "mel_band_conformer",
    "htdemucs",
    "scnet_tran",
    "moises_light",
}  # architectures with a choice of attention backend
# Keys by which community YAML files name a variant, at the top level or in the `model:` section.
FLAGS = {
    "hyperace2": "bs_roformer_hyperace",
    "use_mask_estimator_hyper_ace": "bs_roformer_hyperace",
    "fno": "bs_roformer_fno",
    "use_mask_estimator_fno": "bs_roformer_fno",
    "unwa_inst_large_2": "bs_roformer_large_v2",
    "siamese": "bs_siamese_roformer",
}
YAML_SUFFIXES = (".yaml", ".yml")
# Suffixes of the files that stand beside a weights file, so that no weights file can take their place.
RESERVED_SUFFIXES = (".lock", ".part", ".verified", *YAML_SUFFIXES)
MOST_NAME_BYTES = 200  # most file systems allow 255
MOST_URL_CHARACTERS = 2000

Shares = tuple[tuple[float, ...], ...]  # [network][stem]: each network's share of each stem; a stem's shares sum to 1


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A weights file: its place in the weights folder, its source, and how to check it."""

    name: str  # may contain a subfolder: demo/demo.safetensors
    url: str | None  # None: the file ships with the project or is the user's own
    bytes: int | None
    sha256: str | None  # its first 8 digits or more
    stem: str | None  # a specialist's stem; several files without a stem are networks whose estimates are averaged
    checkpoint: str = "NAME"  # the checkpoint's name, for the command in error messages
    is_recorded: bool = False  # the sha256 was recorded at the first download, not published
    mirrors: tuple[str, ...] = ()  # other addresses of the same bytes, tried in order when the url fails


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint as its YAML describes it."""

    name: str
    source: Path  # the YAML file, or the weights file if that contains its own description
    architecture: str | None  # a key of models.ARCHITECTURES; None: to be recognised by the weights
    stems: tuple[str, ...]  # in the order of the model's estimates
    published_stems: tuple[str, ...]  # their names in the `training:` section; empty if it has none
    residual: str | None  # the name of the mixture minus the stems, if it has one
    sample_rate: int  # hertz
    chunk_samples: int
    files: tuple[WeightFile, ...]
    audio: dict[str, Any]  # the `audio:` section; some architectures read more of it than the two values above
    hyper_parameters: dict[str, Any]  # the `model:` section
    standardised: bool  # `normalize` in the `inference:` section: tracks have zero mean and unit variance
    facts: Facts  # for people
    ignored: tuple[str, ...]  # unknown keys
    shares: Shares = ()  # empty: the estimates of several files without a stem are averaged
    lora: Lora | None = None  # how LoRA adapters in the weights, or beside them, are merged

    def chunks(self, choice: ChunkChoice) -> tuple[int, int]:
        """The chunk and the overlap in samples for this choice. Raises InputError for an overlap that is too long."""
        if self.architecture in SIDE_BY_SIDE:
            return self.chunk_samples, 0
        is_fixed = self.architecture in FIXED_CHUNKS
        return choice.samples(self.name, self.chunk_samples, self.sample_rate, is_fixed=is_fixed)


def load_document(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's YAML file.

    Raises RecipeError for a missing file, CheckpointError for one that cannot be read or has no keys.
    """
    try:
        document = read_yaml(path)
    except FileNotFoundError as e:
        raise RecipeError(f"there is no file {path}: give the path of a model's .yaml file") from e
    except DocumentError as e:
        raise CheckpointError(f"{path} {e}") from e
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise CheckpointError(f"{path} does not describe a model: it must have keys such as architecture and model")
    return document


def describe(document: dict[str, Any], path: Path, *, name: str, shares: Shares = ()) -> Checkpoint:
    """The checkpoint `name` that the content of the file `path` describes.

    A community YAML lacks this project's keys. `stems` are then the stems of its training, `architecture` is what its
    `training` section names, if anything, and `files` is empty.

    Raises CheckpointError for a key that is missing, of the wrong type or out of range.
    """
    training, inference = section(document, "training", path), section(document, "inference", path)
    unknown = set(document) - KEYS - COMMUNITY_SECTIONS - set(FLAGS)
    if isinstance(document.get("model"), str):
        unknown.discard(document["model"])
        document = _from_demucs_training(document, training, path)
    elif "cls" in document and "kwargs" in document:
        unknown -= {"cls", "kwargs"}
        document = _from_class(document, path)
    if isinstance(document.get("name"), str):  # of the class; the checkpoint's name is its file's
        unknown.discard("name")
    audio = take(document, "audio", dict, path)
    unknown |= {f"audio.{key}" for key in set(audio) - AUDIO_KEYS}
    if stft := section(document, "stft", path):  # of the Conformer
        audio = audio | _stft_sizes(stft, path)
        unknown.discard("stft")
    hyper_parameters = take(document, "model", dict, path)
    architecture = document.get("architecture", training.get("model_type")) or _flagged(document, hyper_parameters)
    if architecture is not None and not isinstance(architecture, str):
        raise CheckpointError(f"{path}: architecture must be a string, not {quoted(architecture)}")
    stems = _stems(document, training, hyper_parameters, path)
    files = tuple(_weight_file(entry, path, name) for entry in take(document, "files", list, path, default=[]))
    _check_specialists(files, stems, path)
    sample_rate = take(audio, "sample_rate", int, path, default=44100)
    chunk_samples = _chunk_samples(audio, inference, path)
    return Checkpoint(
        name=name,
        source=path,
        architecture=architecture,
        stems=stems,
        published_stems=_published_stems(training, hyper_parameters, len(stems)),
        residual=_residual(document, stems, path),
        sample_rate=sample_rate,
        chunk_samples=chunk_samples,
        files=files,
        audio=audio | {"sample_rate": sample_rate, "chunk_size": chunk_samples},
        hyper_parameters=hyper_parameters,
        standardised=bool(inference.get("normalize")),
        facts=facts_in(document, path),
        ignored=tuple(sorted(unknown)),
        shares=shares,
        lora=lora_in(document, path),
    )


def _flagged(document: dict[str, Any], model: dict[str, Any]) -> str | None:
    """The variant that a key of the YAML names, if any. A key at the top level counts whatever its value."""
    if {"use_value_residual_learning", "num_residual_streams"} & set(model):  # no other architecture has these
        return "mel_band_roformer_experimental" if "num_bands" in model else "bs_roformer_experimental"
    return next((name for key, name in FLAGS.items() if key in document or model.get(key)), None)


def _from_demucs_training(document: dict[str, Any], training: dict[str, Any], path: Path) -> dict[str, Any]:
    """A Demucs YAML of Music-Source-Separation-Training, in the form of the other architectures.

    There `model` names the class and the section with its arguments; `training` has the other arguments.
    """
    name = document["model"]
    arguments = take(document, name, dict, path)
    rate, segment = (take(training, key, int, path) for key in ("samplerate", "segment"))
    arguments = arguments | {
        "sources": training.get("instruments"),
        "audio_channels": training.get("channels", 2),
        "samplerate": rate,
        "segment": segment,
    }
    audio = take(document, "audio", dict, path) | {"sample_rate": rate, "chunk_size": rate * segment}
    return {"architecture": name} | document | {"audio": audio, "model": arguments}


def _stft_sizes(stft: dict[str, Any], path: Path) -> dict[str, int]:
    """The sizes in an `stft:` section."""
    if not stft.get("center", True):
        raise CheckpointError(f"{path}: center must be true in the section stft: no model here has it otherwise")
    return {key: take(stft, key, int, path) for key in ("n_fft", "hop_length", "win_length") if key in stft}


def _from_class(document: dict[str, Any], path: Path) -> dict[str, Any]:
    """A YAML that names a class and its arguments, in the form of the other architectures."""
    name = take(document, "cls", str, path)
    if name not in CLASSES:
        raise CheckpointError(f"{path}: cls is {quoted(name)}: use one of {', '.join(CLASSES)}")
    return {"architecture": CLASSES[name], "model": take(document, "kwargs", dict, path)} | document


def _stems(document: dict[str, Any], training: dict[str, Any], model: dict[str, Any], path: Path) -> tuple[str, ...]:
    """The stems in lowercase: of `stems`, else of the training."""
    if training.get("instruments") is not None:
        take(training, "instruments", list, path)
    if "stems" not in document and (found := _trained_stems(training, model)):
        document = {"stems": found}
    named = take(document, "stems", list, path)
    if wrong := [stem for stem in named if not isinstance(stem, str | int | float)]:
        raise CheckpointError(f"{path}: a stem must be a string, not {quoted(wrong[0])}: rename it under stems")
    stems = tuple(str(stem).lower() for stem in named)
    if len(set(stems)) != len(stems) or not stems:
        raise CheckpointError(f"{path}: stems must name each stem once, not {quoted(list(stems))}")
    if wrong := [stem for stem in stems if not _is_file_name(stem)]:
        raise CheckpointError(f"{path}: the stem {quoted(wrong[0])} cannot be a file's name: rename it under stems")
    return stems


def _trained_stems(training: dict[str, Any], model: dict[str, Any]) -> Any:
    """The stems as the training names them. A model with one output gives its training's target."""
    sources = model.get("sources")
    n_sources = len(sources or [None]) if sources is None or isinstance(sources, list | tuple) else sources
    outputs = model.get("num_stems") or model.get("n_sources") or n_sources
    target = training.get("target_instrument")
    return [target] if target and outputs == 1 else training.get("instruments") or sources


def _published_stems(training: dict[str, Any], model: dict[str, Any], n_stems: int) -> tuple[str, ...]:
    """The stems under their published names; empty if the training names none, or another number of them."""
    found = _trained_stems(training, model) if training else None
    return tuple(map(str, found)) if isinstance(found, list | tuple) and len(found) == n_stems else ()


def _residual(document: dict[str, Any], stems: tuple[str, ...], path: Path) -> str | None:
    """The name of the residual."""
    if document.get("residual") is None:
        return None
    residual = take(document, "residual", str, path).lower()
    if residual in stems or not _is_file_name(residual):
        raise CheckpointError(
            f"{path}: the residual {quoted(residual)} must be a file's name and not one of stems: rename it"
        )
    return residual


def _chunk_samples(audio: dict[str, Any], inference: dict[str, Any], path: Path) -> int:
    """The chunk for inference, else for training; some YAML files state it in STFT frames, one more than hops."""
    frames, hop_length = inference.get("dim_t", audio.get("dim_t")), audio.get("hop_length")
    if "chunk_size" not in inference | audio and isinstance(frames, int) and isinstance(hop_length, int):
        n_samples = take({"dim_t": frames - 1}, "dim_t", int, path) * take(audio, "hop_length", int, path)
        return take({"chunk_size": n_samples}, "chunk_size", int, path)
    return take(inference if "chunk_size" in inference else audio, "chunk_size", int, path)


def _check_specialists(files: tuple[WeightFile, ...], stems: tuple[str, ...], path: Path) -> None:
    specialised = sorted(file.stem for file in files if file.stem is not None)
    if specialised and (specialised != sorted(stems) or len(files) > len(stems)):
        raise CheckpointError(f"{path}: the files must name one stem each of {list(stems)}, not {specialised}")


def _weight_file(entry: Any, path: Path, checkpoint: str) -> WeightFile:
    if isinstance(entry, WeightFile):  # a bag's
        return entry
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path}: each of files must be a section with a name, not {quoted(entry)}")
    known = {field.name for field in fields(WeightFile)} - {"checkpoint", "is_recorded"}
    refuse_unknown(set(entry) - known, path)
    url, sha256, stem = (
        None if entry.get(key) is None else take(entry, key, str, path) for key in ("url", "sha256", "stem")
    )
    mirrors = take(entry, "mirrors", list, path, default=[])
    n_bytes = None if entry.get("bytes") is None else take(entry, "bytes", int, path)
    name = take(entry, "name", str, path)
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise CheckpointError(f"{path}: the file name {quoted(name)} leads out of the weights folder: rename it")
    if not all(map(_is_file_name, name.split("/"))) or name.endswith(RESERVED_SUFFIXES):
        raise CheckpointError(f"{path}: a weights file cannot be named {quoted(name)}: rename it")
    if sha256 is not None and not re.fullmatch("[0-9a-f]{8,64}", sha256):
        raise CheckpointError(
            f"{path}: sha256 must be 64 hexadecimal digits in lowercase, or at least the first 8, not {quoted(sha256)}"
        )
    if mirrors and url is None:
        raise CheckpointError(f"{path}: the file {quoted(name)} has mirrors and no url: move the first of them to url")
    for address in [*([] if url is None else [url]), *mirrors]:
        _check_url(address, path)
    return WeightFile(
        name=name,
        url=url,
        bytes=n_bytes,
        sha256=sha256,
        stem=stem,
        checkpoint=checkpoint,
        mirrors=tuple(mirrors),
    )


def _is_file_name(name: str) -> bool:
    """Whether every system allows a file of this name, with one of our own suffixes appended."""
    has_odd = CONTROL.search(name) or set(name) & set('/\\:*?"<>|\t\n') or name[:1] == " " or name[-1:] in (" ", ".")
    return bool(name) and not has_odd and len(name.encode()) <= MOST_NAME_BYTES


def _check_url(url: Any, path: Path) -> None:
    if not isinstance(url, str) or not url.startswith(("https://", "http://")):
        raise CheckpointError(f"{path}: url must begin with https:// or http://, not {quoted(url)}")
    try:
        parts = urlsplit(url)
        is_valid = bool(parts.hostname) and (parts.port or 1) > 0  # both raise ValueError
        is_valid &= url.isascii() and url.isprintable() and " " not in url and len(url) <= MOST_URL_CHARACTERS
    except ValueError:
        is_valid = False
    if not is_valid:
        raise CheckpointError(f"{path}: url must be a file's address, not {quoted(url)}: correct it")
