"""Render songs whose tempo and key are known, in ten drum grooves and all 24 keys.

    PYTHONPATH=.:weights/demo python tests/bench/known_songs.py SONGS

SONGS/<number>/ then holds what weights/demo/make_song.py renders, and truth.json: `bpm`, `key` (such as "Bb minor") and
`groove`. Song n is in the n-th key from A, and its tempo is drawn from those at which its groove is played. A song that
is there is kept. Needs what make_song.py needs.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import make_song
import numpy as np
import soundfile
from make_song import CRASH, DRUM_CHANNEL, HAT, HAT_OPEN, KICK, SAMPLE_RATE, SNARE_LOUD, STEMS, Note

from separation.analysis.key import TONICS

BARS = 12
LOWEST_A = 45
# groove -> lowest and highest tempo; kicks, snares, hats and open hats in beats of a 4/4 bar
GROOVES: dict[str, tuple[tuple[float, float], tuple[tuple[float, ...], ...]]] = {
    "rock": ((80, 140), ((0, 1.75, 2.5), (1, 3), (0, 0.5, 1, 1.5, 2, 2.5, 3), (3.5,))),
    "house": (
        (115, 132),
        ((0, 1, 2, 3), (1, 3), (0, 0.25, 0.75, 1, 1.25, 1.75, 2, 2.25, 2.75, 3), (0.5, 1.5, 2.5, 3.5)),
    ),
    "ballad": ((60, 80), ((0, 2, 2.5), (1, 3), (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5), ())),
    "shuffle": ((85, 130), ((0, 2), (1, 3), (0, 2 / 3, 1, 5 / 3, 2, 8 / 3, 3, 11 / 3), ())),
    "breakbeat": ((158, 178), ((0, 2.5), (1, 3), (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5), ())),
    "funk": ((92, 116), ((0, 0.75, 2.5, 2.75), (1, 3), tuple(i / 4 for i in range(16)), ())),
}
# Grooves that the constants of separation/analysis were not chosen on; they start at song 48.
OTHER_GROOVES: dict[str, tuple[tuple[float, float], tuple[tuple[float, ...], ...]]] = {
    "half-time": ((125, 150), ((0, 0.75, 3.25), (2,), (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.25, 3.5, 3.75), ())),
    "motown": ((110, 135), ((0, 1.5, 2, 3.5), (0, 1, 2, 3), (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5), ())),
    "one drop": ((70, 88), ((2,), (2,), (0, 2 / 3, 1, 5 / 3, 2, 8 / 3, 3, 11 / 3), ())),
    "train": ((130, 160), ((0, 2), (0.5, 1, 1.5, 1.75, 2.5, 3, 3.5, 3.75), (0, 1, 2, 3), ())),
}
# Roots in semitones over the tonic of the major key; a minor song is in the relative minor, whose tonic is 9.
MAJOR = ((0, 7, 9, 5), (0, 9, 5, 7), (0, 5, 9, 7), (0, 5, 7, 0))
MINOR = ((9, 2, 4, 9), (9, 5, 0, 4), (9, 7, 5, 4), (9, 5, 0, 7))  # 4 is the major dominant of the minor key


class Composer(make_song.Composer):
    """Writes a song in a known key and groove."""

    def __init__(self, dice: random.Random, steps_over_a: int, groove: str, *, minor: bool) -> None:
        super().__init__(dice, BARS)
        self.key = LOWEST_A + (steps_over_a + (3 if minor else 0)) % 12
        self.progression = dice.choice(MINOR if minor else MAJOR)
        self.groove = (GROOVES | OTHER_GROOVES)[groove][1]

    def drums(self, bar: int, full: bool) -> Iterator[Note]:
        beat = bar * 4
        drums = zip(self.groove, (KICK, SNARE_LOUD, HAT, HAT_OPEN), (112, 108, 75, 80), strict=True)
        for times, drum, velocity in drums:
            for at in times:
                if bar % 4 == 3 and at >= 3.5 and drum == KICK:
                    continue
                yield Note(beat + at + self.late(0.006), 0.15, drum, velocity + self.random.randint(-10, 10))
        if bar in (0, self.bars // 2):
            yield Note(beat, 0.5, CRASH, 110)


def render(number: int) -> tuple[dict[str, make_song.Audio], dict[str, object]]:
    """The stems and the mixture of a song, and the truth about it."""
    dice, noise = random.Random(number), np.random.default_rng(number)
    grooves = GROOVES if number < 48 else OTHER_GROOVES
    groove = tuple(grooves)[(number + number // 24) % len(grooves)]
    bpm = round(dice.uniform(*grooves[groove][0]), 1)
    steps_over_a, minor = number % 12, number // 12 % 2 == 1
    make_song.MINOR_ROOTS = {9, 2} if minor else {9, 2, 4}
    score = Composer(dice, steps_over_a, groove, minor=minor).score()
    kinds = make_song.GUITARS, make_song.BASSES, make_song.PIANOS, make_song.PADS, make_song.LEADS
    guitar, bass, piano, pad, lead = (dice.choice(sounds) for sounds in kinds)
    with tempfile.TemporaryDirectory() as folder:
        studio = make_song.Studio(make_song.SOUND_FONT, bpm, BARS, Path(folder))
        stems = {
            "drums": studio.play(score.drums, 0, DRUM_CHANNEL),
            "bass": make_song.amplify(studio.play(score.bass, bass)),
            "guitar": make_song.double_track(studio.play(score.guitar, guitar)),
            "piano": studio.play(score.piano, piano),
            "other": studio.play(score.pad, pad) + 0.5 * studio.play(score.lead, lead, channel=1),
            "vocals": make_song.place_voice(studio.sing(score.melody), noise),
        }
    for name, stem in stems.items():
        stem *= make_song.STEM_RMS[name] / (np.sqrt((stem**2).mean()) + 1e-9)
    stems["mixture"] = sum(stems[name] for name in STEMS)
    gain = make_song.MIXTURE_PEAK / np.abs(stems["mixture"]).max()
    mode = "minor" if minor else "major"
    key = f"{TONICS[mode][(LOWEST_A + steps_over_a) % 12]} {mode}"
    return {name: stem * gain for name, stem in stems.items()}, {"bpm": bpm, "key": key, "groove": groove}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="SONGS")
    parser.add_argument("--songs", type=make_song.seed_range, default=range(72), help="first:end (default: 0:72)")
    options = parser.parse_args()
    for number in options.songs:
        folder = options.folder / f"{number:02}"
        if (folder / "truth.json").exists():
            continue
        stems, truth = render(number)
        folder.mkdir(parents=True, exist_ok=True)
        for name, audio in stems.items():
            soundfile.write(folder / f"{name}.flac", audio, SAMPLE_RATE)
        (folder / "truth.json").write_text(json.dumps(truth))


if __name__ == "__main__":
    main()
