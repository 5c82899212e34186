import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from helpers.common import needs_ffmpeg
from separation.audio.wavpack import find_songs

RATE = 44100

pytestmark = needs_ffmpeg


@pytest.fixture(scope="module", params=[2, 6])
def blocks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The blocks of a WavPack file with four seconds of noise. Blocks of the same samples are joined."""
    folder = tmp_path_factory.mktemp("wavpack")
    noise = 0.1 * np.random.default_rng(0).standard_normal((4 * RATE, request.param))
    soundfile.write(folder / "song.wav", noise, RATE)
    command = ["ffmpeg", "-v", "error", "-i", str(folder / "song.wav"), str(folder / "song.wv")]
    subprocess.run(command, check=True)
    content = (folder / "song.wv").read_bytes()
    found: dict[int, bytes] = {}
    while content.startswith(b"wvpk"):
        n_bytes, index = 8 + int.from_bytes(content[4:8], "little"), int.from_bytes(content[16:20], "little")
        found[index] = found.get(index, b"") + content[:n_bytes]
        content = content[n_bytes:]
    assert len(found) > 4
    return list(found.values())


@pytest.mark.parametrize("left_out", [slice(0, 0), slice(0, 1), slice(2, 3), slice(2, 4)])
def test_missing_blocks_are_a_hole(left_out: slice, blocks: list[bytes], tmp_path: Path) -> None:
    missing = blocks[left_out]
    kept = b"".join(block for block in blocks if block not in missing)
    (tmp_path / "song.wv").write_bytes(kept)
    (found,) = find_songs(tmp_path / "song.wv")
    assert bool(found.n_holes) == bool(missing)
    assert found.total_samples == (0 if blocks[0] in missing else 4 * RATE)  # only the first block states it
    assert sum(stop - start for start, stop in found.ranges) == len(kept)
