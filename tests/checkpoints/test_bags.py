"""Bags of Demucs and UVR, YAML files that combine several networks, load unchanged."""

import shutil
from pathlib import Path
from typing import Any

import demucs
import pytest
import torch
import yaml
from demucs.apply import BagOfModels

from helpers.common import quick_first, slow
from helpers.demucs_files import CHUNK_SAMPLES, CLASSES, SOURCES, assert_separates_as, by_demucs, network, save, song
from separation.checkpoints.catalogue import read_config
from separation.checkpoints.load import load_model
from separation.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")


def bag(folder: Path, models: Any, **more: Any) -> Path:
    path = folder / "htdemucs_ft.yaml"
    path.write_text(yaml.safe_dump({"models": models} | more), encoding="utf-8")
    return path


def test_a_weights_file_takes_precedence_over_a_bag_beside_it(tmp_path: Path) -> None:
    path = save(network("htdemucs"), tmp_path)
    bag(tmp_path, ["another"])
    assert read_config(path).source == path


def test_a_bag_is_not_the_yaml_of_other_weights(tmp_path: Path) -> None:
    save(network("htdemucs"), tmp_path, "a0")
    bag(tmp_path, ["a0"])
    torch.save({"x.weight": torch.zeros(3)}, tmp_path / "odd.ckpt")
    with pytest.raises(CheckpointError, match=r"odd\.ckpt needs the YAML .*, and there is no YAML: put it into"):
        read_config(tmp_path / "odd.ckpt")


def test_a_folder_with_a_bag_is_found_by_its_name(tmp_path: Path) -> None:
    for name in ("a0", "a1"):
        save(network("htdemucs"), tmp_path / "mine", name)
    bag(tmp_path / "mine", ["a0", "a1"])
    assert load_model(tmp_path / "mine").name == "mine"


def test_each_specialist_of_a_bag_gives_its_stem(tmp_path: Path) -> None:
    nets = [network("htdemucs", seed) for seed in (1, 2)]
    for name, net in zip(("f7e0c4bc", "d12395a8"), nets, strict=True):
        save(net, tmp_path, name)
    path = bag(tmp_path, ["f7e0c4bc", "d12395a8"], weights=[[0.0, 1.0], [1.0, 0.0]])
    found = read_config(path)
    assert [(file.stem, Path(file.name).name[:8]) for file in found.files] == [
        ("bass", "f7e0c4bc"),
        ("drums", "d12395a8"),
    ]
    model = load_model(path)
    assert sorted(model.stems) == sorted(SOURCES)
    mixture = song(CHUNK_SAMPLES)[None]
    with torch.no_grad():
        estimates = dict(zip(model.stems, model(mixture)[0], strict=True))
        for stem, net in (("bass", nets[0]), ("drums", nets[1])):
            assert torch.allclose(estimates[stem], net(mixture)[0, SOURCES.index(stem)], atol=1e-5)
    assert load_model(path, stems=["drums"]).stems == ("drums",)


@pytest.mark.parametrize("name", quick_first(CLASSES, 1))
@pytest.mark.parametrize("weights", [{}, slow({"weights": [[1, 1], [1, 1]]})])
def test_equal_shares_give_the_mean(name: str, weights: dict[str, Any], tmp_path: Path) -> None:
    nets = [network(name, seed) for seed in (1, 2)]
    for number, net in enumerate(nets):
        save(net, tmp_path, f"a{number}")
    model = load_model(bag(tmp_path, ["a0", "a1"], **weights))
    mixture = song(CHUNK_SAMPLES)[None]
    mixture = torch.nn.functional.pad(
        mixture, (0, (model.input_samples(CHUNK_SAMPLES) or CHUNK_SAMPLES) - CHUNK_SAMPLES)
    )
    with torch.no_grad():
        expected = sum(net(mixture) for net in nets) / 2
        assert torch.allclose(model(mixture), expected, atol=1e-5)


@pytest.mark.parametrize(
    "names", [("demucs", "hdemucs"), *(slow((names,)) for names in (("hdemucs",) * 2, ("hdemucs", "demucs")))]
)
def test_unequal_shares_give_the_weighted_mean(names: tuple[str, str], tmp_path: Path) -> None:
    nets = [network(name, seed) for seed, name in enumerate(names)]
    for number, net in enumerate(nets):
        save(net, tmp_path, f"a{number}")
    model = load_model(bag(tmp_path, ["a0", "a1"], weights=[[3, 0], [1, 2]]))
    length = model.input_samples(CHUNK_SAMPLES)
    assert length is not None and (length > CHUNK_SAMPLES) == ("demucs" in names)
    mixture = song(length)[None]
    with torch.no_grad():
        first, second = (net(mixture) for net in nets)
        drums, bass = model(mixture)[0]
    assert torch.allclose(drums, 0.75 * first[0, 0] + 0.25 * second[0, 0], atol=1e-5)
    assert torch.allclose(bass, second[0, 1], atol=1e-5)
    assert model.origin is not None and model.origin.hyper_parameters["shares"] == "((0.75, 0.0), (0.25, 1.0))"


@pytest.mark.slow
def test_unequal_shares_separate_as_demucs_does(tmp_path: Path) -> None:
    nets, weights = [network("hdemucs", seed) for seed in (1, 2, 3)], [[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]]
    for number, net in enumerate(nets):
        save(net, tmp_path, f"a{number}")
    model = load_model(bag(tmp_path, ["a0", "a1", "a2"], weights=weights))
    assert_separates_as(model, BagOfModels(nets, weights))


@pytest.mark.parametrize(
    "path", quick_first(sorted(Path(demucs.__file__).parent.glob("remote/*.yaml")), 4), ids=lambda path: path.stem
)
def test_every_published_bag_of_demucs_can_be_read(path: Path, tmp_path: Path) -> None:
    published = yaml.safe_load(path.read_text(encoding="utf-8"))
    sources = ["drums", "bass", "other", "vocals"]
    for number, name in enumerate(dict.fromkeys(published["models"])):
        kind = "htdemucs" if path.stem.startswith("htdemucs") else ("demucs", "hdemucs")[number % 2]
        network_class, arguments = CLASSES[kind]
        save(network_class(sources, **arguments), tmp_path, name)
    shutil.copy(path, tmp_path)
    found = read_config(tmp_path / path.name)
    assert found.stems == tuple(sources) and len(found.files) == len(published["models"])
    assert [file.stem for file in found.files] == (sources if path.stem == "htdemucs_ft" else [None] * len(found.files))
    assert bool(found.shares) == (path.stem in ("mdx", "mdx_q"))
    assert found.chunk_samples == (44 * 44100 if "segment" in published else CHUNK_SAMPLES)


def test_a_bag_of_one_separates_as_demucs_does(tmp_path: Path) -> None:
    net = network("htdemucs")
    save(net, tmp_path, "955717e8")
    assert_separates_as(load_model(bag(tmp_path, ["955717e8"])), net)
    assert torch.isfinite(by_demucs(net, song())).all()


@pytest.mark.parametrize(
    "name, segment, chunk_samples",
    [("hdemucs", 2, 88_200), ("htdemucs", 2, CHUNK_SAMPLES), ("hdemucs", None, CHUNK_SAMPLES)],
)
def test_the_segment_is_the_chunk_but_never_longer_than_a_transformers(
    tmp_path: Path, name: str, segment: int | None, chunk_samples: int
) -> None:
    save(network(name), tmp_path, "a0")
    assert read_config(bag(tmp_path, ["a0"], segment=segment)).chunk_samples == chunk_samples


@pytest.mark.parametrize(
    "models, more, words",
    quick_first(
        [
            (["a0", "zz"], {}, r"the network zz is missing: put zz\.th or zz-….th beside the YAML"),
            ([], {}, "models must be a list of 1 to 64 names, not []"),
            ("a0", {}, "models must be a list of 1 to 64 names, not 'a0'"),
            (["../a0"], {}, "models must name files beside the YAML, not '../a0'"),
            (
                ["a0", "h0"],
                {},
                "all networks must have the same stems and sample rate, and be htdemucs if one of them is: a0-",
            ),
            (["a0"], {"weights": [[1]]}, "weights must be 2 numbers for each of 1 models, not [[1]]"),
            (["a0"], {"weights": 5}, "weights must be 2 numbers for each of 1 models, not 5"),
            (["a0", "a0"], {"weights": [[1, 0], [1, 0]]}, "weights give no model a share of bass"),
            (["a0"], {"weights": [[1, True]]}, "weights must be 2 numbers for each of 1 models, not [[1, True]]"),
            (["a0"], {"weights": [[1, -1]]}, "weights must be 2 numbers for each of 1 models, not [[1, -1]]"),
            (["a0"], {"segment": "long"}, "segment must be a positive integer, not 'long'"),
        ],
        5,
    ),
)
def test_an_invalid_bag_says_why(tmp_path: Path, models: Any, more: dict[str, Any], words: str) -> None:
    save(network("htdemucs"), tmp_path, "a0")
    save(network("hdemucs"), tmp_path, "h0")
    with pytest.raises(CheckpointError) as caught:
        read_config(bag(tmp_path, models, **more))
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'htdemucs_ft.yaml'}: ") and "\n" not in said
    assert words.replace("\\", "") in said
