"""Reads environment variables."""

import math
import os

from separation.errors import InputError


def positive(name: str, default: float, *, otherwise: str = "leave it out") -> float:
    """The number in an environment variable, or the default if the variable is empty or not set.

    Raises InputError for anything but a finite number above 0. `otherwise` is an alternative that ends its message.
    """
    text = os.environ.get(name) or str(default)
    try:
        number = float(text)
        if not 0 < number < math.inf:
            raise ValueError
    except ValueError as e:
        raise InputError(f"{name} is {text!r}: set it to a number above 0, or {otherwise}") from e
    return number


def switch(name: str, *, default: bool) -> bool:
    """Whether an environment variable is `on`, or the default if the variable is empty or not set.

    Raises InputError for anything but `on` and `off`.
    """
    text = os.environ.get(name) or ("on" if default else "off")
    if text not in ("on", "off"):
        raise InputError(f"{name} is {text!r}: set it to on or off, or leave it out")
    return text == "on"
