"""Ultimate Vocal Remover's table of models, configs/uvr.yaml: what their files do not say, by a hash of the file.

With it, its models need no YAML beside them; nor do MDX-Nets in training, which describe themselves. Nothing here
imports PyTorch unless weights must be opened.
"""

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from separation.checkpoints.keys import LARGEST_OTHER
from separation.documents import quoted, read_yaml
from separation.errors import CheckpointError
from separation.system.places import shipped, size_bytes

# Whose mask Ultimate Vocal Remover sharpens more
VOCAL = {"vocals", "other", "bass", "drums", "guitar", "piano"}
VOCAL |= {"synthesizer", "strings", "woodwinds", "brass", "wind inst"}
HASHED_BYTES = 10_000 * 1024  # at the end of a file


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    """For each kind of model, what the table says about a file by its hash."""
    return dict(read_yaml(shipped("configs") / "uvr.yaml"))


def hash_of(path: Path) -> str:
    """The hash by which Ultimate Vocal Remover knows a file, which must exist."""
    with path.open("rb") as file:
        file.seek(max(0, size_bytes(path) - HASHED_BYTES))
        return hashlib.md5(file.read(), usedforsecurity=False).hexdigest()


def yaml_of(weights: Path) -> tuple[str, str | None] | None:
    """The name of the YAML file that these weights need, and the model in configs/models that has its content, if any.

    None if the table does not know the file.
    """
    name = _table()["yaml"].get(hash_of(weights))
    return None if name is None else (name, _table()["configs"].get(name))


def completed(weights: Path, document: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The content that a YAML for these weights needs, of which `document` may be a part; None if it is unknown.

    It comes from the table and from the weights themselves. `document` takes precedence.

    Raises CheckpointError for weights that cannot be used, or if something is neither there nor in the table.
    """
    if weights.suffix == ".onnx":
        return mdx_net(weights, document or {})
    if document is not None and (own := _own_of_mdx_net(document)) is not None and _is_mdx_net(weights):
        return mdx_net(weights, own)
    if weights.suffix == ".pth" and (document is None or _names_bands(document)):
        return _vr(weights, document or {})
    return None if document is None else dict(document)


def mdx_net(weights: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """The content that a YAML for this MDX-Net needs; see `completed`."""
    from separation.checkpoints.state_dict import open_weights  # imports PyTorch

    sizes = open_weights(weights).sizes
    assert sizes is not None
    known = _table()["mdx_net"].get(hash_of(weights), {})
    if known:
        found = {"stems": [known["stem"]], "audio": {"n_fft": known["n_fft"]}}
        sizes = _merged(sizes, {**found, "model": {"compensate": known.get("compensate", 1.0)}})
    made = _merged(sizes, document)
    audio = made["audio"]
    if not made.get("stems") and "n_fft" in sizes["audio"]:
        raise CheckpointError(
            f"{weights} is an MDX-Net that does not name its stem: put a file {weights.stem}.yaml with the lines "
            "`architecture: mdx_net` and `stems: [vocals]` beside it, with its own stem"
        )
    if not made.get("stems") or not _is_size(audio.get("n_fft")):
        also = "" if weights.suffix == ".onnx" else "`architecture: mdx_net`, "
        raise CheckpointError(
            f"{weights} is an MDX-Net that the table of Ultimate Vocal Remover does not have: put a file "
            f"{weights.stem}.yaml with the lines {also}`stems: [vocals]` and `audio: {{n_fft: 6144}}` beside it, with "
            f"the model's own stem and n_fft, which is at least {2 * audio['dim_f'] - 2} (usual are 4096, 5120, 6144, "
            "7680, 8192 and 16384)"
        )
    frames = audio.pop("dim_t", 256)
    if wrong := [key for key, value in (("hop_length", audio["hop_length"]), ("dim_t", frames)) if not _is_size(value)]:
        raise CheckpointError(
            f"{weights}: {wrong[0]} of its section audio must be a positive integer: correct its YAML"
        )
    return {**made, "audio": {"chunk_size": audio["hop_length"] * (frames - 1) - audio["n_fft"]} | audio}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST_OTHER


def _is_mdx_net(weights: Path) -> bool:
    """Whether these weights are an MDX-Net that describes itself."""
    from separation.checkpoints.state_dict import open_weights  # imports PyTorch

    return open_weights(weights).sizes is not None


def _own_of_mdx_net(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a YAML says about an MDX-Net, as this project states it; None if it is for another model.

    The YAML files of kuielab/mdx-net have the arguments of its class.
    """
    if document.get("architecture") == "mdx_net":
        return document
    if not str(document.get("_target_")).endswith(".ConvTDFNet"):
        return None
    audio = {key: document[key] for key in ("n_fft", "hop_length", "dim_t") if key in document}
    return {"audio": audio} | ({"stems": [document["target_name"]]} if "target_name" in document else {})


def _names_bands(document: Mapping[str, Any]) -> bool:
    """Whether a YAML names the spectrogram of a VR network instead of stating it."""
    model = document.get("model")
    return isinstance(model, Mapping) and "bands" in model


def _vr(weights: Path, document: Mapping[str, Any]) -> dict[str, Any] | None:
    known = _table()["vr"].get(hash_of(weights), {})
    model = {"bands": known.get("bands")} | dict(document.get("model") or {})
    name, all_bands = model.pop("bands"), _table()["vr_bands"]
    if name is None:
        return None
    if name not in all_bands:
        raise CheckpointError(f"{weights} has the unknown bands {quoted(name)}: use one of {', '.join(all_bands)}")
    bands, sizes = dict(all_bands[name]), _vr_sizes(weights)
    channels, conversions = bands.pop("channels"), bands.pop("conversions")
    bands["channels"] = conversions if sizes["nout_lstm"] else [channels] * len(conversions)
    own = document.get("stems")
    masked = own[0] if isinstance(own, list) and own else known.get("stem")
    found = {
        "architecture": "vr",
        "audio": {"sample_rate": bands["rates"][-1], "chunk_size": _vr_chunk(bands, sizes)},
        "stems": [known["stem"], _other_than(known["stem"])] if known else [],
        "model": {**bands, **sizes, "is_vocal": str(masked).lower() in VOCAL},
    }
    made = _merged(found, {**document, "model": model})
    if not made["stems"]:
        raise CheckpointError(f"{weights} needs its stems: add the line `stems: [vocals, instrumental]`, with its own")
    return made


def vr_advice(weights: Path) -> str:
    """What a VR network that the table does not have needs."""
    return (
        f"{weights} is a VR network that the table of Ultimate Vocal Remover does not have: put a file "
        f"{weights.stem}.yaml with the lines `stems: [vocals, instrumental]` and `model: {{bands: 4band_v3}}` beside "
        "it, with its own stems, first the one of its mask, and the bands of its training, one of "
        f"{', '.join(_table()['vr_bands'])}"
    )


def _vr_sizes(weights: Path) -> dict[str, Any]:
    """The hyper-parameters that the weights of a VR network determine."""
    from separation.checkpoints.state_dict import open_weights  # these import PyTorch
    from separation.models.shapes import Shapes
    from separation.models.vr import VR

    tensors = open_weights(weights).tensors
    if not any(name.startswith("stg1_low_band_net.") for name in tensors):
        raise CheckpointError(f"{weights} is not a VR network: remove `bands` from its YAML, or use the right file")
    read = {"out.weight", "stg1_low_band_net.enc1.conv1.conv.0.weight", "stg3_full_band_net.lstm_dec2.dense.0.weight"}
    shapes = {name: tuple(value().shape) if name in read else () for name, value in tensors.items()}
    return {key: size for key, size in VR.sizes_in(Shapes(shapes), None).items() if key != "bins"}


def _vr_chunk(bands: Mapping[str, Any], sizes: Mapping[str, Any]) -> int:
    """The samples whose mask counts, of a window of 512 frames."""
    return (512 - 2 * (64 if sizes["nout_lstm"] else 128)) * int(bands["hop_lengths"][-1])


def _other_than(stem: str) -> str:
    """The name of the rest of a song without this stem."""
    others = {"vocals": "instrumental", "instrumental": "vocals", "dry": "reverb"}
    return others.get(stem) or (stem.removeprefix("no_") if stem.startswith("no_") else f"no_{stem}")


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both documents; where both have a value the second's, in sections key by key."""
    sections = {
        key: {**first[key], **value}
        for key, value in second.items()
        if isinstance(value, Mapping) and isinstance(first.get(key), Mapping)
    }
    return {**first, **second, **sections}
