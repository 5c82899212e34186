"""The command line: `python -m separation --help`. Every command is one call into the modules beside this one."""

import argparse
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm import tqdm

from separation import catalogue
from separation.errors import InputError, SeparationError
from separation.recipes import choices, names

# What imports PyTorch is imported by the commands that need it: it takes a second, which --help, a wrong option and
# `models list` do without. For the same reason these choices are written out; a test compares them with the engine's.
if TYPE_CHECKING:
    from separation.separator import Separator, StemFiles

FORMATS = ("wav", "mp3", "flac")
SAMPLE_RATES = (44100, 48000)
PRECISIONS = ("fp32", "bf16", "fp16")
ATTENTIONS = ("auto", "fused", "sage", "sdpa", "itemwise", "einsum")


class Parser(argparse.ArgumentParser):
    """argparse whose usage errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 success, 2 bad input or usage, 1 anything else."""
    options = build_parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a song's name may hold what the terminal cannot show
    logging.basicConfig(format="%(message)s", level=logging.INFO if options.verbose else logging.WARNING)
    try:
        return options.command(options)
    except SeparationError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    shared = Parser(add_help=False)
    shared.add_argument("-v", "--verbose", action="store_true", help="say which device and precision, and why")
    shared.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    shared.add_argument("--precision", default="auto", choices=["auto", *PRECISIONS], help="default: auto")

    engine = Parser(add_help=False)
    all_choices = sorted({choice for name in names() for choice in choices(name)})
    engine.add_argument("--stems", default="vocals_instrumental", help=f"{', '.join(all_choices)}")
    engine.add_argument("--recipe", default="standard", help=f"{', '.join(names())} (default: standard)")
    engine.add_argument("--model-name", metavar="NAME", help="all stems of this one model instead of a recipe")
    engine.add_argument("--model-path", type=Path, metavar="FILE", help="its weights, instead of those in weights/")
    engine.add_argument("--chunk-size", type=int, default=8, metavar="S", help="seconds, 4 to 30 (default: 8)")
    engine.add_argument("--overlap", type=int, default=4, metavar="S", help="seconds, 1 to 8 (default: 4)")
    engine.add_argument("--batch-size", type=_batch_size, default="auto", metavar="N", help="chunks at once, or auto")
    engine.add_argument("--attention", default="auto", choices=ATTENTIONS, help="how attention is computed")

    parser = Parser(prog="python -m separation", description="Split songs into stems.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    demo = commands.add_parser("demo", parents=[shared], help="separate the song that ships with the project")
    demo.add_argument("-o", "--output", type=Path, default=Path("stems"), metavar="DIR", help="default: stems")
    demo.set_defaults(command=_demo)

    separate = commands.add_parser(
        "separate", parents=[shared, engine], help="separate songs: DIR/<song>/<stem>.<format>"
    )
    separate.add_argument("songs", nargs="+", type=Path, metavar="SONG")
    separate.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    separate.add_argument(
        "--two-stems",
        metavar="STEM",
        help="vocals, drums, bass or other: give this stem and no_STEM, the song without it; --stems is then ignored",
    )
    separate.add_argument("--format", default="wav", choices=FORMATS, help="default: wav (32-bit float)")
    separate.add_argument("--sample-rate", type=int, default=44100, choices=SAMPLE_RATES, help="default: 44100")
    separate.add_argument(
        "--mp3-bitrate", type=int, default=320, metavar="KBPS", help="128, 160, 192, 224, 256 or 320 (default: 320)"
    )
    separate.add_argument(
        "--report", action="store_true", help="write stems.html beside the stems: pictures, levels and a player"
    )
    separate.add_argument("--json", action="store_true", help="print one JSON object a song")
    separate.set_defaults(command=_separate)

    bench = commands.add_parser("bench", parents=[shared, engine], help="measure how fast a model or a recipe is here")
    bench.add_argument(
        "--cold-start",
        action="store_true",
        help="instead, where the time goes from a fresh process's start to the first stem",
    )
    bench.add_argument(
        "--random-weights", action="store_true", help="as fast as the true ones, and nothing to download"
    )
    bench.add_argument("--seconds", type=int, default=30, metavar="S", help="of music in a run (default: 30)")
    bench.add_argument("--runs", type=int, default=3, metavar="N", help="after a warm-up (default: 3)")
    bench.add_argument("--json", action="store_true", help="print one JSON object")
    bench.set_defaults(command=_bench)

    models = commands.add_parser("models", help="list, download, verify or convert the checkpoints").add_subparsers(
        required=True, metavar="list|download|verify|convert", parser_class=Parser
    )
    quiet: dict[str, Any] = {"verbose": False}
    models.add_parser("list", help="every checkpoint and whether it is here").set_defaults(command=_list, **quiet)
    for name, command in (("download", _download), ("verify", _verify)):
        sub = models.add_parser(name, help=f"{name} a checkpoint's files")
        sub.add_argument("name", metavar="NAME")
        sub.set_defaults(command=command, **quiet)
    convert = models.add_parser("convert", help="write a checkpoint's weights as the format that loads fastest")
    convert.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    convert.add_argument("output", type=Path, metavar="OUT.safetensors")
    convert.set_defaults(command=_convert, **quiet)
    return parser


def _batch_size(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be auto or a whole number from 1 up")
    return text if text == "auto" else int(text)


def _demo(options: argparse.Namespace) -> int:
    from separation.demo import run_demo

    with _bar("demo") as progress:
        report = run_demo(options.output, device=options.device, precision=options.precision, progress=progress)
    print(report)
    return 0


def _separate(options: argparse.Namespace) -> int:
    folders = [options.output / (song.name if song.stem == ".." else song.stem) for song in options.songs]
    for song, folder in zip(options.songs, folders, strict=True):
        if folders.count(folder) > 1:
            raise InputError(
                f"more than one song would be written to {str(folder)!r}: separate {song.name!r} on its own"
            )
    if not any(song.exists() for song in options.songs):  # before a checkpoint is downloaded in vain
        raise InputError(f"{options.songs[0].name!r} does not exist: check the path")
    separator = _separator(options)
    failed = 0
    for song, folder in zip(options.songs, folders, strict=True):
        try:
            with _bar(song.name) as progress:
                files = separator.separate_file(
                    song,
                    folder,
                    format=options.format,
                    sample_rate=options.sample_rate,
                    mp3_bitrate=options.mp3_bitrate,
                    progress=progress,
                )
            _report(song, files, as_json=options.json)
            if options.report:
                _page(song, files, folder / "stems.html", as_json=options.json)
        except SeparationError as e:
            print(f"error: {e}", file=sys.stderr)
            failed += 1
    return 2 if failed else 0


def _separator(options: argparse.Namespace) -> "Separator":
    from separation.checkpoints import load_model
    from separation.separator import ModelPool, Separator

    _check_model_options(options)
    shared: dict[str, Any] = {
        "two_stems": options.two_stems,
        "batch_size": options.batch_size,
        "chunk_seconds": options.chunk_size,
        "overlap_seconds": options.overlap,
    }
    pool = ModelPool(options.device, options.precision, options.attention)
    logging.getLogger("separation").info(pool.choice.reason)
    if options.model_name:
        model = load_model(
            options.model_name,
            checkpoint=options.model_path,
            stems=None if options.two_stems is None else [options.two_stems],
            device=pool.choice.device,
            precision=pool.choice.precision,
            attention=options.attention,
        )
        return Separator.from_model(model, **shared)
    return Separator(options.recipe, options.stems, pool=pool, **shared)


def _check_model_options(options: argparse.Namespace) -> None:
    if options.model_path and not options.model_name:
        raise InputError("--model-path needs --model-name, the name of its configuration in configs/models")


def _report(song: Path, files: "StemFiles", *, as_json: bool) -> None:
    if as_json:
        line = {
            "song": str(song),
            "stems": {stem: str(path) for stem, path in files.items()},
            "duration_seconds": round(files.duration_seconds, 3),
            "elapsed_seconds": round(files.elapsed_seconds, 3),
            "times_realtime": round(files.times_realtime, 3),
            "gain": files.gain,
        }
        print(json.dumps(line), flush=True)
        return
    seconds = f"{files.duration_seconds:.1f} s in {files.elapsed_seconds:.1f} s"
    print(f"{song.name}: {seconds}, {files.times_realtime:.2f} times real-time")
    for path in files.values():
        print(f"  {path}")


def _page(song: Path, files: "StemFiles", target: Path, *, as_json: bool) -> None:
    from separation.report import write_report

    with _bar(f"{song.name}: report") as progress:
        write_report(song.name, song, files, target, progress=progress)
    if not as_json:
        print(f"  {target}")


def _list(options: argparse.Namespace) -> int:
    for name in catalogue.available():
        stems = ", ".join(catalogue.read_config(name).stems)
        print(f"{name:28} {'here' if catalogue.is_here(name) else '-':5} {stems}")
    return 0


def _download(options: argparse.Namespace) -> int:
    for file in catalogue.read_config(options.name).files:
        print(catalogue.fetch(file))
    return 0


def _verify(options: argparse.Namespace) -> int:
    for file in catalogue.read_config(options.name).files:
        path, converted = catalogue.local_path(file), catalogue.converted_path(file)
        if converted:
            print(f"{converted}: made from the right {path.name}")
        if path.exists() or not converted:
            catalogue.verify(path, file)
            print(f"{path}: right")
    return 0


def _convert(options: argparse.Namespace) -> int:
    from separation.checkpoints import convert

    convert(options.checkpoint, options.output)
    print(options.output)
    return 0


def _bench(options: argparse.Namespace) -> int:
    from separation.bench import cold_start, engine_speed

    _check_model_options(options)
    shared: dict[str, Any] = {
        "model_name": options.model_name,
        "model_path": options.model_path,
        "device": options.device,
        "precision": options.precision,
    }
    engine: dict[str, Any] = {
        "attention": options.attention,
        "batch_size": options.batch_size,
        "chunk_seconds": options.chunk_size,
        "overlap_seconds": options.overlap,
        "random": options.random_weights,
        "seconds": options.seconds,
        "runs": options.runs,
    }
    result: Any
    if options.cold_start:
        default = build_parser().parse_args(["bench"])
        for name in ("attention", "batch_size", "chunk_size", "overlap", "random_weights", "seconds", "runs"):
            if getattr(options, name) != getattr(default, name):
                raise InputError(f"--cold-start does not take --{name.replace('_', '-')}: leave one of them out")
        result = cold_start(options.recipe, options.stems, **shared)
    else:
        result = engine_speed(options.recipe, options.stems, **shared, **engine)
    print(result.as_json() if options.json else result)
    return 0


@contextmanager
def _bar(name: str) -> Iterator[Callable[[float, str], None]]:
    """A progress bar on stderr; nothing where stderr is not a terminal."""
    with tqdm(total=100, disable=None, bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}") as bar:

        def progress(share: float, stage: str) -> None:
            bar.set_description_str(f"{name}: {stage}", refresh=False)
            bar.update(share * 100 - bar.n)

        yield progress


def _terminate(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)  # an exception, so that temporary files are removed on the way out


if __name__ == "__main__":
    # PyTorch's threads then wait asleep. Spinning, as they would, they take the cores from the fused layers' threads
    # and from other processes: two songs at once took longer than one after the other. Read as PyTorch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGHUP, _terminate)
    sys.exit(main())
