"""Addresses in object stores, such as `s3://bucket/music/song.flac`."""

import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Self

from separation.errors import InputError

SCHEMES = ("s3", "gs")  # Amazon S3 and compatible stores; Google Cloud Storage

_URL = re.compile(rf"({'|'.join(SCHEMES)})://(.*)", re.DOTALL)


@dataclass(frozen=True, order=True)
class Url:
    """The address of an object, or of everything below a folder. Names and folders are read as in a `PurePosixPath`.

    Args:
        scheme: one of `SCHEMES`.
        bucket: the bucket's name.
        key: the object's name in the bucket, with `/` between its parts; empty for the whole bucket.
    """

    scheme: str
    bucket: str
    key: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """The address in a text. A slash at its end does not count.

        Raises InputError if the text names no bucket, or cannot be the name of a file.
        """
        match = _URL.fullmatch(text)
        bucket, _, key = match[2].partition("/") if match else ("", "", "")
        if match is None or not bucket:
            raise InputError(f"{text!r} names no bucket: write s3://BUCKET/FOLDER or gs://BUCKET/FOLDER")
        return cls(match[1], bucket, key.rstrip("/"))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> Self:
        return replace(self, key=self.key.rpartition("/")[0])

    def with_name(self, name: str) -> Self:
        return self.parent / name

    def __truediv__(self, below: PurePosixPath | str) -> Self:
        text = str(below)
        return self if text in ("", ".") else replace(self, key=f"{self.key}/{text}" if self.key else text)

    def relative_to(self, folder: object) -> PurePosixPath:
        """The rest of the address below a folder. Raises ValueError if it is not below it."""
        below = f"{folder.key}/" if isinstance(folder, Url) and folder.key else ""
        if not isinstance(folder, Url) or (folder.scheme, folder.bucket) != (self.scheme, self.bucket):
            raise ValueError(f"{self} is not below {folder}")
        if not f"{self.key}/".startswith(below):
            raise ValueError(f"{self} is not below {folder}")
        return PurePosixPath(self.key[len(below) :].lstrip("/"))  # a name may begin with a slash

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.key}" if self.key else "")


Location = Path | Url


def is_url(text: str) -> bool:
    """Whether a text is an address in an object store."""
    return _URL.fullmatch(text) is not None
