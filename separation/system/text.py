"""Text for a terminal. A song's name may hold anything that a file system takes."""

from unicodedata import category

# Control characters move the cursor, clear the screen or ring; format characters reverse or hide what follows; lone
# surrogates, which stand for bytes that are no UTF-8, cannot be written.
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"  # format characters that words of some languages and many emoji are spelt with


def shown(text: str) -> str:
    """The text on one line, with escapes such as `\\x1b` in place of characters that a terminal would act on."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode() if _is_unsafe(character) else character for character in text
    )


def _is_unsafe(character: str) -> bool:
    return category(character) in _UNSAFE and character not in _JOINERS
