"""A small checkpoint as a user has one: weights, and a YAML in the community's form."""

from pathlib import Path

import yaml

from helpers.small_model import DOCUMENT, HYPER_PARAMETERS, small_model, write_weights
from separation.models.bs_roformer import BSRoFormer

SIZES = {"freqs_per_bands": [25] * 41, "stft_n_fft": 2048, "stft_win_length": 2048, "stft_hop_length": 1024}
COMMUNITY = {
    "audio": DOCUMENT["audio"],
    "model": HYPER_PARAMETERS | SIZES,
    "training": {"instruments": ["Vocals", "Drums"], "target_instrument": None},
}


def own_model() -> BSRoFormer:
    return small_model(**SIZES | {"freqs_per_bands": (25,) * 41})


def put(folder: Path, *names: str) -> None:
    """Write files of these names: weights and YAML files that fit each other."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name.endswith((".yaml", ".yml")):
            (folder / name).write_text(yaml.safe_dump(COMMUNITY), encoding="utf-8")
        else:
            write_weights(own_model().state_dict(), folder / name)
