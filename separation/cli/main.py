"""The command line: `separation --help`. Every command is one call into the modules beside this one."""

import argparse
import contextlib
import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from tqdm import tqdm

from separation import __version__
from separation.audio.options import FLAC_DEPTHS, FORMATS, MP3_BITRATES, SAMPLE_RATES, WAV_DEPTHS, OutputOptions
from separation.batch import songs
from separation.batch.find import find
from separation.checkpoints import about, catalogue
from separation.checkpoints.chunk_choice import ChunkChoice
from separation.checkpoints.description import FIXED_CHUNKS, WITH_ATTENTION, WITH_INT8, YAML_SUFFIXES, Checkpoint
from separation.checkpoints.download import fetch
from separation.checkpoints.files import converted_path, known_bytes, local_path
from separation.checkpoints.files import verify as verify_file
from separation.engine.cache import Cache, chosen_cache
from separation.engine.options import EngineOptions
from separation.engine.recipes import choices, load_recipe, names, one_model
from separation.engine.selection import Selection
from separation.errors import InputError, SeparationError
from separation.progress import Progress
from separation.system import signals
from separation.system.memory import enough_memory
from separation.system.places import program
from separation.system.text import shown

# What imports PyTorch is imported by the commands that need it: it takes a second, which --help, a wrong option and
# `models list` do without. For the same reason these choices are written out; a test compares them with the engine's.
if TYPE_CHECKING:
    from separation.engine.separator import Separator

RECIPE, STEMS = "standard", "vocals_instrumental"  # where neither these nor a model is named
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
ATTENTIONS = ("auto", "fused", "triton", "sage", "sdpa", "itemwise", "einsum")
_ONE = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"  # the bar of a song
_WHOLE = "{n_fmt} of {total_fmt} songs|{bar}| {elapsed}<{remaining}"


class Parser(argparse.ArgumentParser):
    """argparse whose usage errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {shown(message)} (see {self.prog} --help)\n")


class _Log(logging.StreamHandler[TextIO]):
    """Prints to stderr what is logged, a line each, above the progress bars."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(record.getMessage())

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(self.stream):
            super().emit(record)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 success, 2 bad input or usage."""
    options = build_parser().parse_args(arguments)
    logging.basicConfig(handlers=[_Log()], level=logging.INFO if options.verbose else logging.WARNING)
    try:
        with enough_memory("the program"):
            code: int = options.command(options)
        return code
    except SeparationError as e:
        _say_error(e)
        return 2
    except OSError as e:  # where no module had more to say: a disk that is full, or no folder for temporary files
        _say_error(f"{e.strerror or e}{f': {e.filename!r}' if e.filename else ''}")
        return 2


def _say(line: object, file: TextIO | None = None) -> None:
    """Print a line for people, on stdout unless to a file; every word to a terminal goes through here or `_Log`."""
    print(shown(str(line)), file=file, flush=True)


def _say_table(table: object) -> None:
    for line in str(table).split("\n"):
        _say(line)


def _say_error(error: object) -> None:
    _say(f"error: {error}", file=sys.stderr)


def _say_json(text: str, file: TextIO | None = None) -> None:
    """Print JSON, which escapes all that `shown` does but DEL, exactly."""
    print(text.replace("\x7f", "\\u007f"), file=file, flush=True)


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    shared = Parser(add_help=False)
    shared.add_argument("-v", "--verbose", action="store_true", help="say which device and precision, and why")
    shared.add_argument("--device", type=_given, default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    shared.add_argument("--precision", default="auto", choices=["auto", *PRECISIONS], help="default: auto")

    engine = Parser(add_help=False)
    all_choices = sorted({choice for name in names() for choice in choices(name)})
    engine.add_argument("--stems", type=_given, help=f"{', '.join(all_choices)} (default: {STEMS})")
    engine.add_argument("--recipe", type=_given, help=f"{', '.join(names())} (default: {RECIPE})")
    engine.add_argument("--model-name", type=_given, metavar="NAME", help="all stems of this model instead of a recipe")
    engine.add_argument(
        "--model-dir", type=_path, metavar="DIR", help="where that lies: DIR/NAME, or NAME.yaml and .ckpt"
    )
    engine.add_argument(
        "--model-path", type=_path, metavar="FILE", help="weights of your own; their YAML is beside them"
    )
    engine.add_argument(
        "--chunk-size",
        type=_seconds,
        default="auto",
        metavar="S",
        help="seconds, 4 to 30 (default: auto, a model's own)",
    )
    engine.add_argument(
        "--overlap", type=_seconds, default="auto", metavar="S", help="seconds, 1 to 8 (default: auto, half a chunk)"
    )
    engine.add_argument("--batch-size", type=_batch_size, default="auto", metavar="N", help="chunks at once, or auto")
    engine.add_argument("--attention", default="auto", choices=ATTENTIONS, help="how attention is computed")

    overwriting = "replace also files that this program did not write"
    parser = Parser(prog=program(), description="Split songs into stems.")
    parser.add_argument("--version", action="version", version=f"separation {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    demo = commands.add_parser("demo", parents=[shared], help="separate the song that ships with the project")
    demo.add_argument("-o", "--output", type=_path, default=Path("stems"), metavar="DIR", help="default: stems")
    demo.add_argument("--overwrite", action="store_true", help=overwriting)
    demo.set_defaults(command=_demo)

    separate = commands.add_parser(
        "separate", parents=[shared, engine], help="separate songs: DIR/<song>/<stem>.<format>"
    )
    separate.add_argument(
        "songs", nargs="+", type=_given, metavar="SONG", help="files, folders, and globs such as 'music/**/*.flac'"
    )
    separate.add_argument("-o", "--output", type=_path, required=True, metavar="DIR")
    separate.add_argument(
        "--two-stems",
        type=_given,
        metavar="STEM",
        help="any stem, such as drums: give it and no_STEM, the song minus it; by the models of --stems if that has it",
    )
    separate.add_argument("--format", default="wav", choices=FORMATS, help="default: wav")
    separate.add_argument(
        "--sample-rate",
        type=_sample_rate,
        default=44100,
        choices=SAMPLE_RATES,
        help="or source, the song's (default: 44100)",
    )
    separate.add_argument("--wav-depth", choices=WAV_DEPTHS, help="bits of WAV; 16 is dithered (default: 32f, float)")
    separate.add_argument("--flac-depth", choices=FLAC_DEPTHS, help="bits of FLAC; 16 is dithered (default: 24)")
    separate.add_argument(
        "--mp3-bitrate",
        type=int,
        choices=MP3_BITRATES,
        metavar="KBPS",
        help=f"{', '.join(map(str, MP3_BITRATES))} (default: 320)",
    )
    separate.add_argument(
        "--report", action="store_true", help="write stems.html beside the stems: pictures, levels and a player"
    )
    separate.add_argument(
        "--force-refresh", action="store_true", help="also do again what is done, and compute what the cache holds"
    )
    separate.add_argument("--overwrite", action="store_true", help=f"{overwriting}, and another song's stems")
    separate.add_argument(
        "--accept-damaged",
        action="store_true",
        help="take what can be read of songs of which more than a tenth, or nobody knows how much, is missing",
    )
    separate.add_argument(
        "--workers",
        type=_count,
        default=1,
        metavar="N",
        help="songs at once on each GPU: decode and encode beside the model",
    )
    separate.add_argument("--ray", type=_given, metavar="ADDRESS", help="do it on this Ray cluster's machines, or auto")
    separate.add_argument("--json", action="store_true", help="print one JSON object a song")
    separate.set_defaults(command=_separate)

    serve = commands.add_parser("serve", parents=[shared], help="a page in the browser for songs, stems and listening")
    serve.add_argument(
        "--host", type=_given, default="127.0.0.1", help="0.0.0.0: the whole network (default: 127.0.0.1)"
    )
    serve.add_argument("--port", type=int, default=8765, help="0: any that is free (default: 8765)")
    serve.add_argument("--no-browser", action="store_true", help="only print the page's address")
    serve.set_defaults(command=_serve)

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

    evaluate = commands.add_parser(
        "evaluate", parents=[shared, engine], help="score stems against their references: SDR, SI-SDR, SIR, SAR in dB"
    )
    evaluate.add_argument(
        "--references",
        type=_path,
        required=True,
        metavar="DIR",
        help="the true stems: DIR/<song>/<stem>.wav, or MUSDB18-HQ",
    )
    evaluate.add_argument(
        "--estimates", type=_path, metavar="DIR", help="the stems to score; without it the mixtures are separated first"
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(command=_evaluate, two_stems=None, force_refresh=False)

    null = commands.add_parser("null", help="what is left of A minus B in dBFS, file by file")
    null.add_argument("first", type=_path, metavar="A", help="a file, or a folder of them")
    null.add_argument(
        "second", type=_path, metavar="B", help="likewise; or a file, the mixture that the stems in A sum to"
    )
    null.set_defaults(command=_null, verbose=False)

    export = commands.add_parser("export", help="write a model as an ONNX file, for programs without PyTorch")
    export.add_argument(
        "model", type=_given, metavar="MODEL", help="a name, or the path of a YAML or of weights with one beside them"
    )
    export.add_argument("output", type=_path, metavar="OUT.onnx")
    export.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    export.add_argument("--model-path", type=_path, metavar="FILE", help="weights to use in place of the model's own")
    export.add_argument("--random-weights", action="store_true", help="to try it: nothing is downloaded")
    export.set_defaults(command=_export, verbose=False)

    models = commands.add_parser(
        "models", help="list, show, download, verify or convert the checkpoints; compile what they run on a GPU"
    ).add_subparsers(required=True, metavar="list|show|download|verify|convert|compile", parser_class=Parser)
    quiet: dict[str, Any] = {"verbose": False}
    listing = models.add_parser("list", help="every checkpoint, what it gives and whether it is here")
    listing.add_argument("--json", action="store_true", help="print one JSON object a checkpoint")
    listing.set_defaults(command=_list, **quiet)
    showing = models.add_parser("show", help="what a checkpoint is: chunks, stems, parameters, licence, files")
    showing.add_argument(
        "model", type=_given, metavar="NAME", help="or the path of a YAML or of weights with one beside them"
    )
    showing.add_argument("--json", action="store_true", help="print one JSON object")
    showing.set_defaults(command=_show, **quiet)
    download = models.add_parser("download", help="download checkpoints' files")
    download.add_argument("names", nargs="+", type=_given, metavar="NAME")
    download.set_defaults(command=_download, **quiet)
    verify = models.add_parser("verify", help="compare checkpoints' files with their sha256")
    verify.add_argument("names", nargs="*", type=_given, metavar="NAME", help="default: all that are here")
    verify.set_defaults(command=_verify, **quiet)
    convert = models.add_parser("convert", help="write a checkpoint's weights as the format that loads fastest")
    convert.add_argument("checkpoint", type=_path, metavar="CHECKPOINT")
    convert.add_argument("output", type=_path, metavar="OUT.safetensors")
    convert.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    convert.set_defaults(command=_convert, **quiet)
    compiling = models.add_parser(
        "compile", help="compile models' kernels for CUDA GPUs, without one, into a folder for SEPARATION_KERNELS"
    )
    compiling.add_argument("names", nargs="+", type=_given, metavar="NAME")
    compiling.add_argument(
        "--gpu", type=_capabilities, default="80,86,89,90", metavar="80,90", help="compute capabilities times ten"
    )
    compiling.add_argument("-o", "--output", type=_path, required=True, metavar="DIR")
    compiling.set_defaults(command=_compile, **quiet)

    cache = commands.add_parser("cache", help="list or clear what models have estimated").add_subparsers(
        required=True, metavar="list|clear", parser_class=Parser
    )
    kept = cache.add_parser("list", help="each estimate that is kept: when, of which song, with which settings")
    kept.add_argument("--json", action="store_true", help="print one JSON object an estimate, with all settings")
    kept.set_defaults(command=_cache_list, **quiet)
    clear = cache.add_parser("clear", help="remove them all")
    clear.set_defaults(command=_cache_clear, **quiet)
    return parser


def _given(text: str) -> str:
    if not text:  # often a shell's variable that is not set; as a path it would be the current folder
        raise argparse.ArgumentTypeError("it is empty: give a value, or leave it out")
    return text


def _path(text: str) -> Path:
    return Path(_given(text))


def _batch_size(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be auto or a whole number from 1 up")
    return text if text == "auto" else int(text)


def _seconds(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be auto or a whole number of seconds")
    return text if text == "auto" else int(text)


def _sample_rate(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 up")
    return int(text)


def _capabilities(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d{1,2}(,[1-9]\d{1,2})*", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be compute capabilities times ten, such as 80,90")
    return [int(number) for number in text.split(",")]


def _demo(options: argparse.Namespace) -> int:
    from separation.cli.demo import run_demo

    with _bar("demo") as progress:
        report = run_demo(
            options.output,
            options=_engine_options(options),
            overwrite=options.overwrite,
            progress=progress,
        )
    _say_table(report)
    return 0


def _separate(options: argparse.Namespace) -> int:
    search = find(options.songs, options.output)
    found, outcomes = search.songs, search.failed
    n_songs = len(found) + len(outcomes)
    if note := search.note():
        logging.getLogger("separation").warning(note)
    job = songs.Job(
        settings=_settings(options) if found else {},
        output=_output_options(options),
        accept_damaged=options.accept_damaged,
        report=options.report,
        stems=_stems(options) if found else (),
    )
    if options.ray:
        _refuse(options, ["separate", ".", "-o", "."], "--ray", ["workers"])
        found = [songs.Song(song.path.absolute(), song.folder.absolute()) for song in found]
    left, done = songs.unfinished(found, job, force=options.force_refresh)
    outcomes += done
    tell = partial(_tell, as_json=options.json, file=sys.stdout)  # which Ray will take
    for outcome in outcomes:
        tell(outcome)
    try:
        with (
            tqdm(total=len(left), disable=None if n_songs > 1 else True, leave=False, bar_format=_WHOLE) as whole,
            contextlib.closing(_outcomes(options, left, job)) as running,
        ):
            for outcome in running:
                outcomes.append(outcome)
                with tqdm.external_write_mode():
                    tell(outcome)
                whole.update()
    finally:
        _summarise(outcomes, n_songs)
    return 2 if any(outcome.status == "failed" for outcome in outcomes) else 0


def _outcomes(options: argparse.Namespace, left: Sequence[songs.Song], job: songs.Job) -> Generator[songs.Outcome]:
    if not left:
        return  # without loading a model
    if options.ray:
        try:
            from separation.batch import cluster
        except ImportError as e:
            raise InputError(f"--ray needs the package ray: pip install ray ({e})") from e
        absolute = {
            name: value.absolute() if isinstance(value, Path) else value
            for name, value in vars(options).items()
            if name != "command"
        }
        yield from cluster.run(left, job, partial(_separator, argparse.Namespace(**absolute)), options.ray)
    else:
        from separation.device import parallel_devices

        devices = parallel_devices(options.device)[: len(left)]
        separators = [_separator(argparse.Namespace(**vars(options) | {"device": device})) for device in devices]
        bar = partial(_bar, leave=len(left) == 1)
        yield from songs.run(
            left, job, separators, workers=min(options.workers, -(-len(left) // len(devices))), bar=bar
        )


# Options that say where and how fast, or what else is wanted. All others decide what the stems hold: they are in the
# record beside them, and a song that was done with other values is done again.
INDIFFERENT = {
    "songs",
    "output",
    "verbose",
    "command",
    "json",
    "report",
    "force_refresh",
    "overwrite",
    "accept_damaged",
}
INDIFFERENT |= {"device", "batch_size", "workers", "ray"}


# Of which each format has one at most.
ENCODINGS = ("wav_depth", "flac_depth", "mp3_bitrate")


def _encoding(options: argparse.Namespace) -> dict[str, Any]:
    """The format's own option. Raises InputError if that of another is given."""
    encoding = OutputOptions(options.format).encoding
    for name in ENCODINGS:
        if getattr(options, name) is not None and name not in encoding:
            option, owner = f"--{name.replace('_', '-')}", name.split("_")[0]
            raise InputError(f"{option} means nothing for --format {options.format}: leave it out, or choose {owner}")
    return {name: getattr(options, name) or default for name, default in encoding.items()}


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """All that decides what the stems' files hold: options, what the recipe says, and the weights."""
    settings: dict[str, Any] = {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in INDIFFERENT | {"recipe", "stems", "chunk_size", "overlap", *ENCODINGS}
    } | _encoding(options)
    if name := _model_name(options):
        models: dict[str, Any] = {name: None if options.two_stems is None else [options.two_stems]}
    else:
        recipe = load_recipe(*_recipe(options), two_stems=options.two_stems)
        models = dict(recipe.models)
        settings["recipe"], settings["stems"] = _recipe(options)
        settings["sources"] = {stem: repr(source) for stem, source in recipe.outputs.items()}
    descriptions = {name: catalogue.read_config(name) for name in models}
    _refuse_unused(options, descriptions.values())
    choice = ChunkChoice(options.chunk_size, options.overlap)
    settings["chunks"] = {name: list(model.chunks(choice)) for name, model in descriptions.items()}
    files = [file for name, stems in models.items() for file in catalogue.files_for(descriptions[name], stems)]
    own = [local_path(file) for file in files if file.url is None and file.sha256 is None]
    settings["weights"] = {file.name: file.sha256 for file in files}
    for path in [options.model_path] if options.model_path else own:
        if path.exists():
            settings["weights"][path.name] = [path.stat().st_size, path.stat().st_mtime_ns]
    return settings


def _stems(options: argparse.Namespace) -> tuple[str, ...]:
    """What comes out, as recipe and YAML say: to see what is in its way before a model is loaded."""
    if name := _model_name(options):
        recipe = one_model(name, catalogue.read_config(name).stems)
        return (recipe if options.two_stems is None else recipe.two_stems(options.two_stems)).stems
    return load_recipe(*_recipe(options), two_stems=options.two_stems).stems


def _separator(options: argparse.Namespace) -> "Separator":
    from separation.checkpoints.load import load_model
    from separation.engine.separator import ModelPool, Separator

    model_name = _model_name(options)
    engine = _engine_options(options)
    shared: dict[str, Any] = {
        "two_stems": options.two_stems,
        "options": replace(engine, device="auto", precision="auto", attention="auto"),  # these are the pool's
        "cache": chosen_cache(default=True, refresh=options.force_refresh),
    }
    pool = ModelPool(engine)
    logging.getLogger("separation").info(pool.choice.reason)
    if model_name:
        model = load_model(
            model_name,
            checkpoint=options.model_path,
            stems=None if options.two_stems is None else [options.two_stems],
            device=pool.choice.device,
            precision=pool.choice.precision,
            attention=options.attention,
        )
        return Separator.from_model(model, **shared)
    return Separator(*_recipe(options), pool=pool, **shared)


def _engine_options(options: argparse.Namespace) -> EngineOptions:
    """The options that the command has; the others have their defaults."""
    given = vars(options)
    return EngineOptions(
        device=options.device,
        precision=options.precision,
        attention=given.get("attention", "auto"),
        batch_size=given.get("batch_size", "auto"),
        chunk_seconds=given.get("chunk_size", "auto"),
        overlap_seconds=given.get("overlap", "auto"),
    )


def _output_options(options: argparse.Namespace) -> OutputOptions:
    return OutputOptions(
        options.format, sample_rate=options.sample_rate, overwrite=options.overwrite, **_encoding(options)
    )


def _recipe(options: argparse.Namespace) -> tuple[str, str]:
    """The recipe and the choice of stems."""
    return options.recipe or RECIPE, options.stems or STEMS


def _model_name(options: argparse.Namespace) -> str | None:
    """The name or the path of the model that is to take the recipe's place, if any."""
    for name in ("model_path", "model_name"):
        for other in ("stems", "recipe"):
            if getattr(options, name) is not None and getattr(options, other) is not None:
                raise InputError(
                    f"--{name.replace('_', '-')} gives all stems of one model, and does not take --{other}: leave one "
                    "of them out"
                )
    if options.model_dir is not None:
        if options.model_path is not None or not options.model_name:
            raise InputError("--model-dir needs --model-name, a name in that folder, and excludes --model-path")
        return os.path.join(options.model_dir, options.model_name)
    if options.model_path is not None and options.model_path.suffix in YAML_SUFFIXES:
        raise InputError(f"--model-path {options.model_path} is a YAML file: give that to --model-name, weights here")
    return options.model_name or (options.model_path and str(options.model_path))


def _models(options: argparse.Namespace) -> list[Checkpoint]:
    """Those that `evaluate` and `bench` run."""
    name = _model_name(options)
    return [catalogue.read_config(model) for model in ([name] if name else load_recipe(*_recipe(options)).models)]


def _refuse_unused(options: argparse.Namespace, models: Collection[Checkpoint]) -> None:
    """Raise if an option was given that means nothing for any of the models."""
    if options.precision == "int8" and options.attention not in ("auto", "fused"):
        raise InputError(
            f"--precision int8 needs --attention fused or auto, not {options.attention}: leave one of them out"
        )
    kinds, names = {model.architecture for model in models}, ", ".join(model.name for model in models)
    if None in kinds:
        return  # nobody knows before the weights are read
    for option, is_given, takers in (
        ("--attention", options.attention != "auto", WITH_ATTENTION),
        ("--precision int8", options.precision == "int8", WITH_INT8),
    ):
        if is_given and not kinds & takers:
            raise InputError(f"{option} means nothing for {names}: leave it out")
    if options.chunk_size != "auto" and options.overlap == "auto" and kinds <= FIXED_CHUNKS:
        raise InputError(f"--chunk-size alone means nothing for {names}, whose chunks have one length: leave it out")


def _tell(outcome: songs.Outcome, *, as_json: bool, file: TextIO) -> None:
    facts = dict(outcome.facts)
    if facts:
        facts["times_realtime"] = facts["duration_seconds"] / facts["elapsed_seconds"]
    if as_json:
        line: dict[str, Any] = {"song": str(outcome.path), "status": outcome.status}
        if outcome.error:
            line["error"] = outcome.error
        if outcome.stems:
            line["stems"] = {stem: str(path) for stem, path in outcome.stems.items()}
        if outcome.page:
            line["page"] = str(outcome.page)
        line["warnings"] = outcome.warnings
        rounded = {name: value if name == "gain" else round(value, 3) for name, value in facts.items()}
        _say_json(json.dumps(line | rounded), file=file)
    elif outcome.status == "skipped":
        _say(f"{outcome.path.name}: done already (--force-refresh does it again)", file=file)
    elif facts:
        seconds = f"{facts['duration_seconds']:.1f} s in {facts['elapsed_seconds']:.1f} s"
        _say(f"{outcome.path.name}: {seconds}, {facts['times_realtime']:.2f} times real-time", file=file)
        for path in (*outcome.stems.values(), *([outcome.page] if outcome.page else [])):
            _say(f"  {path}", file=file)


def _summarise(outcomes: Sequence[songs.Outcome], n_songs: int) -> None:
    """What failed and why, and how many did not, on stderr."""
    for outcome in outcomes:
        if outcome.status == "failed":
            where = f"{outcome.path}: " if n_songs > 1 else ""
            _say_error(f"{where}{outcome.error}")
    if n_songs > 1:
        counts = Counter(outcome.status for outcome in outcomes)
        counts["left"] = n_songs - len(outcomes)
        parts = [f"{counts[status]} {status}" for status in ("done", "skipped", "failed", "left") if counts[status]]
        _say(f"{n_songs} songs: {', '.join(parts)}", file=sys.stderr)


def _each(names: Sequence[str], job: Callable[[str], None]) -> int:
    """Does the job for each model; one that fails does not stop the others. Returns the exit code."""
    failed = 0
    for name in names:
        try:
            job(name)
        except SeparationError as e:
            _say_error(e)
            failed += 1
    return 2 if failed else 0


def _serve(options: argparse.Namespace) -> int:
    from separation.web.serve import serve

    desktop = sys.platform == "darwin" or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ

    def ready(url: str) -> None:
        _say(f"{url} is the page; Ctrl-C ends it and removes its files")
        if desktop and not options.no_browser:  # without a desktop, a browser would be one for this terminal
            import webbrowser

            webbrowser.open(url)

    with contextlib.suppress(KeyboardInterrupt):
        serve(options.host, options.port, options=_engine_options(options), ready=ready)
    return 0


def _list(options: argparse.Namespace) -> int:
    names, failed = catalogue.available(), []
    width = max(map(len, names))
    if not options.json:
        _say(f"{'NAME':{width}}  HERE  {'SIZE':>7}  {'ARCHITECTURE':17}  STEMS")
    for name in names:
        try:
            model, here = catalogue.read_config(name), catalogue.is_here(name)
            n_bytes = known_bytes(model.files)
        except SeparationError as e:
            failed.append(name)
            if options.json:
                _say_json(json.dumps({"name": name, "error": str(e)}))
            else:
                _say(f"{name:{width}}  error: {e}")
            continue
        if options.json:
            facts = {"name": name, "architecture": model.architecture, "stems": model.stems, "bytes": n_bytes}
            _say_json(json.dumps(facts | {"here": here, "licence": model.licence, "quality": model.quality}))
            continue
        size = f"{n_bytes / 1e6:.0f} MB" if n_bytes else "?"
        stems = ", ".join(model.stems)
        _say(f"{name:{width}}  {'here' if here else '-':4}  {size:>7}  {model.architecture or '?':17}  {stems}")
        _say(f"    quality: {model.quality}; licence: {model.licence}")
    if failed:
        _say_error(f"{len(failed)} of {len(names)} models cannot be used: {', '.join(failed)}")
    return 2 if failed else 0


def _show(options: argparse.Namespace) -> int:
    facts = about.model_facts(options.model)
    _say_json(json.dumps(facts)) if options.json else _say_table(about.as_text(facts))
    return 0


def _download(options: argparse.Namespace) -> int:
    def download(name: str) -> None:
        for file in catalogue.read_config(name).files:
            _say(fetch(file))

    return _each(options.names, download)


def _verify(options: argparse.Namespace) -> int:
    def verify(name: str) -> None:
        for file in catalogue.read_config(name).files:
            path, converted = local_path(file), converted_path(file)
            if converted:
                _say(f"{converted}: made from the right {path.name}")
            if path.exists() or (options.names and not converted):
                known = verify_file(path, file)
                _say(f"{path}: {'right' if known else 'here, but no sha256 is known to compare it with'}")

    return _each(options.names or catalogue.available(), verify)


def _convert(options: argparse.Namespace) -> int:
    from separation.checkpoints.convert import convert

    convert(options.checkpoint, options.output, overwrite=options.overwrite)
    _say(options.output)
    return 0


def _compile(options: argparse.Namespace) -> int:
    import torch

    from separation.checkpoints.build import model_for_gpu

    try:
        from separation.models.kernels.compile_ahead import compile_kernels
    except ImportError as e:
        raise InputError(f"Triton cannot be imported ({e}): install PyTorch for CUDA") from e
    models = [model_for_gpu(name, torch.float16) for name in options.names]
    _say(f"{options.output}: {compile_kernels(models, options.gpu, options.output)} kernels compiled")
    return 0


def _cache_list(options: argparse.Namespace) -> int:
    cache = _cache()
    entries = cache.entries()
    if options.json:
        for entry in entries:
            _say_json(entry.as_json())
        return 0
    for entry in entries:
        _say(entry)
    total = sum(entry.bytes for entry in entries)
    limit = f"{total / 2**30:.2f} of {cache.limit_bytes / 2**30:.4g} GiB"
    _say(f"{len(entries)} estimates in {cache.folder}: {limit}")
    return 0


def _cache_clear(options: argparse.Namespace) -> int:
    _cache().clear()
    return 0


def _cache() -> Cache:
    cache = chosen_cache(default=True)
    if cache is None:
        raise InputError("the cache is off: set SEPARATION_CACHE to `on` or to its folder")
    return cache


def _export(options: argparse.Namespace) -> int:
    from separation.checkpoints.export import export

    weights: dict[str, Any] = {"checkpoint": options.model_path, "random": options.random_weights}
    _say(export(options.model, options.output, **weights, overwrite=options.overwrite))
    return 0


def _bench(options: argparse.Namespace) -> int:
    from separation.evaluation.bench import cold_start, engine_speed

    recipe, stems = _recipe(options)
    selection = Selection(recipe, stems, model_name=_model_name(options), model_path=options.model_path)
    result: Any
    if options.cold_start:
        unused = ("attention", "batch_size", "chunk_size", "overlap", "random_weights", "seconds", "runs")
        _refuse(options, ["bench"], "--cold-start", unused)
        result = cold_start(selection, device=options.device, precision=options.precision)
    else:
        _refuse_unused(options, _models(options))
        result = engine_speed(
            selection,
            _engine_options(options),
            random=options.random_weights,
            seconds=options.seconds,
            runs=options.runs,
        )
    _say_json(result.as_json()) if options.json else _say_table(result)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from separation.evaluation.evaluate import evaluate, find_songs

    if options.estimates:
        unused = ["recipe", "stems", "model_name", "model_dir", "model_path", "chunk_size", "overlap", "batch_size"]
        unused += ["attention", "device", "precision"]
        _refuse(options, ["evaluate", "--references", "."], "--estimates", unused)
    else:
        _refuse_unused(options, _models(options))
    references = find_songs(options.references)  # before a checkpoint is downloaded in vain
    estimates = find_songs(options.estimates) if options.estimates else _separator(options)
    with _bar("evaluate") as progress:
        report = evaluate(references, estimates, progress=progress)
    _say_json(report.as_json()) if options.json else _say_table(report)
    for song, error in report.failed.items():
        _say_error(f"{song} is left out: {error}")
    return 2 if report.failed else 0


def _null(options: argparse.Namespace) -> int:
    from separation.evaluation.evaluate import null

    for residual in null(options.first, options.second):
        _say(residual)
    return 0


def _refuse(options: argparse.Namespace, command: list[str], flag: str, names: Sequence[str]) -> None:
    """Raise if an option was given that means nothing beside the flag."""
    default = build_parser().parse_args(command)
    for name in names:
        if getattr(options, name) != getattr(default, name):
            raise InputError(f"{flag} does not take --{name.replace('_', '-')}: leave one of them out")


@contextlib.contextmanager
def _bar(name: str, *, leave: bool = True) -> Iterator[Progress]:
    """A progress bar on stderr; nothing where stderr is not a terminal."""
    with tqdm(total=100, desc=shown(name), disable=None, leave=leave, bar_format=_ONE) as bar:

        def show(share: float, stage: str) -> None:
            signals.check()
            bar.set_description_str(shown(f"{name}: {stage}"), refresh=False)
            bar.update(share * 100 - bar.n)

        yield Progress(show)
