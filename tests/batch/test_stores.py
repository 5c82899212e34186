"""Objects are read and written whole or not at all; what goes wrong is one sentence without a secret."""

import logging
import os
from collections.abc import Iterator
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import pytest

from helpers.common import quick_first
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


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, alone in a list, which passes only when the store sleeps."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(stores.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stores.time, "sleep", sleep)
    return now


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
    for _ in range(2):
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
        (
            "no credentials",
            "for s3://BUCKET (Unable to locate credentials): run `aws configure`, or set AWS_ACCESS_KEY_ID",
        ),
        ("no profile", "there are no credentials for s3://BUCKET (The config profile (none) could not be found): run"),
        ("other credentials", "s3://BUCKET refuses the credentials (The AWS Access Key Id you provided does not exist"),
        ("no bucket", "s3://BUCKET does not exist: check the name of the bucket"),
        ("no name of a bucket", "s3://NO_%_NAME is not a valid name of a bucket: check the address"),
    ],
)
@pytest.mark.parametrize("asked", quick_first(["objects", "head"], 1))
def test_what_goes_wrong_is_one_sentence_without_a_secret(
    asked: str, kind: str, words: str, bucket: Bucket, fresh: pytest.MonkeyPatch
) -> None:
    name = bucket.name
    if kind == "no credentials":
        for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            fresh.delenv(variable)
    elif kind == "no profile":
        fresh.setenv("AWS_PROFILE", "none")
    elif kind == "other credentials":
        bucket.check_credentials_after(0)
    else:
        name = "missing-bucket" if kind == "no bucket" else "NO_%_NAME"
    try:
        with pytest.raises(InputError) as caught:
            getattr(Store("s3", patience=0), "objects" if kind == "no bucket" else asked)(Url("s3", name, "music"))
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
        with pytest.raises(OutputError, match=rf"no permission to write '{bucket}/a.wav' \(.+\): check what the"):
            store.write(b"1", url(bucket, "a.wav"), "run")
        with pytest.raises(InputError, match=rf"no permission to read '{bucket}/a.wav'"):
            store.head(url(bucket, "a.wav"))
    finally:
        bucket.check_credentials_after(10**9)


@pytest.mark.parametrize(
    "code, status, message, expected",
    [
        (
            "InvalidObjectState",
            403,
            "The object is archived.",
            "no permission to write 's3://b/k' (The object is archived)",
        ),
        ("RequestTimeTooSkewed", 403, "The clock is wrong.", "no permission to write 's3://b/k' (The clock is wrong)"),
        ("KMS.DisabledException", 400, "The key is disabled.", "The key is disabled): check the address"),
        ("PermanentRedirect", 301, "Use another endpoint.", "Use another endpoint): check the address"),
        ("NoSuchUpload", 404, "It is finished already, and the answer was lost.", None),
        ("SlowDown", 503, "Please reduce your request rate.", None),
        ("RequestTimeout", 400, "The connection was idle.", None),
        ("TooManyRequests", 429, "Slow down.", None),
    ],
)
def test_only_errors_that_pass_are_repeated_and_others_keep_their_reason(
    code: str, status: int, message: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = pytest.importorskip("s3fs.errors")
    from botocore.exceptions import ClientError

    answer: Any = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    failures = iter([errors.translate_boto_error(ClientError(answer, "GetObject"))])

    def attempt() -> str:
        for failure in failures:
            raise failure
        return "written"

    monkeypatch.setattr(stores.time, "sleep", lambda seconds: None)
    if expected is None:
        assert Store("s3")._written(Url("s3", "b", "k"), attempt) == "written"
        return
    with pytest.raises(SeparationError) as caught:
        Store("s3")._written(Url("s3", "b", "k"), attempt)
    assert expected in str(caught.value)


def test_what_is_not_found_twice_while_it_is_written_has_no_bucket() -> None:
    pytest.importorskip("s3fs")
    tries = []

    def attempt() -> None:
        tries.append(1)
        raise FileNotFoundError("The specified bucket does not exist")

    with pytest.raises(InputError, match=r"^s3://b does not exist: check the name of the bucket$"):
        Store("s3")._written(Url("s3", "b", "k"), attempt)
    assert len(tries) == 2


def test_a_store_that_is_away_is_told_once_and_a_signal_ends_the_wait(
    now: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("s3fs")

    def away() -> None:
        raise ConnectionError("nobody is there?signature=secret")

    def check() -> None:
        if now[0] > 50:  # the main thread has received a signal
            raise KeyboardInterrupt

    monkeypatch.setattr(stores.signals, "check", check)
    with pytest.raises(KeyboardInterrupt):
        Store("s3")._repeated(Url("s3", "bucket", "a.wav"), away)
    assert 50 < now[0] < 80
    (record,) = caplog.records
    assert record.getMessage() == "s3://bucket does not answer (nobody is there): asked again for 5 minutes"


def test_removing_after_a_failure_does_not_tell_again_that_the_store_is_away(
    now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("s3fs")

    def away() -> None:
        raise ConnectionError("nobody is there")

    with pytest.raises(stores.UnreachableError, match="nobody is there"):
        Store("s3", stores.CLEANING_SECONDS)._repeated(Url("s3", "bucket", "a.wav"), away, doing="remove")
    assert now[0] > stores.NOTICE_SECONDS and not caplog.records


def test_the_libraries_print_nothing(bucket: Bucket) -> None:
    assert Store("s3").head(url(bucket, "a.wav")) is None
    root, heard = logging.getLogger(), BufferingHandler(10**6)
    root.addHandler(heard)
    try:
        for name in ("s3fs", "gcsfs.retry", "fsspec", "separation"):
            logging.getLogger(name).error("out of retries")
    finally:
        root.removeHandler(heard)
    assert [record.name for record in heard.buffer if record.msg == "out of retries"] == ["separation"]


def test_the_longest_name_of_a_file_can_be_downloaded(bucket: Bucket, tmp_path: Path) -> None:
    name = "音" * 83 + ".wav"  # 253 bytes
    bucket.put(name, b"123")
    found = Store("s3").head(url(bucket, name))
    assert found is not None
    Store("s3").download(found, tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"123" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("scheme, package", [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named(scheme: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(scheme: str, **options: object) -> None:
        raise ImportError(f"No module named {package!r}")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(InputError, match=rf"^{scheme}:// needs the package {package} \(.*\): pip install {package}$"):
        Store(scheme)
