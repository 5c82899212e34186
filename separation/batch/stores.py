"""Objects in a store: Amazon S3, stores that speak its protocol, and Google Cloud Storage, through fsspec.

A request that fails for a passing reason is repeated with backoff. A file is uploaded in parts, so that it appears
whole or not at all, and memory does not grow with it. Uploaded objects carry the name of their run as metadata, which
tells later runs that this program wrote them.
"""

import errno
import logging
import mimetypes
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from separation.batch.urls import Url
from separation.documents import first_line
from separation.errors import InputError, OutputError, SeparationError
from separation.progress import Progress
from separation.system import signals
from separation.system.os_errors import output_errors

PART_BYTES = 2**24  # of an upload or download at once; S3 takes 10,000 parts
PATIENCE_SECONDS = 300.0  # how long to repeat a request that fails
CLEANING_SECONDS = 10.0  # the same, to remove objects after a failure
LONGEST_WAIT_SECONDS = 20.0  # between two attempts
NOTICE_SECONDS = 5.0  # after which it is said that a store does not answer, and then every minute
RUN = "separation-run"  # the metadata with the name of the run that wrote an object

_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
_LOG_IN = {
    "s3": "run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound"}
_BAD_CREDENTIALS = {"CredentialRetrievalError", "TokenRetrievalError", "UnauthorizedSSOTokenError", "RefreshError"}
_BAD_CODES = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
_PASSING = {  # names of the classes of errors that pass; the libraries that have them need not be there
    "HTTPClientError",
    "ConnectionError",
    "EndpointConnectionError",
    "ResponseParserError",
    "IncompleteRead",
    "TimeoutError",
    "ClientError",  # of aiohttp; s3fs turns botocore's into an OSError
    "HttpError",
    "RequestException",
    "TransportError",
    "ChecksumError",
}
_LIBRARIES = {"botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec", "gcsfs", "google", "requests", "asyncio"}
_PASSING_CODES = {"IncompleteBody", "BadDigest"}  # of an upload, which is then begun again
_PASSING_STATUSES = {408, 409, 425, 429, *range(500, 600)}
_FINAL_ERRNOS = {errno.EINVAL, errno.ENAMETOOLONG, errno.EPERM}

logger: logging.Logger = logging.getLogger("separation")

Result = TypeVar("Result")


@dataclass(frozen=True)
class StoredObject:
    """An object in a store.

    Attributes:
        url: its address.
        n_bytes: its size.
        tag: its checksum as the store tells it. A new content has a new tag.
        run: the run of this program that wrote it; empty if none did, or if it comes from a listing.
    """

    url: Url
    n_bytes: int
    tag: str
    run: str = ""


class NotPermittedError(InputError):
    """The credentials do not allow to read."""


class UnreachableError(SeparationError):
    """A store does not answer, or fails for another passing reason."""


class ChangedError(SeparationError):
    """An object changed while it was read."""


class Store:
    """All buckets of a kind of store.

    Args:
        scheme: one of `urls.SCHEMES`.
        patience: for how many seconds to repeat a request that fails for a passing reason.

    Raises InputError if the package for it is missing. All methods raise InputError if they may not read, or if a
    bucket does not exist; OutputError if they may not write; and UnreachableError if the store does not answer.
    """

    def __init__(self, scheme: str, patience: float = PATIENCE_SECONDS) -> None:
        self._scheme = scheme
        self._patience = patience
        self._noticed = -60.0  # when it was last said that the store does not answer
        options: dict[str, Any] = {"use_listings_cache": False}
        if scheme == "s3":  # requests are repeated here
            options |= {"config_kwargs": {"retries": {"max_attempts": 1}}}
        try:
            import fsspec  # takes a while, and few songs are in a store

            self._files: Any = fsspec.filesystem(scheme, **options)
            for name in ("fsspec", "s3fs", "gcsfs"):  # what matters is told as an error or a warning of this program
                logging.getLogger(name).addHandler(logging.NullHandler())
                logging.getLogger(name).propagate = False
        except ImportError as e:
            name = _PACKAGES[scheme]
            raise InputError(f"{scheme}:// needs the package {name} ({first_line(e)}): pip install {name}") from e
        except Exception as e:
            raise _told(e, Url(scheme, "")) from e

    def check_bucket(self, url: Url) -> None:
        """Raise InputError if the bucket of an address does not exist, as far as the credentials allow to see that."""
        try:
            with suppress(NotPermittedError):
                self._repeated(url, lambda: self._files.info(url.bucket), doing="look at")
        except FileNotFoundError as e:
            raise _told(e, url) from e

    def objects(self, folder: Url) -> list[StoredObject]:
        """The objects below a folder, in order of their names."""
        try:
            found = self._repeated(folder, lambda: self._files.find(_path(folder), detail=True))
        except FileNotFoundError as e:
            raise _told(e, folder) from e
        below = f"{folder.key}/" if folder.key else ""
        objects = []
        for name, facts in sorted(found.items()):
            key = name.partition("/")[2]
            if facts["type"] == "file" and key.startswith(below) and not key.endswith("/"):
                url = Url(folder.scheme, folder.bucket, key)
                objects.append(StoredObject(url, int(facts["size"]), self._tag(facts)))
        return objects

    def head(self, url: Url) -> StoredObject | None:
        """An object, if it exists."""
        try:
            facts = self._repeated(url, lambda: self._facts(url))
        except FileNotFoundError:
            return None
        if facts.get("type") == "directory":  # gcsfs has found objects below it
            return None
        size = facts["ContentLength"] if self._scheme == "s3" else facts["size"]
        metadata = facts.get("Metadata" if self._scheme == "s3" else "metadata") or {}
        return StoredObject(url, int(size), self._tag(facts), str(metadata.get(RUN, "")))

    def exists(self, url: Url) -> bool:
        """Whether there is an object of that name, or one below it."""
        found: bool = self._repeated(url, lambda: self._files.exists(_path(url)))
        return found

    def read(self, url: Url) -> bytes | None:
        """The content of a small object, if it exists."""
        try:
            content: bytes = self._repeated(url, lambda: self._files.cat_file(_path(url)))
        except FileNotFoundError:
            return None
        return content

    def download(self, found: StoredObject, path: Path, progress: Progress = Progress()) -> None:
        """Copy an object to a new file, which appears complete or not at all.

        Raises ChangedError if it is not the object any more that was found.
        """
        part = path.with_name(".part")  # not longer than the name, which may be as long as names can be
        reader = _Reader(self, found, part, progress)
        try:
            while not reader.is_complete():
                self._repeated(found.url, reader.read_part)
            if self.head(found.url) != found:
                raise ChangedError(f"{str(found.url)!r} changed while it was read: run it again")
            with output_errors(path):
                os.replace(part, path)
        except FileNotFoundError as e:
            raise ChangedError(f"{str(found.url)!r} was removed while it was read: run it again") from e
        finally:
            part.unlink(missing_ok=True)

    def upload(self, path: Path, url: Url, run: str, progress: Progress = Progress()) -> StoredObject:
        """Copy a file to an object and return it. If another run replaces it at once, that is returned."""

        def attempt() -> None:
            with path.open("rb") as file, self._writing(url, run) as writer:
                n_bytes = max(1, path.stat().st_size)
                while block := file.read(PART_BYTES):
                    writer.write(block)
                    progress(file.tell() / n_bytes, "uploading")

        self._written(url, attempt)
        found = self.head(url)
        if found is None or (found.run == run and found.n_bytes != path.stat().st_size):
            raise OutputError(f"{str(url)!r} is not what was uploaded: check what else writes to the bucket")
        return found

    def write(self, content: bytes, url: Url, run: str) -> None:
        """Write a small object."""

        def attempt() -> None:
            with self._writing(url, run) as writer:
                writer.write(content)

        self._written(url, attempt)

    def remove(self, url: Url) -> None:
        """Remove an object, unless it is gone already."""
        with suppress(FileNotFoundError):
            self._repeated(url, lambda: self._files.rm_file(_path(url)), doing="remove")

    def open(self, url: Url) -> Any:
        """Open an object for reading, a part at a time."""
        return self._files.open(_path(url), "rb", block_size=PART_BYTES, cache_type="none")

    @contextmanager
    def _writing(self, url: Url, run: str) -> Iterator[Any]:
        """A new object to write to. Without an error it appears at the end; with one, its parts are discarded."""
        kind = mimetypes.guess_type(url.name)[0] or "application/octet-stream"
        facts: dict[str, Any] = {"metadata": {RUN: run}, "content_type": kind}
        if self._scheme == "s3":
            facts = {"Metadata": {RUN: run}, "ContentType": kind}
        writer = self._files.open(_path(url), "wb", block_size=PART_BYTES, **facts)
        try:
            yield writer
            writer.close()
        except BaseException:
            writer.closed = True  # otherwise its destructor would finish the upload
            with suppress(Exception):  # the first error counts; a store removes parts after some days
                writer.discard()
            raise

    def _facts(self, url: Url) -> Any:
        if self._scheme != "s3":
            return self._files.info(_path(url))
        try:  # `info` has no metadata
            return self._files.call_s3("head_object", Bucket=url.bucket, Key=url.key)
        except PermissionError:  # without a reason, which the answer to another kind of request has
            self._files.call_s3("get_object", Bucket=url.bucket, Key=url.key, Range="bytes=0-0")
            raise

    def _tag(self, facts: Any) -> str:
        return str(facts["ETag"]).strip('"') if self._scheme == "s3" else str(facts.get("crc32c") or facts["etag"])

    def _written(self, url: Url, attempt: Callable[[], Result]) -> Result:
        """Write an object, and once more if "not found" is the answer.

        That means that the bucket is missing, or that the upload is finished already but the first answer was lost.
        """
        with suppress(FileNotFoundError):
            return self._repeated(url, attempt, doing="write")
        try:
            return self._repeated(url, attempt, doing="write")
        except FileNotFoundError as e:
            raise _told(e, url, "write") from e

    def _repeated(self, url: Url, attempt: Callable[[], Result], doing: str = "read") -> Result:
        """Call `attempt` until it succeeds. Any other error than a passing one ends this, and so does the patience.

        Raises FileNotFoundError if there is no such object or bucket.
        """
        start, wait = time.monotonic(), 0.5
        while True:
            try:
                return attempt()
            except FileNotFoundError:
                raise
            except Exception as e:
                if not _is_from_store(e):  # an error of this program, or what cancels the song
                    raise
                passed = time.monotonic() - start
                if not _is_passing(e) or passed > self._patience:
                    raise _told(e, url, doing) from e
                signals.check()  # in threads, which no signal interrupts
                self._notice(e, url, passed)
            time.sleep(wait * random.uniform(0.5, 1))  # so that many workers do not repeat at once
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    def _notice(self, error: Exception, url: Url, passed: float) -> None:
        """Say that the store has not answered for a while, for all threads once a minute; not again while cleaning."""
        is_due = passed > NOTICE_SECONDS and time.monotonic() - self._noticed > 60
        if is_due and self._patience > CLEANING_SECONDS:
            self._noticed = time.monotonic()
            bucket, minutes = f"{url.scheme}://{url.bucket}", self._patience / 60
            logger.warning("%s does not answer (%s): asked again for %.0f minutes", bucket, _reason(error), minutes)


class _Reader:
    """Copies an object to a file, part after part; a part that fails is read again."""

    def __init__(self, store: Store, found: StoredObject, path: Path, progress: Progress) -> None:
        self._store, self._found, self._path, self._progress = store, found, path, progress
        self._n_bytes = 0
        with output_errors(path):
            path.write_bytes(b"")

    def is_complete(self) -> bool:
        return self._n_bytes == self._found.n_bytes

    def read_part(self) -> None:
        with self._store.open(self._found.url) as reader:
            reader.seek(self._n_bytes)
            while block := reader.read(PART_BYTES):
                with output_errors(self._path), self._path.open("ab") as file:
                    file.write(block)
                self._n_bytes += len(block)
                self._progress(min(1.0, self._n_bytes / max(1, self._found.n_bytes)), "downloading")
        if self._n_bytes != self._found.n_bytes:
            raise ChangedError(f"{str(self._found.url)!r} changed while it was read: run it again")


@cache
def store(scheme: str, patience: float = PATIENCE_SECONDS) -> Store:
    """The store for addresses of a scheme."""
    return Store(scheme, patience)


def _path(url: Url) -> str:
    return f"{url.bucket}/{url.key}".rstrip("/")


def _names(error: BaseException) -> set[str]:
    """The names of an error's class and of its base classes."""
    return {kind.__name__ for kind in type(error).__mro__}


def _code(error: BaseException) -> str:
    """The code that a store gave for an error, if any."""
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    return str(getattr(error, "code", ""))


def _status(error: BaseException) -> int:
    """The HTTP status with which a store answered; 0 if there is none."""
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(getattr(error, "code", ""))
    return int(code) if code.isdecimal() else 0


def _is_from_store(error: Exception) -> bool:
    if isinstance(error, ValueError) and str(error).startswith("Bad Request"):  # of gcsfs
        return True
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _LIBRARIES


def _reason(error: Exception) -> str:
    """Why a store refused or did not answer. It never has an address with a query, which could hold a signature."""
    text = str(error).strip()
    starts_with_path = text.startswith(("Forbidden", "Bad Request"))  # of gcsfs
    line = text.rpartition("\n")[2] if starts_with_path else getattr(error, "strerror", None) or first_line(error)
    return str(line).partition("?")[0].rstrip(". ")


def _is_passing(error: Exception) -> bool:
    code = _code(error)
    if code in _PASSING_CODES or isinstance(error, TimeoutError):
        return True
    if isinstance(error, FileNotFoundError | PermissionError | FileExistsError) or "Forbidden" in str(error):
        return False
    if "FileExpired" in _names(error):
        return False
    if _names(error) & (_NO_CREDENTIALS | _BAD_CREDENTIALS) or code in _BAD_CODES:
        return False
    if status := _status(error):
        return status in _PASSING_STATUSES
    if isinstance(error, OSError):
        return error.errno not in _FINAL_ERRNOS
    return bool(_names(error) & _PASSING)


def _told(error: Exception, url: Url, doing: str = "read") -> SeparationError:
    """The error as a sentence."""
    bucket, log_in = f"{url.scheme}://{url.bucket}", _LOG_IN[url.scheme]
    reason, code = _reason(error), _code(error)
    if "FileExpired" in _names(error):
        return ChangedError(f"{str(url)!r} changed while it was read: run it again")
    if _names(error) & _NO_CREDENTIALS:
        return InputError(f"there are no credentials for {bucket} ({reason}): {log_in}")
    if _names(error) & _BAD_CREDENTIALS or code in (*_BAD_CODES, "401"):
        return InputError(f"{bucket} refuses the credentials ({reason}): {log_in}")
    if isinstance(error, FileNotFoundError):
        return InputError(f"{bucket} does not exist: check the name of the bucket")
    if isinstance(error, PermissionError) or "Forbidden" in str(error):
        kind = OutputError if doing in ("write", "remove") else NotPermittedError
        return kind(f"no permission to {doing} {str(url)!r} ({reason}): check what the credentials allow")
    if "ParamValidationError" in _names(error) and "bucket name" in str(error):
        return InputError(f"{bucket} is not a valid name of a bucket: check the address")
    if _is_passing(error):
        return UnreachableError(f"cannot {doing} {str(url)!r} ({reason}): check the network, and run it again")
    return InputError(f"cannot {doing} {str(url)!r} ({reason}): check the address")
