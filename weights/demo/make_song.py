"""Render synthetic songs with six true stems: the data that the demo weights were trained on.

    python weights/demo/make_song.py --seeds 1000:1160 --bars 8 --out SONGS

SONGS/<seed>/ then holds vocals, drums, bass, guitar, piano, other and mixture as 32-bit float WAV, 44.1 kHz stereo.
The mixture is the sum of the stems. The same seed, bars and tempo give the same samples. A song takes about 4 s.

Needs FluidSynth with the FluidR3 sound font (`apt-get install fluidsynth fluid-soundfont-gm`) and, from PyPI,
numpy, scipy, soundfile, mido, pysinsy==0.0.5 (the Sinsy singing voice, built from source) and "setuptools<81" for it.
"""

import argparse
import random
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mido
import numpy as np
import pysinsy
import soundfile
from numpy.typing import NDArray
from scipy.signal import butter, fftconvolve, resample_poly, sosfilt

Audio = NDArray[np.floating[Any]]  # [T, 2] unless a docstring says otherwise

SAMPLE_RATE = 44100
STEMS = ("vocals", "drums", "bass", "guitar", "piano", "other")
SOUND_FONT = Path("/usr/share/sounds/sf2/FluidR3_GM.sf2")
BEATS_A_BAR = 4
TICKS_A_BEAT = 480
DRUM_CHANNEL = 9  # General MIDI keeps it for percussion
MIXTURE_PEAK = 0.891
STEM_RMS = {"vocals": 0.075, "drums": 0.085, "bass": 0.07, "guitar": 0.055, "piano": 0.045, "other": 0.04}

TEMPI_BPM = (84, 96, 100, 112, 120, 128)
KEYS = (48, 50, 52, 53, 55, 45)  # MIDI notes of the tonic
PROGRESSIONS = ((0, 7, 9, 5), (9, 5, 0, 7), (0, 9, 5, 7), (0, 5, 9, 7), (9, 7, 5, 7))  # roots, semitones over the key
MINOR_ROOTS = {9, 2, 4}
MAJOR_SCALE = (0, 2, 4, 5, 7, 9, 11)
# General MIDI programs, counted from 0, that a song draws its sounds from.
GUITARS = (25, 27, 29)  # steel, clean, overdriven
BASSES = (33, 34, 33)  # fingered, picked
PIANOS = (0, 1, 4)  # grand, bright, electric
PADS = (48, 50, 89, 16)  # strings, synth strings, warm pad, organ
LEADS = (81, 80, 73)  # saw, square, flute
KICK, SNARE, SNARE_LOUD, HAT, HAT_OPEN, CRASH = 36, 40, 38, 42, 46, 49
TOM_FILL = (50, 48, 45, 41)
SYLLABLES = "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわ"
NOTE_NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")


class Note(NamedTuple):
    """A note of an instrument; times in beats from the start of the song."""

    start: float
    duration: float
    pitch: int
    velocity: int


class Sung(NamedTuple):
    """A syllable of the melody, or a breath where the pitch is None; times in sixteenths."""

    start: int
    duration: int
    pitch: int | None
    syllable: str


@dataclass
class Score:
    """What everyone plays; the two parts of `other` have a sound each."""

    drums: list[Note] = field(default_factory=list)
    bass: list[Note] = field(default_factory=list)
    guitar: list[Note] = field(default_factory=list)
    piano: list[Note] = field(default_factory=list)
    pad: list[Note] = field(default_factory=list)
    lead: list[Note] = field(default_factory=list)
    melody: list[Sung] = field(default_factory=list)


class Composer:
    """Writes a score bar by bar. Every draw comes from one `random.Random`: their order is the song."""

    def __init__(self, random_: random.Random, bars: int) -> None:
        self.random, self.bars = random_, bars
        self.key = random_.choice(KEYS)
        self.progression = random_.choice(PROGRESSIONS)

    def score(self) -> Score:
        score = Score()
        for bar in range(self.bars):
            root = self.progression[bar % 4]
            intervals = (0, 3, 7) if root in MINOR_ROOTS else (0, 4, 7)
            chord = [self.key + root + interval for interval in intervals]
            full = bar >= self.bars // 2  # the second half plays more
            score.drums.extend(self.drums(bar, full))
            score.bass.extend(self.bass(bar, chord[0], full))
            score.guitar.extend(self.guitar(bar, chord))
            score.piano.extend(self.piano(bar, chord, full))
            beat = bar * BEATS_A_BAR
            score.pad.extend(Note(beat, 3.9, pitch + 12, 84 if full else 66) for pitch in chord)
            if full:
                score.lead.extend(
                    Note(beat + at, 0.24, self.random.choice(chord) + 24, 72) for at in (0.5, 1.25, 2, 2.75, 3.5)
                )
            self.sing(bar, chord, score.melody)
        return score

    def late(self, spread_beats: float) -> float:
        """How far off the beat a player is."""
        return self.random.gauss(0, spread_beats)

    def drums(self, bar: int, full: bool) -> Iterator[Note]:
        beat, dice = bar * BEATS_A_BAR, self.random
        for at in (0, 2.5) if bar % 2 else (0, 1.75, 2.5):
            yield Note(beat + at + self.late(0.006), 0.2, KICK, 112 + dice.randint(-8, 8))
        for at in (1, 3):
            yield Note(beat + at + self.late(0.006), 0.2, SNARE_LOUD if full else SNARE, 108 + dice.randint(-10, 10))
        for eighth in range(8):
            hat = HAT_OPEN if eighth == 7 and bar % 2 else HAT
            accent = 88 if eighth % 2 == 0 else 62
            yield Note(beat + eighth / 2 + self.late(0.005), 0.1, hat, accent + dice.randint(-8, 8))
        if bar in (0, self.bars // 2):
            yield Note(beat, 0.5, CRASH, 110)
        if bar % 4 == 3:
            for index, tom in enumerate(TOM_FILL):
                yield Note(beat + 3 + index / 4, 0.1, tom, 90 + 6 * index)

    def bass(self, bar: int, root: int, full: bool) -> Iterator[Note]:
        dice = self.random
        lowest = 28 + (root - 28) % 12  # the root in the octave over the low E
        for eighth in range(8):
            if not full and eighth not in (0, 3, 4, 6, 7):
                continue
            start = bar * BEATS_A_BAR + eighth / 2 + self.late(0.006)
            leap = 0
            if eighth == 7 and dice.random() < 0.4:
                leap = 12
            elif eighth == 6 and dice.random() < 0.4:
                leap = 7
            yield Note(start, 0.45, lowest + leap, 100 + dice.randint(-12, 12))

    def guitar(self, bar: int, chord: list[int]) -> Iterator[Note]:
        """Strums, down and up in turn, a string after the other."""
        strings = sorted({chord[0], chord[0] + 7, chord[0] + 12, chord[1] + 12, chord[2] + 12})
        for strum, at in enumerate((0, 1, 1.5, 2.5, 3, 3.5)):
            down = strum % 2 == 0
            for index, pitch in enumerate(strings if down else reversed(strings)):
                start = bar * BEATS_A_BAR + at + index * 0.018 + self.late(0.004)
                yield Note(start, 0.85 if down else 0.45, pitch, 86 - 4 * index + self.random.randint(-10, 10))

    def piano(self, bar: int, chord: list[int], full: bool) -> Iterator[Note]:
        """A broken chord in eighths; in the second half a held chord two octaves up as well."""
        beat = bar * BEATS_A_BAR
        tones = [*chord, chord[0] + 12]
        for eighth, tone in enumerate((0, 1, 2, 3, 2, 1, 2, 1)):
            start = beat + eighth / 2 + self.late(0.006)
            yield Note(start, 0.6, tones[tone] + 12, 74 + self.random.randint(-14, 14))
        if full:
            for pitch in chord:
                yield Note(beat + self.late(0.005), 1.8, pitch + 24, 70)

    def sing(self, bar: int, chord: list[int], melody: list[Sung]) -> None:
        """Adds a bar of melody: phrases of two bars, the first after a quarter rest, each ending in a breath."""
        dice, bar_start, at = self.random, bar * 16, 0
        while at < 16:
            duration = min(dice.choice((2, 2, 2, 4, 4, 3)), 16 - at)
            if bar == 0 and at == 0:
                melody.append(Sung(bar_start, 4, None, ""))
                at = 4
                continue
            if bar % 2 == 1 and at >= 12:
                melody.append(Sung(bar_start + at, 16 - at, None, ""))
                return
            # On the strong beats tones of the chord, between them the scale too.
            degrees = [pitch - self.key for pitch in chord] if at % 8 == 0 else MAJOR_SCALE
            classes = [pitch % 12 for pitch in chord]
            tones = [tone for tone in range(57, 75) if (tone - self.key) % 12 in degrees or tone % 12 in classes]
            previous = next((sung.pitch for sung in reversed(melody) if sung.pitch), 66)
            pitch = min(
                tones,
                key=lambda tone: abs(tone - (previous + dice.choice((-4, -2, -2, 0, 2, 2, 3, 5)))) + dice.random(),
            )
            melody.append(Sung(bar_start + at, duration, pitch, dice.choice(SYLLABLES)))
            at += duration


class Studio:
    """Plays notes with FluidSynth and sings melodies with Sinsy, all to one length."""

    def __init__(self, sound_font: Path, bpm: float, bars: int, folder: Path) -> None:
        self.sound_font, self.bpm, self.bars, self.folder = sound_font, bpm, bars, folder
        self.samples = int(bars * BEATS_A_BAR * 60 / bpm * SAMPLE_RATE)

    def play(self, notes: list[Note], program: int, channel: int = 0) -> Audio:
        """Notes played by one General MIDI sound to `[T, 2]` in float64."""
        messages: list[tuple[int, int, Any]] = []  # tick, ends before starts, message
        for note in notes:
            if not 0 <= note.start < self.bars * BEATS_A_BAR:
                continue
            velocity = min(max(note.velocity, 1), 127)
            start, end = int(note.start * TICKS_A_BEAT), int((note.start + note.duration) * TICKS_A_BEAT)
            messages.append((start, 1, mido.Message("note_on", note=note.pitch, velocity=velocity, channel=channel)))
            messages.append((end, 0, mido.Message("note_off", note=note.pitch, channel=channel)))
        track = mido.MidiTrack()
        track.append(mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(self.bpm)))
        track.append(mido.Message("program_change", program=program, channel=channel))
        last = 0
        for tick, _, message in sorted(messages, key=lambda entry: entry[:2]):
            track.append(message.copy(time=tick - last))
            last = tick
        midi, wav = self.folder / "part.mid", self.folder / "part.wav"
        mido.MidiFile(ticks_per_beat=TICKS_A_BEAT, tracks=[track]).save(midi)
        command = ["fluidsynth", "-ni", "-q", "-g", "0.7", "-r", str(SAMPLE_RATE), "-O", "float", "-T", "wav"]
        subprocess.run([*command, "-F", wav, self.sound_font, midi], check=True, capture_output=True)
        audio, _ = soundfile.read(wav, dtype="float32", always_2d=True)
        audio = np.pad(audio, ((0, max(0, self.samples - len(audio))), (0, 0)))
        return np.asarray(audio[: self.samples], dtype=np.float64)

    def sing(self, melody: list[Sung]) -> Audio:
        """A melody to the dry voice `[T]` in float64."""
        path = self.folder / "melody.xml"
        path.write_text(music_xml(melody, self.bpm, self.bars), encoding="utf-8")
        sinsy = pysinsy.Sinsy()
        sinsy.setLanguages("j", pysinsy.get_default_dic_dir())
        sinsy.loadVoices(pysinsy.get_default_htsvoice())
        if not sinsy.loadScoreFromMusicXML(str(path)):
            raise RuntimeError("Sinsy could not read the melody that was written for it.")
        voice, sample_rate = sinsy.synthesize()
        if sample_rate != 48000:
            raise RuntimeError(f"Sinsy sang at {sample_rate} Hz where 48000 was expected.")
        resampled: Audio = resample_poly(np.asarray(voice, dtype=np.float64) / 32768, 147, 160)  # 48 kHz to 44.1
        return np.pad(resampled, (0, max(0, self.samples - len(resampled))))[: self.samples]


def music_xml(melody: list[Sung], bpm: float, bars: int) -> str:
    """The melody as MusicXML in 4/4, a measure a bar, with a syllable a note."""
    measures = []
    for bar in range(bars):
        notes = []
        for sung in melody:
            if sung.start // 16 != bar:
                continue
            length = f"<duration>{sung.duration}</duration><voice>1</voice>"
            if sung.pitch is None:
                notes.append(f"<note><rest/>{length}</note>")
                continue
            name = NOTE_NAMES[sung.pitch % 12]
            alter = "<alter>1</alter>" if name.endswith("#") else ""
            notes.append(
                f"<note><pitch><step>{name[0]}</step>{alter}<octave>{sung.pitch // 12 - 1}</octave></pitch>{length}"
                f"<lyric><text>{sung.syllable}</text></lyric></note>"
            )
        heading = ""
        if bar == 0:
            heading = (
                "<attributes><divisions>4</divisions><key><fifths>0</fifths></key>"
                "<time><beats>4</beats><beat-type>4</beat-type></time></attributes>"
                f'<direction><sound tempo="{bpm}"/></direction>'
            )
        measures.append(f'<measure number="{bar + 1}">{heading}{"".join(notes)}</measure>')
    return (
        '<?xml version="1.0" encoding="UTF-8"?><score-partwise version="2.0"><part-list><score-part id="P1">'
        '<part-name>V</part-name></score-part></part-list><part id="P1">'
        + "".join(measures)
        + "</part></score-partwise>"
    )


def amplify(bass: Audio) -> Audio:
    """The dark tilt of a bass amplifier."""
    low: Audio = sosfilt(butter(1, 220, fs=SAMPLE_RATE, output="sos"), bass, axis=0)
    return bass * 0.5 + 1.6 * low


def double_track(guitar: Audio) -> Audio:
    """The guitar on the left, and on the right mostly itself 11 ms later."""
    late = np.roll(guitar, int(0.011 * SAMPLE_RATE), axis=0)
    early, late = guitar.mean(1), late.mean(1)
    return np.stack([early * 0.9 + 0.1 * late, 0.35 * early + 0.65 * late], 1)


def place_voice(voice: Audio, noise: np.random.Generator) -> Audio:
    """A dry voice `[T]` to `[T, 2]` in a room: rumble cut, a faint echo on each side, reverberation."""
    voice = sosfilt(butter(2, 110, "high", fs=SAMPLE_RATE, output="sos"), voice)
    sides = [voice + 0.12 * np.roll(voice, int(seconds * SAMPLE_RATE)) for seconds in (0.017, 0.023)]
    return reverberate(np.stack(sides, 1), noise, decay_seconds=1.3, wet=0.22)


def reverberate(audio: Audio, noise: np.random.Generator, *, decay_seconds: float, wet: float) -> Audio:
    """Adds exponentially decaying, band-passed noise as a room's answer; it falls by 60 dB in `decay_seconds`."""
    samples = int(decay_seconds * SAMPLE_RATE)
    response = noise.standard_normal((samples, 2)) * np.exp(-6.9 * np.arange(samples) / samples)[:, None]
    response = sosfilt(butter(2, [250, 7000], "band", fs=SAMPLE_RATE, output="sos"), response, axis=0)
    response /= np.sqrt((response**2).sum(0))
    room = [fftconvolve(audio[:, side], response[:, side])[: len(audio)] for side in (0, 1)]
    return audio + wet * np.stack(room, 1)


def render(seed: int, *, bars: int, bpm: float | None = None, sound_font: Path = SOUND_FONT) -> dict[str, Audio]:
    """The six stems of a song, then "mixture", each `[T, 2]` in float32 at 44.1 kHz; the seed draws a missing `bpm`."""
    dice, noise = random.Random(seed), np.random.default_rng(seed)
    if bpm is None:
        bpm = dice.choice(TEMPI_BPM)
    score = Composer(dice, bars).score()
    guitar, bass, piano, pad, lead = (dice.choice(sounds) for sounds in (GUITARS, BASSES, PIANOS, PADS, LEADS))
    with tempfile.TemporaryDirectory() as folder:
        studio = Studio(sound_font, bpm, bars, Path(folder))
        stems = {
            "drums": studio.play(score.drums, 0, DRUM_CHANNEL),
            "bass": amplify(studio.play(score.bass, bass)),
            "guitar": double_track(studio.play(score.guitar, guitar)),
            "piano": studio.play(score.piano, piano),
            "other": studio.play(score.pad, pad) + 0.5 * studio.play(score.lead, lead, channel=1),
            "vocals": place_voice(studio.sing(score.melody), noise),
        }
    for name, stem in stems.items():
        stem *= STEM_RMS[name] / (np.sqrt((stem**2).mean()) + 1e-9)
    gain = MIXTURE_PEAK / np.abs(sum(stems.values())).max()
    song = {name: (stems[name] * gain).astype(np.float32) for name in STEMS}
    song["mixture"] = np.sum([song[name] for name in sorted(STEMS)], axis=0, dtype=np.float32)
    return song


def seed_range(text: str) -> range:
    """ "1000:1160" to range(1000, 1160); "7" to that seed alone."""
    first, _, end = text.partition(":")
    return range(int(first), int(end) if end else int(first) + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=seed_range, required=True, help="first:end, the end not among them, or one seed"
    )
    parser.add_argument("--bars", type=int, default=8)
    parser.add_argument("--bpm", type=float, help="beats a minute; default: each seed's own")
    parser.add_argument("--out", type=Path, required=True, help="gets a folder a song; a song that is there is kept")
    parser.add_argument("--sound-font", type=Path, default=SOUND_FONT)
    options = parser.parse_args()
    for seed in options.seeds:
        folder = options.out / str(seed)
        if (folder / "mixture.wav").exists():  # the last to be written
            continue
        song = render(seed, bars=options.bars, bpm=options.bpm, sound_font=options.sound_font)
        folder.mkdir(parents=True, exist_ok=True)
        for name, audio in song.items():
            soundfile.write(folder / f"{name}.wav", audio, SAMPLE_RATE, subtype="FLOAT")
        print(f"{folder}: {len(song['mixture']) / SAMPLE_RATE:.1f} s", flush=True)


if __name__ == "__main__":
    main()
