"""Addresses in object stores are read as paths are."""

from pathlib import Path, PurePosixPath

import pytest

from separation.batch.urls import Url, is_url
from separation.errors import InputError


def test_an_address_has_the_parts_of_a_path() -> None:
    url = Url.parse("s3://bucket/music/a b/song.tar.flac")
    assert (url.scheme, url.bucket, url.name, url.suffix) == ("s3", "bucket", "song.tar.flac", ".flac")
    assert str(url) == "s3://bucket/music/a b/song.tar.flac" and str(url.parent) == "s3://bucket/music/a b"
    assert url.relative_to(Url.parse("s3://bucket/music")) == PurePosixPath("a b/song.tar.flac")
    assert url.parent / "x" / "." == url.with_name("x") == Url("s3", "bucket", "music/a b/x")
    assert Url.parse("gs://bucket/") == Url.parse("gs://bucket") == Url("gs", "bucket")
    assert str(Url("gs", "bucket") / PurePosixPath("a/b")) == "gs://bucket/a/b"
    assert url.relative_to(url) == PurePosixPath(".")


def test_a_name_may_begin_with_a_slash() -> None:
    url = Url.parse("s3://bucket//music//song.wav")
    assert str(url) == "s3://bucket//music//song.wav"
    assert url.relative_to(Url("s3", "bucket")) == PurePosixPath("music/song.wav")
    assert url.relative_to(Url("s3", "bucket", "/music")) == PurePosixPath("song.wav")


@pytest.mark.parametrize("folder", ["s3://bucket/mus", "gs://bucket/music", "s3://other/music", Path("music")])
def test_an_address_is_not_below_another_folder(folder: str | Path) -> None:
    with pytest.raises(ValueError):
        Url.parse("s3://bucket/music/song").relative_to(folder if isinstance(folder, Path) else Url.parse(folder))


@pytest.mark.parametrize("text", ["s3://", "s3:///key", "gs:bucket", "http://host/a.wav"])
def test_an_address_without_a_bucket_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="names no bucket"):
        Url.parse(text)


def test_only_object_stores_have_such_addresses() -> None:
    assert is_url("s3://bucket") and is_url("gs://bucket/a\nb")
    assert not is_url("https://host/a.wav") and not is_url("music/s3://a") and not is_url("s3")
