"""Files beside the stems: their names, and what they need."""

from pathlib import Path

import pytest

from separation.audio.beside import names_beside, stems_in, suffix_of
from separation.audio.excerpt import Excerpt
from separation.audio.options import OutputOptions
from separation.errors import InputError
from separation.system.names import Place, song_fields


@pytest.mark.parametrize(
    "name, suffix",
    [("a.mp4", "mp4"), ("a.M4V", "m4v"), ("a.mov", "mov"), ("a.webm", "webm"), ("a.avi", "mkv"), ("a", "mkv")],
)
def test_a_video_keeps_its_suffix_or_becomes_mkv(name: str, suffix: str) -> None:
    assert suffix_of(Path(name)) == suffix


def test_files_beside_the_stems_have_names_of_the_template() -> None:
    options = OutputOptions(reaper=True, video="vocals")
    assert names_beside(Path("clip.mp4"), Place(), options) == {"project": "stems.rpp", "video": "video.mp4"}
    place = Place.of("{stem}/{song} ({stem}).{ext}", song_fields("clip", {}, "demo"))
    found = names_beside(Path("clip.mp4"), place, options)
    assert found == {"project": "clip (stems).rpp", "video": "clip (video).mp4"}
    assert names_beside(Path("clip.mp4"), place, OutputOptions()) == {}


def test_a_mix_is_made_of_the_stems_that_there_are() -> None:
    assert stems_in("drums+bass", ("vocals", "drums", "bass")) == ["drums", "bass"]
    with pytest.raises(InputError, match=r"'drums\+kazoo' needs the stem 'kazoo': choose from vocals, drums, with"):
        stems_in("drums+kazoo", ("vocals", "drums"))


def test_what_a_video_or_a_project_cannot_be_made_of_is_refused() -> None:
    with pytest.raises(InputError, match="a video is written whole"):
        OutputOptions(video="vocals", excerpt=Excerpt(start_seconds=1))
    with pytest.raises(InputError, match=r"a video cannot be made of stem.mp4"):
        OutputOptions("stem.mp4", video="vocals")
    with pytest.raises(InputError, match=r"a REAPER project cannot hold stem.mp4"):
        OutputOptions("stem.mp4", reaper=True)
