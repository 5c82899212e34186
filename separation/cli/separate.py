"""The command `separate`."""

import argparse
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from separation.audio.beside import stems_in
from separation.audio.options import STEM_FILE
from separation.batch import summary
from separation.batch.anywhere import find_anywhere, unfinished_anywhere
from separation.batch.job import AnySong, Job, Outcome, stem_settings
from separation.batch.urls import Location, Url
from separation.cli.options import engine_options, output_options, refuse_beside, selection
from separation.cli.pipes import PIPE, Pipes, changed, check_stdout, stdin_song, write_to_stdout
from separation.cli.printing import json_progress, print_error, print_json, print_line, song_bar, songs_bar
from separation.engine.recipes import models_of_files
from separation.engine.selection import Selection
from separation.errors import InputError
from separation.progress import Progress
from separation.system.names import FROM_ANALYSIS, FROM_TAGS, Place, fields_in, song_fields

if TYPE_CHECKING:
    from separation.batch.retry import Attempt

logger: logging.Logger = logging.getLogger("separation")


def separate(args: argparse.Namespace) -> int:
    """Separate songs. Prints each outcome as soon as it is known, and at the end what failed."""
    if args.ray:
        refuse_beside("--ray", ["--workers", "--gpus"], args)
        if ":" in args.device:
            raise InputError(f"--ray gives each worker a GPU of its own, not {args.device}: choose --device cuda")
    summary.check(args.summary or [], overwrite=args.overwrite)
    with ExitStack() as opened:
        to_stdout, stdin = args.output == Path(PIPE), None
        if to_stdout:
            check_stdout(args, list(_job(args).stems))
            args = changed(args, output=Path(opened.enter_context(TemporaryDirectory())))
        if PIPE in args.songs:
            if args.ray:
                raise InputError("--ray does not take a song from stdin: give a file on the shared file system")
            stdin = opened.enter_context(stdin_song())
            args = changed(args, songs=[str(stdin) if song == PIPE else song for song in args.songs])
        return _separate(args, Pipes(stdin, to_stdout))


def _separate(args: argparse.Namespace, pipes: Pipes) -> int:
    started = time.monotonic()
    found = find_anywhere(args.songs, args.output, _placed(args))
    if note := found.note():
        logger.warning(note)
    songs = [song.absolute() for song in found.songs] if args.ray else found.songs
    outcomes, n_songs = list(found.failed), len(found.failed) + len(songs)
    job, left = Job({}), songs
    if songs:  # report a missing song before a missing model
        first, path = args.songs[0], str(found.songs[0].path)
        is_only = len(args.songs) == 1 and path in (first, str(Path(first)))  # rather than found in a folder
        job = replace(_job(args), needs_picture=is_only)
        left, finished = unfinished_anywhere(songs, job, force=args.force_refresh)
        outcomes += finished
    if pipes.to_stdout and n_songs > 1:
        raise InputError(f"-o - writes one stem of one song, and there are {n_songs} songs: give one")
    print_outcome = partial(
        _print_outcome, args=args, pipes=pipes, file=sys.stdout
    )  # while Ray runs, sys.stdout is stderr
    for outcome in outcomes:
        print_outcome(outcome)
    try:
        hidden = n_songs == 1 or args.quiet or args.progress == "json"
        with songs_bar(len(left), hidden=hidden) as bar, closing(_run(left, job, args, pipes)) as running:
            for outcome in running:
                outcomes.append(outcome)
                with tqdm.external_write_mode():
                    print_outcome(outcome)
                bar.update()
    finally:
        _print_summary(outcomes, n_songs, args)
        if args.summary:
            told = {outcome.path for outcome in outcomes}
            unseen = [Outcome(song.path, "left") for song in songs if song.path not in told]
            _write_summaries([_named(outcome, pipes) for outcome in [*outcomes, *unseen]], started, args)
    return 2 if any(outcome.status == "failed" for outcome in outcomes) else 0


def _write_summaries(outcomes: Sequence[Outcome], started: float, args: argparse.Namespace) -> None:
    recipe = args.model_name or (str(args.model_path) if args.model_path else args.recipe or Selection.recipe)
    written = summary.Summary(outcomes, recipe, time.monotonic() - started)
    for path in args.summary:
        summary.write(written, path, overwrite=args.overwrite)


def _placed(args: argparse.Namespace) -> Callable[[AnySong], AnySong]:
    """Gives a song the place that the options name."""
    options = output_options(args)

    def placed(song: AnySong) -> AnySong:
        if options.excerpt:  # in a folder of its own, beside the whole song's
            song = replace(song, folder=song.folder.with_name(f"{song.folder.name} {options.excerpt}"))
        if options.name is None:
            return song
        tags, below = _tags(options.name, song.path), song.folder.parent.relative_to(args.output)
        recipe = selection(args).load().name
        place = Place.of(options.name, song_fields(song.folder.name, tags, recipe, below.as_posix()))
        return replace(song, folder=args.output / place.folder, place=replace(place, folder=""))

    return placed


def _tags(template: str, song: Location) -> dict[str, str]:
    """The tags of a song that a template of names needs."""
    if isinstance(song, Url):
        if missing := fields_in(template) & set(FROM_TAGS):
            raise InputError(
                f"--name takes no {{{min(missing)}}} for songs in an object store, which would have to be read for it: "
                "leave it out, or download the songs"
            )
        return {}
    from separation.audio.metadata import tags_for  # needs PyTorch, which a run that has nothing to do does without

    return dict(tags_for(template, song))


def _job(args: argparse.Namespace) -> Job:
    selected, engine, output = selection(args), engine_options(args), output_options(args)
    selected.check(engine)
    for option, is_given in (("--report", args.report), ("--analyse", args.analyse)):
        if is_given and output.format == STEM_FILE:
            raise InputError(f"{option} does not take --format {STEM_FILE}: leave one of them out")
    if output.video:
        stems_in(output.video, selected.load().stems)
    return Job(
        stem_settings(selected, engine, output),
        models_of_files(selected.load(), output.format),
        output,
        accept_damaged=args.accept_damaged,
        analyse=args.analyse or (output.name is not None and not fields_in(output.name).isdisjoint(FROM_ANALYSIS)),
        report=args.report,
    )


def _run(songs: Sequence[AnySong], job: Job, args: argparse.Namespace, pipes: Pipes) -> Generator[Outcome]:
    """Separate songs here or on a cluster. Loads no model if there are none."""
    if not songs:
        return
    from separation.batch.retry import retried

    attempt = _on_cluster(job, args) if args.ray else _here(songs, job, args, pipes)
    yield from retried(songs, attempt, args.retries)


def _on_cluster(job: Job, args: argparse.Namespace) -> "Attempt[AnySong]":
    try:
        from separation.batch import cluster
    except ImportError as e:
        raise InputError(f"--ray needs the package ray ({e}): pip install ray") from e
    from separation.batch.run import load_separator

    load = partial(load_separator, selection(args).absolute(), engine_options(args), refresh=args.force_refresh)
    return lambda songs, is_retry: cluster.run(songs, job, load, args.ray)


def _here(songs: Sequence[AnySong], job: Job, args: argparse.Namespace, pipes: Pipes) -> "Attempt[AnySong]":
    from separation.batch.fresh import run_afresh
    from separation.batch.run import load_separators, run

    selected, engine = selection(args), engine_options(args)
    load = partial(load_separators, selected, engine, gpus=args.gpus or (), refresh=args.force_refresh)
    separators = load(len(songs))
    bar = partial(_bar, args, pipes, leave=len(songs) == 1)

    def attempt(songs: Sequence[AnySong], is_retry: bool) -> Iterator[Outcome]:
        workers = 1 if is_retry else args.workers  # fewer songs at once need less memory
        afresh = partial(run_afresh, job=job, load=load, workers=workers, bar=bar)
        return run(songs, job, separators, workers=workers, bar=bar, afresh=afresh)

    return attempt


def _bar(args: argparse.Namespace, pipes: Pipes, song: Location, *, leave: bool) -> AbstractContextManager[Progress]:
    """What shows the progress of a song."""
    if args.progress == "json":
        return json_progress(PIPE if song == pipes.stdin else str(song))
    return song_bar(song.name, leave=leave, hidden=args.quiet)


def _print_outcome(outcome: Outcome, *, args: argparse.Namespace, pipes: Pipes, file: TextIO) -> None:
    if pipes.to_stdout:
        for path in outcome.stems.values():
            if isinstance(path, Path):
                write_to_stdout(path)
        return
    outcome = _named(outcome, pipes)
    facts = dict(outcome.facts)
    if facts:
        facts["times_realtime"] = facts["duration_seconds"] / facts["elapsed_seconds"]
    if args.json:
        print_json(json.dumps(_as_json(outcome, facts)), file=file)
    elif args.quiet:
        return
    elif outcome.status == "skipped":
        print_line(f"{outcome.path.name}: done already (use --force-refresh to separate it again)", file=file)
    elif facts:
        times = f"{facts['duration_seconds']:.1f} s in {facts['elapsed_seconds']:.1f} s"
        print_line(f"{outcome.path.name}: {times}, {facts['times_realtime']:.2f} times real-time", file=file)
        if outcome.analysis:
            print_line(f"  {outcome.analysis}", file=file)
        for path in (*outcome.stems.values(), *([outcome.page] if outcome.page else [])):
            print_line(f"  {path}", file=file)


def _named(outcome: Outcome, pipes: Pipes) -> Outcome:
    """The outcome, under `-` for the song from stdin."""
    return replace(outcome, path=Path(PIPE)) if outcome.path == pipes.stdin else outcome


def _as_json(outcome: Outcome, facts: dict[str, Any]) -> dict[str, Any]:
    line: dict[str, Any] = {"song": str(outcome.path), "status": outcome.status, "tries": outcome.tries}
    if outcome.error:
        line["error"] = outcome.error
    if outcome.stems:
        line["stems"] = {stem: str(path) for stem, path in outcome.stems.items()}
    if outcome.analysis:
        line["analysis"] = outcome.analysis.as_json()
    if outcome.page:
        line["page"] = str(outcome.page)
    line["warnings"] = outcome.warnings
    return line | {name: value if name == "gain" else round(value, 3) for name, value in facts.items()}


def _print_summary(outcomes: Sequence[Outcome], n_songs: int, args: argparse.Namespace) -> None:
    """Print the failures on stderr and, for several songs, how many have each status."""
    for outcome in outcomes:
        if outcome.status == "failed":
            where = f"{outcome.path}: " if n_songs > 1 else ""
            print_error(f"{where}{outcome.error}", as_json=args.progress == "json")
    if n_songs > 1 and not args.quiet and args.progress != "json":
        counts = Counter(outcome.status for outcome in outcomes)
        counts["left"] = n_songs - len(outcomes)
        parts = [f"{counts[status]} {status}" for status in ("done", "skipped", "failed", "left") if counts[status]]
        print_line(f"{n_songs} songs: {', '.join(parts)}", file=sys.stderr)
