"""Objects are read and written whole or not at all; what goes wrong is one sentence without a secret."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.s3_server import CREDENTIALS, Bucket
from separation.batch import stores
from separation.batch.stores import ChangedError, Store, StoredObject
from separation.batch.urls import Url
from separation.errors import InputError, OutputError, SeparationError
from separation.progress import Progress


def url(bucket: Bucket, key: str = "") -> Url:
    return Url("s3", bucket.name, key)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """fsspec reads the environment again."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    yield monkeypatch
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_file_goes_to_a_store_and_back_and_its_run_is_known(bucket: Bucket, tmp_path: Path) -> None:
    store, shares = Store("s3"), list[float]()
    (tmp_path / "a.wav").write_bytes(b"123")
    found = store.upload(tmp_path / "a.wav", url(bucket, "x/a.wav"), "run 1", Progress(lambda s, _: shares.append(s)))
    assert (found.n_bytes, found.run, found.tag) == (3, "run 1", "202cb962ac59075b964b07152d234b70")
    assert store.objects(url(bucket, "x")) == [StoredObject(found.url, 3, found.tag)] and shares == [1.0]
    store.download(found, tmp_path / "b.wav")
    assert (tmp_path / "b.wav").read_bytes() == b"123" and bucket.get("x/a.wav") == b"123"
    bucket.put("x/a.wav", b"other")
    theirs = store.head(found.url)
    assert theirs is not None and theirs.run == "" and store.read(found.url) == b"other"
    store.remove(found.url)
    assert store.head(found.url) is None and store.read(found.url) is None and store.objects(url(bucket)) == []


def test_a_large_file_is_sent_in_parts_and_an_upload_that_is_cancelled_leaves_nothing(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "PART_BYTES", 5 * 2**20)
    content = os.urandom(12 * 2**20)
    (tmp_path / "a.wav").write_bytes(content)
    store, target = Store("s3"), url(bucket, "a.wav")

    def cancel(share: float, stage: str) -> None:
        if share > 0.5:
            raise KeyError("cancelled")

    with pytest.raises(KeyError, match="cancelled"):
        store.upload(tmp_path / "a.wav", target, "run", Progress(cancel))
    assert bucket.keys() == [] and bucket.uploads() == []
    found = store.upload(tmp_path / "a.wav", target, "run")
    assert "-" in found.tag and found.run == "run" and bucket.uploads() == []
    with pytest.raises(KeyError, match="cancelled"):
        store.download(found, tmp_path / "b.wav", Progress(cancel))
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
    store.download(found, tmp_path / "b.wav")
    assert (tmp_path / "b.wav").read_bytes() == content


def test_an_object_that_changes_while_it_is_read_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    store = Store("s3")
    bucket.put("a.wav", b"1234")
    found = store.head(url(bucket, "a.wav"))
    assert found is not None
    for content in (b"4321", b"longer"):
        bucket.put("a.wav", content)
        with pytest.raises(ChangedError, match="changed while it was read: run it again"):
            store.download(found, tmp_path / "a.wav")
    bucket.remove("a.wav")
    with pytest.raises(ChangedError, match="was removed while it was read"):
        store.download(found, tmp_path / "a.wav")
    assert not list(tmp_path.iterdir())


def test_a_store_that_does_not_answer_for_a_while_is_asked_again(
    bucket: Bucket, fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.wav").write_bytes(b"123")
    bucket.server.stop()

    def wait(seconds: float) -> None:  # until the server is back, instead
        fresh.undo()
        bucket.server.start()

    fresh.setattr(stores.time, "sleep", wait)
    found = Store("s3", patience=60).upload(tmp_path / "a.wav", url(bucket, "a.wav"), "run")
    assert found.n_bytes == 3 and bucket.get("a.wav") == b"123"


def test_a_store_that_does_not_answer_at_all_is_an_error(bucket: Bucket, fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(SeparationError) as caught:
        Store("s3", patience=0).objects(url(bucket))
    message = str(caught.value)
    assert message.startswith(f"cannot read '{bucket}' (Could not connect to the endpoint URL: ")
    assert message.endswith("check the network, and run it again") and "?" not in message


@pytest.mark.parametrize(
    "kind, words",
    [
        ("no credentials", "there are no credentials for s3://BUCKET: run `aws configure`, or set AWS_ACCESS_KEY_ID"),
        ("other credentials", "s3://BUCKET refuses the credentials (The AWS Access Key Id you provided does not exist"),
        ("no bucket", "s3://BUCKET does not exist: check the name of the bucket"),
        ("no name of a bucket", "check the address"),
    ],
)
def test_what_goes_wrong_is_one_sentence_without_a_secret(
    kind: str, words: str, bucket: Bucket, fresh: pytest.MonkeyPatch
) -> None:
    name = bucket.name
    if kind == "no credentials":
        for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            fresh.delenv(variable)
    elif kind == "other credentials":
        bucket.check_credentials_after(0)
    else:
        name = "missing-bucket" if kind == "no bucket" else "NO_%_NAME"
    try:
        with pytest.raises(InputError) as caught:
            Store("s3", patience=0).objects(Url("s3", name, "music"))
    finally:
        bucket.check_credentials_after(10**9)
    message = str(caught.value)
    assert words.replace("BUCKET", name) in message and "\n" not in message
    assert not any(value in message for key, value in CREDENTIALS.items() if "KEY" in key)


def test_what_may_not_be_written_or_read_is_one_sentence(bucket: Bucket, fresh: pytest.MonkeyPatch) -> None:
    key = bucket.key_that_may_only_list()
    fresh.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    fresh.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    bucket.check_credentials_after(0)
    try:
        store = Store("s3", patience=0)
        assert store.objects(url(bucket)) == []
        with pytest.raises(OutputError, match=rf"no permission to write '{bucket}/a.wav': check what the credentials"):
            store.write(b"1", url(bucket, "a.wav"), "run")
        with pytest.raises(InputError, match=rf"no permission to read '{bucket}/a.wav'"):
            store.head(url(bucket, "a.wav"))
    finally:
        bucket.check_credentials_after(10**9)


@pytest.mark.parametrize("scheme, package", [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named(scheme: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(scheme: str, **options: object) -> None:
        raise ImportError(f"No module named {package!r}")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(InputError, match=rf"^{scheme}:// needs the package {package} \(.*\): pip install {package}$"):
        Store(scheme)
