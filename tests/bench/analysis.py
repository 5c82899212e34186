"""How often the tempo and the key that `separate --analyse` finds are right, on songs where both are known.

    PYTHONPATH=. python tests/bench/analysis.py SONGS [--stems DIR]

SONGS comes from known_songs.py. DIR/<number>/ holds separated stems, as `separation separate` writes them; without it,
the true stems are taken, and with `--stems none` the mixture alone.
"""

import argparse
import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from separation.analysis.key import TONICS
from separation.analysis.song import find_key, find_tempo
from separation.audio.decode import decode
from separation.audio.suffixes import AUDIO_OR_VIDEO

HELD_OUT = 48  # songs from here on have grooves that no constant was chosen on
TOLERANCE = 0.02


def tempo_relation(found: float | None, true: float) -> str:
    """`right` within 2 %, `octave` for half or twice the tempo, else `wrong` or `none`."""
    if found is None:
        return "none"
    factors = {"right": (1.0,), "octave": (0.5, 2.0)}
    near = (name for name, of in factors.items() if any(abs(found / true / factor - 1) <= TOLERANCE for factor in of))
    return next(near, "wrong")


def key_relation(found: str | None, true: str) -> str:
    """`exact`, `relative`, `fifth` (of the same mode), `parallel`, `other` or `none`."""
    if found is None:
        return "none"
    (tonic, mode), (true_tonic, true_mode) = found.split(), true.split()
    steps = (TONICS[mode].index(tonic) - TONICS[true_mode].index(true_tonic)) % 12
    if mode == true_mode:
        return {0: "exact", 5: "fifth", 7: "fifth"}.get(steps, "other")
    return {0: "parallel", 9 if mode == "minor" else 3: "relative"}.get(steps, "other")


def found_in(song: Path, stems: str | None) -> tuple[float | None, str | None]:
    """The tempo and the key of a song."""
    folder = Path(stems) / song.name if stems not in (None, "none") else song
    files = [] if stems == "none" else [path for path in folder.iterdir() if path.suffix in AUDIO_OR_VIDEO]
    with TemporaryDirectory() as work, ExitStack() as stack:
        waves = {path.stem: stack.enter_context(decode(path, Path(work))) for path in files}
        waves["mixture"] = stack.enter_context(decode(song / "mixture.flac", Path(work)))
        return find_tempo(waves), find_key(waves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("songs", type=Path, metavar="SONGS")
    parser.add_argument("--stems", metavar="DIR")
    options = parser.parse_args()
    tempi, keys = Counter[str](), Counter[str]()
    for song in sorted(options.songs.iterdir()):
        if options.stems not in (None, "none") and not (Path(options.stems) / song.name).is_dir():
            continue
        truth = json.loads((song / "truth.json").read_text())
        bpm, name = found_in(song, options.stems)
        set_ = "held out" if int(song.name) >= HELD_OUT else "chosen on"
        tempo, key = tempo_relation(bpm, truth["bpm"]), key_relation(name, truth["key"])
        tempi[f"{set_}: tempo {tempo}"] += 1
        keys[f"{set_}: key {key}"] += 1
        if tempo != "right" or key != "exact":
            print(song.name, truth, bpm, name, flush=True)
    for name, count in sorted((tempi + keys).items()):
        print(f"{count:3} {name}")


if __name__ == "__main__":
    main()
