"""TIGER equals its authors' network and loads as published.

The figures come from look2hear/models/tiger_dnr.py of JusperLee/TIGER, in the copy suyccc/TIGER at 5d3bc40.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from helpers.common import quick_first
from helpers.recorded import assert_as_recorded
from helpers.small_model import assert_chunks_are_alone, assert_near, identity
from separation import CheckpointError, Separator, load_model
from separation.checkpoints.build import build
from separation.checkpoints.catalogue import read_config
from separation.engine.options import EngineOptions
from separation.evaluation.metrics import sdr
from separation.models.tiger import Tiger, TigerConfig

pytestmark = pytest.mark.usefixtures("one_thread")

STEMS = ("dialog", "effect", "music")
SMALL: dict[str, Any] = {"out_channels": 24, "in_channels": 16, "num_blocks": 2, "upsampling_depth": 3}
OTHER: dict[str, Any] = {
    "out_channels": 12,
    "upsampling_depth": 2,
    "num_blocks": 3,
    "att_n_head": 2,
    "att_hid_chan": 3,
    "win": 1024,
    "stride": 256,
    "sample_rate": 48_000,
}
RECORDED = [
    ({}, 12_000, """
    12.57865 14.11505 12.69064 0.1556564 0.05580147 0.03115133 -0.02344264 -0.007970457 0.002565266 -0.09854683
    -0.07008196 -0.03962259 -0.1319339 0.03869989 -0.05357988 -0.0663593 -0.01614424 0.1073097 0.05680694
    -0.05654347 -0.1359824 0.09486179 0.01593188 0.2355117 -0.05528249 -0.02057304 0.04843592
    """),
    (OTHER, 12_345, """
    9.322313 21.16616 18.51366 0.05174395 0.01073541 -0.04367261 -0.008950729 0.1724751 0.04994614 0.00292818
    -0.06184225 -0.3333332 -0.07710698 0.03249454 0.02135259 0.03715223 0.08394735 0.02678046 -0.08583558
    -0.03331899 -0.05591076 -0.103646 0.1132363 -0.2353246 0.1482114 0.1467862 0.2145202
    """),
]  # fmt: skip


def make(**changes: Any) -> Tiger:
    torch.manual_seed(0)
    return Tiger(TigerConfig(**SMALL | changes), identity(STEMS, chunk_samples=12_000)).eval()


@pytest.mark.parametrize("changes, length, figures", quick_first(RECORDED, 1))
def test_output_equals_the_authors_network(changes: dict, length: int, figures: str) -> None:
    assert_as_recorded(make(**changes), length, figures)


@pytest.mark.slow
def test_an_estimate_does_not_depend_on_the_other_chunks_of_the_batch() -> None:
    assert_chunks_are_alone(make())


@pytest.mark.slow
@pytest.mark.parametrize("precision, decibels", [(torch.bfloat16, 30), (torch.float16, 45)])
def test_half_precision_stays_close_to_float32(precision: torch.dtype, decibels: float) -> None:
    model = make()
    chunks = torch.randn(1, 1, 6_000) * 0.1
    with torch.inference_mode():
        exact = model(chunks)
        model.prepare(precision)
        assert sdr(exact, model(chunks)) > decibels


@pytest.mark.slow
def test_requested_stems_are_the_same_without_the_others() -> None:
    model = make()
    chunks = torch.randn(1, 1, 6_000) * 0.1
    with torch.inference_mode():
        assert_near(model.only(("music", "dialog"))(chunks), model(chunks)[:, [2, 0]])


def write_files(folder: Path, **changes: Any) -> Path:
    """A YAML that does not name the architecture, and the weights as their authors' program stores them."""
    document = {
        "audio": {"chunk_size": 12_000, "sample_rate": 44_100},
        "model": SMALL | {"att_kernel_size": 8, "att_stride": 1, "num_sources": 3} | changes,
        "training": {"instruments": list(STEMS), "target_instrument": None},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    save_file(make().state_dict(), folder / "small.safetensors", {"format": "pt"})
    return path


@pytest.mark.slow
def test_published_weights_separate_each_channel_of_a_song(tmp_path: Path) -> None:
    model = load_model(write_files(tmp_path, num_blocks=1))
    assert isinstance(model, Tiger) and model.stems == STEMS
    song = torch.randn(2, 13_000) * 0.1
    stems, same = (
        Separator.from_model(model, options=EngineOptions(batch_size=size)).separate(each)
        for size, each in ((1, song), (3, song.flip(0)))
    )
    assert list(stems) == list(STEMS)
    for name, stem in stems.items():
        assert stem.shape == song.shape
        assert_near(same[name].flip(0), stem)


@pytest.mark.parametrize(
    "changes, message",
    quick_first(
        [
            ({"out_channels": 48}, r"model\.out_channels is 48, the weights have 24"),
            ({"out_channels": 25}, "out_channels 25 is no multiple of att_n_head and of num_sources"),
            ({"num_sources": 2}, "num_sources is 2, fewer than the 3 networks need"),
            ({"upsampling_depth": 1}, "upsampling_depth is 1: use 2 or more"),
            ({"sample_rate": 16_000}, "a band has no bin at win 2048 and 16000 Hz"),
        ],
        1,
    ),
)
def test_an_invalid_configuration_is_a_one_line_error(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(write_files(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_the_public_checkpoint_has_so_many_parameters() -> None:
    description = read_config("tiger_dnr")
    model = build(description)
    assert isinstance(model, Tiger) and description.stems == STEMS and description.chunk_samples == 12 * 44_100
    parameters = sum(parameter.numel() for parameter in model.parameters())
    (file,) = description.files
    header = sum(len(key) for key in model.state_dict())  # at least
    assert parameters == 4_221_846 and file.bytes is not None
    assert 4 * parameters + header <= file.bytes <= 4 * parameters + 4 * header
