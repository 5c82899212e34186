"""The one place where a failed write becomes an `OutputError`."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from separation.documents import first_line
from separation.errors import OutputError

WORK_PREFIX = ".separating-"  # of the hidden folders in which files are written before they are published

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_staging: set[Path] = set()  # temporary folders in use


@contextmanager
def staging(folder: Path) -> Iterator[None]:
    """Within the context, an `OutputError` about a file below this temporary folder names the variable TMPDIR."""
    _staging.add(folder)
    try:
        yield
    finally:
        _staging.remove(folder)


@contextmanager
def output_errors(
    target: Path, *also: type[Exception], doing: str = "write to", elsewhere: str = "choose another folder"
) -> Iterator[None]:
    """Raise `OutputError` in place of an `OSError`, or of an error of the other kinds in `also`.

    The message names `target`, a file or a folder, without any hidden work folder in its path. `elsewhere` tells the
    user how to use another place; if the disk is full, the message first asks for free space, and if a name is too
    long, for a shorter one.
    """
    kinds: tuple[type[Exception], ...] = (OSError, *also)
    try:
        yield
    except kinds as e:
        reason = getattr(e, "strerror", None) or first_line(e)
        visible = repr(str(Path(*(part for part in target.parts if not part.startswith(WORK_PREFIX)))))
        if staged := next((folder for folder in [*_staging] if folder in target.parents), None):
            visible, elsewhere = f"the temporary folder {str(staged.parent)!r}", "set TMPDIR to another folder"
        number, action = getattr(e, "errno", None), elsewhere
        if number in DISK_FULL:
            action = f"free space there, or {elsewhere}"
        elif number == errno.ENAMETOOLONG:
            action = "give the song a shorter name"
        raise OutputError(f"cannot {doing} {visible} ({reason}): {action}") from e
