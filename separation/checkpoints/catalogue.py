"""What there is to load: configs/models/NAME.yaml, and the files of weights it names, found, checked and downloaded.

The YAML holds the community's sections as they are published (`audio`, `model`, `training`, …) and beside them
`architecture`, `stems`, `files` (name, url, bytes, sha256, stem), `licence` and `quality`. One that is the user's own
may lack all of the latter: then its weights lie beside it, and the rest follows from them and from `training`.

This module alone downloads. It does without PyTorch, whose import takes a second: `python -m separation models list` is
there at once.
"""

import contextlib
import functools
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from separation.checkpoints import bags, foreign
from separation.checkpoints.chunk_choice import ChunkChoice
from separation.documents import (
    CONTROL,
    DocumentError,
    bare,
    first_line,
    read_json,
    read_safetensors_header,
    read_yaml,
    shown,
)
from separation.errors import CheckpointError, DownloadError, RecipeError
from separation.system.locks import lock
from separation.system.memory import enough_memory
from separation.system.os_errors import output_errors
from separation.system.output import not_through_links
from separation.system.places import program, shipped, size_bytes, weights_folder

CONFIGS = shipped("configs") / "models"

logger = logging.getLogger("separation")

KEYS = {"architecture", "stems", "files", "licence", "quality", "audio", "model"}
COMMUNITY_SECTIONS = {"training", "inference", "augmentations", "loss_multistft"}
AUDIO_KEYS = {"sample_rate", "chunk_size", "dim_f", "dim_t", "hop_length", "n_fft", "num_channels", "min_mean_abs"}
# The largest whole numbers that are taken, by key: well above what published checkpoints have.
MOST = {"sample_rate": 384_000, "samplerate": 384_000, "chunk_size": 2**24, "segment": 600, "bytes": 2**36}
MOST_OTHER = 2**20
FIXED_CHUNKS = {"demucs", "hdemucs", "htdemucs", "mdx23c"}  # architectures that take chunks of one length alone
WITH_ATTENTION = {"bs_roformer", "mel_band_roformer", "htdemucs"}  # architectures whose attention has a choice
WITH_INT8 = {"bs_roformer", "mel_band_roformer"}  # architectures that compute in int8
YAML_SUFFIXES = (".yaml", ".yml")
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".th", ".chpt", ".bin")  # the first that is there is taken
OWN_SUFFIXES = (".lock", ".part", ".verified", *YAML_SUFFIXES)  # of what stands beside a file of weights
MOST_NAME_BYTES = 200  # most file systems take 255
MOST_URL_CHARACTERS = 2000
UVR_CONFIGS = Path("model_data", "mdx_c_configs")  # where Ultimate Vocal Remover keeps the YAML files of its models

SOURCE_SHA256 = "source_sha256"  # in the metadata of a converted file: the checksum of what it was made from

TIMEOUT_SECONDS = 30.0  # without a byte
RETRY_SECONDS = (0.5, 1.0, 2.0)  # waits between attempts that bring nothing; one that brings a byte starts over
BLOCK_BYTES = 1 << 18
REDIRECTS = {("http", "http"), ("http", "https"), ("https", "https")}  # schemes, from and to


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A file of weights: where it lies below the weights folder, where it comes from, and how it is recognised."""

    name: str  # may hold a subfolder: demo/demo.safetensors
    url: str | None  # None: it ships with the project, or is the user's own
    bytes: int | None
    sha256: str | None
    stem: str | None  # the one stem that this file is for; without it, several files' estimates are averaged
    checkpoint: str = "NAME"  # the checkpoint it belongs to, for the command in error messages
    is_recorded: bool = False  # whether its sha256 is not its publisher's word but what the first download brought


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a YAML file says about a checkpoint."""

    name: str
    source: Path  # the YAML file; the file of weights if that describes itself
    architecture: str | None  # a key of models.ARCHITECTURES; None: the names of its weights tell
    stems: tuple[str, ...]  # in the order of the model's estimates
    sample_rate: int  # hertz
    chunk_samples: int
    files: tuple[WeightFile, ...]
    audio: dict[str, Any]  # the `audio:` section, of which some architectures read more than the two above
    hyper_parameters: dict[str, Any]  # the `model:` section
    normalised: bool  # `normalize` of the `inference:` section: the model knows tracks of zero mean and unit variance
    licence: str
    quality: str  # as published, with its source
    ignored: tuple[str, ...]  # keys that nothing here knows
    shares: bags.Shares = ()  # for each file, of each stem; without it, several files' estimates are averaged

    def chunks(self, choice: ChunkChoice) -> tuple[int, int]:
        """Chunk and overlap in samples, of what is asked for. Raises InputError for an overlap that is too long."""
        is_fixed = self.architecture in FIXED_CHUNKS
        return choice.samples(self.name, self.chunk_samples, self.sample_rate, is_fixed=is_fixed)


class _BrokenConnectionError(Exception):
    """The server or the way to it failed in a manner that may pass."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading the YAML


def models_folder() -> Path | None:
    """The user's own folder of models: the environment variable SEPARATION_MODELS."""
    folder = os.environ.get("SEPARATION_MODELS")
    return Path(folder) if folder else None


def available() -> list[str]:
    """The names of the checkpoints in configs/models and in the user's own folder, whose subfolders are one each."""
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    if (own := models_folder()) is not None:
        weights = _files(own, WEIGHT_SUFFIXES)
        alone = set(_files(own, YAML_SUFFIXES)) - {_config_named_after(path) for path in weights}
        names |= {path.stem for path in [*weights, *alone]}
        names |= {path.parent.name for suffix in YAML_SUFFIXES for path in own.glob(f"*/*{suffix}")}
    return sorted(names)


def read_config(name_or_path: str | Path) -> Checkpoint:
    """Read what describes a checkpoint.

    Args:
        name_or_path: a name in configs/models or in the user's own folder; or the path of a YAML file, of a file of
            weights with its YAML beside it, of a folder with one of each, or of such a pair without its suffix.

    A file as the community publishes it lacks our keys: `stems` are then those it was trained on, `architecture` is
    what its `training` names, if anything, and `files` are the weights beside it, if any. Keys that nothing here knows
    are an error in configs/models, where they are misspelt, and `ignored` elsewhere.

    Raises RecipeError for an unknown name and CheckpointError for files that are missing or do not make sense.
    """
    try:
        found = _find(name_or_path)
    except (OSError, ValueError) as e:  # a name that no file can have, a folder that may not be entered
        raise RecipeError(
            f"the model {shown(name_or_path)} cannot be looked for ({first_line(e)}): name another"
        ) from e
    if found.config is None:
        assert found.weights is not None
        path, document = found.weights, _own_description(found.weights)
        if document is None:
            raise _not_described(found.weights)
    else:
        path, document = found.config, _read_yaml(found.config)
    if what := foreign.by_yaml(document):
        raise foreign.refusal(path, what)
    shares: bags.Shares = ()
    if bags.is_bag(document):
        document, shares = _bag_document(document, path)
    training, inference = _section(document, "training", path), _section(document, "inference", path)
    unknown = set(document) - KEYS - COMMUNITY_SECTIONS
    if isinstance(document.get("model"), str):
        unknown.discard(document["model"])
        document = _demucs_document(document, training, path)
    audio = _take(document, "audio", dict, path)
    unknown |= {f"audio.{key}" for key in set(audio) - AUDIO_KEYS}
    if path.parent == CONFIGS:
        _refuse_unknown(unknown, path)
    hyper_parameters = _take(document, "model", dict, path)
    stems = _stems(document, training, hyper_parameters, path)
    architecture = document.get("architecture", training.get("model_type"))
    if architecture is not None and not isinstance(architecture, str):
        raise CheckpointError(f"{path}: architecture must be a text, not {shown(architecture)}")
    files = tuple(_weight_file(entry, path, found.name) for entry in _take(document, "files", list, path, default=[]))
    specialised = sorted(file.stem for file in files if file.stem is not None)
    if specialised and (specialised != sorted(stems) or len(files) > len(stems)):
        raise CheckpointError(f"{path}: the files must name one stem each of {list(stems)}, not {specialised}")
    if found.weights is not None and (found.by_weights or not files):
        if len(files) > 1:
            raise CheckpointError(f"{path} needs {len(files)} files, {found.weights} is one: give the model's name")
        own = str(found.weights.absolute())  # which also within the weights folder leads to itself
        files = (WeightFile(name=own, url=None, bytes=None, sha256=None, stem=None, checkpoint=found.name),)
    sample_rate = _take(audio, "sample_rate", int, path, default=44100)
    chunk_samples = _take({"chunk_size": _chunk_samples(audio, inference, path)}, "chunk_size", int, path)
    return Checkpoint(
        name=found.name,
        source=path,
        architecture=architecture,
        stems=stems,
        sample_rate=sample_rate,
        chunk_samples=chunk_samples,
        files=files,
        audio=audio | {"sample_rate": sample_rate, "chunk_size": chunk_samples},
        hyper_parameters=hyper_parameters,
        normalised=bool(inference.get("normalize")),
        licence=_take(document, "licence", str, path, default="not stated"),
        quality=_take(document, "quality", str, path, default="not stated"),
        ignored=tuple(sorted(unknown)),
        shares=shares,
    )


def files_for(description: Checkpoint, stems: Sequence[str] | None) -> tuple[WeightFile, ...]:
    """The files that a checkpoint needs, of specialists only those for `stems`, in that order.

    Raises RecipeError for a stem that it does not give.
    """
    wanted = description.stems if stems is None else tuple(dict.fromkeys(stems))
    unknown = [stem for stem in wanted if stem not in description.stems]
    if unknown or not wanted:
        given = ", ".join(description.stems)
        raise RecipeError(f"{description.name} gives {given}, not {', '.join(map(repr, unknown)) or 'no stem at all'}")
    specialists = {file.stem: file for file in description.files if file.stem is not None}
    return tuple(specialists[stem] for stem in wanted) if specialists else description.files


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Where a model's files lie."""

    name: str
    config: Path | None  # None: the weights must describe themselves
    weights: Path | None  # those beside the YAML
    by_weights: bool = False  # whether it was the weights that were asked for


def _find(name_or_path: str | Path) -> _Found:
    path, name, own = Path(name_or_path), str(name_or_path), models_folder()
    is_name = path.name == name
    if is_name and (CONFIGS / f"{name}.yaml").is_file():
        return _Found(name=name, config=CONFIGS / f"{name}.yaml", weights=None)
    if path.suffix in YAML_SUFFIXES:
        return _Found(name=path.stem, config=path, weights=_namesake(path.with_suffix(""), WEIGHT_SUFFIXES))
    if path.suffix in WEIGHT_SUFFIXES or path.is_file() or path.suffix in foreign.SUFFIXES:
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}: give a checkpoint's path (.ckpt, .pth, .th, .safetensors)")
        foreign.refuse_suffix(path)
        return _Found(name=path.stem, config=_yaml_beside(path), weights=path, by_weights=True)
    if not is_name:
        return _find_without_suffix(path)
    if own is not None and ((own / name).is_dir() or _namesake(own / name, YAML_SUFFIXES + WEIGHT_SUFFIXES)):
        return _find_without_suffix(own / name)
    raise RecipeError(
        f"unknown model {name!r}: use one of {', '.join(available())}, or the path of a .yaml file or of weights"
    )


def _find_without_suffix(path: Path) -> _Found:
    if path.is_dir():
        configs, weights = _files(path, YAML_SUFFIXES), _files(path, WEIGHT_SUFFIXES)
        if len(configs) == 1 and _is_bag(configs[0]):
            return _Found(name=path.name, config=configs[0], weights=None)
        if len(configs) > 1 or len({file.stem for file in weights}) > 1 or not configs + weights:
            names = ", ".join(file.name for file in configs + weights) or "neither"
            raise CheckpointError(f"folder {path} must hold one file of weights and one YAML, not {names}")
        weights.sort(key=lambda file: WEIGHT_SUFFIXES.index(file.suffix))
        return _Found(name=path.name, config=next(iter(configs), None), weights=next(iter(weights), None))
    file = _namesake(path, (*YAML_SUFFIXES, *WEIGHT_SUFFIXES, *foreign.SUFFIXES))
    if file is None:
        raise RecipeError(
            f"there is no model {path.name!r} in {path.parent}: neither a folder {path.name}, nor {path.name}.yaml or "
            f"{path.name}.ckpt"
        )
    return _find(file)


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files in a folder that end so."""
    return sorted(path for suffix in suffixes for path in folder.glob(f"*{suffix}") if path.is_file())


def _namesake(path: Path, suffixes: tuple[str, ...]) -> Path | None:
    """The first file that is there with one of the suffixes put behind `path`; its name may hold points."""
    return next((file for suffix in suffixes if (file := path.with_name(path.name + suffix)).is_file()), None)


def _config_named_after(weights: Path) -> Path | None:
    """The YAML file with the name of these weights, or that with `config`; it may lie where UVR keeps such files."""
    for folder in (weights.parent, weights.parent / UVR_CONFIGS):
        for name in (weights.stem, f"config_{weights.stem}", f"{weights.stem}_config", weights.name):
            if found := _namesake(folder / name, YAML_SUFFIXES):
                return found
    return None


def _yaml_beside(weights: Path) -> Path | None:
    """The YAML file that is named after weights or, whatever its name, the only one that is not named after others.

    None if the weights describe themselves, as Demucs' do. Raises CheckpointError where no file or more than one may be
    it, and for weights of a model that is not supported.
    """
    if config := _config_named_after(weights):
        return config
    if weights.suffix in (".safetensors", ".th") and _own_description(weights) is not None:
        return None
    others = {_config_named_after(file) for file in _files(weights.parent, WEIGHT_SUFFIXES)}
    free = [path for path in _files(weights.parent, YAML_SUFFIXES) if path not in others and not _is_bag(path)]
    if len(free) == 1:
        return free[0]
    if _own_description(weights) is None:
        raise _not_described(weights, free)
    return None


def _is_bag(path: Path) -> bool:
    """Whether a YAML file is a bag; what is wrong with one is said where it is used."""
    try:
        document = read_yaml(path)
    except (DocumentError, FileNotFoundError):
        return False
    return isinstance(document, dict) and bags.is_bag(document)


def _not_described(weights: Path, candidates: Sequence[Path] = ()) -> CheckpointError:
    """The error for weights without a YAML: that it is wanted, unless none would do."""
    from separation.checkpoints.state_dict import open_weights  # imports PyTorch, which reading a YAML does without

    if what := foreign.by_names(open_weights(weights).tensors):
        return foreign.refusal(weights, what)
    found = f"any of {', '.join(path.name for path in candidates)} may be it" if candidates else "there is no YAML"
    return CheckpointError(
        f"{weights} needs the YAML file that it was published with, and {found}: put it into {weights.parent} as "
        f"{weights.stem}.yaml"
    )


def _own_description(weights: Path) -> dict[str, Any] | None:
    """What Demucs writes into its files, the class and its arguments, in the form of a YAML's content."""
    if weights.suffix != ".safetensors":
        from separation.checkpoints.state_dict import open_weights  # imports PyTorch, which reading a YAML does without

        return open_weights(weights).description
    metadata = _safetensors_metadata(weights)
    if not {"klass", "kwargs"} <= set(metadata) or "structure" in metadata:  # the latter: quantized weights
        return None

    def text(value: dict[str, Any]) -> Any:
        return f"{value['numerator']:d}/{value['denominator']:d}" if value.get("_type") == "fraction" else value

    try:
        arguments = read_json(metadata["kwargs"], hook=text)
        rate, segment = arguments["samplerate"], arguments["segment"]
        if isinstance(segment, str) and "/" not in segment:  # "1e999999999" would take hours
            raise ValueError(segment)
        chunk_samples = int(Fraction(segment) * rate)
    except (DocumentError, ArithmeticError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise CheckpointError(f"{weights} does not describe itself as Demucs' files do: put its YAML beside it") from e
    return {
        "architecture": metadata["klass"].rpartition(".")[2].lower(),
        "audio": {"sample_rate": rate, "chunk_size": chunk_samples},
        "model": arguments,
    }


def _bag_document(document: dict[str, Any], path: Path) -> tuple[dict[str, Any], bags.Shares]:
    """A bag of networks that describe themselves in the form of one network's YAML, and their shares."""
    try:
        members = bags.member_files(path.parent, document["models"], (".th", ".safetensors"))
        found = [(member, _own_description(member)) for member in members]
        if silent := [member for member, description in found if description is None]:
            raise ValueError(f"its network {silent[0].name} does not describe itself as Demucs' files do")
        first, *others = [description for _, description in found if description is not None]
        if different := [each for each in others if _kind(each) != _kind(first)]:
            raise ValueError(
                "its networks must have the same stems and sample rate, and be htdemucs all or none: "
                f"{members[0].name} and {members[1 + others.index(different[0])].name} differ"
            )
        stems = first["model"]["sources"]
        specialists, shares = bags.parts(document.get("weights"), stems, len(members))
    except ValueError as e:
        raise CheckpointError(f"{path}: {e}") from e
    audio = first["audio"]
    if document.get("segment") is not None:
        samples = _take(document, "segment", int, path) * audio["sample_rate"]
        is_fixed = first["architecture"] == "htdemucs"  # its transformer knows no longer chunks
        audio = audio | {"chunk_size": min(samples, audio["chunk_size"]) if is_fixed else samples}
    parts = [None] * len(members) if specialists is None else [stem.lower() for stem in specialists]
    files = [
        WeightFile(name=str(member.absolute()), url=None, bytes=None, sha256=None, stem=stem, checkpoint=path.stem)
        for member, stem in zip(members, parts, strict=True)
    ]
    kinds = {description["architecture"] for _, description in found if description is not None}
    architecture = "demucs" if len(kinds) > 1 else first["architecture"]  # which takes hybrid ones among its own
    return first | {"architecture": architecture, "audio": audio, "stems": list(stems), "files": files}, shares


def _kind(description: dict[str, Any]) -> tuple[Any, ...]:
    """What the networks of a bag must have in common."""
    is_transformer = description["architecture"] == "htdemucs"  # which takes chunks of one length alone
    return is_transformer, tuple(description["model"]["sources"]), description["audio"]["sample_rate"]


def _safetensors_metadata(path: Path) -> dict[str, str]:
    """Raises CheckpointError for a file without the header of a safetensors file."""
    try:
        read_safetensors_header(path)  # of bounded size, before the library reads it
        with enough_memory(str(path)), safe_open(path, framework="np") as opened:
            return opened.metadata() or {}
    except (DocumentError, SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{path} ({size_bytes(path):,} bytes) is damaged, incomplete or no safetensors checkpoint "
            f"({first_line(e)}): delete it and get it again"
        ) from e


def _demucs_document(document: dict[str, Any], training: dict[str, Any], path: Path) -> dict[str, Any]:
    """A Demucs of MSST's training: `model` names its class and the section of arguments; the rest is in `training`."""
    name = document["model"]
    arguments = _take(document, name, dict, path)
    rate, segment = (_take(training, key, int, path) for key in ("samplerate", "segment"))
    arguments = arguments | {
        "sources": training.get("instruments"),
        "audio_channels": training.get("channels", 2),
        "samplerate": rate,
        "segment": segment,
    }
    audio = _take(document, "audio", dict, path) | {"sample_rate": rate, "chunk_size": rate * segment}
    return {"architecture": name} | document | {"audio": audio, "model": arguments}


def _stems(document: dict[str, Any], training: dict[str, Any], model: dict[str, Any], path: Path) -> tuple[str, ...]:
    """Those that a YAML names, in small letters; the one it was trained for if the model has one output."""
    sources = model.get("sources")
    n_sources = len(sources or [None]) if sources is None or isinstance(sources, list | tuple) else sources
    outputs = model.get("num_stems") or model.get("n_sources") or n_sources
    instruments = None if training.get("instruments") is None else _take(training, "instruments", list, path)
    target = training.get("target_instrument")
    if "stems" not in document and (found := [target] if target and outputs == 1 else instruments or sources):
        document = {"stems": found}
    named = _take(document, "stems", list, path)
    if wrong := [stem for stem in named if not isinstance(stem, str | int | float)]:
        raise CheckpointError(f"{path}: a stem must be a text, not {shown(wrong[0])}: rename it under stems")
    stems = tuple(str(stem).lower() for stem in named)
    if len(set(stems)) != len(stems) or not stems:
        raise CheckpointError(f"{path}: stems must name each stem once, not {shown(list(stems))}")
    if wrong := [stem for stem in stems if not _is_part(stem)]:
        raise CheckpointError(f"{path}: the stem {shown(wrong[0])} cannot be the name of a file: rename it under stems")
    return stems


def _chunk_samples(audio: dict[str, Any], inference: dict[str, Any], path: Path) -> int:
    """What is said for inference, for training, or in frames of the STFT, of which a chunk's ends have one each."""
    frames, hop_length = inference.get("dim_t", audio.get("dim_t")), audio.get("hop_length")
    if "chunk_size" not in inference | audio and isinstance(frames, int) and isinstance(hop_length, int):
        return _take({"dim_t": frames - 1}, "dim_t", int, path) * _take(audio, "hop_length", int, path)
    return _take(inference if "chunk_size" in inference else audio, "chunk_size", int, path)


def _section(document: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    """A section that may be missing or empty."""
    return {} if document.get(key) is None else _take(document, key, dict, path)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = read_yaml(path)
    except FileNotFoundError as e:
        raise RecipeError(f"there is no file {path}: give the path of a model's .yaml file") from e
    except DocumentError as e:
        raise CheckpointError(f"{path} {e}") from e
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise CheckpointError(f"{path} does not describe a model: it must hold keys such as architecture and model")
    return document


def _take(section: Mapping[str, Any], key: str, kind: type, path: Path, *, default: Any = None) -> Any:
    value, label = section.get(key, default), bare(key)
    is_kind = isinstance(value, kind) and not isinstance(value, bool)  # True is an int too
    if not is_kind or (isinstance(value, int) and value <= 0):
        words = {dict: "a section", list: "a list", str: "a text", int: "a whole number above 0"}
        found = f"not {shown(value)}" if key in section else "and is missing"
        raise CheckpointError(f"{path}: {label} must be {words[kind]}, {found}")
    if isinstance(value, int) and value > (most := MOST.get(key, MOST_OTHER)):
        raise CheckpointError(f"{path}: {label} must be at most {most:,}, not {shown(value)}")
    if isinstance(value, dict) and (wrong := [name for name in value if not isinstance(name, str)]):
        raise CheckpointError(f"{path}: the keys of {label} must be texts, not {shown(wrong[0])}")
    return value


def _refuse_unknown(keys: set[Any], path: Path) -> None:
    if keys:
        raise CheckpointError(f"{path}: unknown key {', '.join(sorted(map(shown, keys)))}: correct or remove it")


def _weight_file(entry: Any, path: Path, checkpoint: str) -> WeightFile:
    if isinstance(entry, WeightFile):  # of a bag
        return entry
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path}: each of files must be a section with a name, not {shown(entry)}")
    known = {field.name for field in fields(WeightFile)} - {"checkpoint", "is_recorded"}
    _refuse_unknown(set(entry) - known, path)
    optional: dict[str, Any] = {
        key: None if entry.get(key) is None else _take(entry, key, kind, path)
        for key, kind in {"url": str, "bytes": int, "sha256": str, "stem": str}.items()
    }
    file = WeightFile(name=_take(entry, "name", str, path), checkpoint=checkpoint, **optional)
    if PurePosixPath(file.name).is_absolute() or ".." in PurePosixPath(file.name).parts:
        raise CheckpointError(f"{path}: the file name {shown(file.name)} leads out of the weights folder")
    if not all(map(_is_part, file.name.split("/"))) or file.name.endswith(OWN_SUFFIXES):
        raise CheckpointError(f"{path}: no file of weights can have the name {shown(file.name)}: rename it")
    if file.sha256 is not None and not re.fullmatch("[0-9a-f]{8,64}", file.sha256):
        raise CheckpointError(
            f"{path}: sha256 must be 64 digits of 0-9 and a-f, or the first 8 of them or more, not {shown(file.sha256)}"
        )
    if file.url is not None:
        _check_url(file.url, path)
    return file


def _is_part(name: str) -> bool:
    """Whether a file can have this name on every system, also with one of our own suffixes behind it."""
    has_odd = CONTROL.search(name) or set(name) & set('/\\:*?"<>|\t\n') or name[:1] == " " or name[-1:] in (" ", ".")
    return bool(name) and not has_odd and len(name.encode()) <= MOST_NAME_BYTES


def _check_url(url: str, path: Path) -> None:
    if not url.startswith(("https://", "http://")):
        raise CheckpointError(f"{path}: url must begin with https:// or http://, not {shown(url)}")
    try:
        parts = urlsplit(url)
        is_whole = bool(parts.hostname) and (parts.port or 1) > 0  # both raise ValueError
        is_whole &= url.isascii() and url.isprintable() and " " not in url and len(url) <= MOST_URL_CHARACTERS
    except ValueError:
        is_whole = False
    if not is_whole:
        raise CheckpointError(f"{path}: url must be the address of a file, not {shown(url)}: correct it")


# ---------------------------------------------------------------------------------------------------------------------
# Finding, checking and downloading files


def local_path(file: WeightFile) -> Path:
    """Where the file lies or, if it is not there yet, where a download puts it."""
    path = weights_folder() / file.name
    ships_with_project = file.url is None and not path.exists()
    return shipped("weights") / file.name if ships_with_project else path


def converted_path(file: WeightFile) -> Path | None:
    """The .safetensors file beside the place of another format's file, if it says that it was made from the right one.

    Raises CheckpointError if it is damaged.
    """
    file = _as_recorded(file)
    path = weights_folder() / file.name
    converted = path.with_suffix(".safetensors")
    if file.sha256 is None or converted == path or not converted.is_file():
        return None
    return converted if _safetensors_metadata(converted).get(SOURCE_SHA256, "").startswith(file.sha256) else None


def missing(name: str, stems: Sequence[str] | None = None) -> list[WeightFile]:
    """What of a checkpoint, or of its specialists for `stems`, is left to download."""
    files = files_for(read_config(name), stems)
    return [file for file in files if not (converted_path(file) or local_path(file).exists())]


def is_here(name: str, stems: Sequence[str] | None = None) -> bool:
    """Whether it has files, and none of them is left to download."""
    return bool(read_config(name).files) and not missing(name, stems)


def known_bytes(files: Sequence[WeightFile]) -> int | None:
    """The size of these files together; None if that of one is known neither from its publisher nor from a download."""
    sizes = [_as_recorded(file).bytes or size_bytes(local_path(file)) for file in files]
    return sum(sizes) if files and all(sizes) else None


def fetch(file: WeightFile, *, quiet: bool = False) -> Path:
    """The verified file's path: found in the weights folder, else downloaded with a progress bar on stderr.

    A download that broke off is resumed, also by the next process; a second process waits for the first one's file.
    Where its publisher states no sha256, or only how it begins, the first download's is recorded and said in a warning.

    What `models convert` made of the file, beside it, is taken in its place, without a checksum of its own.

    Raises CheckpointError for a file that is not the right one, DownloadError where it cannot be had, OutputError
    where it cannot be written.
    """
    if converted := converted_path(file):
        return converted
    file = _as_recorded(file)
    path = local_path(file)
    if path.exists():
        if not _is_stamped(path, file):
            verify(path, file)
            _stamp(path, file)
        return path
    if file.url is None:
        raise CheckpointError(f"{path} is missing and has no url: restore it, or put it into {weights_folder()}")
    with _locked(path):
        if not path.exists():  # it exists if another process held the lock until now
            _download(file, file.url, path, quiet=quiet)
    return path


def verify(path: Path, file: WeightFile) -> bool:
    """Raise CheckpointError unless the file at `path` has the size and then the sha256 that are known for it.

    Returns whether a sha256 is known.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {_command(file)}")
    file = _as_recorded(file)
    if fault := _fault(path, file):
        raise CheckpointError(f"{path} {fault}: delete it, then {_command(file)}")
    return file.sha256 is not None


def known_sha256(file: WeightFile) -> str | None:
    """The whole sha256 of a file that `fetch` verifies, if it is known."""
    sha256 = _as_recorded(file).sha256
    return sha256 if sha256 and len(sha256) == 64 else None


def file_state(path: Path) -> tuple[int, int]:
    """What tells whether a file was written since: its size and time of change in nanoseconds; 0, 0 without a file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


@functools.cache
def loaded_sha256(path: Path, state: tuple[int, int]) -> str:
    """The sha256 of a file that was loaded when it had this state. Raises CheckpointError if it has another by now."""
    try:
        found = _sha256(path)
        if file_state(path) == state:
            return found
    except OSError as e:
        raise CheckpointError(
            f"{path} cannot be read any more ({e.strerror}): restore it, or load the model anew"
        ) from e
    raise CheckpointError(f"{path} has changed since it was loaded: load the model anew, or do without the cache")


def _command(file: WeightFile) -> str:
    if file.url is None:
        return "restore it from the project's repository"
    return f"run `{program()} models download {file.checkpoint}`"


def _fault(path: Path, file: WeightFile) -> str | None:
    """What is wrong with the file, as the end of a sentence."""
    found_bytes, fault = size_bytes(path), None
    if file.bytes is not None and found_bytes != file.bytes:
        fault = f"has {found_bytes:,} bytes instead of {file.bytes:,}"
    elif file.sha256 is not None and not (found := _sha256(path)).startswith(file.sha256):
        fault = f"has the sha256 {found} instead of {file.sha256}"
    if fault and file.is_recorded:
        fault += f" as at its first download (remove its line in {_lock_path()} if its publisher has replaced it)"
    return fault


def _web_page(path: Path, file: WeightFile) -> str | None:
    """What is wrong where a server sends its pages in place of a file that nothing else is known of."""
    with path.open("rb") as stream:
        start = stream.read(100).lstrip().lower()
    is_page = file.sha256 is None and start.startswith((b"<!doctype html", b"<html"))
    return "is a web page, not a file of weights" if is_page else None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# What first downloads brought, of files whose publishers state no sha256: lines of sha256, bytes and name


def _lock_path() -> Path:
    return weights_folder() / "checksums.lock"


def _as_recorded(file: WeightFile) -> WeightFile:
    """The file with the sha256 and the size that its first download brought, unless its publisher states them."""
    stated = file.sha256 or ""
    if file.url is None or len(stated) == 64:
        return file
    sha256, n_bytes = _recorded().get(file.name, ("", 0))
    if not sha256 or not sha256.startswith(stated):
        return file
    return replace(file, sha256=sha256, bytes=file.bytes or n_bytes, is_recorded=True)


def _recorded() -> dict[str, tuple[str, int]]:
    """For each file's name its sha256 and size."""
    path = _lock_path()
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{path} cannot be read ({first_line(e)}): delete it") from e
    found = {}
    for number, line in enumerate(lines, start=1):
        if not (entry := re.fullmatch(r"([0-9a-f]{64}) (\d+) (\S.*)", line)):
            raise CheckpointError(f"{path} line {number} is not a sha256, a size in bytes and a name: remove it")
        found[entry[3]] = entry[1], int(entry[2])
    return found


def _record(file: WeightFile, part: Path) -> WeightFile:
    """Write the sha256 and the size of what was downloaded into the lock file; the file with them."""
    path, sha256, n_bytes = _lock_path(), _sha256(part), size_bytes(part)
    new = path.with_name(path.name + ".part")
    with _locked(path), _writing(path):
        entries = _recorded() | {file.name: (sha256, n_bytes)}
        with open(new, "w", encoding="utf-8", opener=not_through_links) as stream:
            stream.writelines(f"{entry[0]} {entry[1]} {name}\n" for name, entry in sorted(entries.items()))
        os.replace(new, path)
    logger.warning(
        f"{file.name}: its publisher states no {'full ' if file.sha256 else ''}sha256; {sha256} is noted in {path}, "
        "and later downloads must match it"
    )
    return replace(file, sha256=sha256, bytes=n_bytes, is_recorded=True)


# ---------------------------------------------------------------------------------------------------------------------
# Stamps, locks and downloads


def _stamp_path(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _stamp_text(path: Path, file: WeightFile) -> str:
    status = path.stat()
    return f"{file.sha256} {status.st_size} {status.st_mtime_ns}\n"


def _is_stamped(path: Path, file: WeightFile) -> bool:
    """Whether this very file was verified before: hashing 640 MB at each start would take a second or more."""
    try:
        return _stamp_path(path).read_text(encoding="ascii") == _stamp_text(path, file)
    except (OSError, UnicodeDecodeError):  # no stamp, or a damaged one: the file is hashed
        return False


def _stamp(path: Path, file: WeightFile) -> None:
    if file.sha256 is None:
        return
    stamp, text = _stamp_path(path), _stamp_text(path, file)
    # In a read-only folder the file is hashed each time.
    with contextlib.suppress(OSError), open(stamp, "w", encoding="ascii", opener=not_through_links) as stream:
        stream.write(text)


def _writing(path: Path) -> contextlib.AbstractContextManager[None]:
    return output_errors(path, elsewhere="set SEPARATION_WEIGHTS to another folder")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock for the writing of `path`; waits as long as another process holds it."""
    file = path.with_name(path.name + ".lock")
    with contextlib.ExitStack() as stack:
        with _writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.is_symlink():  # it would be written through
                file.unlink(missing_ok=True)
            stack.enter_context(lock(file))
        try:
            yield
        finally:
            with contextlib.suppress(PermissionError):  # Windows removes nothing that is open
                file.unlink(missing_ok=True)


def _download(file: WeightFile, url: str, path: Path, *, quiet: bool) -> None:
    part = path.with_name(path.name + ".part")
    with _writing(part):
        if part.is_symlink() or not file.sha256:  # written through, or joined with another version: nothing would tell
            part.unlink(missing_ok=True)
    fruitless, most_bytes = 0, size_bytes(part)
    while True:
        try:
            _transfer(file, url, part, quiet=quiet)
            break
        except _BrokenConnectionError as e:
            fruitless = 0 if size_bytes(part) > most_bytes else fruitless + 1
            most_bytes = max(most_bytes, size_bytes(part))
            if fruitless > len(RETRY_SECONDS):
                raise _not_downloaded(file, path, str(e)) from e
            time.sleep(RETRY_SECONDS[max(0, fruitless - 1)])
    if fault := _fault(part, file) or _web_page(part, file):
        part.unlink()
        raise CheckpointError(f"{url} gave a file that {fault}: it was removed, {_command(file)} to try again")
    if len(file.sha256 or "") < 64:
        file = _record(file, part)
    with _writing(path):
        os.replace(part, path)
    _stamp(path, file)


def _not_downloaded(file: WeightFile, path: Path, reason: str) -> DownloadError:
    return DownloadError(
        f"{path.name} is not in {path.parent} and could not be downloaded from {file.url} ({reason}): put it into that "
        f"folder, or {_command(file)} when the network is there"
    )


def _transfer(file: WeightFile, url: str, part: Path, *, quiet: bool) -> None:
    """Append to `part` what is still missing, in one request."""
    offset = size_bytes(part)
    request = Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    try:
        response = _opener().open(request, timeout=TIMEOUT_SECONDS)
    except HTTPError as e:
        e.close()
        if e.code == 416:  # the server has nothing behind what is here already; whether it is right, the checksum says
            return
        reason = f"the server answers {e.code} {CONTROL.sub(' ', ' '.join(str(e.reason).split()))}"
        if e.code < 500 and e.code != 429:
            raise _not_downloaded(file, part.with_suffix(""), reason) from e
        raise _BrokenConnectionError(reason) from e
    except (OSError, HTTPException) as e:
        cause = e.reason if isinstance(e, URLError) else e
        raise _BrokenConnectionError(f"no connection: {cause}") from e
    except ValueError as e:  # an address, or one that the server leads to, that is none
        raise _not_downloaded(file, part.with_suffix(""), f"not an address: {first_line(e)}") from e
    with response:
        if response.status != 206:  # the server knows no ranges and sends the file from its beginning
            offset = 0
        elif not response.headers.get("Content-Range", f"bytes {offset}-").startswith(f"bytes {offset}-"):
            part.unlink(missing_ok=True)
            raise _BrokenConnectionError("the server sends another part of the file than it was asked for")
        total = file.bytes if response.length is None else offset + response.length
        bar = tqdm(
            desc=part.stem, total=total, initial=offset, unit="B", unit_scale=True, unit_divisor=1024, disable=quiet
        )
        received, most = offset, file.bytes or MOST["bytes"]
        with _writing(part), open(part, "ab" if offset else "wb", opener=not_through_links) as stream, bar:
            while received <= most and (block := _receive(response)):
                stream.write(block)
                bar.update(len(block))
                received += len(block)
    if received > most:  # what is known of its size tells that it is wrong
        part.unlink()
        raise _not_downloaded(file, part.with_suffix(""), f"the server sends more than {most:,} bytes")
    if total is not None and received < total:
        raise _BrokenConnectionError(f"the connection broke after {received:,} of {total:,} bytes")


class _Redirects(HTTPRedirectHandler):
    """Follows a server to http or https, and never from https to what others can read or change on the way."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        if (urlsplit(req.full_url).scheme, urlsplit(newurl).scheme) not in REDIRECTS:
            raise HTTPError(req.full_url, code, f"and leads to {shown(newurl)}, which is refused", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def http_error_302(self, req: Request, fp: Any, code: int, msg: str, headers: Any) -> Any:
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except ValueError:  # it leads to no address
            fp.close()
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _opener() -> OpenerDirector:
    """What opens http and https alone; urllib's own would follow a server to ftp."""
    opener = OpenerDirector()
    for handler in (ProxyHandler, HTTPHandler, HTTPSHandler, HTTPDefaultErrorHandler, _Redirects, HTTPErrorProcessor):
        opener.add_handler(handler())
    opener.add_handler(UnknownHandler())
    return opener


def _receive(response: HTTPResponse) -> bytes:
    try:
        return response.read(BLOCK_BYTES)
    except (OSError, HTTPException) as e:
        raise _BrokenConnectionError(f"the connection broke: {e}") from e
