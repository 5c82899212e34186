"""How files get to their places: all of a run or none."""

from pathlib import Path

import pytest

from separation.errors import OutputError
from separation.system.output import OutputFolder


@pytest.mark.parametrize("older", [{}, {"vocals.wav": b"older"}])
def test_if_one_file_cannot_be_moved_the_others_are_taken_back(older: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in older.items():
        (tmp_path / name).write_bytes(content)
    with OutputFolder(tmp_path, overwrite=True, recorded=False) as output:
        vocals = output.work / "vocals.wav"
        vocals.write_bytes(b"newer")
        with pytest.raises(OutputError, match=r"drums\.wav"):
            output.publish({"vocals": vocals, "drums": output.work / "drums.wav"})  # which was never written
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == older
