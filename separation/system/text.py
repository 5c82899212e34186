"""Text for a terminal. A song's name may hold any character that a file system allows."""

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
