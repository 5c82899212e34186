"""Completion for bash, zsh and fish: scripts that are made from the parser.

A script holds every command, option and name, so that completing starts no Python. Names of models and recipes are
those at the time when the script is made.
"""

import argparse
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from separation.checkpoints import catalogue
from separation.cli.values import output_folder, path
from separation.engine.recipes import choices, load_recipe, names

FILES, FOLDERS = "files", "folders"
Values = str | tuple[str, ...] | None  # FILES, FOLDERS, these words, or anything


@dataclass(frozen=True)
class Option:
    """An option. `values` is None also if it takes none, for which `takes_value` is False."""

    flags: tuple[str, ...]
    help: str
    takes_value: bool
    values: Values


@dataclass(frozen=True)
class Command:
    """A command: the words that name it, those that may follow, its options, and what it takes besides."""

    name: str  # such as "models list"; empty for the program itself
    commands: dict[str, str]  # with the help of each
    options: tuple[Option, ...]
    values: Values


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script for `bash`, `zsh` or `fish`."""
    writers: dict[str, Callable[[list[Command]], Iterator[str]]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    return "\n".join(writers[shell](list(commands_of(parser))))


def commands_of(parser: argparse.ArgumentParser, name: str = "") -> Iterator[Command]:
    """The commands of a parser, from the top down."""
    options, below, values = [], {}, None
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            below = dict(action.choices)
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
        elif action.option_strings:
            takes_value = action.nargs != 0
            text = (action.help or "").replace("%%", "%")
            options.append(Option(tuple(action.option_strings), text, takes_value, _values(action)))
        else:
            values = values or _values(action)
    yield Command(name, {word: helps[word] for word in below}, tuple(options), values)
    for word, parser_below in below.items():
        yield from commands_of(parser_below, f"{name} {word}".strip())


def _values(action: argparse.Action) -> Values:
    """What an option or argument takes."""
    if action.choices is not None:
        return tuple(map(str, action.choices))
    if action.dest in ("model", "model_name", "names"):
        return tuple(catalogue.available())
    if action.dest == "recipe":
        return tuple(names())
    if action.dest == "stems":
        return tuple(sorted({choice for name in names() for choice in choices(name)}))
    if action.dest in ("two_stems", "only"):
        loaded = (load_recipe(name, choice) for name in names() for choice in choices(name))
        return tuple(dict.fromkeys(stem for recipe in loaded for stem in recipe.stems))
    if action.metavar == "DIR":
        return FOLDERS
    return FILES if action.type in (path, output_folder) or action.dest == "songs" else None


def _options_with(command: Command) -> Iterator[tuple[str, Option]]:
    """Each flag of the options that take a value."""
    for option in command.options:
        if option.takes_value:
            for flag in option.flags:
                yield flag, option


def _flags(command: Command) -> list[str]:
    return [flag for option in command.options for flag in option.flags]


# ---------------------------------------------------------------------------------------------------------------------
# bash

# macOS has bash 3.2, without mapfile and compopt.
_BASH_HEAD = """# Completion of separation for bash: eval "$(separation completion bash)"
_separation() {
  local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} name="" word words="" kind=""
  case "$current$previous" in  # bash splits --format=flac at the =
    =-*) current="" ;;
    *=) previous=${COMP_WORDS[COMP_CWORD-2]} ;;
  esac
  for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
    case "$name $word" in"""
_BASH_TAIL = """  esac
  COMPREPLY=()
  case "$kind" in
    files) compopt -o filenames 2> /dev/null; local IFS=$'\n'; COMPREPLY=($(compgen -f -- "$current")) ;;
    folders) compopt -o filenames 2> /dev/null; local IFS=$'\n'; COMPREPLY=($(compgen -d -- "$current")) ;;
    words) COMPREPLY=($(compgen -W "$words" -- "$current")) ;;
  esac
}
complete -F _separation separation"""


def _bash(commands: list[Command]) -> Iterator[str]:
    yield _BASH_HEAD
    yield from (f"      {shlex.quote(f' {one.name}')}) name={shlex.quote(one.name)} ;;" for one in _first(commands))
    yield from (f"      {shlex.quote(one.name)}) name={shlex.quote(one.name)} ;;" for one in _second(commands))
    yield '    esac\n  done\n  case "$name:$previous" in'
    for command in commands:
        for flag, option in _options_with(command):
            yield f"    {shlex.quote(f'{command.name}:{flag}')}) {_bash_reply(option.values)} ;;"
    yield '    *) case "$name:$current" in'
    for command in commands:
        yield f"      {shlex.quote(command.name)}:-*) {_bash_reply(tuple(_flags(command)))} ;;"
    for command in commands:
        yield f"      {shlex.quote(command.name)}:*) {_bash_reply(tuple(command.commands) or command.values)} ;;"
    yield "    esac ;;"
    yield _BASH_TAIL


def _bash_reply(values: Values) -> str:
    if isinstance(values, tuple):
        return f"kind=words words={shlex.quote(' '.join(values))}"
    return f"kind={values or 'none'}"


def _first(commands: list[Command]) -> list[Command]:
    return [command for command in commands if command.name and " " not in command.name]


def _second(commands: list[Command]) -> list[Command]:
    return [command for command in commands if " " in command.name]


# ---------------------------------------------------------------------------------------------------------------------
# zsh

_ZSH_HEAD = """#compdef separation
# Completion of separation for zsh: eval "$(separation completion zsh)" after compinit
_separation() {
  local name="" word current=${words[CURRENT]} previous=${words[CURRENT-1]}
  local -a described
  if [[ $current == --*=* ]]; then
    previous=${current%%=*}
    compset -P '*='
    current=${current#*=}
  fi
  for word in "${(@)words[2,CURRENT-1]}"; do
    case "$name $word" in"""


def _zsh(commands: list[Command]) -> Iterator[str]:
    yield _ZSH_HEAD
    yield from (f"      {shlex.quote(f' {one.name}')}) name={shlex.quote(one.name)} ;;" for one in _first(commands))
    yield from (f"      {shlex.quote(one.name)}) name={shlex.quote(one.name)} ;;" for one in _second(commands))
    yield '    esac\n  done\n  case "$name:$previous" in'
    for command in commands:
        for flag, option in _options_with(command):
            yield f"    {shlex.quote(f'{command.name}:{flag}')}) {_zsh_reply(option.values)}; return ;;"
    yield '  esac\n  case "$name:$current" in'
    for command in commands:
        described = {flag: option.help for option in command.options for flag in option.flags}
        yield f"    {shlex.quote(command.name)}:-*) {_zsh_described('option', described)} ;;"
    for command in commands:
        reply = _zsh_described("command", command.commands) if command.commands else _zsh_reply(command.values)
        yield f"    {shlex.quote(command.name)}:*) {reply} ;;"
    yield "  esac\n}\ncompdef _separation separation"


def _zsh_reply(values: Values) -> str:
    if isinstance(values, tuple):
        return f"compadd -- {shlex.join(values)}"
    return {FILES: "_files", FOLDERS: "_files -/"}.get(values or "", "_message value")


def _zsh_described(what: str, described: dict[str, str]) -> str:
    items = " ".join(shlex.quote(f"{word}:{text}") for word, text in described.items())
    return f"described=({items}); _describe {what} described"


# ---------------------------------------------------------------------------------------------------------------------
# fish

_FISH_HEAD = """# Completion of separation for fish, for ~/.config/fish/completions/separation.fish
function __separation_name
  set -l name
  for word in (commandline -opc)[2..-1]
    switch "$name $word\""""
_FISH_TAIL = """    end
  end
  test "$name" = "$argv[1]"
end
complete -c separation -f"""


def _fish(commands: list[Command]) -> Iterator[str]:
    yield _FISH_HEAD
    yield from (f"      case {_fish_text(f' {one.name}')}\n        set name {one.name}" for one in _first(commands))
    yield from (
        f"      case {_fish_text(one.name)}\n        set name {_fish_text(one.name)}" for one in _second(commands)
    )
    yield _FISH_TAIL
    for command in commands:
        when = f"complete -c separation -n {_fish_text(f'__separation_name {_fish_text(command.name)}')}"
        for word, text in command.commands.items():
            yield f"{when} -a {_fish_text(word)} -d {_fish_text(text)}"
        if not command.commands and command.values:
            yield f"{when} {_fish_reply(command.values)}"
        for option in command.options:
            flags = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags)
            reply = f" -r {_fish_reply(option.values)}" if option.takes_value else ""
            yield f"{when} {flags}{reply} -d {_fish_text(option.help)}"


def _fish_reply(values: Values) -> str:
    if isinstance(values, tuple):
        return f"-f -a {_fish_text(' '.join(values))}"
    return {FILES: "-F", FOLDERS: "-f -a '(__fish_complete_directories)'"}.get(values or "", "-f")


def _fish_text(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
