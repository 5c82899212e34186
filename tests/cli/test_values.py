"""Values of arguments are converted, and wrong ones explained."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from separation.cli.values import (
    batch_size,
    capabilities,
    count,
    given,
    gpus,
    path,
    retries,
    sample_rate,
    scores,
    seconds,
    time,
)
from separation.evaluation.choice import SCORES


@pytest.mark.parametrize(
    "convert, text, value",
    [
        (given, "x", "x"),
        (path, "a/b", Path("a/b")),
        (batch_size, "auto", "auto"),
        (batch_size, "4", 4),
        (seconds, "auto", "auto"),
        (seconds, "8", 8),
        (time, "80", 80),
        (time, "1:20.5", 80.5),
        (time, "1:02:03", 3723),
        (sample_rate, "44100", 44100),
        (sample_rate, "source", "source"),
        (count, "1", 1),
        (retries, "0", 0),
        (gpus, "0", (0,)),
        (gpus, "2,0", (2, 0)),
        (scores, "fullness,sdr", ("fullness", "sdr")),
        (scores, "all", tuple(SCORES)),
        (capabilities, "80", [80]),
        (capabilities, "75,90,100", [75, 90, 100]),
    ],
)
def test_a_value_is_converted(convert: Callable[[str], Any], text: str, value: object) -> None:
    assert convert(text) == value


@pytest.mark.parametrize(
    "convert, text, error",
    [
        (given, "", "it is empty: give a value, or leave it out"),
        (path, "", "it is empty"),
        (path, "s3://bucket/all.csv", "'s3://bucket/all.csv' is an address: give a path on this computer"),
        *(
            (time, text, "must be a time such as 1:20, 1:20.5 or 80")
            for text in ("", "1m20s", "1:2:3:4", "-5", "٣", ":5")
        ),
        (batch_size, "-1", "'-1' must be auto or a whole number"),
        (seconds, "1.5", "'1.5' must be auto or a whole number of seconds"),
        (count, "0", "'0' must be a whole number from 1 up"),
        (count, "two", "'two' must be a whole number from 1 up"),
        *((gpus, text, "must be numbers of GPUs with") for text in ("", "cuda:0", "0;1", "0,", "-1", "all", "٣")),
        *((retries, text, "must be a whole number from 0 to 9") for text in ("", "-1", "10", "two")),
        (gpus, "0,1,0", "'0,1,0' names GPU 0 twice: name each once"),
        (scores, "sdr,loud", "'loud' is not a score: choose from sdr, si_sdr, "),
        (scores, "sdr,", "'' is not a score"),
        (capabilities, "8", "'8' must be compute capabilities times ten"),
        (capabilities, "80,", "'80,' must be compute capabilities times ten"),
        (capabilities, "8.0", "'8.0' must be compute capabilities times ten"),
    ],
)
def test_a_wrong_value_is_explained(convert: Callable[[str], Any], text: str, error: str) -> None:
    with pytest.raises(ArgumentTypeError, match=error):
        convert(text)
