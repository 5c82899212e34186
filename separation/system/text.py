"""Text for a terminal. A song's name may hold any character that a file system allows."""

from collections.abc import Iterable
from difflib import get_close_matches
from unicodedata import category

# Control characters move the cursor, clear the screen or ring the bell. Format characters reverse or hide what follows.
# Lone surrogates stand for bytes that are not UTF-8, and cannot be printed.
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # format characters that some languages and many emoji need


def shown(text: str) -> str:
    """The text on one line, with escapes such as `\\x1b` in place of characters that a terminal would interpret."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode() if _is_unsafe(character) else character for character in text
    )


def _is_unsafe(character: str) -> bool:
    return category(character) in _UNSAFE and character not in _JOINERS


def close_matches(word: str, choices: Iterable[str], *, most: int = 4) -> list[str]:
    """The choices that somebody who typed `word` may have meant: those with all its parts in them, else similar ones.

    The parts are what `_`, `-` and spaces divide, in lowercase.
    """
    typed, choices = word.lower(), list(choices)
    parts = typed.replace("-", "_").replace(" ", "_").split("_")
    within = [choice for choice in choices if all(part in choice.lower() for part in parts)] if typed else []
    return sorted(within, key=len)[:most] or get_close_matches(typed, choices, n=most)
