"""Scores stems against their references, song by song, and subtracts recordings from each other.

A song is a folder with an audio file for each stem: `<song>/<stem>.wav`, as `separate` writes it, or
`train|test/<song>/{mixture,vocals,drums,bass,other}.wav`, as in MUSDB18-HQ.
"""

import json
import logging
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn.functional import pad

from separation.audio.decode import decode
from separation.audio.encode import encode
from separation.audio.options import OutputOptions
from separation.audio.suffixes import AUDIO
from separation.audio.waveform import Waveform
from separation.engine.separator import Separator
from separation.errors import AudioError, EstimateError, InputError
from separation.evaluation import spectral
from separation.evaluation.choice import DEFAULT_SCORES, columns
from separation.evaluation.log_wmse import log_wmse
from separation.evaluation.metrics import Read, Scores, has_museval, is_ill_conditioned, scores
from separation.progress import Progress
from separation.system.text import shown

logger: logging.Logger = logging.getLogger("separation")

TOLERANCE_SECONDS = 0.1  # how much recordings of one song may differ in length
SEPARATED = 0.9  # share of the progress bar for the separation; the rest is for the scores
HINT = "SIR and SAR need museval: pip install museval"
_MIXTURE = "mixture"
_BLOCK_SAMPLES = 2**19  # compared at once, per channel

StemFiles = dict[str, Path]  # the files of a song by stem


@dataclass(frozen=True)
class Evaluation:
    """Scores by song and stem."""

    songs: dict[str, dict[str, Scores]]
    columns: dict[str, str]  # the fields of the scores that were asked for, and their headings
    hint: str  # what to install for missing scores
    failed: dict[str, str]  # song -> why it has no scores

    @property
    def median(self) -> dict[str, Scores]:
        """The median over the songs, by stem. Undefined scores do not count."""
        return self._over_songs(statistics.median)

    @property
    def mean(self) -> dict[str, Scores]:
        """The mean over the songs, by stem. Undefined scores do not count."""
        return self._over_songs(statistics.fmean)

    def _over_songs(self, average: Callable[[list[float]], float]) -> dict[str, Scores]:
        averages = {}
        for stem in next(iter(self.songs.values())):
            columns = zip(*(astuple(stems[stem]) for stems in self.songs.values()), strict=True)
            known = [[value for value in column if not math.isnan(value)] for column in columns]
            averages[stem] = Scores(*(average(values) if values else math.nan for values in known))
        return averages

    def as_json(self) -> str:
        """One JSON object. Undefined or missing scores are null; infinite ones are the strings "inf" and "-inf"."""
        songs = {song: self._plain(stems) for song, stems in self.songs.items()}
        averages = {"median": self._plain(self.median), "mean": self._plain(self.mean)}
        return json.dumps({"songs": songs, **averages, "failed": self.failed})

    def __str__(self) -> str:
        songs = [*self.songs.items(), *([("median", self.median), ("mean", self.mean)] if len(self.songs) > 1 else [])]
        rows = [["song", "stem", *self.columns.values()]]
        for song, stems in songs:
            rows += [
                [shown(song), stem, *(_text(getattr(score, field)) for field in self.columns)]
                for stem, score in stems.items()
            ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}"
            + "".join(f"  {cell:>{width}}" for cell, width in zip(row[2:], widths[2:], strict=True))
            for row in rows
        ]
        return "\n".join([*lines, self.hint] if self.hint else lines)

    def _plain(self, stems: Mapping[str, Scores]) -> dict[str, dict[str, float | str | None]]:
        return {stem: {field: _plain(getattr(score, field)) for field in self.columns} for stem, score in stems.items()}


def _text(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.2f}"


def _plain(value: float) -> float | str | None:
    return None if math.isnan(value) else str(value) if math.isinf(value) else round(value, 4)


def find_songs(folder: Path) -> dict[str, StemFiles]:
    """The songs in a folder and its subfolders, by the names of their folders. The folder may itself be a song.

    Raises InputError if there is no song, two songs have the same name, or a song has two files for a stem.
    """
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is not a folder: give one with a folder of stems for each song")
    found: dict[Path, StemFiles] = {}
    for path, stem in _audio_files(folder):
        song = found.setdefault(path.parent, {})
        if stem in song:
            two = f"{song[stem].name!r} and {path.name!r} in {str(path.parent)!r}"
            raise InputError(f"{two} are the same stem: remove one")
        song[stem] = path
    songs: dict[str, StemFiles] = {}
    for path, song in found.items():
        name = path.resolve().name
        if name in songs:
            raise InputError(f"{str(folder)!r} has more than one song {name!r}: give a folder with only one of them")
        songs[name] = song
    if not songs:
        raise InputError(f"{str(folder)!r} has no audio files: give a folder with one file for each stem")
    return songs


def _audio_files(folder: Path) -> Iterable[tuple[Path, str]]:
    """Each audio file below a folder and its stem, in order. Hidden files are skipped."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in AUDIO and not hidden and path.is_file():
            yield path, path.stem


def evaluate(
    references: Mapping[str, StemFiles],
    estimates: Mapping[str, StemFiles] | Separator,
    *,
    names: Sequence[str] = DEFAULT_SCORES,
    progress: Progress = Progress(),
) -> Evaluation:
    """Score the estimates of every song. If `estimates` is a separator, it first separates each song's mixture.

    `names` are the scores to compute, of `choice.SCORES`. The mixture is the file `mixture` or, without one, the sum of
    the references. `instrumental` and `no_<stem>` are scored against their own reference or, without one, against the
    sum of all others except vocals or `<stem>`.

    Everything is scored in stereo at 44100 Hz. Estimates up to 0.1 s longer or shorter than their reference are cut or
    padded with silence. Temporary files take 8 bytes per sample and stem. If a song fails, the others continue.

    Raises:
        InputError: a song or a stem has no counterpart; or every song failed, the last one because of its length.
        AudioError: every song failed, the last one because a file cannot be read as audio.
        SeparationError: as `Separator.separate_file`.
    """
    if isinstance(estimates, Separator):
        wanted = {song: sorted(estimates.stems) for song in references}
    else:
        if len(references) == len(estimates) == 1:  # their folders may have different names
            estimates = dict(zip(references, estimates.values(), strict=True))
        wanted = _estimated_stems(references, estimates)
    parts = {song: {stem: _reference(song, stem, references[song]) for stem in wanted[song]} for song in references}
    songs, failed = {}, {}
    for index, (song, files) in enumerate(references.items()):
        share = progress.part(index / len(references), (index + 1) / len(references))
        try:
            with TemporaryDirectory() as work:
                if isinstance(estimates, Separator):
                    separating = share.part(0, SEPARATED)
                    mixture = _mixture_file(files, Path(work))
                    made: StemFiles = estimates.separate_file(mixture, Path(work) / "stems", progress=separating)
                else:
                    made = estimates[song]
                share(SEPARATED, f"scoring {song}")
                songs[song] = _Song(song, parts[song], _mixture(files), made).scores(names, Path(work))
        except (AudioError, EstimateError, InputError) as e:
            failed[song] = str(e)
            if len(failed) == len(references):
                raise
    progress(1.0, "done")
    hint = HINT if {"sir", "sar"} & set(names) and not has_museval() else ""
    return Evaluation(songs, columns(names), hint, failed)


def _estimated_stems(references: Mapping[str, StemFiles], estimates: Mapping[str, StemFiles]) -> dict[str, list[str]]:
    """The stems to score in each song. Raises InputError unless all songs have estimates of the same stems."""
    stems = {song: [stem for stem in estimates.get(song, {}) if stem != _MIXTURE] for song in references}
    expected = sorted({stem for found in stems.values() for stem in found})
    for song, found in stems.items():
        if song not in estimates:
            raise InputError(f"song {song!r} has no estimates: separate it, or leave it out of the references")
        if missing := [stem for stem in expected if stem not in found]:
            raise InputError(f"song {song!r} has no estimate of {missing[0]!r}, unlike other songs: separate it again")
    return stems


def _reference(song: str, stem: str, files: StemFiles) -> list[Path]:
    """The files whose sum is the reference of a stem. Raises InputError if there are none."""
    if stem in files:
        return [files[stem]]
    left_out = _left_out(stem)
    rest = [path for name, path in files.items() if name not in (_MIXTURE, left_out) and not _left_out(name)]
    if left_out is None or not rest:
        raise InputError(f"song {song!r} has no reference for the stem {stem!r}: leave its estimate out")
    return rest


def _left_out(stem: str) -> str | None:
    """The stem that `instrumental` or `no_<stem>` leaves out; None for other stems."""
    if stem == "instrumental":
        return "vocals"
    return stem.removeprefix("no_") if stem.startswith("no_") else None


def _mixture(files: StemFiles) -> list[Path]:
    """The files whose sum is the mixture: its own file, or else all stems, each once."""
    if _MIXTURE in files:
        return [files[_MIXTURE]]
    plain = [stem for stem in files if not _left_out(stem)]
    rest = [stem for stem in files if _left_out(stem) and [_left_out(stem)] == plain]  # such as vocals, instrumental
    return [files[stem] for stem in (*plain, *rest[:1])]


def _mixture_file(files: StemFiles, work: Path) -> Path:
    parts = _mixture(files)
    if len(parts) == 1:
        return parts[0]
    with ExitStack() as stack:
        waves = [stack.enter_context(decode(path, work)) for path in parts]
        mixture = stack.enter_context(Waveform(work))
        for start in range(0, waves[0].n_samples, _BLOCK_SAMPLES):
            mixture.append(_sum(waves, start, min(start + _BLOCK_SAMPLES, waves[0].n_samples)).float())
        path = work / f"{_MIXTURE}.wav"
        encode(mixture, path, OutputOptions())
    return path


@dataclass(frozen=True)
class _Song:
    """The files of a song: those of each reference, of the mixture, and the estimates."""

    name: str
    references: Mapping[str, Sequence[Path]]
    mixture: Sequence[Path]
    estimates: StemFiles

    def scores(self, names: Sequence[str], work: Path) -> dict[str, Scores]:
        """These scores of each stem. Temporary files are written to `work`."""
        paths = [path for parts in self.references.values() for path in parts]
        paths += [self.estimates[stem] for stem in self.references]
        paths += self.mixture if "log_wmse" in names else []
        with ExitStack() as stack:
            waves = {path: stack.enter_context(decode(path, work)) for path in dict.fromkeys(paths)}
            n_samples = waves[next(iter(self.references.values()))[0]].n_samples
            for path, wave in waves.items():
                _check_length(path, wave, n_samples, f"the first reference of {self.name!r}")
            result = self._in_decibels(waves, n_samples, names)
            return {stem: replace(result[stem], **self._others(stem, waves, n_samples, names)) for stem in result}

    def _in_decibels(self, waves: Mapping[Path, Waveform], n_samples: int, names: Sequence[str]) -> dict[str, Scores]:
        result: dict[str, Scores] = {}
        sir_and_sar = bool({"sir", "sar"} & set(names))
        for group in _groups(list(self.references)):
            true = _read([[waves[path] for path in self.references[stem]] for stem in group])
            estimated = _read([[waves[self.estimates[stem]]] for stem in group])
            found = scores(true, estimated, n_samples, sir_and_sar=sir_and_sar)
            if is_ill_conditioned(found):
                logger.warning(
                    f"{self.name!r}: SIR and SAR of {', '.join(group)} are wrong, because museval's equations fail on "
                    "references that are nearly mono or lossy: go by the other scores"
                )
            result |= zip(group, found, strict=True)
        return {stem: result[stem] for stem in self.references}

    def _others(
        self, stem: str, waves: Mapping[Path, Waveform], n_samples: int, names: Sequence[str]
    ) -> dict[str, float]:
        """The scores of one stem that are not in decibels, by the fields of `Scores`."""
        true = partial(_sum, [waves[path] for path in self.references[stem]])
        estimated = partial(_sum, [waves[self.estimates[stem]]])
        found: dict[str, float] = {}
        if {"bleedless", "fullness"} & set(names):
            found["bleedless"], found["fullness"] = spectral.bleedless_and_fullness(true, estimated, n_samples)
        if "log_wmse" in names:
            mixture = partial(_sum, [waves[path] for path in self.mixture])
            found["log_wmse"] = log_wmse(mixture, true, estimated, n_samples)
        if "l1_freq" in names:
            found["l1_freq"] = spectral.l1_frequency(true, estimated, n_samples)
        if "mrstft" in names:
            found["mrstft"] = spectral.multi_resolution_stft(true, estimated, n_samples)
        return found


def _groups(stems: Sequence[str]) -> list[list[str]]:
    """Groups of stems to score together. No two stems of a group contain the same music.

    A stem may be in several groups; its scores are those of the last one.
    """
    plain = [stem for stem in stems if not _left_out(stem)]
    groups = [[part for part in plain if part == left_out] + [stem] for stem in stems if (left_out := _left_out(stem))]
    if not any(set(plain) <= set(group) for group in groups):
        groups.append(plain)
    return groups


def _read(stems: Sequence[Sequence[Waveform]]) -> Read:
    """A function that reads stems `[S, 2, n]`, each the sum of some waveforms."""
    return lambda start, stop: torch.stack([_sum(waves, start, stop) for waves in stems])


def _sum(waves: Sequence[Waveform], start: int, stop: int) -> Tensor:
    """Samples `[start, stop)` of the sum of waveforms, in float64. Shorter waveforms are padded with silence."""
    parts = []
    for wave in waves:
        part = wave.read(min(start, wave.n_samples), min(stop, wave.n_samples)).double()
        parts.append(pad(part, (0, stop - start - part.shape[1])))
    return torch.stack(parts).sum(dim=0)


def _check_length(path: Path, wave: Waveform, n_samples: int, of: str) -> None:
    difference = (wave.n_samples - n_samples) / wave.sample_rate
    if abs(difference) > TOLERANCE_SECONDS:
        longer = "longer" if difference > 0 else "shorter"
        raise InputError(
            f"{str(path)!r} is {abs(difference):.1f} s {longer} than {of}; the limit is {TOLERANCE_SECONDS} s: "
            "export both again from the same song"
        )


@dataclass(frozen=True)
class Residual:
    """The difference of two recordings in dB relative to full scale (a constant 1)."""

    name: str
    peak_dbfs: float
    rms_dbfs: float

    def __str__(self) -> str:
        if self.peak_dbfs == -math.inf:
            return f"{self.name}: identical"
        return f"{self.name}: peak {self.peak_dbfs:.1f} dBFS, RMS {self.rms_dbfs:.1f} dBFS"


def null(first: Path, second: Path) -> list[Residual]:
    """Subtract each recording in folder `second` from the one of the same name in folder `first`.

    Both may also be files; or `first` is a folder of stems and `second` the mixture that they should sum to. Files are
    compared in stereo at their own sample rate; their formats may differ.

    Raises InputError if a file has no counterpart, or if their sample rates or lengths differ.
    """
    if second.is_file():
        if first.is_file():
            return [_residual(second.name, [first], second)]
        parts = [path for path, stem in _audio_files(first) if stem != _MIXTURE]
        if not parts:
            raise InputError(f"{str(first)!r} has no audio files: give a folder of stems")
        return [_residual(f"sum of {', '.join(path.stem for path in parts)}", parts, second)]
    if first.is_file():
        raise InputError(f"{str(first)!r} is a file but {str(second)!r} is not: give two files, or the folder first")
    first_files, second_files = _by_name(first), _by_name(second)
    for name in [*first_files, *second_files]:
        if name not in first_files or name not in second_files:
            folder = str(second if name in first_files else first)
            raise InputError(f"{folder!r} has no {name!r}, unlike the other folder: give folders with the same files")
    return [_residual(name, [path], second_files[name]) for name, path in first_files.items()]


def _by_name(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path, _ in _audio_files(folder):
        name = str(path.relative_to(folder).with_suffix(""))
        if name in files:
            two = f"{files[name].name!r} and {path.name!r} in {str(folder)!r}"
            raise InputError(f"{two} have the same name: remove one")
        files[name] = path
    if not files:
        raise InputError(f"{str(folder)!r} has no audio files: give a file, or a folder with audio files")
    return files


def _residual(name: str, parts: Sequence[Path], whole: Path) -> Residual:
    with TemporaryDirectory() as work, ExitStack() as stack:
        waves = [stack.enter_context(decode(path, Path(work), sample_rate=None)) for path in [whole, *parts]]
        sizes = [(wave.n_samples, wave.sample_rate) for wave in waves]
        for path, size in zip(parts, sizes[1:], strict=True):
            if size != sizes[0]:
                raise InputError(
                    f"{str(path)!r} has {size[0]} samples at {size[1]} Hz, {str(whole)!r} has {sizes[0][0]} at "
                    f"{sizes[0][1]} Hz: give recordings of equal length and sample rate"
                )
        peak, energy = 0.0, 0.0
        for start in range(0, waves[0].n_samples, _BLOCK_SAMPLES):
            stop = min(start + _BLOCK_SAMPLES, waves[0].n_samples)
            left = _sum(waves[1:], start, stop) - _sum(waves[:1], start, stop)
            peak, energy = max(peak, float(left.abs().max())), energy + float(left.square().sum())
        mean_square = energy / (waves[0].n_samples * waves[0].channels)
        return Residual(name, _decibels(peak**2), _decibels(mean_square))


def _decibels(power: float) -> float:
    return 10 * math.log10(power) if power else -math.inf
