"""Orders of the local page: what they may ask for, and how they are kept."""

import json
from typing import Any

import pytest

from separation.audio.excerpt import Excerpt
from separation.errors import InputError
from separation.web.order import Order

RECIPE = {"name": "song.flac", "recipe": "demo", "stems": "all_4", "format": "flac"}
MODEL = {"name": "song.wav", "model": "mel_band_roformer_kim", "format": "wav"}


@pytest.mark.parametrize(
    "order",
    [
        RECIPE,
        MODEL,
        RECIPE | {"part": "preview", "seconds": 200.5},
        MODEL | {"part": [10.0, 40.0]},
        MODEL | {"part": [10.0, None]},
        RECIPE | {"format": "stem.mp4"},
        RECIPE | {"channels": "source", "accept_damaged": True},
        MODEL | {"format": "reaper"},
    ],
)
def test_an_order_is_what_its_json_says(order: dict[str, Any]) -> None:
    assert Order.read(json.loads(json.dumps(order))).as_json() == order


def test_an_order_names_a_recipe_or_the_stems_of_a_model() -> None:
    assert Order.read(RECIPE).load().stems == ("vocals", "drums", "bass", "other")
    order = Order.read(MODEL | {"part": [80, 110]})
    assert order.load().stems == ("vocals", "instrumental")
    assert order.n_stems == 2
    assert order.output.excerpt == Excerpt(80, 110)
    assert (order.output.channels, order.accept_damaged) == ("stereo", False)
    assert {Order.read(RECIPE).choice, order.choice} == {"demo all_4", "mel_band_roformer_kim"}


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"recipe": "no_such"}, "unknown recipe 'no_such'"),
        ({"recipe": "/etc/passwd.yaml"}, "unknown recipe"),
        ({"stems": "all_7"}, "has no stems 'all_7'"),
        ({"model": "no_such"}, "unknown model 'no_such': choose one that the page offers"),
        ({"model": "configs/models/demo.yaml"}, "unknown model"),
        ({"format": "exe"}, "output format 'exe' is not offered: choose wav or wav24 or flac"),
        ({"format": "stem.mp4", "stems": "vocals_instrumental"}, "holds four stems, not 2"),
        ({"channels": "quad"}, "number of channels 'quad' is not offered: choose stereo or mono or source"),
        ({"channels": 1}, "number of channels 1 is not offered"),
        ({"channels": "mono", "format": "stem.mp4"}, "always in stereo: leave the channels out"),
        ({"accept_damaged": "yes"}, "accept_damaged is 'yes': send true or false"),
        ({"name": 3}, "the order is incomplete"),
        ({"part": "loud"}, r"must be \[start, end\] in seconds, or preview"),
        ({"part": [1]}, r"must be \[start, end\]"),
        ({"part": [3, 2]}, "is empty"),
        ({"part": [-1, 2]}, "cannot start or end at -1 s"),
        ({"part": [float("nan"), 2]}, "cannot start or end at nan s"),
        ({"part": [0, float("inf")]}, "cannot start or end at inf s"),
        ({"part": [0, 10**400]}, "cannot start or end at 1000"),
        ({"part": [True, 2]}, "cannot start or end at True s"),
        ({"part": ["0", 2]}, "cannot start or end at 0 s"),
        ({"seconds": "long"}, "cannot start or end at long s"),
    ],
)
def test_a_wrong_order_is_an_error(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Order.read(RECIPE | wrong)


@pytest.mark.parametrize(
    "order, seconds",
    [
        (MODEL, 10),  # of 176,400 bytes each
        (RECIPE, 16),
        (RECIPE | {"name": "song.mp3"}, 55),
        (MODEL | {"seconds": 200}, 200),
        (MODEL | {"seconds": 200, "part": "preview"}, 30),
        (MODEL | {"seconds": 20, "part": "preview"}, 20),
        (MODEL | {"seconds": 200, "part": [20, 35]}, 15),
        (MODEL | {"seconds": 200, "part": [20, None]}, 180),
        (MODEL | {"part": [50, None]}, 1),  # the size of the file was misleading
    ],
)
def test_the_length_is_estimated_from_what_is_known(order: dict[str, Any], seconds: int) -> None:
    assert round(Order.read(order).seconds(1_764_000)) == seconds
