"""Everything about a song: its tempo, its key, and how loud it and its stems are."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from separation.analysis.facts import MIXTURE, Loudness, SongAnalysis
from separation.analysis.key import key
from separation.analysis.loudness import loudness
from separation.analysis.tempo import tempo
from separation.audio.beside import PROJECT, VIDEO
from separation.audio.decode import decode
from separation.audio.excerpt import Excerpt
from separation.audio.waveform import SAMPLE_RATE, Waveform, cut
from separation.progress import Progress, Report
from separation.system.threads import Threads

# What to take the tempo and the key from: the first line whose stems are there; if there is none, the mixture.
RHYTHM = (("drums",), ("kick", "snare", "toms", "hihat", "cymbals"), ("instrumental",), ("no_vocals",))
HARMONY = (("bass", "guitar", "piano", "other"), ("bass", "other"), ("no_drums",), ("instrumental",), ("no_vocals",))
QUIET_DECIBELS = -40.0  # against the mixture; a quieter stem is only what leaked into it
DECODED = 0.4  # share of the job


def analyse(
    mixture: Path | str,
    stems: Mapping[str, Path],
    *,
    excerpt: Excerpt | None = None,
    folder: Path | None = None,
    progress: Report | None = None,
) -> SongAnalysis:
    """Analyse a song from its file and the files of its stems, which may be none.

    The tempo is that of the drums, the key that of the other instruments. Without such stems, both are those of the
    instrumental or, if that is missing too, of the mixture, which is less certain. Memory grows by 2 kB for each second
    of the song.

    Args:
        mixture: the song's file.
        stems: the stems' files by name, such as the result of `Separator.separate_file`, whose "video" and "project"
            are left out.
        excerpt: the part of the song of which these are the stems; None means the whole song.
        folder: for the decoded audio, while it is analysed; None means the system's folder for temporary files.
        progress: called with the share that is done, 0 to 1, and the stage; an exception that it raises cancels.

    Raises:
        AudioError: a file cannot be read.
        OutputError: `folder` is full or cannot be written to.
    """
    job = Progress(progress)
    files = {MIXTURE: Path(mixture)} | {name: path for name, path in stems.items() if name not in (PROJECT, VIDEO)}
    waves: dict[str, Waveform] = {}
    rate = None if excerpt is None else SAMPLE_RATE  # at which the separator chose the samples of a preview
    with ExitStack() as stack:
        work = folder or Path(stack.enter_context(TemporaryDirectory()))
        for name, path in files.items():
            job(DECODED * len(waves) / len(files), f"reading {path.name}")
            waves[name] = stack.enter_context(decode(path, work, sample_rate=rate, accept_damaged=True))
        if excerpt is not None:
            waves[MIXTURE] = stack.enter_context(cut(waves[MIXTURE], *excerpt.samples(waves[MIXTURE]), work))
        return analyse_waves(waves, progress=job.part(DECODED, 1))


def analyse_waves(waves: Mapping[str, Waveform], *, progress: Progress = Progress()) -> SongAnalysis:
    """As `analyse`, of decoded audio: the mixture, under "mixture", and the stems, which all have one sample rate."""
    with Threads() as threads:
        measuring = {name: threads.submit(loudness, wave, wave.sample_rate) for name, wave in waves.items()}
        progress(0, "finding the tempo")
        bpm = find_tempo(waves)
        progress(0.3, "finding the key")
        name = find_key(waves)
        measured: dict[str, Loudness] = {}
        for stem, measurement in measuring.items():
            progress(0.5 + 0.5 * len(measured) / len(waves), "measuring the loudness")
            measured[stem] = measurement.result()
    return SongAnalysis(bpm, name, measured)


def find_tempo(waves: Mapping[str, Waveform]) -> float | None:
    """The tempo in BPM, of waveforms as for `analyse_waves`; None if there are no drums or no regular beat."""
    chosen = _chosen(waves, RHYTHM)
    return None if chosen is None else tempo(chosen, chosen.sample_rate)


def find_key(waves: Mapping[str, Waveform]) -> str | None:
    """The key, of waveforms as for `analyse_waves`; None if nothing has a pitch, or no key fits."""
    chosen = _chosen(waves, HARMONY)
    return None if chosen is None else key(chosen, chosen.sample_rate)


class _Sum:
    """The sum of waveforms with one sample rate, computed whenever it is read."""

    def __init__(self, waves: Sequence[Waveform]) -> None:
        self._waves = waves
        self.sample_rate = waves[0].sample_rate
        self.n_samples = min(wave.n_samples for wave in waves)

    def read(self, start: int, stop: int) -> Tensor:
        return torch.stack([wave.read(start, stop) for wave in self._waves]).sum(dim=0)


def _chosen(waves: Mapping[str, Waveform], sources: Sequence[Sequence[str]]) -> _Sum | None:
    """The first source whose stems are there, else the mixture; None if it is silent or only what leaked into it."""
    names = next((names for names in sources if set(names) <= waves.keys()), (MIXTURE,))
    parts = [waves[name] for name in names]
    rms = math.sqrt(sum(_mean_square(part) for part in parts))
    limit = math.sqrt(_mean_square(waves[MIXTURE])) * 10 ** (QUIET_DECIBELS / 20)
    return _Sum(parts) if rms > limit else None


def _mean_square(wave: Waveform) -> float:
    return wave.mean**2 + wave.std**2
