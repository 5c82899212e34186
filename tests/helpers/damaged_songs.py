"""Damages songs of every format by seeded numbers, and measures how much of the music survives.

`python tests/helpers/damaged_songs.py 0 1500 [FORMAT]` decodes the damaged songs with these numbers and prints a table.
"""

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

SECONDS, RATE = 3, 44100
WINDOW = RATE // 50  # samples: the unit in which survival is measured
LOSS_SECONDS = 0.05  # a larger loss must not be silent
HANG_SECONDS = 60  # generous, because the machine may be busy

_VIDEO = ("-f", "lavfi", "-i", f"color=c=blue:s=32x32:r=5:d={SECONDS}", "-map", "0:a", "-map", "1:v", "-c:v", "mpeg4")
# ffmpeg's options for the song, by file name.
FORMATS: dict[str, tuple[str, ...]] = {
    "pcm.wav": (),
    "rf64.wav": ("-rf64", "always"),
    "pcm.w64": (),
    "pcm.aiff": (),
    "pcm.caf": (),
    "pcm.au": (),
    "flac.flac": (),
    "vorbis.ogg": ("-c:a", "libvorbis"),
    "opus.opus": ("-c:a", "libopus"),
    "flac.oga": ("-c:a", "flac"),
    "speex.ogg": ("-c:a", "libspeex", "-ac", "1", "-ar", "32000"),
    "cbr.mp3": ("-b:a", "192k"),
    "vbr.mp3": ("-q:a", "3"),
    "joint.mp3": ("-b:a", "96k", "-joint_stereo", "1"),
    "mono.mp3": ("-b:a", "96k", "-ac", "1"),
    "low.mp3": ("-b:a", "48k", "-ar", "22050"),
    "bare.mp3": ("-b:a", "192k", "-write_xing", "0", "-id3v2_version", "0"),
    "layer2.mp2": ("-b:a", "192k"),
    "adts.aac": ("-c:a", "aac"),
    "aac.m4a": ("-c:a", "aac"),
    "alac.m4a": ("-c:a", "alac"),
    "aac.mka": ("-c:a", "aac"),
    "flac.mka": ("-c:a", "flac", "-cluster_time_limit", "500"),
    "opus.webm": ("-c:a", "libopus", "-cluster_time_limit", "500"),
    "vorbis.webm": ("-c:a", "libvorbis"),
    "wavpack.wv": (),
    "wma2.wma": (),
    "ac3.ac3": (),
    "eac3.eac3": (),
    "tta.tta": (),
    "aac.mp4": (*_VIDEO, "-c:a", "aac"),
    "pcm.mov": (*_VIDEO, "-c:a", "pcm_s16le"),
    "mp3.avi": (*_VIDEO, "-c:a", "libmp3lame"),
    "aac.flv": (*_VIDEO[:-1], "flv", "-c:a", "aac"),
    "aac.ts": (*_VIDEO, "-c:a", "aac"),
    "mp2.mpg": (*_VIDEO[:-1], "mpeg2video", "-r", "25", "-c:a", "mp2"),
}
# Plain samples without checksums: bytes that change in place cannot be noticed.
PLAIN = ("pcm.wav", "rf64.wav", "pcm.w64", "pcm.aiff", "pcm.caf", "pcm.au", "pcm.mov")
# ffmpeg skips zeros in the MPEG audio of a program stream without reporting an error.
UNNOTICED = {("mp2.mpg", "zero")}


def song() -> NDArray[np.float32]:
    """`[n, 2]` noise that never repeats itself, with similar but not equal sides."""
    noise = np.random.default_rng(7).standard_normal((SECONDS * RATE + 64, 3)).astype(np.float32)
    low = sum(noise[i : i + SECONDS * RATE] for i in range(5)) / 12  # low frequencies, which encoders keep
    return np.clip(np.stack([low[:, 0] + 0.3 * low[:, 1], low[:, 0] + 0.3 * low[:, 2]], axis=1), -1, 1)


def make(folder: Path, names: Iterable[str] = FORMATS) -> dict[str, bytes]:
    """The intact songs by name, as far as this ffmpeg has encoders for them."""
    source = folder / "source.wav"
    soundfile.write(source, song(), RATE)
    made = {}
    for name in names:
        path = folder / name
        command = ["ffmpeg", "-nostdin", "-v", "error", "-y", "-fflags", "+bitexact", "-i", str(source)]
        options = [*FORMATS[name], "-flags", "+bitexact", "-map_metadata", "-1", "-metadata", "title=Song"]
        if subprocess.run([*command, *options, str(path)], capture_output=True, check=False).returncode == 0:
            made[name] = path.read_bytes()
    return made


KINDS = (
    "flip one",
    "flip some",
    "burst",
    "delete",
    "insert",
    "truncate",
    "duplicate",
    "join",
    "zero",
    "header",
    "number",
    *("delete", "insert", "zero", "burst"),  # twice as often as the others
)


def damaged(whole: dict[str, bytes], name: str, number: int) -> tuple[str, bytes]:
    """A kind of damage, and the song with it, by the damage's number."""
    random_ = random.Random(f"{name} {number}")
    kind, data = KINDS[random_.randrange(len(KINDS))], bytearray(whole[name])
    at = random_.randrange(len(data))
    length = min(int(2 ** random_.uniform(0, 14)), len(data) // 3)
    match kind:
        case "flip one":
            data[at] ^= 1 << random_.randrange(8)
        case "flip some":
            for _ in range(random_.choice((3, 10, 30))):
                data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        case "burst":
            data[at : at + length] = random_.randbytes(min(length, len(data) - at))
        case "delete":
            del data[at : at + length]
        case "insert":
            data[at:at] = random_.randbytes(length)
        case "truncate":
            del data[at:]
        case "duplicate":
            data[at:at] = data[at : at + length]
        case "join":
            other = random_.choice([name, name, *(n for n in whole if n.split(".")[-1] == name.split(".")[-1])])
            data += whole[other]
        case "zero":
            data[at : at + length] = bytes(min(length, len(data) - at))
        case "header":
            data[random_.randrange(min(200, len(data)))] = random_.choice((0, 1, 127, 128, 255))
        case "number":
            at = random_.randrange(min(400, len(data)))
            value = random_.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, len(data), random_.randrange(2**20)))
            data[at : at + 4] = value.to_bytes(4, random_.choice(("little", "big")))
    return kind, bytes(data)


@dataclass
class Survival:
    """What became of a song, in seconds."""

    right: float = 0.0  # at the right time
    moved: float = 0.0  # at another time
    lost: float = 0.0  # silent, or beyond the end
    altered: float = 0.0  # something else


def _alike(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """The correlation of each row."""
    norms = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    result: NDArray[np.float32] = (a * b).sum(axis=1) / np.maximum(norms, 1e-9)
    return result


def survival(whole: NDArray[np.float32], got: NDArray[np.float32]) -> Survival:
    """How much of a song `[n]` is in the decoded one `[m]`."""
    n = len(whole) // WINDOW
    windows = whole[: n * WINDOW].reshape(n, WINDOW)
    there = np.zeros(max(n * WINDOW, len(got)), np.float32)
    there[: len(got)] = got
    at_place = there[: n * WINDOW].reshape(n, WINDOW)
    counts: Counter[str] = Counter(right=int((_alike(windows, at_place) > 0.5).sum()))
    spectrum, size = None, 1 << (len(there) + WINDOW).bit_length()
    for i in np.flatnonzero(_alike(windows, at_place) <= 0.5):
        if spectrum is None:
            spectrum = np.fft.rfft(there, size)
            sums = np.concatenate([[0.0], np.cumsum(there.astype(np.float64) ** 2)])
            energy = sums[WINDOW:] - sums[:-WINDOW]
        products = np.fft.irfft(spectrum * np.fft.rfft(windows[i], size).conj(), size)[: len(energy)]
        alike = products / np.sqrt(np.maximum(energy * (windows[i] ** 2).sum(), 1e-9))
        best = int(alike.argmax())
        if alike[best] > 0.5:
            counts["right" if abs(best - i * WINDOW) <= LOSS_SECONDS * RATE else "moved"] += 1
        else:
            level = (at_place[i] ** 2).mean() / max((windows[i] ** 2).mean(), 1e-9)
            counts["lost" if level < 1e-4 else "altered"] += 1
    return Survival(**{what: count * WINDOW / RATE for what, count in counts.items()})


@dataclass
class Answer:
    name: str
    number: int
    kind: str
    refusal: str = ""
    warning: str = ""
    survival: Survival | None = None
    seconds: float = 0.0
    left: Sequence[str] = ()  # files that the decoder left behind

    @property
    def is_silent_loss(self) -> bool:
        return self.is_silent and self._missing > LOSS_SECONDS

    @property
    def is_silently_altered(self) -> bool:
        return self.is_silent and self.survival is not None and self.survival.altered > LOSS_SECONDS

    @property
    def is_silent(self) -> bool:
        return not self.refusal and not self.warning

    @property
    def _missing(self) -> float:
        if self.survival is None:
            return 0.0
        is_unnoticed = self.name in PLAIN or (self.name, self.kind) in UNNOTICED
        return self.survival.moved + (0.0 if is_unnoticed else self.survival.lost)


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def main_decoding() -> None:
    """Decode the songs that are named on stdin, and print one line of JSON for each."""
    from separation.audio.decode import decode
    from separation.errors import SeparationError

    log = _Log()
    logging.getLogger("separation").addHandler(log)
    folder = Path(sys.argv[2])
    whole: dict[str, NDArray[np.float32]] = {}

    def samples(path: Path) -> NDArray[np.float32]:
        with decode(path, folder) as wave:
            result: NDArray[np.float32] = wave.read(0, min(wave.n_samples, 10 * SECONDS * RATE))[0].numpy()
            return result

    for line in sys.stdin:
        reference, path, name, number, kind = json.loads(line)
        answer = Answer(name, number, kind)
        if name not in whole:
            whole[name] = samples(Path(reference))
        log.messages.clear()
        started = time.monotonic()
        signal.alarm(HANG_SECONDS)  # ends this process even while a library hangs
        try:
            got = samples(Path(path))
            signal.alarm(0)
            answer.seconds = time.monotonic() - started
            answer.survival = survival(whole[name], got)
        except SeparationError as e:
            signal.alarm(0)
            answer.refusal = str(e)
        answer.warning = " | ".join(log.messages)
        answer.left = os.listdir(folder)
        print(json.dumps(asdict(answer)), flush=True)


def decode_all(
    jobs: Sequence[tuple[str, int]], whole: dict[str, bytes], folder: Path, project: Path, processes: int = 2
) -> list[Answer]:
    """Decode the damaged songs with these names and numbers. Raises RuntimeError if one hangs or crashes."""
    for name, content in whole.items():
        (folder / f"whole-{name}").write_bytes(content)
    running = []
    for worker in range(processes):
        work = folder / f"work{worker}"
        work.mkdir()
        lines = []
        for name, number in jobs[worker::processes]:
            kind, content = damaged(whole, name, number)
            path = folder / f"{number}-{name}"
            path.write_bytes(content)
            lines.append(json.dumps([str(folder / f"whole-{name}"), str(path), name, number, kind]))
        (folder / f"jobs{worker}").write_text("\n".join(lines))
        environment = os.environ | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "decode", str(work)]
        with (folder / f"jobs{worker}").open() as stdin, (folder / f"errors{worker}").open("w") as errors:
            running.append(
                (subprocess.Popen(command, env=environment, stdin=stdin, stdout=subprocess.PIPE, stderr=errors), lines)
            )
    answers = []
    for worker, (process, lines) in enumerate(running):
        output, _ = process.communicate()
        got = [json.loads(line) for line in output.splitlines()]
        if process.returncode:
            died = {-signal.SIGALRM: "hung", -signal.SIGSEGV: "crashed"}.get(process.returncode, "failed")
            errors = (folder / f"errors{worker}").read_text()[-3000:]
            raise RuntimeError(f"{died} at {lines[len(got)] if len(got) < len(lines) else 'the end'}: {errors}")
        for fields in got:
            lived = fields.pop("survival")
            answers.append(Answer(**fields, survival=None if lived is None else Survival(**lived)))
    return answers


def table(answers: Sequence[Answer]) -> str:
    rows = [f"{'format':12} mutations refused warned fine  lost (silently)  altered (silently)"]
    for name in [*dict.fromkeys(answer.name for answer in answers), "all"]:
        of_name = [answer for answer in answers if name in ("all", answer.name)]
        counts = [
            sum(bool(answer.refusal) for answer in of_name),
            sum(bool(answer.warning and not answer.refusal) for answer in of_name),
            sum(
                answer.is_silent and not answer.is_silent_loss and not answer.is_silently_altered for answer in of_name
            ),
            sum(answer.is_silent_loss for answer in of_name),
            sum(answer.is_silently_altered for answer in of_name),
        ]
        rows.append(f"{name:12} {len(of_name):9d}" + "".join(f"{count:8d}" for count in counts))
    return "\n".join(rows)


def main() -> None:
    start, stop = map(int, sys.argv[1:3])
    folder = Path(os.environ.get("DAMAGED_FOLDER", "/tmp/damaged-songs"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    whole = make(folder)
    names = [name for name in whole if sys.argv[3:] in ([], [name])]
    jobs = [(names[number % len(names)], number) for number in range(start, stop)]
    project = Path(os.environ.get("DAMAGED_PROJECT", Path(__file__).parents[2]))
    answers = decode_all(jobs, whole, folder, project)
    for answer in answers:
        if os.environ.get("DAMAGED_ALL") or answer.is_silent_loss or answer.is_silently_altered:
            print(json.dumps(asdict(answer)))
    print(table(answers))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main_decoding() if sys.argv[1] == "decode" else main()
