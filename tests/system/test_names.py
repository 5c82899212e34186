"""Names of stems' files: what a template gives, and that no value leads out of the folder."""

from pathlib import PurePosixPath

import pytest

from separation.errors import InputError
from separation.system.names import MAX_VALUE_BYTES, Place, fields_in, song_fields
from separation.system.record import RECORD

TAGS = {"artist": "AC/DC", "album": "Back in Black", "track": "6/10"}
MODELS = {"vocals": "roformer", "drums": "roformer+htdemucs"}


def names(template: str | None, song: str = "Hells Bells", folder: str = "", **tags: str) -> list[str]:
    place = Place.of(template, song_fields(song, TAGS | tags, "standard", folder))
    return [str(PurePosixPath(place.folder, name)) for name in place.names(MODELS, "flac").values()]


@pytest.mark.parametrize(
    "template, vocals",
    [
        (None, "vocals.flac"),
        ("{artist}/{album}/{song} ({stem}).{ext}", "AC_DC/Back in Black/Hells Bells (vocals).flac"),
        ("{stem}/{track} {song}.{ext}", "vocals/06 Hells Bells.flac"),
        ("{folder}/{song}/{stem}.{ext}", "music/a/Hells Bells/vocals.flac"),
        ("{recipe}-{model}-{stem}.{ext}", "standard-roformer-vocals.flac"),
        ("{song}: {stem}?.{ext}", "Hells Bells_ vocals_.flac"),
        ("{{{stem}}}.{ext}", "{vocals}.flac"),
    ],
)
def test_a_template_gives_folders_and_names(template: str | None, vocals: str) -> None:
    assert names(template, folder="music/a")[0] == vocals


@pytest.mark.parametrize(
    "tempo_bpm, key, expected",
    [
        (127.96, "F# minor", "128 F#m"),
        (127.46, "E major", "128 E"),  # 127.5 in a record
        (92.4, "Eb minor", "92 Ebm"),
        (None, None, "0 Unknown key"),
    ],
)
def test_tempo_and_key_get_into_names_when_they_are_known(
    tempo_bpm: float | None, key: str | None, expected: str
) -> None:
    fields = song_fields("{a} {bpm}", TAGS, "standard")
    place = Place.of("{artist}/{bpm} {key}/{song} ({stem}).{ext}", fields)
    assert place.needs_analysis and place.folder == "AC_DC"
    assert place.name("vocals", "wav") == "{bpm} {key}/{a} {bpm} (vocals).wav"
    known = place.analysed(tempo_bpm, key)
    assert known.name("vocals", "wav") == f"{expected}/{{a}} {{bpm}} (vocals).wav"
    assert (known.record, known.folder) == (place.record, place.folder) and not known.needs_analysis
    if tempo_bpm is not None:
        assert place.analysed(round(tempo_bpm, 1), key) == known
    again = Place.of(place.template, fields)  # as the engine gets it
    assert (again.template, again.record) == (place.template, place.record)
    assert not Place.of("{song} {stem}.{ext}", fields).needs_analysis


def test_without_a_folder_of_the_song_its_part_is_left_out() -> None:
    assert names("{folder}/{song}/{stem}.{ext}", folder=".")[0] == "Hells Bells/vocals.flac"
    assert names("{folder}/{song}/{stem}.{ext}")[0] == "Hells Bells/vocals.flac"


def test_missing_tags_have_words_of_their_own() -> None:
    fields = song_fields("x", {}, "standard")
    assert [fields[name] for name in ("artist", "album", "track")] == ["Unknown artist", "Unknown album", "00"]


@pytest.mark.parametrize(
    "hostile",
    [
        "../../etc",
        "/etc/passwd",
        "..",
        ".",
        "a/../../b",
        "..\\..\\x",
        "C:\\x",
        "\x00\n",
        "con",
        "aux.txt",
        ". .",
        "é" * 300,
    ],
)
@pytest.mark.parametrize("template", ["{artist}/{song}/{stem}.{ext}", "{artist}{stem}.{ext}", "{stem}/{artist}.{ext}"])
def test_no_value_leads_out_of_the_folder_or_has_a_name_that_file_systems_refuse(template: str, hostile: str) -> None:
    for name in names(template, song=hostile, artist=hostile):
        parts = name.split("/")
        assert len(parts) == template.count("/") + 1
        for part in parts:
            assert part == part.strip(" ").rstrip(".") and not part.startswith(".")
            assert not set(part) & set('<>:"|?*\\\n\0')
            assert part.split(".")[0].lower() not in ("con", "aux")
            assert len(part.encode()) <= 2 * MAX_VALUE_BYTES


@pytest.mark.parametrize(
    "template, words",
    [
        ("{stem}", "does not end in .{ext}: add it"),
        ("{title}.{ext}", "has no field {title}: choose from {folder}, {song}"),
        ("{stem!r}.{ext}", "has a format for {stem}, which takes none: write {stem}"),
        ("{stem:>9}.{ext}", "has a format for {stem}, which takes none: write {stem}"),
        ("{stem.__class__}.{ext}", "has no field {stem.__class__}"),
        ("{}.{ext}", "has no field {}"),
        ("{stem.{ext}", "is no template"),
        ("/tmp/{stem}.{ext}", "could lead out of the output folder"),
        ("../{stem}.{ext}", "could lead out of the output folder"),
        ("{song}/../../{stem}.{ext}", "could lead out of the output folder"),
        ("a\\{stem}.{ext}", "could lead out of the output folder"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(template: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        fields_in(template)
    assert words in str(caught.value)


def test_two_stems_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match=r"both be written to 'Hells Bells.flac': put \{stem\} into the name"):
        names("{song}.{ext}")


def test_songs_in_one_folder_have_records_of_their_own_that_do_not_depend_on_the_stems() -> None:
    places = [Place.of("{song} ({stem}).{ext}", song_fields(song, {}, "standard")) for song in ("a", "b", "a")]
    assert places[0] == places[2] and places[0].record != places[1].record != RECORD
    assert Place.of(None, song_fields("a", {}, "standard")).record == RECORD


@pytest.mark.parametrize("song", ["plain", "with {braces}", "{stem}"])
def test_a_place_made_of_a_places_template_is_the_same(song: str) -> None:
    place = Place.of("{artist}/{song} ({stem}).{ext}", song_fields(song, TAGS, "standard"))
    again = Place.of(place.template, song_fields("other", {}, "other"))
    assert (again.template, again.record) == (place.template, place.record)
    assert place.name("vocals", "wav") == f"{song} (vocals).wav"
