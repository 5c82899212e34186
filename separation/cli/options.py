"""Turns the arguments of a command into options of the engine."""

import argparse
from collections.abc import Sequence

from separation.audio.excerpt import Excerpt
from separation.audio.options import OutputOptions
from separation.checkpoints.description import YAML_SUFFIXES
from separation.engine.options import EngineOptions
from separation.engine.selection import Selection
from separation.errors import InputError

_ENGINE = {  # arguments by the fields of EngineOptions
    "device": "device",
    "precision": "precision",
    "attention": "attention",
    "batch_size": "batch_size",
    "chunk_seconds": "chunk_size",
    "overlap_seconds": "overlap",
}


def engine_options(args: argparse.Namespace) -> EngineOptions:
    """The engine's options. Options that the command lacks keep their defaults."""
    return EngineOptions(**{field: getattr(args, name) for field, name in _ENGINE.items() if hasattr(args, name)})


def output_options(args: argparse.Namespace) -> OutputOptions:
    """The options for the stems' files."""
    return OutputOptions(
        args.format,
        sample_rate=args.sample_rate,
        bitrate=args.bitrate,
        wav_depth=args.wav_depth,
        flac_depth=args.flac_depth,
        channels=args.channels,
        name=args.name,
        reaper=args.reaper,
        video=args.video,
        overwrite=args.overwrite,
        excerpt=_excerpt(args),
    )


def _excerpt(args: argparse.Namespace) -> Excerpt | None:
    """The part of each song to separate. Raises InputError if it is empty."""
    if args.start is None and args.end is None and not args.preview:
        return None
    return Excerpt(args.start or 0.0, args.end, is_preview=args.preview)


def selection(args: argparse.Namespace) -> Selection:
    """The models to run. Raises InputError for arguments that cannot be combined."""
    for model in ("--model-name", "--model-path"):
        for other in ("--stems", "--recipe"):
            if is_given(args, model) and is_given(args, other):
                raise InputError(
                    f"{model} gives all stems of one model and cannot be combined with {other}: leave one of them out"
                )
    if getattr(args, "only", None) and getattr(args, "two_stems", None):
        raise InputError("--only and --two-stems cannot be combined: leave one of them out")
    if args.model_dir is not None and (args.model_name is None or args.model_path is not None):
        raise InputError(
            "--model-dir needs --model-name and cannot be combined with --model-path: name a model in that folder"
        )
    if args.model_path is not None and args.model_path.suffix in YAML_SUFFIXES:
        raise InputError(
            f"--model-path {args.model_path} is a YAML file: give it as --model-name, and weights as --model-path"
        )
    return Selection(
        recipe=args.recipe or Selection.recipe,
        stems=args.stems,
        two_stems=getattr(args, "two_stems", None),
        only=getattr(args, "only", None),
        model_name=args.model_name,
        model_dir=args.model_dir,
        model_path=args.model_path,
    )


def refuse_beside(flag: str, options: Sequence[str], args: argparse.Namespace) -> None:
    """Raise InputError if one of the options is given, because it has no effect beside the flag."""
    for option in options:
        if is_given(args, option):
            raise InputError(f"{flag} does not take {option}: leave one of them out")


def is_given(args: argparse.Namespace, option: str) -> bool:
    """Whether an option, such as `--batch-size`, differs from its default."""
    name = option.removeprefix("--").replace("-", "_")
    return bool(getattr(args, name) != args.parser.get_default(name))
