"""Weights files on this computer: where they are, and whether they are the right ones.

A file is compared with the sha256 that its publisher states. If the publisher states none, or only its first digits,
the first download's sha256 is recorded in `checksums.lock`, and later downloads must match it. A verified file gets a
stamp beside it, `NAME.verified`, so that it is not hashed at every start.
"""

import contextlib
import functools
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from separation.checkpoints.description import WeightFile
from separation.checkpoints.embedded import safetensors_metadata
from separation.documents import first_line
from separation.errors import CheckpointError
from separation.system.locks import lock
from separation.system.os_errors import output_errors
from separation.system.output import not_through_links
from separation.system.places import program, shipped, size_bytes, weights_folder

SOURCE_SHA256 = "source_sha256"  # in a converted file's metadata: the sha256 of the file that it was made from

logger: logging.Logger = logging.getLogger("separation")


def local_path(file: WeightFile) -> Path:
    """The file's path; where a download would put it, if it is not here yet."""
    path = weights_folder() / file.name
    ships_with_project = file.url is None and not path.exists()
    return shipped("weights") / file.name if ships_with_project else path


def converted_path(file: WeightFile) -> Path | None:
    """The .safetensors file that `models convert` made of this file, if it is here and was made of the right file.

    Raises CheckpointError if it is damaged.
    """
    file = as_recorded(file)
    path = weights_folder() / file.name
    converted = path.with_suffix(".safetensors")
    if file.sha256 is None or converted == path or not converted.is_file():
        return None
    return converted if safetensors_metadata(converted).get(SOURCE_SHA256, "").startswith(file.sha256) else None


def known_bytes(files: Sequence[WeightFile]) -> int | None:
    """The total size of these files; None if the size of one is neither published nor recorded."""
    sizes = [as_recorded(file).bytes or size_bytes(local_path(file)) for file in files]
    return sum(sizes) if files and all(sizes) else None


def known_sha256(file: WeightFile) -> str | None:
    """The whole sha256 that a verified file has; None if it is not known."""
    sha256 = as_recorded(file).sha256
    return sha256 if sha256 and len(sha256) == 64 else None


def verify(path: Path, file: WeightFile) -> bool:
    """Raise CheckpointError unless the file at `path` has the size and the sha256 that are known.

    Returns whether a sha256 is known.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {restore_command(file)}")
    file = as_recorded(file)
    if problem := fault(path, file):
        raise CheckpointError(f"{path} {problem}: delete it, then {restore_command(file)}")
    return file.sha256 is not None


def restore_command(file: WeightFile) -> str:
    """What the user can do to get this file, as the end of an error message."""
    if file.url is None:
        return "restore it from the project's repository"
    return f"run `{program()} models download {file.checkpoint}`"


def fault(path: Path, file: WeightFile) -> str | None:
    """How the file at `path` differs from its known size and sha256; None if it does not."""
    found_bytes, problem = size_bytes(path), None
    if file.bytes is not None and found_bytes != file.bytes and not file.is_recorded:
        problem = f"has {found_bytes:,} bytes instead of {file.bytes:,}"
    elif file.sha256 is not None and not (found := _sha256(path)).startswith(file.sha256):
        problem = f"has the sha256 {found} instead of {file.sha256}"
    if problem and file.is_recorded:
        problem += f" of its first download (if its publisher has replaced it, remove its line in {_record_path()})"
    return problem


def file_state(path: Path) -> tuple[int, int]:
    """The file's size in bytes and modification time in nanoseconds, which tell a change; 0, 0 if it is missing."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


@functools.cache
def loaded_sha256(path: Path, state: tuple[int, int]) -> str:
    """The sha256 of a file that had this state when it was loaded. Raises CheckpointError if it has changed since."""
    try:
        found = _sha256(path)
        if file_state(path) == state:
            return found
    except OSError as e:
        raise CheckpointError(
            f"{path} can no longer be read ({e.strerror}): restore it, or load the model again"
        ) from e
    raise CheckpointError(f"{path} has changed since it was loaded: load the model again, or turn off the cache")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Checksums of first downloads: lines of sha256, bytes and name


def _record_path() -> Path:
    return weights_folder() / "checksums.lock"


def as_recorded(file: WeightFile) -> WeightFile:
    """The file with the recorded sha256 and size, unless its publisher states others."""
    stated = file.sha256 or ""
    if file.url is None or len(stated) == 64:
        return file
    sha256, n_bytes = _recorded().get(file.name, ("", 0))
    if not sha256 or not sha256.startswith(stated):
        return file
    return replace(file, sha256=sha256, bytes=file.bytes or n_bytes, is_recorded=True)


def _recorded() -> dict[str, tuple[str, int]]:
    """The recorded sha256 and size by file name."""
    path = _record_path()
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{path} cannot be read ({first_line(e)}): delete it") from e
    found = {}
    for number, line in enumerate(lines, start=1):
        if not (entry := re.fullmatch(r"([0-9a-f]{64}) (\d+) (\S.*)", line)):
            raise CheckpointError(f"{path} line {number} is not a sha256, a size in bytes and a name: remove it")
        found[entry[3]] = entry[1], int(entry[2])
    return found


def record(file: WeightFile, part: Path) -> WeightFile:
    """Record the sha256 and the size of the download `part`, and return the file with them."""
    path, sha256, n_bytes = _record_path(), _sha256(part), size_bytes(part)
    new = path.with_name(path.name + ".part")
    with locked(path), writing(path):
        entries = _recorded() | {file.name: (sha256, n_bytes)}
        with open(new, "w", encoding="utf-8", opener=not_through_links) as stream:
            stream.writelines(f"{entry[0]} {entry[1]} {name}\n" for name, entry in sorted(entries.items()))
        os.replace(new, path)
    logger.warning(
        f"{file.name}: the publisher states no {'full ' if file.sha256 else ''}sha256; {sha256} is recorded in {path}, "
        "and later downloads must match it"
    )
    return replace(file, sha256=sha256, bytes=n_bytes, is_recorded=True)


# ---------------------------------------------------------------------------------------------------------------------
# Stamps and locks


def _stamp_path(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _stamp_text(path: Path, file: WeightFile) -> str:
    n_bytes, modified_ns = file_state(path)
    return f"{file.sha256} {n_bytes} {modified_ns}\n"


def is_stamped(path: Path, file: WeightFile) -> bool:
    """Whether the file was verified and has not changed since. Hashing 640 MB takes a second or more."""
    try:
        return _stamp_path(path).read_text(encoding="ascii") == _stamp_text(path, file)
    except (OSError, UnicodeDecodeError):  # no stamp, or a damaged one: the file is hashed again
        return False


def stamp(path: Path, file: WeightFile) -> None:
    """Note that the file is verified, if its sha256 is known. In a read-only folder, it is hashed at every start."""
    if file.sha256 is None:
        return
    text = _stamp_text(path, file)
    with contextlib.suppress(OSError), open(_stamp_path(path), "w", encoding="ascii", opener=not_through_links) as out:
        out.write(text)


def writing(path: Path) -> contextlib.AbstractContextManager[None]:
    """Raises OutputError if a file in the weights folder cannot be written."""
    return output_errors(path, elsewhere="set SEPARATION_WEIGHTS to another folder")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock for writing `path`; waits while another process holds it."""
    file = path.with_name(path.name + ".lock")
    with contextlib.ExitStack() as stack:
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.is_symlink():  # opening it would create or change the file that it points to
                file.unlink(missing_ok=True)
            stack.enter_context(lock(file))
        try:
            yield
        finally:
            with contextlib.suppress(PermissionError):  # Windows does not remove an open file
                file.unlink(missing_ok=True)
