"""The table of models fits a terminal of 100 columns."""

from dataclasses import replace

import pytest

from separation.checkpoints.catalogue import read_config
from separation.checkpoints.listing import Entry, Filter
from separation.cli.models_table import COLUMNS, table


def entries(*names: str) -> list[Entry]:
    return [Entry(read_config(name), is_here=name == "demo") for name in names]


@pytest.mark.usefixtures("weights")
def test_models_stand_below_their_tasks() -> None:
    assert table(entries("scnet", "mel_band_roformer_kim", "bs_roformer_viperx_1297"), Filter()) == [
        "  NAME                      MB  LICENCE      STEMS",
        "",
        "vocals: the voice",
        "  mel_band_roformer_kim    913  permissive   vocals (instrumental)",
        "  bs_roformer_viperx_1297  639  none stated  vocals (instrumental)",
        "",
        "four_stems: vocals, drums, bass and other",
        "  scnet                     42  permissive   drums, bass, other, vocals",
    ]


@pytest.mark.usefixtures("weights")
def test_an_order_by_quality_has_no_groups_and_says_what_is_compared() -> None:
    wanted = Filter(stem="vocals", sort="quality")
    assert table(entries("mel_band_roformer_kim", "demo"), wanted) == [
        "  NAME                   VOCALS   MB  LICENCE     STEMS",
        "  mel_band_roformer_kim   10.98  913  permissive  vocals (instrumental)",
        "* demo                        -    9  permissive  vocals, drums, bass, guitar, piano, other",
        "",
        "* is downloaded",
        "VOCALS is the SDR of vocals in dB on MVSEP Multisong",
        "-: no published figure on MVSEP Multisong; such a model may still be better",
    ]


@pytest.mark.usefixtures("weights")
def test_an_order_by_quality_without_any_figure_says_so() -> None:
    _, *lines = table(entries("bs_roformer_mega_harp_mvsep"), Filter(stem="harp", sort="quality"))
    assert lines[-1] == "-: no published figure on MVSEP Multisong; the order is that of the names"
    assert not any(line.startswith("HARP is") for line in lines)


@pytest.mark.usefixtures("weights")
def test_stems_without_room_are_counted() -> None:
    (long,) = entries("bs_roformer_mega_53_mvsep")
    four = Entry(replace(read_config("scnet"), name="n" * 62), is_here=False)
    one = Entry(replace(read_config("mel_band_roformer_kim"), name="n" * 60), is_here=False)
    lines = table([long, four, one], Filter(task="vocals"))
    assert [line.rpartition("  ")[2] for line in lines[1:]] == ["53 stems", "4 stems", "vocals"]
    assert max(map(len, lines)) <= COLUMNS


def test_no_models_have_no_table() -> None:
    assert table([], Filter()) == []
