"""Converts the values of arguments. argparse prints their errors after the argument's name."""

import re
from argparse import ArgumentTypeError
from pathlib import Path

from separation.batch.urls import Location, Url, is_url
from separation.errors import InputError
from separation.evaluation.choice import SCORES

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def given(text: str) -> str:
    """Any text that is not empty."""
    if not text:  # often an unset variable of a shell; as a path it would be the current folder
        raise ArgumentTypeError("it is empty: give a value, or leave it out")
    return text


def path(text: str) -> Path:
    """A path on this computer."""
    if _ADDRESS.match(text):
        raise ArgumentTypeError(f"{text!r} is an address: give a path on this computer")
    return Path(given(text))


def output_folder(text: str) -> Location:
    """A folder, an address in an object store, or `-` for stdout; `./-` is a folder."""
    if is_url(text):
        try:
            return Url.parse(text)
        except InputError as e:
            raise ArgumentTypeError(str(e)) from e
    if _ADDRESS.match(text):
        raise ArgumentTypeError(
            f"{text!r} is no place to write to: give a folder, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER"
        )
    folder = path(text)
    return folder.absolute() if text != "-" and folder == Path("-") else folder


def batch_size(text: str) -> int | str:
    """`auto`, or a number of chunks."""
    if text != "auto" and not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} must be auto or a whole number from 1 up")
    return text if text == "auto" else int(text)


def seconds(text: str) -> int | str:
    """`auto`, or whole seconds."""
    if text != "auto" and not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} must be auto or a whole number of seconds")
    return text if text == "auto" else int(text)


def time(text: str) -> float:
    """Seconds, or minutes and seconds, or hours, minutes and seconds: `80`, `1:20.5`, `1:02:03`. Returns seconds."""
    if not re.fullmatch(r"(\d{1,3}:)?(\d{1,5}:)?\d{1,6}(\.\d{1,6})?", text, re.ASCII):
        raise ArgumentTypeError(f"{text!r} must be a time such as 1:20, 1:20.5 or 80")
    parts = [float(part) for part in reversed(text.split(":"))]
    return sum(part * (1, 60, 3600)[power] for power, part in enumerate(parts))


def sample_rate(text: str) -> int | str:
    """Hertz, or a name, which the parser's choices check."""
    return int(text) if text.isdecimal() else text


def bitrate(text: str) -> int | str:
    """kbit/s, or a word, which the parser's choices check."""
    return int(text) if text.isdecimal() else text


def count(text: str) -> int:
    """A whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} must be a whole number from 1 up")
    return int(text)


def retries(text: str) -> int:
    """A whole number from 0 up, of one digit."""
    if not re.fullmatch(r"\d", text, re.ASCII):
        raise ArgumentTypeError(f"{text!r} must be a whole number from 0 to 9")
    return int(text)


def gpus(text: str) -> tuple[int, ...]:
    """Numbers of GPUs with commas between them."""
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", text, re.ASCII):
        raise ArgumentTypeError(f"{text!r} must be numbers of GPUs with commas between them, such as 0,1")
    numbers = tuple(map(int, text.split(",")))
    if doubled := [number for number in numbers if numbers.count(number) > 1]:
        raise ArgumentTypeError(f"{text!r} names GPU {doubled[0]} twice: name each once")
    return numbers


def scores(text: str) -> tuple[str, ...]:
    """Names of scores with commas between them, or `all`."""
    names = tuple(SCORES) if text == "all" else tuple(text.split(","))
    if unknown := [name for name in names if name not in SCORES]:
        raise ArgumentTypeError(f"{unknown[0]!r} is not a score: choose from {', '.join(SCORES)}, or all")
    return names


def capabilities(text: str) -> list[int]:
    """Compute capabilities times ten, with commas between them."""
    if not re.fullmatch(r"[1-9]\d{1,2}(,[1-9]\d{1,2})*", text):
        raise ArgumentTypeError(f"{text!r} must be compute capabilities times ten, such as 80,90")
    return [int(number) for number in text.split(",")]
