"""Each command explains itself with a sentence and examples that work, and refuses values that make no sense."""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from separation.cli.main import main
from separation.cli.parser import build_parser
from separation.system.places import program


def parsers(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parser of the program and those of all commands, each with the command's name."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                yield from parsers(below, f"{name} {word}".strip())


PARSERS = dict(parsers(build_parser()))


@pytest.mark.parametrize("command", PARSERS)
def test_each_command_has_one_sentence_and_examples_that_parse(command: str) -> None:
    text = PARSERS[command].format_help()
    description = PARSERS[command].description or ""
    assert re.fullmatch(r"[A-Z].*\w\.", description) and description in text
    examples = re.search(r"^examples?:\n((?:  .+\n)+)", text, re.MULTILINE)
    assert examples is not None
    for line in examples[1].splitlines():
        assert line.startswith(f"  {program()} {command}".rstrip())
        typed = line.partition(" < ")[0]  # what a shell leaves of it
        args = build_parser().parse_args(shlex.split(typed.strip().removeprefix(program())))
        assert callable(args.command)


@pytest.mark.parametrize("command", PARSERS)
def test_each_argument_is_explained_in_one_style(command: str) -> None:
    for action in PARSERS[command]._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        words = action.help or ""
        assert re.match(r"[a-z\d]", words) and not words.endswith("."), f"{action.dest}: {words}"
        if action.option_strings and action.nargs != 0 and not action.required and action.default is not None:
            assert f"(default: {action.default})" in words or action.default == [], f"{action.dest}: {words}"


@pytest.mark.parametrize("command", PARSERS)
def test_help_fits_into_80_columns(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert all(len(line) <= 80 for line in PARSERS[command].format_help().splitlines())


@pytest.mark.parametrize("command", PARSERS)
def test_help_is_printed_for_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*command.split(), "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {program()} {command}".rstrip())


def with_empty_values(parser: argparse.ArgumentParser, *command: str) -> Iterator[tuple[list[str], str]]:
    """For each argument that takes a value: its command with an empty value, and its name."""
    positionals = 0
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from with_empty_values(sub, *command, name)
        elif action.option_strings and action.nargs != 0:
            yield [*command, action.option_strings[0], ""], "/".join(action.option_strings)
        elif not action.option_strings:
            yield [*command, *["x"] * positionals, ""], str(action.metavar)
            positionals += 1


@pytest.mark.parametrize("arguments, name", [*with_empty_values(build_parser())], ids=lambda value: " ".join(value))
def test_no_argument_may_be_empty(
    arguments: list[str],
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An empty path would be the current folder, and an empty address every address of this machine."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(arguments)
    told = capsys.readouterr().err
    assert left.value.code == 2
    assert told.startswith(f"error: argument {name}: ") and told.count("\n") == 1, told
