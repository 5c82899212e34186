"""The command `tune`: compares models on a few seconds of a song and writes a page to listen to them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from separation.cli.options import engine_options
from separation.cli.printing import print_error, print_json, print_line, print_lines, song_bar
from separation.evaluation.candidates import Candidates, find_candidates, size_bytes
from separation.system.record import RECORD, check_targets

if TYPE_CHECKING:
    from separation.evaluation.tune import Tuning
    from separation.progress import Progress

LISTED = 10  # of the candidates that are not downloaded
COMPARED = 0.9  # share of the progress bar for the models; the rest is for the page


def tune(args: argparse.Namespace) -> int:
    """Compare models and print what each took; on stderr, which ones failed."""
    candidates = find_candidates(args.task, args.stem, args.recipe or ())
    page = args.output / args.song.stem / f"{candidates.stem}.html"
    check_targets(page.parent, [page.name, RECORD], overwrite=args.overwrite, song=args.song)  # before the work
    from separation.evaluation.tune import tune as compare  # imports PyTorch

    with song_bar(args.song.name) as progress:
        comparing = progress.part(0, COMPARED)
        tuning = compare(args.song, candidates, engine_options(args), seconds=args.seconds, progress=comparing)
        _write_page(tuning, page, args, progress.part(COMPARED, 1))
    if args.json:
        print_json(tuning.as_json(page))
    else:
        print_lines(tuning)
        print_line(f"page to listen{' blind' if args.blind else ''}: {page}")
        _print_others(candidates)
    for name, error in tuning.failed.items():
        print_error(f"{name} is left out: {error}")
    return 2 if tuning.failed else 0


def _write_page(tuning: "Tuning", page: Path, args: argparse.Namespace, progress: "Progress") -> None:
    from separation.evaluation.tune import MEANING
    from separation.report.compare import Candidate, Comparison, write_comparison

    facts = tuning.facts()
    comparison = Comparison(
        title=f"{tuning.stem} of {tuning.song}",
        about=tuning.about(),
        mixture=tuning.mixture,
        candidates=[Candidate(result.name, result.stem, facts[result.name]) for result in tuning.results],
        meaning=f"{MEANING[0].upper()}{MEANING[1:]}.",
        blind=args.blind,
    )
    write_comparison(comparison, page, overwrite=args.overwrite, progress=progress)


def _print_others(candidates: Candidates) -> None:
    """Print the candidates that did not take part, and how to get them."""
    if candidates.missing:
        print_line("not downloaded, and so not compared; `separation models download NAME` gets one:")
        for candidate in candidates.missing[:LISTED]:
            size = size_bytes(candidate)
            print_line(f"  {candidate.name} ({'of unknown size' if size is None else f'{size / 1e6:.0f} MB'})")
        if len(candidates.missing) > LISTED:
            print_line(
                f"  and {len(candidates.missing) - LISTED} more: see `separation models list --stem {candidates.stem}`"
            )
    if candidates.unreadable:
        n_models = len(candidates.unreadable)
        print_line(f"{n_models} model{'s' * (n_models > 1)} cannot be read: `separation models list` says why")
