"""knobs.py measures what it says."""

from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor

import knobs
from helpers.common import PROJECT
from helpers.small_model import identity
from separation import Separator
from separation.models.base import SeparationModel

DEMO = PROJECT / "weights" / "demo"


class Half(SeparationModel):
    """Each of two stems is half of the mixture, at every position."""

    channels = 2

    def __init__(self) -> None:
        super().__init__(identity(["vocals", "other"], name="half", chunk_samples=352_800))
        self.gain = torch.nn.Parameter(torch.ones(1))

    def forward(self, chunks: Tensor) -> Tensor:
        return (chunks * self.gain / 2).unsqueeze(1).expand(-1, 2, -1, -1)


def test_shifts_are_undone() -> None:
    mixture = torch.randn(2, 100_000) * 0.1
    stems = knobs.separate_shifted(Separator.from_model(Half()), mixture, 3)
    assert list(stems) == ["vocals", "other"]
    assert all((stem - mixture / 2).abs().max() <= 1e-6 for stem in stems.values())


def test_each_song_is_scored_by_its_own_stems_and_guitar_and_piano_count_as_other() -> None:
    first, second = torch.randn(2, 2, 1000), torch.randn(3, 2, 500)
    songs = [
        ("first", first.sum(0), dict(zip(("vocals", "other"), first, strict=True))),
        ("second", second.sum(0), dict(zip(("guitar", "piano", "other"), second, strict=True))),
    ]
    estimates = {
        "vocals": torch.cat([first[0] * 0.9, torch.zeros(2, 500)], dim=-1),
        "other": torch.cat([first[1] * 0.99, second.sum(0) * 0.9], dim=-1),
    }
    scores = knobs.scores(songs, estimates)
    assert scores == {"first": pytest.approx((20 + 40) / 2, abs=1e-3), "second": pytest.approx(20, abs=1e-3)}


@pytest.mark.slow
def test_the_table_of_precisions_shows_that_fewer_bits_lose_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    song = tmp_path / "songs" / "demo"
    song.mkdir(parents=True)
    for name, path in (("mixture", DEMO / "song.flac"), *((path.stem, path) for path in DEMO.glob("stems/*.ogg"))):
        audio, rate = soundfile.read(path, dtype="float32")
        soundfile.write(song / f"{name}.wav", audio, rate, subtype="FLOAT")
    monkeypatch.setattr("sys.argv", ["knobs.py", str(song.parent), "--tables", "precision"])
    knobs.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["precision", "fp32", "bf16", "int8"]
    assert [float(row[1]) for row in rows[2:]] == pytest.approx([float(rows[1][1])] * 2, abs=0.02)
    assert float(rows[1][1]) > 4
