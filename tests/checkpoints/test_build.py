"""From descriptions to models without weights: architectures, hyper-parameters, random weights."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from helpers.common import quick_models
from helpers.demucs_files import ARGUMENTS, CLASSES, SOURCES, config, network
from helpers.own_checkpoint import COMMUNITY, SIZES, own_model, put
from helpers.small_model import HYPER_PARAMETERS, chunks, small_model, write_weights, write_yaml
from separation import Separator
from separation.checkpoints import catalogue
from separation.checkpoints import description as descriptions
from separation.checkpoints.build import architectures_with, build, random_weights, specialists_of
from separation.checkpoints.catalogue import read_config
from separation.checkpoints.load import load_model
from separation.errors import CheckpointError
from separation.models import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("one_thread")


# Building


def test_a_community_yaml_needs_none_of_our_keys(tmp_path: Path) -> None:
    torch.save(small_model().state_dict(), tmp_path / "x.ckpt")
    relatives = {"linear_transformer_depth": 0, "skip_connection": False, "flash_attn": True, "num_subbands": 1}
    path = write_yaml(
        tmp_path,
        drop=("architecture", "stems", "files"),
        model=HYPER_PARAMETERS | relatives,
        training={"instruments": ["vocals", "drums"], "target_instrument": None, "lr": 1e-5},
        inference={"num_overlap": 4},
    )
    assert load_model(path, checkpoint=tmp_path / "x.ckpt").stems == ("vocals", "drums")


@pytest.mark.parametrize("name", quick_models())
def test_every_shipped_yaml_builds(name: str) -> None:
    description = read_config(name)
    assert description.files
    specialists = tuple(file.stem for file in description.files if file.stem)
    model = build(description, specialists)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    sources = description.hyper_parameters.get("sources")
    assert sources is None or tuple(sources) == description.stems


@pytest.mark.parametrize("name", quick_models())
def test_a_models_parameters_agree_with_the_published_bytes(name: str) -> None:
    """Files hold 4 or 2 bytes for each weight, up to 600 for each tensor's name, and little else."""
    description = read_config(name)
    n_bytes = sum(file.bytes or 0 for file in description.files)
    if not all(file.bytes for file in description.files) or name == "mdx_extra_q":  # whose weights are quantised
        pytest.skip("the size is not published, or the weights are packed")
    state = build(description, specialists_of(description.files)).state_dict()
    weights = sum(value.numel() * (2 if value.is_complex() else 1) for value in state.values())
    assert any(0.99 * width * weights <= n_bytes <= 1.01 * width * weights + 600 * len(state) for width in (4, 2)), (
        n_bytes / weights
    )


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("bs_roformer_viperx_1297", 159_758_092),
        ("bs_roformer_viperx_1296", 159_758_092),
        ("bs_roformer_sw", 174_656_564),
        ("mel_band_roformer_kim", 228_202_852),
        ("htdemucs", 41_984_456),
        ("htdemucs_6s", 27_414_996),
        ("hdemucs_mmi", 83_637_832),
    ],
)
def test_published_models_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    model = build(read_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"colour": 1}, "bs_roformer has no hyper-parameter colour"),
        ({"num_subbands": 4}, "bs_roformer has no hyper-parameter num_subbands"),
        ({"freqs_per_bands": [3, 4]}, "adds up to 7 bins"),
        ({"dim": "wide"}, "the model section is not valid"),
        ({"depth": 1.5}, "the model section is not valid"),
        ({"num_stems": 3}, "names 2 stems and num_stems is 3"),
    ],
)
def test_wrong_hyper_parameters_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"small\.yaml.*{message}"):
        load_model(write_yaml(tmp_path, model=HYPER_PARAMETERS | changes))


def test_an_unknown_architecture_is_an_error_that_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"small\.yaml: unknown architecture 'perceptron': use one of bs_roformer"
    ):
        load_model(write_yaml(tmp_path, architecture="perceptron"))


def test_only_architectures_that_average_accept_several_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"small\.yaml.*members"):
        load_model(write_yaml(tmp_path, files=[{"name": "a"}, {"name": "b"}]))


@pytest.mark.parametrize("chunk_samples, is_enough", [(32, False), (33, True)])
def test_a_chunk_shorter_than_half_a_frame_is_refused(tmp_path: Path, chunk_samples: int, is_enough: bool) -> None:
    path = write_yaml(tmp_path, audio={"chunk_size": chunk_samples}, drop=("files",))
    weights = write_weights(small_model().state_dict(), tmp_path / "x.ckpt")
    if is_enough:
        estimates = Separator.from_model(load_model(path, checkpoint=weights)).separate(chunks(500)[0])
        assert estimates["drums"].shape == (2, 500)
    else:
        words = r"small\.yaml: chunk_size is 32 samples, and its Fourier transform needs at least 33: correct it$"
        with pytest.raises(CheckpointError, match=words):
            load_model(path, checkpoint=weights)


def test_building_draws_no_random_numbers_and_leaves_initialisation_on() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    build(read_config("demo"))
    assert torch.equal(torch.rand(1), expected)
    assert 0 < torch.nn.Linear(100, 100).weight.abs().max() < 0.1001


# Architectures


@pytest.mark.parametrize("name", quick_models())
def test_each_model_is_recognised_by_the_names_of_its_weights(name: str) -> None:
    description = read_config(name)
    model = build(description)
    keys = [key.removeprefix(model.key_prefix("0")) for key in model.state_dict()]
    assert architectures_with(keys) == [description.architecture]


def test_each_demucs_class_is_recognised_by_its_keys() -> None:
    keys = {name: list(network(name).state_dict()) for name in CLASSES}
    keys["demo"] = list(random_weights("demo"))
    for name in CLASSES:
        patterns = ARCHITECTURES[name].KEY_PATTERNS
        found = {of for of in keys if all(any(re.fullmatch(p, key) for key in keys[of]) for p in patterns)}
        assert found == {name}


def test_weights_of_an_unknown_architecture_are_named_with_their_first_keys(tmp_path: Path) -> None:
    put(tmp_path, "x.yaml")
    write_weights({f"encoder.{n}.weight": torch.zeros(2) for n in range(5)}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"x\.ckpt fits none of the architectures bs_roformer, .* \(its first "):
        load_model(tmp_path / "x.ckpt")
    with pytest.raises(
        CheckpointError, match=r"weights are encoder\.0\.weight, encoder\.1\.weight, encoder\.2\.weight\)"
    ):
        load_model(tmp_path / "x.ckpt")


def test_the_list_of_architectures_with_fixed_chunks_is_complete() -> None:
    fixed = {name for name, architecture in ARCHITECTURES.items() if architecture.fixed_chunk}
    assert fixed == descriptions.FIXED_CHUNKS


@pytest.mark.parametrize(
    "name",
    [
        "demo",
        "bs_roformer_inst_fno_unwa",
        "mel_band_roformer_kim",
        "htdemucs",
        "hdemucs_mmi",
        "drumsep",
        "scnet",
        "vr_denoise_lite_foxjoy",
    ],
)
def test_the_lists_of_architectures_with_properties_are_complete(name: str) -> None:
    description = catalogue.read_config(name)
    model = build(description)
    assert (model.head_size is not None) == (description.architecture in descriptions.WITH_ATTENTION)
    assert model.has_int8 == (description.architecture in descriptions.WITH_INT8)
    assert (model.spill_samples > 0) == (description.architecture in descriptions.SIDE_BY_SIDE)


# Random weights


def test_random_weights_depend_on_the_seed_only(tmp_path: Path) -> None:
    path = write_yaml(
        tmp_path, model=HYPER_PARAMETERS | {"depth": 2}
    )  # two layers, which share their rotary frequencies
    before = torch.get_rng_state()
    first, again, other = (random_weights(path, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert any(not torch.equal(value, other[key]) for key, value in first.items())
    save_file(first, tmp_path / "random.safetensors")
    model = load_model(path, checkpoint=tmp_path / "random.safetensors")
    assert all(torch.equal(value, first[key]) for key, value in model.state_dict().items())
    assert "channel_downsampler.weight" in random_weights("htdemucs")  # as in a file, without the prefix of our class


def test_random_weights_need_hyper_parameters_that_tell_the_architecture(tmp_path: Path) -> None:
    put(tmp_path, "x.yaml")
    assert random_weights(tmp_path / "x.yaml").keys() == own_model().state_dict().keys()
    (tmp_path / "x.yaml").write_text(
        yaml.safe_dump(COMMUNITY | {"model": HYPER_PARAMETERS | SIZES | {"hyper_streams": 4}})
    )
    with pytest.raises(CheckpointError, match=r"x\.yaml does not name its architecture \(none fits its keys\): add"):
        random_weights(tmp_path / "x.yaml")


def test_an_architecture_whose_hyper_parameters_are_missing_is_not_chosen(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(COMMUNITY | {"model": {"stereo": True}}))
    with pytest.raises(CheckpointError, match=r"x\.yaml does not name its architecture \(none fits its keys\): add"):
        random_weights(tmp_path / "x.yaml")


def test_random_weights_have_the_initial_scale_of_the_architecture(tmp_path: Path) -> None:
    path = config(tmp_path, "demucs")
    torch.manual_seed(3)
    expected = CLASSES["demucs"][0](SOURCES, **ARGUMENTS).state_dict()
    found = random_weights(path, seed=3)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], value) for key, value in expected.items())
