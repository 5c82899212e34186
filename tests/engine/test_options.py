"""options: values that are not offered are errors."""

import pytest

from separation import InputError, Separator
from separation.engine.options import EngineOptions


@pytest.mark.parametrize(
    "options, words",
    [
        ({"chunk_seconds": 3}, "chunk size 3 s.*4 to 30"),
        ({"overlap_seconds": 9}, "overlap 9 s.*1 to 8"),
        ({"chunk_seconds": 4, "overlap_seconds": 4}, "overlap.*smaller than the chunk size.*below 4 s"),
        ({"chunk_seconds": 5, "overlap_seconds": 8}, "overlap.*smaller than the chunk size"),
        ({"batch_size": 0}, "batch size 0"),
        ({"chunk_seconds": 8.0}, "chunk size 8.0 s.*whole seconds"),
        ({"overlap_seconds": 2.5}, "overlap 2.5 s.*whole seconds"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"precision": "int4"}, "unknown precision 'int4'"),
    ],
)
def test_an_option_that_is_not_offered_is_an_error_that_names_it(options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Separator("demo", "all_4", options=EngineOptions(**options))


def test_auto_is_the_default_of_every_option() -> None:
    assert set(vars(EngineOptions()).values()) == {"auto"}
    chunks = EngineOptions(chunk_seconds=8, overlap_seconds=2).chunks
    assert (chunks.chunk_seconds, chunks.overlap_seconds) == (8, 2)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, "many"])
def test_a_batch_size_is_auto_or_a_positive_whole_number(batch_size: object) -> None:
    with pytest.raises(InputError, match=f"^batch size {batch_size!r} is not offered: choose auto or a whole number"):
        EngineOptions(batch_size=batch_size)
