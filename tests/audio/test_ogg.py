import io
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from separation.audio.decode import decode
from separation.audio.ogg import read_chain

RATE = 44100


@pytest.fixture(scope="module")
def pages() -> list[bytes]:
    """The pages of an Ogg Vorbis file with six seconds of noise."""
    file = io.BytesIO()
    noise = 0.1 * np.random.default_rng(0).standard_normal((6 * RATE, 2))
    soundfile.write(file, noise, RATE, format="OGG")
    starts = [*(at for at in range(len(file.getvalue())) if file.getvalue()[at : at + 5] == b"OggS\0"), None]
    return [file.getvalue()[start:stop] for start, stop in pairwise(starts)]


def number(page: bytes) -> int:
    return int.from_bytes(page[18:22], "little")


def decoded(pages: list[bytes], folder: Path, **options: bool) -> np.ndarray:
    (folder / "song.ogg").write_bytes(b"".join(pages))
    with decode(folder / "song.ogg", folder, **options) as wave:
        return wave.read(0, wave.n_samples).numpy()


def test_a_duplicate_page_is_decoded_once(pages: list[bytes], tmp_path: Path) -> None:
    middle = len(pages) // 2
    twice = [*pages[: middle + 1], *pages[middle:]]
    np.testing.assert_array_equal(decoded(twice, tmp_path), decoded(pages, tmp_path))


def test_the_header_pages_of_a_run_are_numbered_up_to_its_first_page(pages: list[bytes], tmp_path: Path) -> None:
    middle = len(pages) // 2
    path = tmp_path / "song.ogg"
    path.write_bytes(b"".join([*pages[:middle], *pages[middle + 1 :]]))
    (link,) = read_chain(path, "song").links
    assert len(link.headers) > 1 and [run.first for run in link.runs] == [len(link.headers), middle + 1]
    (tmp_path / "run.ogg").write_bytes(
        b"".join(
            piece if isinstance(piece, bytes) else path.read_bytes()[slice(*piece)]
            for piece in link.file_of(link.runs[1], path)
        )
    )
    (again,) = read_chain(tmp_path / "run.ogg", "run").links
    assert again.header_numbers == [middle + 1 - len(link.headers) + i for i in range(len(link.headers))]
    assert [run.first for run in again.runs] == [middle + 1] and not again.n_bad_pages


@pytest.mark.parametrize("byte, told", [(6, "6.00"), (7, "6.37"), *((byte, None) for byte in range(8, 14))])
def test_the_granule_of_a_broken_last_page_counts_only_if_it_adds_less_than_a_minute(
    byte: int, told: str | None, pages: list[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = bytearray(pages[-1])
    last[byte] ^= 0x40  # one of the eight bytes of the granule position
    samples = decoded([*pages[:-1], bytes(last)], tmp_path, accept_damaged=True)
    np.testing.assert_array_equal(samples[:, : 5 * RATE], decoded(pages, tmp_path)[:, : 5 * RATE])
    (warning,) = caplog.messages
    found = re.search(r" of ([\d.]+) s are missing", warning)
    assert (found and found[1]) == told
