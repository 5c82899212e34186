"""Altered YAML files and checkpoints of every architecture: each loads, or is refused in one sentence.

Every case has a seed: `python tests/checkpoints/test_fuzzed_models.py FOLDER 123` writes case 123 again.
"""

import io
import itertools
import json
import math
import pickletools
import random
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load, save
from torch import Tensor

from helpers.common import PROJECT
from helpers.limited import load_all
from helpers.small_model import DOCUMENT, HYPER_PARAMETERS
from separation.checkpoints.build import random_weights
from separation.checkpoints.state_dict import metadata_of
from separation.models import ARCHITECTURES
from separation.models.base import Blueprint

N_QUICK, N_SLOW = 60, 2000

AUDIO = {"sample_rate": 44100, "chunk_size": 4096}
ROFORMER = {key: value for key, value in HYPER_PARAMETERS.items() if key != "freqs_per_bands"}
DEMUCS = {"sources": ["vocals", "drums"], "samplerate": 44100, "segment": "1/4", "channels": 8}
STEMS = {"stems": ["vocals", "drums"], "audio": AUDIO}
DOCUMENTS: dict[str, dict[str, Any]] = {
    "bs_roformer": {key: value for key, value in DOCUMENT.items() if key != "files"},
    "mel_band_roformer": STEMS | {"model": ROFORMER | {"num_bands": 8}},
    "mdx23c": STEMS
    | {
        "audio": AUDIO | {"n_fft": 64, "hop_length": 16, "dim_f": 32, "num_channels": 2, "chunk_size": 4080},
        "model": {"act": "gelu", "bottleneck_factor": 2, "growth": 8, "norm": "InstanceNorm", "num_scales": 2}
        | {"num_channels": 8, "num_subbands": 2, "scale": [2, 2], "num_blocks_per_scale": 1},
    },
    "scnet": STEMS
    | {"model": {"sources": ["vocals", "drums"], "dims": [4, 8, 16], "nfft": 64, "hop_size": 16, "win_size": 64}},
    "htdemucs": STEMS | {"model": DEMUCS | {"t_layers": 1, "t_heads": 2, "nfft": 2048}},
    "hdemucs": STEMS | {"model": DEMUCS | {"depth": 5}},
    "demucs": STEMS | {"model": DEMUCS | {"depth": 3}},
}
FORMS = ("ckpt", "th", "safetensors")

NUMBERS = [0, 1, -1, 2, 3, 255, 65_536, 2**20, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**12, 10**30]
ODD: list[Any] = [
    *NUMBERS,
    math.inf,
    -math.inf,
    math.nan,
    0.5,
    1e300,
    True,
    False,
    None,
    "",
    "x",
    "x" * 300,
    "9" * 5000,
    "1e999999999",
    "../../x",
    "http://[::1",
    "\x00",
    "\x1b[31m",
    "é🎵",
    [],
    [1],
    [[1]],
    list(range(1000)),
    {},
    {"a": 1},
    {1: 2},
    {"a": {"a": {"a": [1]}}},
]
TEXTS = ["\t", "\ufeff", "\0", "&a ", "*a", "<<: *a", "!!python/object/apply:os.getcwd []", "!!int ", "!!binary ", "? "]
TEXTS += ["- ", "[", "{", "}", ": ", "#", "|\n", ">\n", '"', "'", "%YAML 9.9\n---\n", "---\n", "...\n", "2024-13-45"]
TEXTS += ["9" * 5000, "[" * 5000, ".inf", ".nan", "0x" + "f" * 5000, "1:59" * 1000, "~", "yes", "\\ud800", "&b [*b]"]
TEXTS += [
    "a: &a {x: 1}\n" + "".join(f"{b}: &{b} {{<<: [{f'*{a}, ' * 9}]}}\n" for a, b in itertools.pairwise("abcdefghi"))
]
TEXTS += ["&a [x]\nb: &b [" + "*a, " * 9 + "]\nc: &c [" + "*b, " * 9 + "]\nd: [" + "*c, " * 999 + "]\n"]


GLOBALS = [
    "builtins\nbytearray",
    "torch\nFloatTensor",
    "torch\nLongStorage",
    "torch\nHalfStorage",
    "torch\nQInt8Storage",
]
GLOBALS += ["torch._utils\n_rebuild_parameter", "torch._utils\n_rebuild_qtensor", "torch.storage\nUntypedStorage"]
GLOBALS += ["collections\nOrderedDict", "collections\ndefaultdict", "torch\nSize", "fractions\nFraction", "os\nsystem"]
GLOBALS += ["demucs.hdemucs\nHDemucs", "argparse\nNamespace", "_codecs\nencode", "torch\nfloat32"]


def altered(value: Any, random: random.Random) -> Any:
    """The document with one value, at any depth, replaced, removed, added or swapped."""
    if isinstance(value, dict | list) and value and random.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = random.choice(keys)
        copy: Any = value.copy()
        match random.choice(("within", "within", "within", "replace", "remove", "add", "swap")):
            case "within":
                copy[key] = altered(copy[key], random)
            case "replace":
                copy[key] = random.choice(ODD)
            case "remove":
                del copy[key]
            case "add" if isinstance(copy, dict):
                copy[
                    random.choice(["colour", "files", "sources", "num_stems", "stems", "training", "inference", 1, ""])
                ] = random.choice(ODD)
            case "add":
                copy.append(random.choice(ODD))
            case "swap":
                other = random.choice(keys)
                copy[key], copy[other] = copy[other], copy[key]
        return copy
    if isinstance(value, int) and random.random() < 0.5:
        return value * random.choice((-1, 0, 2, 3, 1000, 2**40)) + random.choice((-1, 0, 1))
    return random.choice(ODD)


def cut_up(content: bytes, random: random.Random) -> bytes:
    """The bytes with some of them changed, removed, doubled or replaced."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 5))):
        region = random.choice((64, 512, 4096, len(data)))  # changes headers as often as weights
        start = random.choice((0, max(0, len(data) - region)))
        a, b = sorted(start + random.randrange(1 + min(region, len(data))) for _ in range(2))
        part = bytes(data[a:b])
        match random.choice(("flip", "set", "remove", "end", "double", "random", "number")):
            case "flip" if data:
                data[min(a, len(data) - 1)] ^= 1 << random.randrange(8)
            case "set" if data:
                data[min(a, len(data) - 1)] = random.choice((0, 1, 127, 128, 255))
            case "remove":
                del data[a:b]
            case "end":
                del data[a:]
            case "double":
                data[a:b] = part + part
            case "random":
                data[a:b] = random.randbytes(len(part))
            case "number":
                n_bytes = random.choice((1, 2, 4, 8))
                value = random.choice(NUMBERS[:13]) % 256**n_bytes
                data[a : a + n_bytes] = value.to_bytes(n_bytes, "little")
    return bytes(data)


def with_a_size(document: dict[str, Any], random: random.Random) -> dict[str, Any]:
    """The `model:` section with another number for one key, or for some of a list."""
    model = dict(document["model"])
    known = [field.name for field in fields(ARCHITECTURES[document["architecture"]].Config)]
    key, size = random.choice(known), random.choice([*NUMBERS, 100, 1000, 4096, 100_000])
    value = model.get(key)
    model[key] = [size if random.random() < 0.5 else each for each in value] if isinstance(value, list) else size
    return model


def altered_yaml(document: dict[str, Any], random: random.Random) -> bytes:
    text = yaml.safe_dump(document, allow_unicode=True, default_flow_style=random.choice((None, False, True)))
    match random.choice(("value", "value", "size", "size", "text", "line", "bytes")):
        case "size":
            return yaml.safe_dump(document | {"model": with_a_size(document, random)}).encode()
        case "value":
            for _ in range(random.choice((1, 1, 3))):
                document = altered(document, random)
            return yaml.safe_dump(document, allow_unicode=True).encode()
        case "text":
            for _ in range(random.choice((1, 3))):
                at = random.randrange(len(text))
                text = text[:at] + random.choice(TEXTS) + text[at + random.choice((0, 1, 5)) :]
        case "line":
            lines = text.splitlines(keepends=True)
            at = random.randrange(len(lines))
            lines[at] = random.choice((lines[at] * 2, "", "  " + lines[at], lines[at].lstrip(), "\t" + lines[at]))
            text = "".join(lines)
        case "bytes":
            return cut_up(text.encode(), random)
    return text.encode("utf-8", "surrogatepass")


def altered_pickle(content: bytes, random: random.Random) -> bytes:
    """The pickle with some of its opcodes changed, removed, doubled or exchanged; all stay whole."""
    starts = [position for _, _, position in pickletools.genops(content) if position is not None]
    codes = [content[a:b] for a, b in itertools.pairwise([*starts, len(content)])]
    for _ in range(random.choice((1, 1, 2, 5))):
        at, other = random.randrange(1, len(codes)), random.randrange(1, len(codes))
        match random.choice(("number", "number", "number", "name", "remove", "double", "exchange", "insert")):
            case "number":
                numbers = [n for n, code in enumerate(codes) if code[:1] in b"KMJ\x8a"]
                value = random.choice([*NUMBERS, -4, 5, 2**40])
                n_bytes = value.bit_length() // 8 + 1
                codes[random.choice(numbers)] = (
                    b"\x8a" + bytes([n_bytes]) + value.to_bytes(n_bytes, "little", signed=True)
                )
            case "name":
                names = [n for n, code in enumerate(codes) if code[:1] == b"c"]
                codes[random.choice(names)] = f"c{random.choice(GLOBALS)}\n".encode()
            case "remove":
                del codes[at]
            case "double":
                codes.insert(at, codes[at])
            case "exchange":
                codes[at], codes[other] = codes[other], codes[at]
            case "insert":
                codes.insert(at, random.choice(codes))
    return b"".join(codes)


def altered_archive(content: bytes, random: random.Random) -> bytes:
    """The archive with one of its members damaged, removed, compressed or renamed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as whole, zipfile.ZipFile(stream, "w") as crafted:
        names = whole.namelist()
        chosen = (
            next(name for name in names if name.endswith("data.pkl")) if random.random() < 0.7 else random.choice(names)
        )
        for name in names:
            data, method = whole.read(name), zipfile.ZIP_STORED
            if name == chosen:
                is_pickle = name.endswith("data.pkl")
                match random.choice(("codes",) * 6 * is_pickle + ("cut up", "cut up", "remove", "compress", "rename")):
                    case "codes":
                        data = altered_pickle(data, random)
                    case "cut up":
                        data = cut_up(data, random)
                    case "remove":
                        continue
                    case "compress":
                        method = zipfile.ZIP_DEFLATED
                    case "rename":
                        name = random.choice(("../x", "/x", "x/data/0", name + "x", "data.pkl", "y/data.pkl"))
            crafted.writestr(name, data, method)
    return stream.getvalue()


def altered_header(content: bytes, random: random.Random) -> bytes:
    """The safetensors file with a header that is valid JSON but has wrong values."""
    n_bytes = int.from_bytes(content[:8], "little")
    header = altered(json.loads(content[8 : 8 + n_bytes]), random)
    if isinstance(header, dict) and isinstance(header.get("__metadata__"), dict) and random.random() < 0.5:
        metadata = header["__metadata__"]
        if isinstance(metadata.get("kwargs"), str):
            metadata["kwargs"] = json.dumps(altered(json.loads(metadata["kwargs"]), random))
    text = json.dumps(header).encode()
    length = random.choice((len(text), len(text), len(text), len(text) + 1, 2**32, 2**63))
    return length.to_bytes(8, "little") + text + content[8 + n_bytes :]


def weights_of(document: dict[str, Any], architecture: str, folder: Path) -> dict[str, Tensor]:
    path = folder / f"{architecture}.yaml"
    path.write_text(yaml.safe_dump({"architecture": architecture} | document), encoding="utf-8")
    return random_weights(path)


def as_file(weights: dict[str, Tensor], form: str, blueprint: Blueprint | None) -> bytes:
    if form == "safetensors":
        return save(weights, None if blueprint is None else metadata_of(blueprint))
    stream = io.BytesIO()
    torch.save({"state_dict": weights, "epoch": 3}, stream, _use_new_zipfile_serialization=form == "ckpt")
    return stream.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], dict[str, bytes]]]:
    """The YAML and the checkpoint, in each format, of each architecture and of the demo model."""
    folder = tmp_path_factory.mktemp("whole")
    return whole_models(folder)


def whole_models(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, bytes]]]:
    found = {}
    for architecture, document in DOCUMENTS.items():
        weights = weights_of(document, architecture, folder)
        arguments = document["model"] | {"segment": Fraction(1, 4)}
        class_name = {"htdemucs": "HTDemucs", "hdemucs": "HDemucs"}.get(architecture)
        blueprint = None
        if class_name:
            blueprint = Blueprint(f"demucs.{architecture}.{class_name}", (), arguments)
        files = {form: as_file(weights, form, blueprint) for form in FORMS}
        found[architecture] = {"architecture": architecture} | document, files
    config, checkpoint = PROJECT / "configs/models/demo.yaml", PROJECT / "weights/demo/demo.safetensors"
    document = yaml.safe_load(config.read_text(encoding="utf-8"))
    del document["files"]
    found["demo"] = document, {"safetensors": checkpoint.read_bytes()}
    return found


def write_case(number: int, whole: dict[str, tuple[dict[str, Any], dict[str, bytes]]], folder: Path) -> Path:
    """A folder with a YAML file and a checkpoint; one of them is altered."""
    chance = random.Random(number)
    name = chance.choice([*DOCUMENTS] * 4 + ["demo"])
    document, files = whole[name]
    form = chance.choice(list(files))
    config, checkpoint = yaml.safe_dump(document).encode(), files[form]
    if chance.random() < 0.5:
        config = altered_yaml(document, chance)
    else:
        damages: list[Callable[[bytes, random.Random], bytes]] = [cut_up]
        damages += {"ckpt": [altered_archive] * 2, "safetensors": [altered_header] * 2, "th": []}[form]
        checkpoint = chance.choice(damages)(checkpoint, chance)
    case = folder / f"{number}-{name}-{form}"
    case.mkdir(parents=True)
    (case / "x.yaml").write_bytes(config)
    (case / f"x.{form}").write_bytes(checkpoint)
    return case


def check(numbers: range, whole: dict[str, tuple[dict[str, Any], dict[str, bytes]]], folder: Path) -> None:
    cases = [write_case(number, whole, folder) for number in numbers]
    answers = load_all(cases)
    refused = [answer.removeprefix("refused: ") for answer, _ in answers.values() if answer.startswith("refused: ")]
    wrong = {
        case.name: answer for case, (answer, _) in answers.items() if not answer.startswith(("refused: ", "loaded"))
    }
    assert wrong == {}
    for sentence in refused:
        assert "\n" not in sentence and sentence.isprintable() and len(sentence) < 1000, sentence
    assert max(grown for _, grown in answers.values()) < 500
    assert len(cases) / 4 < len(refused) < len(cases)


@pytest.mark.slow
def test_the_unaltered_models_load(whole: dict[str, tuple[dict[str, Any], dict[str, bytes]]], tmp_path: Path) -> None:
    paths = []
    for name, (document, files) in whole.items():
        for form, content in files.items():
            folder = tmp_path / f"{name}-{form}"
            folder.mkdir()
            (folder / "x.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
            (folder / f"x.{form}").write_bytes(content)
            paths.append(folder)
    assert {path.name: answer for path, (answer, _) in load_all(paths).items()} == {
        path.name: "loaded" for path in paths
    }


@pytest.mark.slow
def test_altered_models_load_or_are_refused_in_one_sentence(
    whole: dict[str, tuple[dict[str, Any], dict[str, bytes]]], tmp_path: Path
) -> None:
    check(range(N_QUICK), whole, tmp_path)


@pytest.mark.slow
def test_any_number_of_bands_in_a_checkpoint_is_refused_in_one_sentence(
    whole: dict[str, tuple[dict[str, Any], dict[str, bytes]]], tmp_path: Path
) -> None:
    document, files = whole["mel_band_roformer"]
    band_split = "band_split.to_features"
    weights = {key: value for key, value in load(files["safetensors"]).items() if not key.startswith(band_split)}
    for bands in (["none"], range(300), range(20_000)):
        folder = tmp_path / str(len(bands))
        folder.mkdir()
        (folder / "x.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
        added = {f"{band_split}.{band}.1.weight": torch.zeros(1, 1) for band in bands}
        (folder / "x.safetensors").write_bytes(save(weights | added))
    for answer, grown in load_all(sorted(tmp_path.iterdir())).values():
        assert re.fullmatch(r"refused: .* does not fit .*num_bands is 8, the weights have \d+.*", answer)
        assert grown < 300


@pytest.mark.slow
def test_thousands_of_altered_models_load_or_are_refused_in_one_sentence(
    whole: dict[str, tuple[dict[str, Any], dict[str, bytes]]], tmp_path: Path
) -> None:
    check(range(N_QUICK, N_SLOW), whole, tmp_path)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for each in sys.argv[2:]:
        print(write_case(int(each), whole_models(target), target))
