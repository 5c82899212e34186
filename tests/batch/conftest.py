"""Fixtures for songs in object stores."""

from collections.abc import Iterator
from typing import Any

import pytest

from helpers.s3_server import Bucket, s3_server


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """A local S3 server, and a file system of it."""
    for package in ("s3fs", "moto.server", "flask"):
        pytest.importorskip(package)
    with s3_server() as started:
        yield started


@pytest.fixture
def bucket(s3: Any) -> Bucket:
    """An empty bucket."""
    server, files = s3
    return Bucket(files, server)
