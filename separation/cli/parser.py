"""The commands and their options."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from separation import __version__
from separation.audio.options import BITRATES, CHANNELS, FLAC_DEPTHS, FORMATS, LOSSLESS, SAMPLE_RATES, WAV_DEPTHS
from separation.checkpoints.facts import LICENCES, TASKS
from separation.checkpoints.listing import SORTS
from separation.cli import commands, models
from separation.cli.printing import print_lines
from separation.cli.separate import separate
from separation.cli.tune import tune
from separation.cli.values import (
    batch_size,
    bitrate,
    capabilities,
    count,
    given,
    gpus,
    output_folder,
    path,
    retries,
    sample_rate,
    scores,
    seconds,
    time,
)
from separation.engine.options import ATTENTIONS, PRECISIONS
from separation.engine.recipes import ALL, DEFAULT_CHOICE, choices, names
from separation.engine.selection import Selection
from separation.evaluation.choice import DEFAULT_SCORES, SCORES
from separation.system.places import program
from separation.system.text import shown

Command = Callable[[argparse.Namespace], int]

_OVERWRITE = "also replace files that this program did not write"


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and with `--help` in the last group of options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def add_last(self, *, verbose: bool = False) -> argparse._ArgumentGroup:
        """Add `--help` and, if asked for, `--verbose`; returns their group."""
        group = self.add_argument_group("other options")
        if verbose:
            group.add_argument(
                "-v", "--verbose", action="store_true", help="print the device, precision and attention, and why"
            )
        group.add_argument("-h", "--help", action="help", help="print this help")
        return group

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {shown(message)} (see {self.prog} --help)\n")


class _Commands:
    """Adds commands to a parser."""

    def __init__(self, parser: Parser) -> None:
        self._parsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=Parser)

    def add(self, name: str, command: Command, usage: str, description: str, *examples: str) -> Parser:
        """Add a command that calls a function. `description` is one sentence; an example is the text after the name."""
        parser = self.add_group(name, description, *examples)
        parser.usage = f"%(prog)s {usage}".rstrip()
        parser.set_defaults(command=command, parser=parser)
        return parser

    def add_group(self, name: str, description: str, *examples: str) -> Parser:
        """Add a command, with a description that is one sentence."""
        words = description[0].lower() + description[1:].removesuffix(".")
        return self._parsers.add_parser(name, help=words, description=description, epilog=_epilog(examples))


def _epilog(examples: tuple[str, ...]) -> str:
    lines = "\n".join(f"  %(prog)s {example}".rstrip() for example in examples)
    return f"example{'s' if len(examples) > 1 else ''}:\n{lines}"


def build_parser() -> Parser:
    """The parser of the command line.

    Its namespaces have two attributes besides the arguments: `command`, the function to call with the namespace, and
    `parser`, the parser of that command.
    """
    parser = Parser(
        prog=program(),
        description="Split songs into stems, such as vocals and drums.",
        epilog=f"{_epilog(('separate song.mp3 -o stems',))}\n\n`%(prog)s COMMAND --help` describes a command.",
    )
    parser.set_defaults(verbose=False, quiet=False, progress="bar")
    parent = _Commands(parser)
    _add_demo(parent)
    _add_separate(parent)
    _add_serve(parent)
    _add_tune(parent)
    _add_evaluate(parent)
    _add_null(parent)
    _add_bench(parent)
    _add_models(parent)
    _add_cache(parent)
    _add_export(parent)
    _add_completion(parent)
    parser.add_last().add_argument(
        "--version", action="version", version=f"separation {__version__}", help="print the version"
    )
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def _add_demo(parent: _Commands) -> None:
    demo = parent.add("demo", commands.demo, "[OPTIONS]", "Separate the song that ships with the program.", "-o stems")
    group = demo.add_argument_group("output options")
    group.add_argument(
        "-o", "--output", type=path, default=Path("stems"), metavar="DIR", help="folder to write to (default: stems)"
    )
    group.add_argument("--overwrite", action="store_true", help=_OVERWRITE)
    _add_device_options(demo.add_argument_group("device options"))
    demo.add_last(verbose=True)


def _add_separate(parent: _Commands) -> None:
    parser = parent.add(
        "separate",
        separate,
        "[OPTIONS] -o DIR SONG [SONG ...]",
        "Separate songs into stems.",
        "song.mp3 -o stems",
        "s3://bucket/music -o s3://bucket/stems",
        "music -o stems --stems all_4 --format mp3",
        "'music/**/*.flac' -o karaoke --two-stems vocals",
        "music -o stems --report --summary stems/all.html",
        "- -o - --only vocals < song.mp3 > vocals.wav",
    )
    parser.add_argument_group("arguments").add_argument(
        "songs",
        nargs="+",
        type=given,
        metavar="SONG",
        help="file, folder or glob, also at s3:// or gs://, or - for stdin",
    )
    model = _add_model_options(parser)
    model.add_argument(
        "--two-stems",
        type=given,
        metavar="STEM",
        help="give only this stem and no_STEM, the song minus it; any stem that the recipe has",
    )
    model.add_argument("--only", type=given, metavar="STEM", help="give only this stem; any stem that the recipe has")
    _add_output_options(parser)
    engine = _add_engine_options(parser)
    engine.add_argument(
        "--gpus", type=gpus, metavar="0,1", help="use these GPUs, each for songs of its own (default: all)"
    )
    engine.add_argument(
        "--workers",
        type=count,
        default=1,
        metavar="N",
        help="songs at once on each GPU: some are decoded and encoded while the model works on another (default: 1)",
    )
    engine.add_argument("--ray", type=given, metavar="ADDRESS", help="use the machines of this Ray cluster, or `auto`")
    songs = parser.add_argument_group("song options")
    songs.add_argument("--start", type=time, metavar="TIME", help="separate only from here on, such as 1:20")
    songs.add_argument("--end", type=time, metavar="TIME", help="separate only up to here, such as 1:50")
    songs.add_argument("--preview", action="store_true", help="separate only the loudest half minute")
    songs.add_argument(
        "--force-refresh", action="store_true", help="separate finished songs again, and ignore cached estimates"
    )
    songs.add_argument(
        "--retries",
        type=retries,
        default=2,
        metavar="N",
        help="how often to try songs again whose failure may pass, such as a lack of memory (default: 2)",
    )
    songs.add_argument(
        "--accept-damaged",
        action="store_true",
        help="also separate songs of which more than a tenth, or an unknown part, is missing",
    )
    last = parser.add_last(verbose=True)
    last.add_argument("-q", "--quiet", action="store_true", help="print only warnings, errors and what --json asks for")
    last.add_argument("--json", action="store_true", help="print a JSON object for each song")
    last.add_argument(
        "--progress",
        default="bar",
        choices=("bar", "json"),
        metavar="NAME",
        help="what goes to stderr: bar, or json for programs, an object a line (default: bar)",
    )


def _add_output_options(parser: Parser) -> None:
    group = parser.add_argument_group("output options")
    group.add_argument(
        "-o",
        "--output",
        type=output_folder,
        required=True,
        metavar="DIR",
        help="write the stems to DIR/<song>/<stem>.<format>; - writes one stem to stdout",
    )
    group.add_argument(
        "--format",
        default="wav",
        choices=FORMATS,
        metavar="NAME",
        help=f"{_listed(FORMATS)}; the last four need ffmpeg (default: wav)",
    )
    group.add_argument(
        "--sample-rate",
        type=sample_rate,
        default=44100,
        choices=SAMPLE_RATES,
        metavar="HZ",
        help="44100, 48000, or `source` for the song's own (default: 44100)",
    )
    group.add_argument(
        "--wav-depth", choices=WAV_DEPTHS, metavar="BITS", help="16 with dither, 24, or 32f for floats (default: 32f)"
    )
    group.add_argument("--flac-depth", choices=FLAC_DEPTHS, metavar="BITS", help="16 with dither, or 24 (default: 24)")
    group.add_argument(
        "--bitrate",
        "--mp3-bitrate",
        type=bitrate,
        choices=(*BITRATES, LOSSLESS),
        metavar="KBPS",
        help=f"{_listed(BITRATES)} kbit/s, or for m4a `lossless` (default: mp3 320, m4a and ogg 256, opus 192)",
    )
    group.add_argument(
        "--channels",
        default="stereo",
        choices=CHANNELS,
        metavar="NAME",
        help="stereo, mono, or `source` for mono stems of mono songs (default: stereo)",
    )
    group.add_argument(
        "--name",
        type=given,
        metavar="TEMPLATE",
        help="names of the files in DIR, such as '{artist}/{album}/{song} ({stem}).{ext}'; also {folder}, {track}, "
        "{bpm}, {key}, {recipe} and {model} (default: '{folder}/{song}/{stem}.{ext}')",
    )
    group.add_argument(
        "--video",
        type=given,
        metavar="STEM",
        help="also write each video again with this stem as its sound, or with a mix such as drums+bass",
    )
    group.add_argument("--reaper", action="store_true", help="also write stems.rpp, a REAPER project with the stems")
    group.add_argument(
        "--analyse", action="store_true", help="also find the tempo and the key, and measure the loudness"
    )
    group.add_argument(
        "--report", action="store_true", help="also write stems.html, a page to see and hear the stems of a song"
    )
    group.add_argument(
        "--summary",
        type=path,
        action="append",
        metavar="FILE",
        help="also write a table of all songs, as .csv or .html; may be repeated",
    )
    group.add_argument("--overwrite", action="store_true", help=f"{_OVERWRITE}, and stems of other songs")


def _add_serve(parent: _Commands) -> None:
    serve = parent.add(
        "serve",
        commands.serve,
        "[OPTIONS]",
        "Open a page in the browser to separate songs and listen to stems.",
        "--port 8000",
    )
    group = serve.add_argument_group("page options")
    group.add_argument(
        "--host",
        type=given,
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; 0.0.0.0 lets in the whole network, without a password (default: 127.0.0.1)",
    )
    group.add_argument(
        "--port", type=int, default=8765, metavar="N", help="port to listen on; 0 takes a free one (default: 8765)"
    )
    group.add_argument("--no-browser", action="store_true", help="only print the page's address")
    _add_device_options(serve.add_argument_group("device options"))
    serve.add_last(verbose=True)


def _add_tune(parent: _Commands) -> None:
    parser = parent.add(
        "tune",
        tune,
        "[OPTIONS] SONG",
        "Compare models on ten seconds of a song, and write a page to listen to them.",
        "song.mp3 --task vocals",
        "song.mp3 --task instrumental --blind",
        "song.mp3 --stem drums --recipe standard",
    )
    parser.add_argument_group("arguments").add_argument("song", type=path, metavar="SONG", help="file to compare on")
    group = parser.add_argument_group("candidates")
    group.add_argument(
        "--task",
        type=given,
        metavar="NAME",
        help="compare the downloaded models for this task; `separation models list` prints the tasks",
    )
    group.add_argument(
        "--stem", type=given, metavar="NAME", help="compare this stem; without --task, of all models that give it"
    )
    group.add_argument(
        "--recipe",
        type=given,
        action="append",
        metavar="NAME",
        help=f"also compare this recipe: {_listed(names())}; may be repeated",
    )
    group.add_argument("--seconds", type=count, default=10, metavar="S", help="length, at most 60 (default: 10)")
    group = parser.add_argument_group("page options")
    group.add_argument(
        "-o",
        "--output",
        type=path,
        default=Path("tune"),
        metavar="DIR",
        help="write the page to DIR/<song>/<stem>.html (default: tune)",
    )
    group.add_argument("--blind", action="store_true", help="hide the names on the page until you ask for them")
    group.add_argument("--overwrite", action="store_true", help=_OVERWRITE)
    _add_device_options(parser.add_argument_group("device options"))
    parser.add_last(verbose=True).add_argument("--json", action="store_true", help="print one JSON object")


def _add_evaluate(parent: _Commands) -> None:
    evaluate = parent.add(
        "evaluate",
        commands.evaluate,
        "[OPTIONS] --references DIR",
        "Score stems against the true ones: SDR, SI-SDR, bleedless, fullness and others.",
        "--references true --estimates stems",
        "--references true --estimates stems --scores all",
        "--references musdb18hq/test --stems all_4",
    )
    group = evaluate.add_argument_group("songs")
    group.add_argument(
        "--references", type=path, required=True, metavar="DIR", help="the true stems: DIR/<song>/<stem>.wav"
    )
    group.add_argument(
        "--estimates", type=path, metavar="DIR", help="the stems to score; without it, the mixtures are separated"
    )
    group.add_argument(
        "--scores",
        type=scores,
        default=",".join(DEFAULT_SCORES),
        metavar="NAME,NAME",
        help=f"{_listed([*SCORES, 'all'])} (default: {','.join(DEFAULT_SCORES)})",
    )
    _add_model_options(evaluate)
    _add_engine_options(evaluate)
    evaluate.add_last(verbose=True).add_argument("--json", action="store_true", help="print one JSON object")


def _add_null(parent: _Commands) -> None:
    null = parent.add(
        "null",
        commands.null,
        "A B",
        "Subtract one recording from another and print the level of the rest.",
        "stems/song song.flac",
        "stems/song other/song",
    )
    arguments = null.add_argument_group("arguments")
    arguments.add_argument("first", type=path, metavar="A", help="file, or folder of files")
    arguments.add_argument(
        "second", type=path, metavar="B", help="file or folder to subtract; or the song that the stems in A sum to"
    )
    null.add_last()


def _add_bench(parent: _Commands) -> None:
    bench = parent.add(
        "bench",
        commands.bench,
        "[OPTIONS]",
        "Measure how fast a recipe or a model is on this machine.",
        "--recipe demo --runs 5",
        "--model-name htdemucs --random-weights",
        "--recipe demo --compare-precision song.wav",
    )
    group = bench.add_argument_group("measurement options")
    group.add_argument("--seconds", type=int, default=30, metavar="S", help="seconds of music in a run (default: 30)")
    group.add_argument("--runs", type=int, default=3, metavar="N", help="runs after a warm-up (default: 3)")
    group.add_argument(
        "--random-weights", action="store_true", help="use random weights: as fast, and nothing is downloaded"
    )
    group.add_argument(
        "--cold-start",
        action="store_true",
        help="instead, measure each stage from the start of a process to the first stem",
    )
    group.add_argument(
        "--compare-precision",
        type=path,
        metavar="SONG",
        help="instead, separate the loudest part of a song in each precision and compare the stems with fp32",
    )
    _add_model_options(bench)
    _add_engine_options(bench)
    bench.add_last(verbose=True).add_argument("--json", action="store_true", help="print one JSON object")


def _add_export(parent: _Commands) -> None:
    export = parent.add(
        "export",
        commands.export,
        "[OPTIONS] MODEL OUT.onnx",
        "Write a model as an ONNX file, for programs without PyTorch.",
        "demo demo.onnx",
    )
    arguments = export.add_argument_group("arguments")
    arguments.add_argument("model", type=given, metavar="MODEL", help="name, or path of a YAML file or of weights")
    arguments.add_argument("output", type=path, metavar="OUT.onnx", help="file to write")
    group = export.add_argument_group("options")
    group.add_argument("--model-path", type=path, metavar="FILE", help="weights to use instead of the model's own")
    group.add_argument("--random-weights", action="store_true", help="use random weights, to try it without a download")
    group.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    export.add_last()


def _add_completion(parent: _Commands) -> None:
    completion = parent.add(
        "completion",
        completion_script,
        "SHELL",
        "Print a script with which a shell completes commands, options and names.",
        "bash",
    )
    completion.add_argument_group("arguments").add_argument(
        "shell", choices=("bash", "zsh", "fish"), metavar="SHELL", help="bash, zsh or fish"
    )
    completion.add_last()


def completion_script(args: argparse.Namespace) -> int:
    """Print the script."""
    from separation.cli.completion import script

    print_lines(script(args.shell, build_parser()))
    return 0


def _add_models(parent: _Commands) -> None:
    parser = parent.add_group("models", "List, show, download, verify, convert or compile models.", "list")
    below = _Commands(parser)
    listing = below.add(
        "list",
        models.list_models,
        "[OPTIONS]",
        "List models by task, and whether they are downloaded.",
        "--task karaoke",
        "--stem vocals --sort quality",
    )
    group = listing.add_argument_group("options")
    group.add_argument("--task", type=given, metavar="NAME", help=f"only models for {_listed(list(TASKS))}")
    group.add_argument(
        "--stem", type=given, metavar="NAME", help="only models that give this stem, or a kind of it: lead_vocals"
    )
    group.add_argument(
        "--licence", choices=LICENCES, metavar="CLASS", help=f"only models with a licence that is {_listed(LICENCES)}"
    )
    group.add_argument("--here", action="store_true", help="only models that are downloaded")
    group.add_argument(
        "--sort",
        choices=SORTS,
        default="name",
        metavar="ORDER",
        help="name, or quality: published SDR of the stem (default: name)",
    )
    listing.add_last().add_argument("--json", action="store_true", help="print a JSON object for each model")

    show = below.add(
        "show",
        models.show,
        "[OPTIONS] NAME",
        "Show a model's stems, chunks, parameters, licence and files.",
        "htdemucs_ft",
    )
    show.add_argument_group("arguments").add_argument(
        "model", type=given, metavar="NAME", help="name, or path of a YAML file or of weights"
    )
    show.add_last().add_argument("--json", action="store_true", help="print one JSON object")

    download = below.add(
        "download", models.download, "NAME [NAME ...]", "Download models.", "bs_roformer_viperx_1297 htdemucs_ft"
    )
    download.add_argument_group("arguments").add_argument(
        "names", nargs="+", type=given, metavar="NAME", help="model to download"
    )
    download.add_last()

    verify = below.add(
        "verify", models.verify, "[NAME ...]", "Compare the files of models with their checksums.", "demo"
    )
    verify.add_argument_group("arguments").add_argument(
        "names", nargs="*", type=given, metavar="NAME", help="model to verify (default: all that are downloaded)"
    )
    verify.add_last()

    convert = below.add(
        "convert",
        models.convert,
        "[OPTIONS] CHECKPOINT OUT.safetensors",
        "Write weights in the format that loads fastest.",
        "FILE.ckpt FILE.safetensors",
    )
    arguments = convert.add_argument_group("arguments")
    arguments.add_argument("checkpoint", type=path, metavar="CHECKPOINT", help="file to read")
    arguments.add_argument("output", type=path, metavar="OUT.safetensors", help="file to write")
    convert.add_argument_group("options").add_argument(
        "--overwrite", action="store_true", help="replace the file if it exists"
    )
    convert.add_last()

    compiling = below.add(
        "compile",
        models.compile_kernels,
        "[OPTIONS] -o DIR NAME [NAME ...]",
        "Compile GPU kernels ahead of time, without a GPU.",
        "htdemucs_ft --gpu 90 -o kernels",
    )
    compiling.add_argument_group("arguments").add_argument(
        "names", nargs="+", type=given, metavar="NAME", help="model to compile for"
    )
    group = compiling.add_argument_group("options")
    group.add_argument(
        "--gpu",
        type=capabilities,
        default="80,86,89,90",
        metavar="80,90",
        help="compute capabilities times ten (default: 80,86,89,90)",
    )
    group.add_argument(
        "-o", "--output", type=path, required=True, metavar="DIR", help="folder to fill, for SEPARATION_KERNELS"
    )
    compiling.add_last()
    parser.add_last()


def _add_cache(parent: _Commands) -> None:
    parser = parent.add_group("cache", "List or clear cached estimates.", "list")
    below = _Commands(parser)
    listing = below.add(
        "list", commands.cache_list, "[OPTIONS]", "List the cached estimates, and when each was made.", "--json"
    )
    listing.add_last().add_argument(
        "--json", action="store_true", help="print a JSON object for each estimate, with all its settings"
    )
    clear = below.add("clear", commands.cache_clear, "", "Remove all cached estimates.", "")
    clear.add_last()
    parser.add_last()


# ---------------------------------------------------------------------------------------------------------------------
# Options that several commands share


def _add_model_options(parser: Parser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("model options")
    all_choices = sorted({choice for name in names() for choice in choices(name)} - {ALL})
    group.add_argument(
        "--stems",
        type=given,
        metavar="NAME",
        help=f"{_listed(all_choices)} (default: {DEFAULT_CHOICE}, or all stems of a recipe without that)",
    )
    group.add_argument(
        "--recipe",
        type=given,
        metavar="NAME",
        help=f"{_listed(names())}, or the path of a .yaml file (default: {Selection.recipe})",
    )
    group.add_argument("--model-name", type=given, metavar="NAME", help="all stems of one model, instead of a recipe")
    group.add_argument(
        "--model-dir", type=path, metavar="DIR", help="folder of that model: DIR/NAME, or DIR/NAME.yaml and NAME.ckpt"
    )
    group.add_argument(
        "--model-path", type=path, metavar="FILE", help="weights of your own, with their YAML file beside them"
    )
    group.add_argument(
        "--chunk-size",
        type=seconds,
        default="auto",
        metavar="S",
        help="4 to 30 seconds, or `auto` for what a model was trained on (default: auto)",
    )
    group.add_argument(
        "--overlap",
        type=seconds,
        default="auto",
        metavar="S",
        help="1 to 8 seconds, or `auto` for half a chunk (default: auto)",
    )
    return group


def _add_engine_options(parser: Parser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("device options")
    _add_device_options(group)
    group.add_argument(
        "--attention",
        default="auto",
        choices=ATTENTIONS,
        metavar="NAME",
        help=f"how to compute attention: {_listed(ATTENTIONS)} (default: auto)",
    )
    group.add_argument(
        "--batch-size",
        type=batch_size,
        default="auto",
        metavar="N",
        help="chunks to compute at once, or `auto` (default: auto)",
    )
    return group


def _add_device_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--device", type=given, default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps (default: auto)"
    )
    group.add_argument(
        "--precision",
        default="auto",
        choices=PRECISIONS,
        metavar="NAME",
        help=f"{_listed(PRECISIONS)} (default: auto)",
    )


def _listed(values: list[str] | tuple[int | str, ...]) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}"
