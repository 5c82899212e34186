"""The subcommands of `models`."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from separation.checkpoints import about, catalogue, files
from separation.checkpoints.download import fetch
from separation.checkpoints.listing import Entry, Filter, listed, without_one
from separation.cli import models_table
from separation.cli.printing import print_error, print_json, print_line, print_lines
from separation.engine import recipes
from separation.errors import InputError, RecipeError, SeparationError

T = TypeVar("T")


def list_models(args: argparse.Namespace) -> int:
    """Print the models that pass the filter and, without one, the errors of those that cannot be used."""
    wanted = Filter(task=args.task, stem=args.stem, licence=args.licence, here=args.here, sort=args.sort)
    entries, errors = listed(wanted)
    failed = errors if wanted.is_empty else {}
    if args.json:
        objects = [_facts(entry) for entry in entries] + [{"name": name, "error": failed[name]} for name in failed]
        if wanted.sort == "name":
            objects.sort(key=lambda each: each["name"])
        for each in objects:
            print_json(json.dumps(each))
    else:
        for line in models_table.table(entries, wanted):
            print_line(line)
        for name, error in failed.items():
            print_line(f"{name}  error: {error}")
    if not entries and not failed:
        print_line(f"no model passes all of these filters{_how_many_would(wanted)}", file=sys.stderr)
    if failed:
        print_error(f"{len(failed)} of {len(entries) + len(failed)} models cannot be used: check {', '.join(failed)}")
    return 2 if failed else 0


def _how_many_would(wanted: Filter) -> str:
    counts = without_one(wanted)
    return ": " * bool(counts) + ", ".join(f"{count} would without --{name}" for name, count in counts.items())


def _facts(entry: Entry) -> dict[str, Any]:
    model = entry.model
    return {
        "name": model.name,
        **model.facts.as_json(),
        "architecture": model.architecture,
        "stems": model.stems,
        "residual": model.residual,
        "bytes": files.known_bytes(model.files),
        "here": entry.is_here,
    }


def show(args: argparse.Namespace) -> int:
    """Print the facts about a checkpoint."""
    facts = _of_model(args.model, about.model_facts)
    print_json(json.dumps(facts)) if args.json else print_lines(about.as_text(facts))
    return 0


def download(args: argparse.Namespace) -> int:
    """Download checkpoints and print the paths of their files."""

    def download_one(name: str) -> None:
        for file in catalogue.read_config(name).files:
            print_line(fetch(file))

    return _for_each(args.names, lambda name: _of_model(name, download_one))


def verify(args: argparse.Namespace) -> int:
    """Compare the files of checkpoints with their checksums."""

    def verify_one(name: str) -> None:
        for file in catalogue.read_config(name).files:
            path, converted = files.local_path(file), files.converted_path(file)
            if converted:
                print_line(f"{converted}: right (converted from {path.name})")
            if path.exists() or (args.names and not converted):
                is_known = files.verify(path, file)
                print_line(f"{path}: {'right' if is_known else 'here, but its sha256 is not known'}")

    return _for_each(args.names or catalogue.available(), lambda name: _of_model(name, verify_one))


def _of_model(name: str, job: Callable[[str], T]) -> T:
    """Do the job for a model. A recipe is an error that names its models."""
    try:
        return job(name)
    except RecipeError as e:
        if name not in recipes.names():
            raise
        models = dict.fromkeys(
            model for choice in recipes.choices(name) for model in recipes.load_recipe(name, choice).models
        )
        raise RecipeError(f"{name} is a recipe, not a model: name its models, {' '.join(models)}") from e


def _for_each(names: Sequence[str], job: Callable[[str], None]) -> int:
    """Do the job for each model; a failure does not stop the others. Returns the exit code."""
    failed = False
    for name in names:
        try:
            job(name)
        except SeparationError as e:
            print_error(e)
            failed = True
    return 2 if failed else 0


def convert(args: argparse.Namespace) -> int:
    """Write a checkpoint's weights as safetensors."""
    from separation.checkpoints.convert import convert as write_safetensors

    write_safetensors(args.checkpoint, args.output, overwrite=args.overwrite)
    print_line(args.output)
    return 0


def compile_kernels(args: argparse.Namespace) -> int:
    """Compile the kernels of models for GPUs."""
    import torch

    from separation.checkpoints.build import model_for_gpu

    try:
        from separation.models.kernels import compile_ahead
    except ImportError as e:
        raise InputError(f"Triton cannot be imported ({e}): install PyTorch for CUDA") from e
    models = [model_for_gpu(name, torch.float16) for name in args.names]
    print_line(f"{args.output}: {compile_ahead.compile_kernels(models, args.gpu, args.output)} kernels compiled")
    return 0
