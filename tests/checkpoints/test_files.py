"""Weights files: their place, their checksums, stamps and records."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from helpers.small_model import (
    assert_same_model,
    chunks,
    convert_to,
    small_model,
    write_yaml,
)
from helpers.weights_server import CONTENT, SHA256, Server, names_in, run_at_once, unstated, weight_file
from separation.checkpoints.catalogue import is_here
from separation.checkpoints.download import fetch
from separation.checkpoints.files import known_bytes, verify
from separation.checkpoints.load import load_model
from separation.errors import CheckpointError, OutputError
from separation.system import places


def test_a_file_without_a_url_is_found_among_the_shipped_weights(
    weights: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(places, "PACKAGE", tmp_path / "project" / "separation")
    shipped = tmp_path / "project" / "weights" / "shipped.bin"
    shipped.parent.mkdir(parents=True)
    shipped.write_bytes(CONTENT)
    assert fetch(weight_file(None, name="shipped.bin")) == shipped


@pytest.mark.parametrize(
    "content, fault", [(b"short", "has 5 bytes instead of"), (b"x" * len(CONTENT), "has the sha256")]
)
def test_an_altered_file_is_named_with_the_command_that_replaces_it(weights: Path, content: bytes, fault: str) -> None:
    path = weights / "sub" / "weights.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{fault}.*delete it, then run .*models download some_model"):
        fetch(weight_file("http://127.0.0.1/"))
    with pytest.raises(CheckpointError, match=fault):
        verify(path, weight_file("http://127.0.0.1/"))
    assert path.read_bytes() == content


def test_a_verified_file_is_hashed_again_only_after_a_change(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = weights / "sub" / "weights.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    file = weight_file("http://127.0.0.1/")
    hashed = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: hashed.append(1) or digest(*args))
    for _ in range(3):
        fetch(file)
    assert len(hashed) == 1
    path.write_bytes(b"x" * len(CONTENT))
    with pytest.raises(CheckpointError, match="sha256"):
        fetch(file)


def test_a_file_is_hashed_each_time_if_no_stamp_can_be_written(weights: Path) -> None:
    path = weights / "sub" / "weights.bin"
    (weights / "sub" / "weights.bin.verified").mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert fetch(weight_file("http://127.0.0.1/")) == path


def test_stamps_and_records_are_not_written_through_symbolic_links(server: Server, weights: Path) -> None:
    weights.mkdir()
    (weights / "mine.txt").write_text("mine")
    (weights / "x.bin.verified").symlink_to("mine.txt")
    assert fetch(weight_file(server.url, name="x.bin"), quiet=True).read_bytes() == CONTENT
    assert fetch(weight_file(server.url, name="x.bin"), quiet=True).exists()  # hashed again, because there is no stamp
    (weights / "checksums.lock.part").symlink_to("mine.txt")
    with pytest.raises(OutputError, match=r"cannot write to '.*checksums\.lock' \(it is a symbolic link"):
        fetch(unstated(server.url), quiet=True)
    assert (weights / "mine.txt").read_text() == "mine"


# Files without a published sha256


def test_the_first_downloads_sha256_is_recorded_and_later_ones_must_match(
    server: Server, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = fetch(unstated(server.url), quiet=True)
    (said,) = caplog.messages
    assert SHA256 in said and str(weights / "checksums.lock") in said and "\n" not in said
    assert (weights / "checksums.lock").read_text() == f"{SHA256} {len(CONTENT)} sub/weights.bin\n"
    assert names_in(weights) == ["checksums.lock", "weights.bin", "weights.bin.verified"]
    assert verify(path, unstated(server.url)) is True
    assert known_bytes([unstated(server.url)]) == len(CONTENT)

    path.unlink()
    server.content = b"x" * len(CONTENT)
    with pytest.raises(CheckpointError, match=rf"sent a file that has the sha256 \w+ instead of {SHA256} of its first"):
        fetch(unstated(server.url), quiet=True)
    server.content = CONTENT
    assert fetch(unstated(server.url), quiet=True) == path
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("content", [b"short", b"x" * len(CONTENT)])
def test_a_file_that_differs_from_its_first_download_is_named_with_both_checksums_and_the_record(
    server: Server, weights: Path, content: bytes
) -> None:
    digests = f"has the sha256 {hashlib.sha256(content).hexdigest()} instead of {SHA256}"
    path = fetch(unstated(server.url), quiet=True)
    path.write_bytes(content)
    for check in (lambda: verify(path, unstated(server.url)), lambda: fetch(unstated(server.url), quiet=True)):
        with pytest.raises(CheckpointError, match=rf"{digests} of its first download .* remove its line in .*\.lock"):
            check()


def test_a_file_without_any_sha256_is_accepted(weights: Path) -> None:
    path = weights / "weights.bin"
    weights.mkdir()
    path.write_bytes(CONTENT)
    assert fetch(unstated("http://127.0.0.1:1/", "weights.bin")) == path
    assert verify(path, unstated("http://127.0.0.1:1/", "weights.bin")) is False
    assert names_in(weights) == ["weights.bin"]


def test_the_start_of_a_sha256_is_compared_and_the_whole_recorded(server: Server, weights: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"has the sha256 {SHA256} instead of 00000000, and it was removed"):
        fetch(unstated(server.url, sha256="0" * 8), quiet=True)
    assert not (weights / "checksums.lock").exists()
    path = fetch(unstated(server.url, sha256=SHA256[:8]), quiet=True)
    assert (weights / "checksums.lock").read_text().startswith(SHA256)
    assert verify(path, unstated(server.url, sha256=SHA256[:8]))
    with pytest.raises(CheckpointError, match=rf"has the sha256 {SHA256} instead of 00000000: delete it"):
        verify(path, unstated(server.url, sha256="0" * 8))  # the published digits take precedence over the record


def test_simultaneous_records_lose_no_line(server: Server, weights: Path) -> None:
    server.content = b"small"
    files = [[unstated(server.url, f"{name}-{number}") for number in range(5)] for name in "abc"]
    run_at_once(weights, [f"for file in {mine!r}: fetch(file, quiet=True)" for mine in files])
    lines = (weights / "checksums.lock").read_text().splitlines()
    assert [line.split()[2] for line in lines] == [f"{name}-{number}" for name in "abc" for number in range(5)]
    assert not list(weights.glob("*.part"))


@pytest.mark.parametrize("line", ["what is this", "0123 5 weights.bin", f"{'0' * 64} many weights.bin"])
def test_a_damaged_record_is_named_by_its_line(weights: Path, line: str) -> None:
    weights.mkdir()
    (weights / "checksums.lock").write_text(f"{'0' * 64} 5 other.bin\n{line}\n")
    with pytest.raises(CheckpointError, match=r"checksums\.lock line 2 is not a sha256, a size in bytes and a name"):
        fetch(unstated("http://127.0.0.1:1/"))


def test_a_damaged_record_does_not_matter_to_a_file_with_a_published_sha256(server: Server, weights: Path) -> None:
    weights.mkdir()
    (weights / "checksums.lock").write_text("damaged")
    assert fetch(weight_file(server.url), quiet=True).read_bytes() == CONTENT


def test_a_record_that_cannot_be_written_or_read_is_an_error(server: Server, weights: Path) -> None:
    (weights / "checksums.lock.part").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"cannot write to '.*checksums\.lock'"):
        fetch(unstated(server.url), quiet=True)
    (weights / "checksums.lock").mkdir()
    with pytest.raises(CheckpointError, match=r"checksums\.lock cannot be read .*: delete it"):
        fetch(unstated(server.url), quiet=True)


# Converted files


def test_a_converted_file_replaces_its_checkpoint_without_a_checksum(
    tmp_path: Path, weights: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, sha256 = convert_to(weights, state, "small.ckpt")
    (weights / "small.ckpt").unlink()
    monkeypatch.setattr(hashlib, "file_digest", None)  # so that hashing is an error
    config = write_yaml(tmp_path, files=[{"name": "small.ckpt", "sha256": sha256, "url": "http://127.0.0.1:1/x"}])
    assert_same_model(load_model(config), small_model(), chunks())
    assert is_here(str(config))


def test_a_file_converted_from_another_checkpoint_is_not_used_and_a_damaged_one_is_named(
    tmp_path: Path, weights: Path, state: dict[str, Tensor]
) -> None:
    target, sha256 = convert_to(weights, state, "small.ckpt")
    (weights / "small.ckpt").unlink()
    config = write_yaml(tmp_path, files=[{"name": "small.ckpt", "sha256": "0" * 64}])
    with pytest.raises(CheckpointError, match=r"small\.ckpt is missing"):
        load_model(config)
    assert not is_here(str(config))
    target.write_bytes(target.read_bytes()[:-100])
    config = write_yaml(tmp_path, files=[{"name": "small.ckpt", "sha256": sha256}])
    with pytest.raises(CheckpointError, match=r"small\.safetensors .* is damaged, incomplete .*: delete it"):
        load_model(config)
