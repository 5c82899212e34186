"""The listening page: one HTML file with pictures, levels and scores of a song and its stems, and a player.

This module fills the data into report.html, which draws and plays it.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from separation.analysis.facts import Loudness, SongAnalysis
from separation.audio.decode import decode
from separation.audio.excerpt import Excerpt
from separation.audio.waveform import Waveform, cut
from separation.errors import AudioError
from separation.progress import Progress
from separation.report.picture import colour_of
from separation.report.player import Picture, Sound, write_page
from separation.system.os_errors import output_errors
from separation.system.output import OutputFolder
from separation.system.record import RECORD
from separation.system.threads import Threads

MAX_SECONDS = 20 * 60  # the longest song; with six stems, its page has about 160 MB
MEASURED = 0.3  # share of the progress bar for decoding and pictures; the rest is for the sound


@dataclass(frozen=True)
class Report:
    """The contents of a listening page.

    Attributes:
        title: the page's title.
        mixture: the song's file.
        stems: stem -> its file.
        scores: stem -> its SDR in dB.
        links: text -> URL of the links at the top of the page.
        mix: the URL, relative to the page's, of a server that mixes the stems' own files; empty if there is none.
        video: its URL for the mix as the sound of the song's video; empty if the song is none.
        record: the name of the record that lists the page.
        excerpt: the part of the song of which these are the stems; None means the whole song.
        analysis: tempo and key, which the page shows, and the loudness of each track.
    """

    title: str
    mixture: Path
    stems: Mapping[str, Path]
    scores: Mapping[str, float] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    mix: str = ""
    video: str = ""
    record: str = RECORD
    excerpt: Excerpt | None = None
    analysis: SongAnalysis | None = None


def write_report(report: Report, target: Path, *, overwrite: bool = False, progress: Progress = Progress()) -> None:
    """Write the page to `target`. Memory does not grow with the song. A failed run leaves no file behind.

    Raises:
        AudioError: a file cannot be read or lasts longer than MAX_SECONDS.
        OutputError: the page cannot be written. Without `overwrite`, a file that this program did not write is never
            replaced.
    """
    files = {"mixture": report.mixture, **report.stems}
    folder = OutputFolder(target.parent, overwrite=overwrite, record=report.record)
    with folder as output, ExitStack() as stack, Threads() as pool:
        output.check_targets([target.name], report.mixture)
        waves: list[Waveform] = []
        for path in files.values():
            progress(MEASURED * len(waves) / len(files), f"reading {path.name}")
            try:
                waves.append(
                    stack.enter_context(decode(path, output.work, max_seconds=MAX_SECONDS, accept_damaged=True))
                )
            except AudioError as e:
                raise AudioError(f"cannot make the report of {report.title!r}: {e}") from e
        if report.excerpt is not None:
            waves[0] = stack.enter_context(cut(waves[0], *report.excerpt.samples(waves[0]), output.work))
        peak = max(wave.peak for wave in waves) or 1.0
        sound = Sound(waves, [min(1.0, 1 / peak)] * len(waves))
        pictures = dict(zip(files, sound.pictures(pool), strict=True))
        data = _page_data(report, pictures, peak) | sound.times()
        written = output.work / target.name
        with output_errors(target):
            write_page(written, "report.html", data, sound, pool, progress.part(MEASURED, 1))
        progress(1.0, "done")
        output.publish({"report": written})


def _page_data(report: Report, pictures: Mapping[str, Picture], peak: float) -> dict[str, Any]:
    """The data for report.html, without the sound. `peak` is that of all tracks; the first track is the mixture."""
    loudest = max(float(picture.energy.max()) for picture in pictures.values()) or 1.0
    sdrs = {name: f"SDR {sdr:.1f} dB".replace("-", "−") for name, sdr in report.scores.items()}
    loudnesses = {name: [_lufs(of_one)] for name, of_one in report.analysis.loudness.items()} if report.analysis else {}
    tracks = [
        {
            "name": name,
            "mixture": index == 0,
            "colour": colour_of(name, index),
            "facts": [picture.level, *loudnesses.get(name, ()), *([sdrs[name]] if name in sdrs else [])],
            **picture.drawn(peak, loudest),
        }
        for index, (name, picture) in enumerate(pictures.items())
    ]
    tempo, key = (report.analysis.tempo_bpm, report.analysis.key) if report.analysis else (None, None)
    links = {"links": dict(report.links), "mix": report.mix, "video": report.video}
    return {"title": report.title, "tempo": tempo, "key": key, "tracks": tracks, **links}


def _lufs(loudness: Loudness) -> str:
    """A track's loudness as the page shows it; "— LUFS" for a silent one."""
    lufs = loudness.integrated_lufs
    return "— LUFS" if lufs is None else f"{lufs:.1f} LUFS".replace("-", "−")
