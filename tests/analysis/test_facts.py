"""An analysis survives JSON, and reads well."""

import json

import pytest

from separation import SongAnalysis
from separation.analysis.facts import Loudness

ANALYSIS = SongAnalysis(
    120.04, "F# minor", {"mixture": Loudness(-14.004, 5.5, -0.3), "vocals": Loudness(None, None, None)}
)
AS_JSON = {
    "tempo_bpm": 120.0,
    "key": "F# minor",
    "loudness": {
        "mixture": {"integrated_lufs": -14.0, "range_lu": 5.5, "true_peak_dbtp": -0.3},
        "vocals": {"integrated_lufs": None, "range_lu": None, "true_peak_dbtp": None},
    },
}


def test_json_is_rounded_and_comes_back() -> None:
    assert ANALYSIS.as_json() == AS_JSON
    assert SongAnalysis.from_json(json.loads(json.dumps(AS_JSON))).as_json() == AS_JSON


@pytest.mark.parametrize("data", [{}, {"tempo_bpm": 1, "key": None}, {**AS_JSON, "loudness": {"mixture": {"loud": 1}}}])
def test_other_objects_are_refused(data: dict[str, object]) -> None:
    with pytest.raises((LookupError, TypeError)):
        SongAnalysis.from_json(data)


def test_what_is_unknown_is_said_to_be() -> None:
    assert str(ANALYSIS) == "120.0 BPM, F# minor, -14.0 LUFS"
    assert str(SongAnalysis(None, None, {"mixture": Loudness(None, None, None)})) == "no regular beat, no key, silent"
