"""Runs a command: `separation --help` lists them."""

import argparse
import logging
import sys
from collections.abc import Sequence

from separation.cli.parser import build_parser
from separation.cli.printing import LogHandler, print_error
from separation.errors import SeparationError
from separation.progress import WAIT
from separation.system.memory import enough_memory


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0 for success, 2 for bad input."""
    args = build_parser().parse_args(arguments)
    as_json = args.progress == "json"
    logging.basicConfig(handlers=[LogHandler(as_json=as_json)], level=_level(args))
    try:
        with enough_memory("the program"):
            code: int = args.command(args)
        return code
    except SeparationError as e:
        print_error(e, as_json=as_json)
        return 2
    except OSError as e:  # such as a full disk, or no folder for temporary files
        print_error(f"{e.strerror or e}{f': {e.filename!r}' if e.filename else ''}", as_json=as_json)
        return 2


def _level(args: argparse.Namespace) -> int:
    """The lowest level of what is logged."""
    if args.verbose:
        return logging.INFO
    # Why it takes time is only for those who watch.
    return WAIT if sys.stderr.isatty() and not args.quiet and args.progress == "bar" else logging.WARNING
