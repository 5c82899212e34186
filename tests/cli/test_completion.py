"""Real shells complete commands, options, names and files with the scripts."""

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from helpers.common import quick_first
from separation.checkpoints import catalogue
from separation.cli.completion import commands_of, script
from separation.cli.parser import build_parser
from separation.engine.recipes import names

EXPECTED = [
    ("separation sep", {"separate"}),
    ("separation separate --rec", {"--recipe"}),
    ("separation separate x.wav --recipe de", {"demo"}),
    ("separation separate --stems all_", {"all_4", "all_6"}),
    ("separation separate --two-stems guit", {"guitar"}),
    ("separation models dow", {"download"}),
    ("separation models download htdemucs_", {"htdemucs_6s", "htdemucs_ft"}),
    ("separation bench --model-name htdemucs_f", {"htdemucs_ft"}),
    ("separation separate my", {"my song.wav"}),
    ("separation completion z", {"zsh"}),
]
WITH_EQUALS = [("separation separate --format=fl", "flac"), ("separation separate x.wav --recipe=de", "demo")]


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"needs {shell}")


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    return {f"script.{shell}": script(shell, build_parser()) for shell in ("bash", "zsh", "fish")}


@pytest.fixture
def folder(scripts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the scripts and a song."""
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "my song.wav").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def run(*command: str) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stderr == ""
    return ran.stdout


@needs("bash")
@pytest.mark.parametrize("line, found", EXPECTED)
def test_bash_completes(line: str, found: set[str], folder: Path) -> None:
    words = " ".join(f"'{word}'" for word in line.split(" "))
    code = f"source script.bash; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); _separation 2> /dev/null"
    assert set(run("bash", "-c", f'{code}; printf "%s\\n" "${{COMPREPLY[@]}}"').splitlines()) == found


@needs("bash")
@pytest.mark.parametrize("line, found", [*WITH_EQUALS, ("separation separate --progress=", "json")])
def test_bash_completes_after_an_equals_sign(line: str, found: str, folder: Path) -> None:
    words = " ".join(f"'{word}'" for word in line.replace("=", " = ").split())
    code = f"source script.bash; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); _separation 2> /dev/null"
    assert found in run("bash", "-c", f'{code}; printf "%s\\n" "${{COMPREPLY[@]}}"').splitlines()


@needs("fish")
@pytest.mark.parametrize("line, found", WITH_EQUALS)
def test_fish_completes_after_an_equals_sign(line: str, found: str, folder: Path) -> None:
    (printed,) = run("fish", "--no-config", "-c", f'source script.fish; complete -C "{line}"').splitlines()
    assert printed.partition("\t")[0].endswith(f"={found}")


@needs("fish")
@pytest.mark.parametrize("line, found", EXPECTED)
def test_fish_completes(line: str, found: set[str], folder: Path) -> None:
    printed = run("fish", "--no-config", "-c", f'source script.fish; complete -C "{line}"')
    assert {text.partition("\t")[0].replace("\\ ", " ") for text in printed.splitlines()} == found


@needs("zsh")
@pytest.mark.parametrize("line, found", quick_first([each for each in EXPECTED if len(each[1]) == 1], 1))
def test_zsh_completes(line: str, found: set[str], folder: Path) -> None:
    (word,) = found
    assert_zsh_completes(line, word.replace(" ", "\\ ").removeprefix(line.rpartition(" ")[2]), folder)


@pytest.mark.slow
@needs("zsh")
@pytest.mark.parametrize("line, found", WITH_EQUALS)
def test_zsh_completes_after_an_equals_sign(line: str, found: str, folder: Path) -> None:
    assert_zsh_completes(line, found.removeprefix(line.rpartition("=")[2]), folder)


def assert_zsh_completes(line: str, rest: str, folder: Path) -> None:
    """The Tab key adds the rest of a word to a line."""
    (folder / ".zshrc").write_text("PS1='READY '; autoload -U compinit; compinit -u; source script.zsh\n")
    process, terminal = pty.fork()
    if process == 0:
        os.execvp("zsh", ["zsh", "-i"])
    try:
        read_until(terminal, "READY ")
        os.write(terminal, f"{line}\t".encode())
        read_until(terminal, f"{line}{rest}")
    finally:
        os.kill(process, 9)
        os.waitpid(process, 0)
        os.close(terminal)


def read_until(terminal: int, text: str) -> None:
    printed, deadline = b"", time.monotonic() + 60
    while text.encode() not in printed:
        assert select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0], printed
        printed += os.read(terminal, 4096)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_has_every_command_option_model_and_recipe(shell: str) -> None:
    text = script(shell, build_parser())
    for command in commands_of(build_parser()):
        flags = [flag for option in command.options for flag in option.flags]
        assert all((f"-l {flag[2:]}" if shell == "fish" and flag[2:] else flag) in text for flag in flags if flag[2:])
        assert all(word in text for word in command.commands)
    assert all(name in text for name in (*catalogue.available(), *names()))
