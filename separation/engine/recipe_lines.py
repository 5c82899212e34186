"""What a line of a recipe says: the sources of a stem, and how they are combined.

Test-time augmentation: a source `with` several views runs its model over each of them, and the undone estimates are
averaged. A perfect model would give the same estimates for all; the errors of a real one differ, and partly cancel.
Polarity and channels are those of `--use_tta` in ZFTurbo/Music-Source-Separation-Training. Shifts are those of Demucs
(Défossez et al. 2019, arXiv:1911.13254), but evenly spaced instead of random.
"""

import re
from typing import Any, NamedTuple

from separation.documents import quoted
from separation.errors import RecipeError

RESIDUAL = "residual"
# How several sources are combined, if not by their mean; `engine/ensembles.py` computes it.
RULES = ("median", "min", "max", "median_fft", "median_fft_msst", "min_fft", "max_fft")
SHIFT_RANGE_SAMPLES = 22050  # half a second, as in Demucs; delays are shorter
MOST_SHIFTS = 20

_STEMS = r"(?P<stems>\S+(?: and \S+)*?)"
_MODEL = re.compile(
    rf"(?:(?P<stem>[\w-]+) by )?(?!{RESIDUAL}(?: |$))(?P<model>\S+)"
    rf"(?: (?P<word>of|after) {_STEMS})?(?: with (?P<views>.+))?"
)
_RESIDUAL = re.compile(rf"(?P<model>{RESIDUAL})(?: (?P<word>after) {_STEMS})?")
_SHIFTS = re.compile(r"(\d{1,4}) shifts")
_FORMS = f"a model, `STEM by MODEL`, `MODEL of STEM`, `MODEL after STEM`, {RESIDUAL!r} or `{RESIDUAL} after STEM`"


class View(NamedTuple):
    """How a model sees its input."""

    is_inverted: bool = False  # multiplied by -1
    is_swapped: bool = False  # left and right exchanged
    delay_samples: int = 0  # of silence before the input


PLAIN = View()


class Source(NamedTuple):
    """One source on a line, with its share of the stem."""

    text: str
    model: str  # or RESIDUAL
    stem: str  # of the model
    word: str | None  # `of` or `after`
    stems: tuple[str, ...]  # after that word
    views: tuple[View, ...]
    share: float


class Line(NamedTuple):
    """The sources of a stem, and the rule that combines them; None for their weighted mean."""

    sources: list[Source]
    rule: str | None


def read_line(value: object, stem: str, where: str) -> Line:
    """What the line of a stem says.

    Raises RecipeError if it makes no sense; `where` is the start of its message.
    """
    if not isinstance(value, dict):
        return Line(_with_shares(_sources(value, stem, where)), None)
    if len(value) == 1 and isinstance(sources := next(iter(value.values())), list):
        (rule,) = value
        if rule not in RULES:
            raise RecipeError(
                f"{where}: {quoted(rule)} is not a rule: write one of {', '.join(RULES)}, or [SOURCE, …] for the mean"
            )
        return Line(_with_shares(_sources(sources, stem, where)), rule)
    weighted = []
    for source, weight in value.items():
        found = _source(source, stem, where)
        if source in RULES and not isinstance(weight, int | float):
            raise RecipeError(
                f"{where}: {source} is a rule for one list of sources: write {{{source}: [SOURCE, SOURCE]}}"
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e9:
            raise RecipeError(
                f"{where}: the weight of {quoted(source)} is {quoted(weight)}: write a number above 0 and below 1e9"
            )
        weighted.append(found._replace(share=weight))
    return Line(_with_shares(weighted or [_source(value, stem, where)]), None)


def read_views(text: str, where: str) -> tuple[View, ...]:
    """The views that `polarity`, `channels`, `tta` for both, and `4 shifts` stand for, joined by ` and `.

    The plain input is the first of them. Shifts apply to each of the others. Delays are multiples of the range over
    their number, so that twice as many contain all of the first.

    Raises RecipeError for anything else; `where` is the start of its message.
    """
    mirrored, n_shifts = {PLAIN: None}, 1
    for word in text.split(" and "):
        shifts = _SHIFTS.fullmatch(word)
        if shifts and 2 <= int(shifts[1]) <= MOST_SHIFTS:
            n_shifts = int(shifts[1])
        elif word in ("channels", "polarity", "tta"):
            mirrored |= {View(is_swapped=True): None} if word != "polarity" else {}
            mirrored |= {View(is_inverted=True): None} if word != "channels" else {}
        else:
            raise RecipeError(
                f"{where}: {quoted(word)} is not a view of the song: write polarity, channels, tta or `2 shifts`, at "
                f"most {MOST_SHIFTS}"
            )
    delays = [SHIFT_RANGE_SAMPLES * shift // n_shifts for shift in range(n_shifts)]
    return tuple(view._replace(delay_samples=delay) for view in mirrored for delay in delays)


def _sources(value: Any, stem: str, where: str) -> list[Source]:
    listed = value if isinstance(value, list) else [value]
    return [_source(source, stem, where) for source in listed or [value]]


def _source(text: Any, stem: str, where: str) -> Source:
    match = (_RESIDUAL.fullmatch(text) or _MODEL.fullmatch(text)) if isinstance(text, str) else None
    if match is None:
        raise RecipeError(f"{where}: {quoted(text)} is not a source: write {_FORMS}")
    found = match.groupdict()
    stems = tuple(found["stems"].split(" and ")) if found["stems"] else ()
    views = read_views(found["views"], where) if found.get("views") else (PLAIN,)
    return Source(text, found["model"], found.get("stem") or stem, found["word"], stems, views, 1.0)


def _with_shares(sources: list[Source]) -> list[Source]:
    total = sum(source.share for source in sources)
    return [source._replace(share=source.share / total) for source in sources]
