"""The command `separate`."""

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any, TextIO

from tqdm import tqdm

from separation.audio.options import STEM_FILE
from separation.batch.done import unfinished
from separation.batch.find import find
from separation.batch.job import Job, Outcome, Song, stem_settings
from separation.cli.options import engine_options, output_options, refuse_beside, selection
from separation.cli.printing import print_error, print_json, print_line, song_bar, songs_bar
from separation.engine.recipes import models_of_files
from separation.errors import InputError
from separation.system.names import Place, song_fields

logger = logging.getLogger("separation")


def separate(args: argparse.Namespace) -> int:
    """Separate songs. Prints each outcome as soon as it is known, and at the end what failed."""
    if args.ray:
        refuse_beside("--ray", ["--workers"], args)
    found = find(args.songs, args.output, _placed(args))
    if note := found.note():
        logger.warning(note)
    songs = [song.absolute() for song in found.songs] if args.ray else found.songs
    outcomes, n_songs = list(found.failed), len(found.failed) + len(songs)
    job, left = Job({}), songs
    if songs:  # report a missing song before a missing model
        job = _job(args)
        left, finished = unfinished(songs, job, force=args.force_refresh)
        outcomes += finished
    print_outcome = partial(_print_outcome, as_json=args.json, file=sys.stdout)  # while Ray runs, sys.stdout is stderr
    for outcome in outcomes:
        print_outcome(outcome)
    try:
        with songs_bar(len(left), hidden=n_songs == 1) as bar, closing(_run(left, job, args)) as running:
            for outcome in running:
                outcomes.append(outcome)
                with tqdm.external_write_mode():
                    print_outcome(outcome)
                bar.update()
    finally:
        _print_summary(outcomes, n_songs)
    return 2 if any(outcome.status == "failed" for outcome in outcomes) else 0


def _placed(args: argparse.Namespace) -> Callable[[Song], Song]:
    """Gives a song the place that the options name."""
    options = output_options(args)

    def placed(song: Song) -> Song:
        if options.excerpt:  # in a folder of its own, beside the whole song's
            song = replace(song, folder=song.folder.with_name(f"{song.folder.name} {options.excerpt}"))
        if options.name is None:
            return song
        from separation.audio.metadata import tags_for  # needs PyTorch, which a run that has nothing to do does without

        tags, below = tags_for(options.name, song.path), song.folder.parent.relative_to(args.output)
        recipe = selection(args).load().name
        place = Place.of(options.name, song_fields(song.folder.name, tags, recipe, below.as_posix()))
        return replace(song, folder=args.output / place.folder, place=replace(place, folder=""))

    return placed


def _job(args: argparse.Namespace) -> Job:
    selected, engine, output = selection(args), engine_options(args), output_options(args)
    selected.check(engine)
    for option, is_given in (("--report", args.report), ("--analyse", args.analyse)):
        if is_given and output.format == STEM_FILE:
            raise InputError(f"{option} does not take --format {STEM_FILE}: leave one of them out")
    return Job(
        stem_settings(selected, engine, output),
        models_of_files(selected.load(), output.format),
        output,
        accept_damaged=args.accept_damaged,
        analyse=args.analyse,
        report=args.report,
    )


def _run(songs: Sequence[Song], job: Job, args: argparse.Namespace) -> Generator[Outcome]:
    """Separate songs here or on a cluster. Loads no model if there are none."""
    if not songs:
        return
    selected, engine = selection(args), engine_options(args)
    if args.ray:
        try:
            from separation.batch import cluster
        except ImportError as e:
            raise InputError(f"--ray needs the package ray ({e}): pip install ray") from e
        from separation.batch.run import load_separator

        load = partial(load_separator, selected.absolute(), engine, refresh=args.force_refresh)
        yield from cluster.run(songs, job, load, args.ray)
        return
    from separation.batch import run

    separators = run.load_separators(selected, engine, len(songs), refresh=args.force_refresh)
    bar = partial(song_bar, leave=len(songs) == 1)
    yield from run.run(songs, job, separators, workers=args.workers, bar=bar)


def _print_outcome(outcome: Outcome, *, as_json: bool, file: TextIO) -> None:
    facts = dict(outcome.facts)
    if facts:
        facts["times_realtime"] = facts["duration_seconds"] / facts["elapsed_seconds"]
    if as_json:
        print_json(json.dumps(_as_json(outcome, facts)), file=file)
    elif outcome.status == "skipped":
        print_line(f"{outcome.path.name}: done already (use --force-refresh to separate it again)", file=file)
    elif facts:
        times = f"{facts['duration_seconds']:.1f} s in {facts['elapsed_seconds']:.1f} s"
        print_line(f"{outcome.path.name}: {times}, {facts['times_realtime']:.2f} times real-time", file=file)
        if outcome.analysis:
            print_line(f"  {outcome.analysis}", file=file)
        for path in (*outcome.stems.values(), *([outcome.page] if outcome.page else [])):
            print_line(f"  {path}", file=file)


def _as_json(outcome: Outcome, facts: dict[str, Any]) -> dict[str, Any]:
    line: dict[str, Any] = {"song": str(outcome.path), "status": outcome.status}
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


def _print_summary(outcomes: Sequence[Outcome], n_songs: int) -> None:
    """Print the failures on stderr and, for several songs, how many have each status."""
    for outcome in outcomes:
        if outcome.status == "failed":
            where = f"{outcome.path}: " if n_songs > 1 else ""
            print_error(f"{where}{outcome.error}")
    if n_songs > 1:
        counts = Counter(outcome.status for outcome in outcomes)
        counts["left"] = n_songs - len(outcomes)
        parts = [f"{counts[status]} {status}" for status in ("done", "skipped", "failed", "left") if counts[status]]
        print_line(f"{n_songs} songs: {', '.join(parts)}", file=sys.stderr)
