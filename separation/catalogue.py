"""What there is to load: configs/models/NAME.yaml, and the files of weights it names, found, checked and downloaded.

The YAML holds the community's sections as they are published (`audio`, `model`, `training`, …) and beside them
`architecture`, `stems`, `files` (name, url, bytes, sha256, stem), `licence` and `quality`. This module alone downloads.
It does without PyTorch, whose import takes a second: `python -m separation models list` is there at once.
"""

import contextlib
import fcntl  # Linux and macOS, the systems that PyTorch's CUDA and MPS builds and Cog run on
import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import yaml
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from separation.errors import CheckpointError, DownloadError, OutputError, RecipeError

PROJECT = Path(__file__).parents[1]
CONFIGS = PROJECT / "configs" / "models"

KEYS = {"architecture", "stems", "files", "licence", "quality", "audio", "model"}
TRAINING_SECTIONS = {"training", "inference", "augmentations", "loss_multistft"}  # of community files

SOURCE_SHA256 = "source_sha256"  # in the metadata of a converted file: the checksum of what it was made from

TIMEOUT_SECONDS = 30.0  # without a byte
RETRY_SECONDS = (0.5, 1.0, 2.0)  # waits between attempts that bring nothing; one that brings a byte starts over
BLOCK_BYTES = 1 << 18


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A file of weights: where it lies below the weights folder, where it comes from, and how it is recognised."""

    name: str  # may hold a subfolder: demo/demo.safetensors
    url: str | None  # None: it ships with the project, or is the user's own
    bytes: int | None
    sha256: str | None
    stem: str | None  # in a checkpoint that is made of specialists: the one stem that this file is for
    checkpoint: str = "NAME"  # the checkpoint it belongs to, for the command in error messages


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a YAML file says about a checkpoint."""

    name: str
    architecture: str  # a key of models.ARCHITECTURES
    stems: tuple[str, ...]  # in the order of the model's estimates
    sample_rate: int  # hertz
    chunk_samples: int
    files: tuple[WeightFile, ...]
    audio: dict[str, Any]  # the `audio:` section, of which some architectures read more than the two above
    hyper_parameters: dict[str, Any]  # the `model:` section
    licence: str
    quality: str  # as published, with its source


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses every `!!python/...` tag, plus a constructor for tuples alone."""


def _construct_tuple(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _construct_tuple)


class _BrokenConnectionError(Exception):
    """The server or the way to it failed in a manner that may pass."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading the YAML


def weights_folder() -> Path:
    """Where weights are kept: the environment variable SEPARATION_WEIGHTS, else weights/ in the project."""
    return Path(os.environ.get("SEPARATION_WEIGHTS") or PROJECT / "weights")


def available() -> list[str]:
    """The names of the checkpoints in configs/models."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def read_config(name_or_path: str | Path) -> Checkpoint:
    """Read a checkpoint's YAML: a name in configs/models, or the path of a .yaml file.

    A file as the community publishes it lacks our keys: `stems` are then those it was trained on, `architecture`
    follows from the hyper-parameters, and `files` is empty.

    Raises RecipeError for an unknown name and CheckpointError for a file that does not make sense.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        if str(name_or_path) not in available():
            raise RecipeError(
                f"unknown model {str(name_or_path)!r}: use one of {', '.join(available())}, or the path of a .yaml file"
            )
        path = CONFIGS / f"{name_or_path}.yaml"
    document = _read_yaml(path)
    _refuse_unknown(set(document) - KEYS - TRAINING_SECTIONS, path)
    audio = _take(document, "audio", dict, path)
    hyper_parameters = _take(document, "model", dict, path)
    if "architecture" not in document and "freqs_per_bands" in hyper_parameters:
        document["architecture"] = "bs_roformer"
    if "stems" not in document and isinstance(training := document.get("training"), dict):
        target = training.get("target_instrument")
        document["stems"] = [target] if target else training.get("instruments")
    architecture = _take(document, "architecture", str, path)
    stems = tuple(str(stem) for stem in _take(document, "stems", list, path))
    files = tuple(_weight_file(entry, path) for entry in _take(document, "files", list, path, default=[]))
    specialised = sorted(file.stem for file in files if file.stem is not None)
    if len(set(stems)) != len(stems) or not stems:
        raise CheckpointError(f"{path}: stems must name each stem once, not {list(stems)}")
    if (specialised or len(files) > 1) and specialised != sorted(stems):
        raise CheckpointError(f"{path}: the files must name one stem each of {list(stems)}, not {specialised}")
    return Checkpoint(
        name=path.stem,
        architecture=architecture,
        stems=stems,
        sample_rate=_take(audio, "sample_rate", int, path),
        chunk_samples=_take(audio, "chunk_size", int, path),
        files=files,
        audio=audio,
        hyper_parameters=hyper_parameters,
        licence=_take(document, "licence", str, path, default="not stated"),
        quality=_take(document, "quality", str, path, default="not stated"),
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


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError as e:
        raise RecipeError(f"there is no file {path}: give the path of a model's .yaml file") from e
    except yaml.MarkedYAMLError as e:  # for a refused tag, the problem names it
        line = f" line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise CheckpointError(f"{path}{line} is not safe and valid YAML: {e.problem}") from e
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{path} cannot be read as YAML: {first_line(e)}") from e
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise CheckpointError(f"{path} does not describe a model: it must hold keys such as architecture and model")
    return document


def _take(section: Mapping[str, Any], key: str, kind: type, path: Path, *, default: Any = None) -> Any:
    value = section.get(key, default)
    if not isinstance(value, kind) or (isinstance(value, int) and value <= 0):
        words = {dict: "a section", list: "a list", str: "a text", int: "a whole number above 0"}
        found = f"not {value!r}" if key in section else "and is missing"
        raise CheckpointError(f"{path}: {key} must be {words[kind]}, {found}")
    return value


def _refuse_unknown(keys: set[Any], path: Path) -> None:
    if keys:
        raise CheckpointError(f"{path}: unknown key {', '.join(sorted(map(repr, keys)))}: correct or remove it")


def _weight_file(entry: Any, path: Path) -> WeightFile:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path}: each of files must be a section with a name, not {entry!r}")
    _refuse_unknown(set(entry) - {field.name for field in fields(WeightFile)} - {"checkpoint"}, path)
    optional = {
        key: None if entry.get(key) is None else _take(entry, key, kind, path)
        for key, kind in {"url": str, "bytes": int, "sha256": str, "stem": str}.items()
    }
    file = WeightFile(name=_take(entry, "name", str, path), checkpoint=path.stem, **optional)
    if Path(file.name).is_absolute() or ".." in Path(file.name).parts:
        raise CheckpointError(f"{path}: the file name {file.name!r} leads out of the weights folder")
    if file.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", file.sha256):
        raise CheckpointError(f"{path}: sha256 must be 64 digits of 0-9 and a-f, not {file.sha256!r}")
    if file.url is not None and not file.url.startswith(("https://", "http://")):
        raise CheckpointError(f"{path}: url must begin with https:// or http://, not {file.url!r}")
    return file


# ---------------------------------------------------------------------------------------------------------------------
# Finding, checking and downloading files


def local_path(file: WeightFile) -> Path:
    """Where the file lies or, if it is not there yet, where a download puts it."""
    path = weights_folder() / file.name
    ships_with_project = file.url is None and not path.exists()
    return PROJECT / "weights" / file.name if ships_with_project else path


def converted_path(file: WeightFile) -> Path | None:
    """The .safetensors file beside the place of another format's file, if it says that it was made from the right one.

    Raises CheckpointError if it is damaged.
    """
    path = weights_folder() / file.name
    converted = path.with_suffix(".safetensors")
    if file.sha256 is None or converted == path or not converted.is_file():
        return None
    try:
        with safe_open(converted, framework="np") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{converted} ({size_bytes(converted):,} bytes) is damaged or incomplete ({first_line(e)}): "
            f"delete it, then {_command(file)}"
        ) from e
    return converted if metadata.get(SOURCE_SHA256) == file.sha256 else None


def is_here(name: str, stems: Sequence[str] | None = None) -> bool:
    """Whether nothing of a checkpoint, or of its specialists for `stems`, is left to download."""
    files = files_for(read_config(name), stems)
    return all(converted_path(file) or local_path(file).exists() for file in files)


def fetch(file: WeightFile, *, quiet: bool = False) -> Path:
    """The verified file's path: found in the weights folder, else downloaded with a progress bar on stderr.

    A download that broke off is resumed, also by the next process; a second process waits for the first one's file.

    What `models convert` made of the file, beside it, is taken in its place, without a checksum of its own.

    Raises CheckpointError for a file that is not the right one, DownloadError where it cannot be had, OutputError
    where it cannot be written.
    """
    if converted := converted_path(file):
        return converted
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


def verify(path: Path, file: WeightFile) -> None:
    """Raise CheckpointError unless the file at `path` has the size and then the sha256 that are known for it."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {_command(file)}")
    if fault := _fault(path, file):
        raise CheckpointError(f"{path} {fault}: delete it, then {_command(file)}")


def _command(file: WeightFile) -> str:
    if file.url is None:
        return "restore it from the project's repository"
    return f"run `python -m separation models download {file.checkpoint}`"


def _fault(path: Path, file: WeightFile) -> str | None:
    """What is wrong with the file, as the end of a sentence."""
    found_bytes = size_bytes(path)
    if file.bytes is not None and found_bytes != file.bytes:
        return f"has {found_bytes:,} bytes instead of {file.bytes:,}"
    if file.sha256 is not None:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != file.sha256:
            return f"has the sha256 {found} instead of {file.sha256}"
    return None


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
    with contextlib.suppress(OSError):  # in a read-only folder the file is hashed each time
        _stamp_path(path).write_text(_stamp_text(path, file), encoding="ascii")


def size_bytes(path: Path) -> int:
    """The size of a file, 0 if it is not there."""
    return path.stat().st_size if path.exists() else 0


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise OutputError(
            f"{path} cannot be written ({e.strerror or e}): free space, or set SEPARATION_WEIGHTS to another folder"
        ) from e


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock for the download of `path`; waits as long as another process holds it."""
    lock = path.with_name(path.name + ".lock")
    with contextlib.ExitStack() as stack:
        with _writing(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context(lock.open("w"))
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
        lock.unlink(missing_ok=True)  # safe: who still waits for it finds the finished file


def _download(file: WeightFile, url: str, path: Path, *, quiet: bool) -> None:
    part = path.with_name(path.name + ".part")
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
    if fault := _fault(part, file):
        part.unlink()
        raise CheckpointError(f"{url} gave a file that {fault}: it was removed, {_command(file)} to try again")
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
        response = urlopen(request, timeout=TIMEOUT_SECONDS)
    except HTTPError as e:
        e.close()
        if e.code == 416:  # the server has nothing behind what is here already; whether it is right, the checksum says
            return
        reason = f"the server answers {e.code} {e.reason}"
        if e.code < 500 and e.code != 429:
            raise _not_downloaded(file, part.with_suffix(""), reason) from e
        raise _BrokenConnectionError(reason) from e
    except (OSError, HTTPException) as e:
        cause = e.reason if isinstance(e, URLError) else e
        raise _BrokenConnectionError(f"no connection: {cause}") from e
    with response:
        if response.status != 206:  # the server knows no ranges and sends the file from its beginning
            offset = 0
        total = file.bytes if response.length is None else offset + response.length
        bar = tqdm(
            desc=part.stem, total=total, initial=offset, unit="B", unit_scale=True, unit_divisor=1024, disable=quiet
        )
        received = offset
        with _writing(part), part.open("ab" if offset else "wb") as stream, bar:
            while block := _receive(response):
                stream.write(block)
                bar.update(len(block))
                received += len(block)
    if total is not None and received < total:
        raise _BrokenConnectionError(f"the connection broke after {received:,} of {total:,} bytes")


def _receive(response: HTTPResponse) -> bytes:
    try:
        return response.read(BLOCK_BYTES)
    except (OSError, HTTPException) as e:
        raise _BrokenConnectionError(f"the connection broke: {e}") from e


def first_line(error: Exception) -> str:
    """The first line of an error's message; its type's name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
