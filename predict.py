"""The container's predictor: typed inputs -> Separator -> stem files. No signal processing here.

Cog parses the signature of `run` without running it, so every default, choice and range is a plain literal. Python
itself does not know these defaults: `predict` fills them in.
"""

import asyncio
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath
from typing import Any, List  # noqa: UP035  # Cog's parser needs this spelling

from cog import BaseRunner, Input, Path, concurrent
from cog.types import URLPath

from separation import EngineOptions, ModelPool, OutputOptions, Separator
from separation.analysis.facts import MIXTURE, SongAnalysis
from separation.analysis.song import analyse
from separation.audio.excerpt import Excerpt
from separation.checkpoints.catalogue import is_here
from separation.checkpoints.chunk_choice import ChunkChoice
from separation.device import peak_memory_bytes
from separation.engine.cache import chosen_cache
from separation.engine.recipes import Recipe, load_recipe
from separation.engine.separator import StemFiles
from separation.errors import InputError, RecipeError
from separation.progress import Progress
from separation.system.stopwatch import Stopwatch, process_seconds
from separation.web.delivery import DeliveredSeparator
from separation.web.errors import errors_as_failures, errors_without_paths
from separation.web.limits import max_mib, max_seconds
from separation.web.remote import BLOCK_BYTES, Allowed, download, save
from separation.web.songs import DeliveryRoom, SongThreads, StemFolders, n_slots, n_songs, total_bytes

SEPARATED = 0.9  # share of the progress bar for the separation, if an analysis follows


@dataclass(frozen=True)
class Order:
    """What a prediction asks for, besides its song."""

    stems: str
    two_stems: str | None
    recipe: str | None  # None: the server's own
    options: EngineOptions
    output: OutputOptions
    analyse: bool  # also find the tempo and the key, and measure the loudness


@dataclass(frozen=True)
class Result:
    """A separated song."""

    files: StemFiles
    models: list[str]
    analysis: SongAnalysis | None


class Predictor(BaseRunner):  # type: ignore[misc]  # cog has no types
    def setup(self) -> None:
        """Load and warm up the models of vocals_instrumental and all_4. Other stems load theirs on first use."""
        print(f"Python and its packages: {process_seconds():.1f} s", flush=True)
        watch = Stopwatch()
        self.recipe = os.environ.get("SEPARATION_RECIPE") or "standard"
        self.max_seconds, self.max_mib = max_seconds(), max_mib()
        self.allowed = Allowed.from_environment()
        # Cog would download URLs with this method before `run` starts: from any address, without a size limit,
        # impossible to cancel, and leaving a partial file on failure. Return the URL instead; `_receive` downloads it.
        URLPath.convert = lambda self: self
        self.songs, self.folders, self.room = (
            SongThreads(n_songs()),
            StemFolders(n_slots()),
            DeliveryRoom.of_this_machine(),
        )
        self.cache = chosen_cache(default=False)
        self.pool = ModelPool()
        print(watch.step(self.pool.choice.reason))
        separator = Separator(self.recipe, "all_4", pool=self.pool)
        for name in separator.models:
            print(f"loading {name}: {self.pool.load_seconds[name]:.1f} s")
        print(watch.step("loading all models"))
        separator.warm_up()
        print(watch.step("running each model once"))
        print(f"ready {process_seconds():.1f} s after the start", flush=True)

    @property  # a method of this name would be Cog's old name for `run`, which must not exist beside it
    def predict(self) -> Callable[..., list[Path]]:
        """`run` under its old name, for callers from Python: it waits for the stems."""
        signature = inspect.signature(self.run)
        defaults = [
            item.replace(default=inspect.Parameter.empty if item.default.default is None else item.default.default)
            for item in signature.parameters.values()
        ]

        def predict(*inputs: Any, **named: Any) -> list[Path]:
            bound = signature.replace(parameters=defaults).bind(*inputs, **named)
            bound.apply_defaults()
            stems: list[Path] = asyncio.run(self.run(*bound.args))
            return stems

        return predict

    @concurrent(max=8)  # type: ignore[untyped-decorator]  # cog has no types
    async def run(
        self,
        audio: Path = Input(description="Audio file to separate (WAV, MP3, FLAC, OGG, etc.)", accept="audio/*,video/*"),
        stems: str = Input(
            description="Which stems to extract",
            default="vocals_instrumental",
            choices=["vocals_instrumental", "all_4", "all_6", "drum_kit"],
        ),
        output_format: str = Input(description="Output audio format", default="wav", choices=["wav", "mp3", "flac"]),
        chunk_size: int = Input(description="Processing chunk size in seconds", default=8, ge=4, le=30),
        overlap: int = Input(description="Overlap between chunks in seconds", default=4, ge=1, le=8),
        sample_rate: int = Input(description="Output sample rate", default=44100, choices=[44100, 48000]),
        mp3_bitrate: int = Input(
            description="Bitrate in kbit/s if the output format is mp3", default=320, choices=[128, 192, 320]
        ),
        two_stems: str = Input(
            description="Give only this stem and the song minus it (no_vocals), made as for stems if that has it",
            default="none",
            choices=["none", "vocals", "drums", "bass", "other", "guitar", "piano"],
        ),
        recipe: str = Input(
            description="Models: standard or sw for quality, demo for a rough try, default leaves it to the server",
            default="default",
            choices=["default", "standard", "sw", "demo"],
        ),
        start: float = Input(description="Separate only from this second of the song on", default=0, ge=0),
        end: float = Input(description="Separate only up to this second; 0 means the end of the song", default=0, ge=0),
        preview: bool = Input(description="Separate only the loudest 30 seconds", default=False),
        analyse: bool = Input(
            description="Also find tempo, key and loudness, given as metrics of the prediction", default=False
        ),
    ) -> List[Path]:  # noqa: UP006
        """Separate a song into stems."""
        folder = self.folders.new()
        chunks = ChunkChoice.of_container(int(chunk_size), int(overlap))
        order = Order(
            stems,
            None if two_stems == "none" else two_stems,
            None if recipe == "default" else recipe,
            EngineOptions(chunk_seconds=chunks.chunk_seconds, overlap_seconds=chunks.overlap_seconds),
            OutputOptions(
                output_format,
                sample_rate=int(sample_rate),
                bitrate=int(mp3_bitrate) if output_format == "mp3" else None,
                excerpt=Excerpt(start, end or None, preview) if start or end or preview else None,
            ),
            analyse,
        )
        try:
            with errors_as_failures():
                result = await self.songs.run(partial(self._separate, audio, order, folder))
            await self.room.take(total_bytes(folder))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # it exists if the cancellation came last
            raise
        self.folders.end(folder)
        for name, value in self._metrics(result).items():
            self.record_metric(name, value)
        return [Path(path) for path in result.files.values()]

    def _metrics(self, result: Result) -> dict[str, str | float]:
        """The figures of a prediction. Of its analysis, only what could be told."""
        files, device, analysis = result.files, self.pool.choice.device, result.analysis
        metrics: dict[str, str | float] = {
            "audio_seconds": round(files.duration_seconds, 3),
            "times_realtime": round(files.times_realtime, 3),
            "model_load_seconds": round(sum(self.pool.load_seconds[name] for name in result.models), 3),
            "device": str(device),
            "peak_memory_mib": round(peak_memory_bytes(device) / 2**20, 1),
        }
        if analysis is not None:
            lufs = analysis.loudness[MIXTURE].integrated_lufs
            metrics |= {} if analysis.tempo_bpm is None else {"tempo_bpm": round(analysis.tempo_bpm, 2)}
            metrics |= {} if analysis.key is None else {"key": analysis.key}
            metrics |= {} if lufs is None else {"loudness_lufs": round(lufs, 2)}
        return metrics

    def _separate(self, audio: object, order: Order, folder: FilePath, check: Callable[[], None]) -> Result:
        """Separate a song into files in `folder`. `check` raises to cancel."""
        with errors_without_paths(), tempfile.TemporaryDirectory(prefix="song-", ignore_cleanup_errors=True) as own:
            chosen = load_recipe(order.recipe or self.recipe, order.stems, two_stems=order.two_stems)
            self._check_weights(chosen)
            separator = DeliveredSeparator(chosen, options=order.options, pool=self.pool, cache=self.cache)
            progress = Progress(_ProgressLog(check))
            song = _receive(audio, own, self.max_mib, partial(_content, allowed=self.allowed, check=check))
            files = separator.separate_file(
                song,
                folder,
                order.output,
                max_seconds=self.max_seconds,
                progress=progress.part(0, SEPARATED if order.analyse else 1),
            )
            analysis = None
            if order.analyse:
                part, rest = order.output.excerpt, progress.part(SEPARATED, 1)
                analysis = analyse(song, files, excerpt=part, folder=FilePath(own), progress=rest)
        return Result(files, list(separator.models), analysis)

    def _check_weights(self, recipe: Recipe) -> None:
        """Announce the weights that are about to be downloaded.

        Raises RecipeError if they belong to a recipe other than the server's own: only the latter may download weights.
        """
        missing = [model for model, stems in recipe.models.items() if not is_here(model, stems)]
        if missing and recipe.name != self.recipe:
            raise RecipeError(
                f"recipe {recipe.name!r} is not on this server, which runs {self.recipe!r}: leave recipe at 'default'"
            )
        if missing:
            print(f"downloading the weights of {', '.join(missing)}, which are not on this server yet", flush=True)


def _receive(
    audio: object, folder: str, max_mib: float, content: Callable[[URLPath, str], Generator[bytes, None, None]]
) -> Path:
    """The song's file. A URL is downloaded into `folder` and keeps its file name.

    Raises:
        InputError: `audio` is a str (Cog passes paths on the server and file:// URLs this way), or the download fails
            or is not allowed.
        AudioError: the file has more than `max_mib` MiB.
    """
    if not isinstance(audio, os.PathLike):
        raise InputError(
            f"audio is {audio!r:.100}: give a URL that begins with http:// or https:// in lower case, or a file"
        )
    if not isinstance(audio, URLPath):
        return Path(audio)
    name = audio.filename.strip(".") or "song"  # Cog removes slashes; without its dots, it is not `..` either
    song = Path(folder, name)
    save(partial(content, audio, name), song, max_mib)
    return song


def _content(audio: URLPath, name: str, *, allowed: Allowed, check: Callable[[], None]) -> Generator[bytes, None, None]:
    """The content of a URL block by block. Cog has already decoded data URIs; its own downloads are not used."""
    if audio.source.startswith("data:"):
        while block := audio.fileobj.read(BLOCK_BYTES):
            yield block
        return
    with closing(download(audio.source, name, allowed)) as blocks:
        for block in blocks:
            check()
            yield block


class _ProgressLog:
    """Prints each stage and, every 5%, a progress bar in the form that `npm replicate` parses from the logs."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._stage, self._printed = "", -1
        self._check = check

    def __call__(self, share: float, stage: str) -> None:
        self._check()
        if stage != self._stage:
            self._stage = stage
            print(stage, flush=True)
        steps = int(share * 20)
        if steps > self._printed:
            self._printed = steps
            print(f"{steps * 5:3d}%|{'█' * steps}{' ' * (20 - steps)}| {steps}/20", flush=True)
