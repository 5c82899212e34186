"""The commands that are a single call. `separate` and `models` have modules of their own."""

import argparse
import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

from separation.cli.options import engine_options, refuse_beside, selection
from separation.cli.printing import print_error, print_json, print_line, print_lines, song_bar
from separation.engine.cache import Cache, chosen_cache
from separation.engine.options import EngineOptions
from separation.engine.selection import Selection
from separation.errors import InputError

if TYPE_CHECKING:
    from separation.engine.separator import Separator

# PyTorch takes a second to import. Modules that need it are imported inside the commands, so that `--help`, a wrong
# option and `models list` stay fast.


def demo(args: argparse.Namespace) -> int:
    """Separate the demo song and print its scores."""
    from separation.cli.demo import run_demo

    with song_bar("demo") as progress:
        report = run_demo(args.output, options=engine_options(args), overwrite=args.overwrite, progress=progress)
    print_lines(report)
    return 0


def serve(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    from separation.web.serve import serve as run_server

    has_desktop = sys.platform == "darwin" or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ

    def ready(url: str) -> None:
        print_line(f"{url} is the page; Ctrl-C ends it and keeps its songs for the next start")
        if has_desktop and not args.no_browser:  # without a desktop, a browser would take over the terminal
            import webbrowser

            webbrowser.open(url)

    with contextlib.suppress(KeyboardInterrupt):
        run_server(args.host, args.port, options=engine_options(args), ready=ready)
    return 0


def bench(args: argparse.Namespace) -> int:
    """Measure speed and print the result."""
    from separation.evaluation.bench import engine_speed
    from separation.evaluation.cold_start import cold_start

    selected = selection(args)
    result: Any
    if args.compare_precision is not None:
        unused = ["--cold-start", "--precision", "--attention", "--random-weights", "--runs"]
        refuse_beside("--compare-precision", unused, args)
        return _compare_precision(args, selected)
    if args.cold_start:
        unused = ["--attention", "--batch-size", "--chunk-size", "--overlap", "--random-weights", "--seconds", "--runs"]
        refuse_beside("--cold-start", unused, args)
        result = cold_start(selected, device=args.device, precision=args.precision)
    else:
        options = engine_options(args)
        selected.check(options)
        result = engine_speed(selected, options, random=args.random_weights, seconds=args.seconds, runs=args.runs)
    print_json(result.as_json()) if args.json else print_lines(result)
    return 0


def _compare_precision(args: argparse.Namespace, selected: Selection) -> int:
    from separation.evaluation.precision import compare_precisions

    options = engine_options(args)
    selected.check(options)
    with song_bar(args.compare_precision.name) as progress:
        result = compare_precisions(args.compare_precision, selected, options, seconds=args.seconds, progress=progress)
    print_json(result.as_json()) if args.json else print_lines(f"{result}\n{result.recommendation}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Score stems and print the scores, and on stderr which songs could not be scored."""
    from separation.evaluation.evaluate import evaluate as score
    from separation.evaluation.evaluate import find_songs

    if args.estimates:
        unused = ["--recipe", "--stems", "--model-name", "--model-dir", "--model-path", "--chunk-size", "--overlap"]
        refuse_beside("--estimates", [*unused, "--batch-size", "--attention", "--device", "--precision"], args)
    selected, options = selection(args), engine_options(args)
    if not args.estimates:
        selected.check(options)
    references = find_songs(args.references)  # before a checkpoint is downloaded
    estimates = find_songs(args.estimates) if args.estimates else _load(selected, options)
    with song_bar("evaluate") as progress:
        report = score(references, estimates, names=args.scores, progress=progress)
    print_json(report.as_json()) if args.json else print_lines(report)
    for song, error in report.failed.items():
        print_error(f"{song} is left out: {error}")
    return 2 if report.failed else 0


def _load(selected: Selection, options: EngineOptions) -> "Separator":
    from separation.batch.run import load_separator

    return load_separator(selected, options)


def null(args: argparse.Namespace) -> int:
    """Subtract one recording from another and print the level of the rest."""
    from separation.evaluation.evaluate import null as subtract

    for residual in subtract(args.first, args.second):
        print_line(residual)
    return 0


def export(args: argparse.Namespace) -> int:
    """Write a model as ONNX."""
    from separation.checkpoints.export import export as write_onnx

    weights: dict[str, Any] = {"checkpoint": args.model_path, "random": args.random_weights}
    print_line(write_onnx(args.model, args.output, **weights, overwrite=args.overwrite))
    return 0


def cache_list(args: argparse.Namespace) -> int:
    """Print the cached estimates."""
    cache = _cache()
    entries = cache.entries()
    if args.json:
        for entry in entries:
            print_json(entry.as_json())
        return 0
    for entry in entries:
        print_line(entry)
    total = sum(entry.bytes for entry in entries)
    size = f"{total / 2**30:.2f} of {cache.limit_bytes / 2**30:.4g} GiB"
    print_line(f"{len(entries)} estimate{'' if len(entries) == 1 else 's'} in {cache.folder}: {size}")
    return 0


def cache_clear(args: argparse.Namespace) -> int:
    """Remove the cached estimates."""
    _cache().clear()
    return 0


def _cache() -> Cache:
    cache = chosen_cache(default=True)
    if cache is None:
        raise InputError("the cache is off: set SEPARATION_CACHE to `on` or to a folder")
    return cache
