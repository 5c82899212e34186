"""The checkpoints by name: those in configs/models, those in the user's own folder, and files given by their path.

Nothing here imports PyTorch, which takes a second, unless weights must be opened to describe themselves.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from separation.checkpoints import bags, foreign, uvr
from separation.checkpoints.description import (
    YAML_SUFFIXES,
    Checkpoint,
    Shares,
    WeightFile,
    describe,
    load_document,
)
from separation.checkpoints.embedded import embedded_description
from separation.checkpoints.files import converted_path, local_path
from separation.checkpoints.keys import refuse_unknown
from separation.documents import DocumentError, first_line, quoted, read_yaml
from separation.errors import CheckpointError, RecipeError
from separation.system.places import program, shipped
from separation.system.text import close_matches

CONFIGS = shipped("configs") / "models"
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".th", ".chpt", ".bin", ".onnx")  # by preference
UVR_CONFIGS = Path("model_data", "mdx_c_configs")  # where Ultimate Vocal Remover keeps YAML files, below its weights


def models_folder() -> Path | None:
    """The user's own folder of models: the environment variable SEPARATION_MODELS."""
    folder = os.environ.get("SEPARATION_MODELS")
    return Path(folder) if folder else None


def available() -> list[str]:
    """The names of the checkpoints in configs/models and the user's own folder, where a subfolder is a checkpoint."""
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    if (own := models_folder()) is not None:
        weights = _files(own, WEIGHT_SUFFIXES)
        alone = set(_files(own, YAML_SUFFIXES)) - {_yaml_named_after(path) for path in weights}
        names |= {path.stem for path in [*weights, *alone]}
        names |= {path.parent.name for suffix in YAML_SUFFIXES for path in own.glob(f"*/*{suffix}")}
    return sorted(names)


def read_config(name_or_path: str | Path) -> Checkpoint:
    """Find a checkpoint and read its description.

    Args:
        name_or_path: a name in configs/models or in the user's own folder; or the path of a YAML file, of a weights
            file with its YAML beside it, of a folder with one of each, or of such a pair without its suffix.

    Unknown keys are an error in configs/models, where they are typing errors, and listed as `ignored` elsewhere.

    Raises RecipeError for an unknown name, CheckpointError for missing or invalid files.
    """
    try:
        found = _find(name_or_path)
    except (OSError, ValueError) as e:  # a name that no file can have, a folder without permission
        raise RecipeError(f"cannot look for the model {quoted(name_or_path)} ({first_line(e)}): name another") from e
    path, document = _document(found)
    if kind := foreign.by_yaml(document):
        raise foreign.refusal(path, kind)
    shares: Shares = ()
    if bags.is_bag(document):
        document, shares = bags.as_document(document, path)
    checkpoint = describe(document, path, name=found.name, shares=shares)
    if path.parent == CONFIGS:
        refuse_unknown(set(checkpoint.ignored), path)
    if found.weights is None or (checkpoint.files and not found.by_weights):
        return checkpoint
    if len(checkpoint.files) > 1:
        raise CheckpointError(
            f"{path} needs {len(checkpoint.files)} files and {found.weights} is only one: give the model's name"
        )
    own = str(found.weights.absolute())  # an absolute name is not looked up in the weights folder
    file = WeightFile(name=own, url=None, bytes=None, sha256=None, stem=None, checkpoint=found.name)
    return replace(checkpoint, files=(file,))


def files_for(checkpoint: Checkpoint, stems: Sequence[str] | None) -> tuple[WeightFile, ...]:
    """The files that a checkpoint needs; of specialists only those for `stems`, in that order.

    Raises RecipeError for a stem that the checkpoint does not give.
    """
    wanted = checkpoint.stems if stems is None else tuple(dict.fromkeys(stems))
    unknown = [stem for stem in wanted if stem not in checkpoint.stems]
    if unknown or not wanted:
        given = ", ".join(checkpoint.stems)
        wrong = f"does not give {', '.join(map(repr, unknown))}" if unknown else "needs at least one stem"
        raise RecipeError(f"{checkpoint.name} {wrong}: choose from {given}")
    specialists = {file.stem: file for file in checkpoint.files if file.stem is not None}
    return tuple(specialists[stem] for stem in wanted) if specialists else checkpoint.files


def missing(name: str, stems: Sequence[str] | None = None) -> list[WeightFile]:
    """The files of a checkpoint, or of its specialists for `stems`, that are not here yet."""
    return _not_here(files_for(read_config(name), stems))


def is_here(name: str, stems: Sequence[str] | None = None) -> bool:
    """Whether the checkpoint has files and all of them, or of its specialists for `stems`, are here."""
    return has_all_files(read_config(name), stems)


def has_all_files(checkpoint: Checkpoint, stems: Sequence[str] | None = None) -> bool:
    """As `is_here`, for a checkpoint whose description has been read."""
    return bool(checkpoint.files) and not _not_here(files_for(checkpoint, stems))


def _not_here(files: Sequence[WeightFile]) -> list[WeightFile]:
    return [file for file in files if not (converted_path(file) or local_path(file).exists())]


# ---------------------------------------------------------------------------------------------------------------------
# Finding files


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A model's files."""

    name: str
    config: Path | None  # None: the weights must describe themselves
    weights: Path | None  # beside the YAML
    by_weights: bool = False  # whether the user named the weights, not the YAML


def _find(name_or_path: str | Path) -> _Found:
    path, name, own = Path(name_or_path), str(name_or_path), models_folder()
    is_name = path.name == name
    if is_name and (CONFIGS / f"{name}.yaml").is_file():
        return _Found(name=name, config=CONFIGS / f"{name}.yaml", weights=None)
    if path.suffix in YAML_SUFFIXES:
        return _Found(name=path.stem, config=path, weights=_weights_beside(path))
    if path.suffix in WEIGHT_SUFFIXES or path.is_file() or path.suffix in foreign.FOREIGN_SUFFIXES:
        if not path.is_file():
            raise CheckpointError(
                f"there is no file {path}: give a checkpoint's path (.ckpt, .pth, .th, .onnx, .safetensors)"
            )
        foreign.refuse_suffix(path)
        return _Found(name=path.stem, config=_yaml_beside(path), weights=path, by_weights=True)
    if not is_name:
        return _find_without_suffix(path)
    if own is not None and ((own / name).is_dir() or _with_suffix(own / name, YAML_SUFFIXES + WEIGHT_SUFFIXES)):
        return _find_without_suffix(own / name)
    close = "".join(f"{each}, or " for each in close_matches(name, available()))
    raise RecipeError(
        f"unknown model {name!r}: use {close}a name that `{program()} models list` prints, or the path of a .yaml file "
        "or of weights"
    )


def _find_without_suffix(path: Path) -> _Found:
    if path.is_dir():
        configs, weights = _files(path, YAML_SUFFIXES), _files(path, WEIGHT_SUFFIXES)
        if len(configs) == 1 and _is_bag(configs[0]):
            return _Found(name=path.name, config=configs[0], weights=None)
        if len(configs) > 1 or len({file.stem for file in weights}) > 1 or not configs + weights:
            names = ", ".join(file.name for file in configs + weights) or "neither"
            raise CheckpointError(f"the folder {path} must have one weights file and one YAML, not {names}")
        weights.sort(key=lambda file: WEIGHT_SUFFIXES.index(file.suffix))
        return _Found(name=path.name, config=next(iter(configs), None), weights=next(iter(weights), None))
    file = _with_suffix(path, (*YAML_SUFFIXES, *WEIGHT_SUFFIXES, *foreign.FOREIGN_SUFFIXES))
    if file is None:
        raise RecipeError(
            f"there is no model {path.name!r} in {path.parent}: put a folder {path.name}, {path.name}.yaml or "
            f"{path.name}.ckpt there"
        )
    return _find(file)


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files in a folder that have one of these suffixes."""
    return sorted(path for suffix in suffixes for path in folder.glob(f"*{suffix}") if path.is_file())


def _with_suffix(path: Path, suffixes: tuple[str, ...]) -> Path | None:
    """The first file that exists when one of the suffixes is appended to `path`, whose name may have dots."""
    return next((file for suffix in suffixes if (file := path.with_name(path.name + suffix)).is_file()), None)


def _weights_beside(config: Path) -> Path | None:
    """The weights that this YAML file is named after."""
    if found := _with_suffix(config.with_suffix(""), WEIGHT_SUFFIXES):
        return found
    named = [path for path in _files(config.parent, WEIGHT_SUFFIXES) if _yaml_named_after(path) == config]
    return min(named, key=lambda path: WEIGHT_SUFFIXES.index(path.suffix), default=None)


def _yaml_named_after(weights: Path) -> Path | None:
    """The YAML file with the name of these weights, or that name and `config`; also in UVR's folder for such files."""
    for folder in (weights.parent, weights.parent / UVR_CONFIGS):
        for name in (weights.stem, f"config_{weights.stem}", f"{weights.stem}_config", weights.name):
            if found := _with_suffix(folder / name, YAML_SUFFIXES):
                return found
    return None


def _yaml_by_hash(weights: Path) -> Path | None:
    """The YAML file that the table of Ultimate Vocal Remover names for these weights.

    None if the table does not have the weights. Raises CheckpointError if it has them and the YAML is not here.
    """
    if weights.suffix != ".ckpt" or (named := uvr.yaml_of(weights)) is None:
        return None
    name, own = named
    places = [weights.parent / name, weights.parent / UVR_CONFIGS / name, *([CONFIGS / f"{own}.yaml"] if own else [])]
    if found := next((path for path in places if path.is_file()), None):
        return found
    raise CheckpointError(
        f"{weights} needs the YAML file {name}, as in Ultimate Vocal Remover: put it into {weights.parent}"
    )


def _yaml_beside(weights: Path) -> Path | None:
    """The YAML file that is named after the weights, else the only one that is not named after other weights.

    None if the weights describe themselves, as Demucs' do. Raises CheckpointError if there is no such file or more than
    one, and for weights of an unsupported architecture.
    """
    if config := _yaml_named_after(weights) or _yaml_by_hash(weights):
        return config
    if uvr.completed(weights) is not None:
        return None
    if weights.suffix in (".safetensors", ".th") and embedded_description(weights) is not None:
        return None
    taken = {_yaml_named_after(file) for file in _files(weights.parent, WEIGHT_SUFFIXES)}
    free = [path for path in _files(weights.parent, YAML_SUFFIXES) if path not in taken and not _is_bag(path)]
    if len(free) == 1:
        return free[0]
    if embedded_description(weights) is None:
        raise _no_yaml(weights, free)
    return None


def _is_bag(path: Path) -> bool:
    """Whether a YAML file is a bag. A file that cannot be read is not; its error is raised where it is used."""
    try:
        document = read_yaml(path)
    except (DocumentError, FileNotFoundError):
        return False
    return isinstance(document, dict) and bags.is_bag(document)


def _document(found: _Found) -> tuple[Path, dict[str, Any]]:
    """The file that has the description, and its content."""
    if found.config is not None:
        document = load_document(found.config)
        own = found.weights is not None and uvr.completed(found.weights, document)
        return found.config, own or document
    assert found.weights is not None
    if (described := uvr.completed(found.weights) or embedded_description(found.weights)) is None:
        raise _no_yaml(found.weights)
    return found.weights, described


def _no_yaml(weights: Path, candidates: Sequence[Path] = ()) -> CheckpointError:
    """The error for weights without a YAML. Weights of an unsupported architecture would not work with one either."""
    from separation.checkpoints.state_dict import open_weights  # imports PyTorch

    names = open_weights(weights).tensors
    if kind := foreign.by_names(names):
        return foreign.refusal(weights, kind)
    if any(name.startswith("stg1_low_band_net.") for name in names):
        return CheckpointError(uvr.vr_advice(weights))
    found = f"any of {', '.join(path.name for path in candidates)} may be it" if candidates else "there is no YAML"
    return CheckpointError(
        f"{weights} needs the YAML file that it was published with, and {found}: put it into {weights.parent} as "
        f"{weights.stem}.yaml"
    )
