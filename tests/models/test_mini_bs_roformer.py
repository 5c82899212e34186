"""Mini-BS-RoFormer v2 equals its author's network and loads as published.

The figures come from modeling_bs_roformer.py in lib_v5/bs_roformer of SuperBypassUdinnn/ultimatevocalremovergui at
b6f6b76, in the form without the package transformers, roformer/model.py of forcepusher/ComfyUI-SloppyAudio at df3e10e.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from helpers.recorded import assert_as_recorded
from helpers.small_model import assert_chunks_are_alone, assert_half_precision_is_near, assert_near, identity
from separation import CheckpointError, load_model
from separation.checkpoints.build import build
from separation.checkpoints.catalogue import read_config
from separation.models.kernels.native import NotFusedError
from separation.models.mini_bs_roformer import MiniBSRoFormer, MiniBSRoFormerConfig

pytestmark = pytest.mark.usefixtures("one_thread")

STEMS = ("bass", "drums")
SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "band_proj_size": 12,
    "time_conv_length": 4,
    "num_stems": 2,
    "freqs_per_bands": (10, 22, 50, 100, 331),
    "freqs_per_bands_out": (5, 11, 25, 50, 166),
    "stft_n_fft": 1024,
    "stft_n_fft_out": 512,
    "stft_hop_length": 128,
}
OTHER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_key_value_heads": 4,
    "num_input_channels": 1,
    "num_stems": 1,
    "register_token_num": 2,
    "time_conv_length": 3,
    "time_transformer_depth": 2,
    "freq_transformer_depth": 2,
    "stft_hop_length": 100,
    "rms_norm_eps": 1e-3,
    "rope_base": 500.0,
}
RECORDED = [
    ({}, 6_000, """
    6.216661 6.163818 -0.03800562 -0.01930221 0.02233533 -0.01689332 -0.009919409 -0.001251466 0.07760347 0.02341887
    -0.02180929 -0.0170109 0.01333072 0.06368036 0.04270817 -0.03142335 -0.016337 -0.02591743 -0.03029406 0.07999472
    -0.04054175 -0.04899035 -0.006852552 0.007342753 -0.04840907 -0.08841031
    """),
    (OTHER, 5_555, """
    3.395127 -0.0417432 0.03830652 -0.02037417 0.001215859 0.03430333 -0.01294201 0.02079533 0.0262286 0.005540904
    -0.00993936 0.02589276 -0.005031641 0.04125263 -0.01360107 -0.08063686 0.01515069 -0.04472411 -0.02922211
    0.03669506 0.02597795 0.01031336 -0.03187824 -0.007797757 -0.02945188
    """),
]  # fmt: skip


def make(**changes: Any) -> MiniBSRoFormer:
    torch.manual_seed(0)
    config = MiniBSRoFormerConfig(**SMALL | changes)
    return MiniBSRoFormer(config, identity(STEMS[: config.num_stems], chunk_samples=6_000)).eval()


@pytest.mark.parametrize("changes, length, figures", RECORDED)
def test_output_equals_the_authors_network(changes: dict[str, Any], length: int, figures: str) -> None:
    assert_as_recorded(make(**changes), length, figures)


def test_an_estimate_does_not_depend_on_the_other_chunks_of_the_batch() -> None:
    assert_chunks_are_alone(make())


@pytest.mark.parametrize("precision, decibels", [(torch.bfloat16, 30), (torch.float16, 45)])
def test_half_precision_stays_close_to_float32(precision: torch.dtype, decibels: float) -> None:
    assert_half_precision_is_near(make(), precision, decibels)


def test_requested_stems_are_the_same_without_the_others() -> None:
    model, chunks = make(), torch.randn(1, 2, 6_000) * 0.1
    with torch.inference_mode():
        assert torch.equal(model.only(("drums",))(chunks), model(chunks)[:, 1:])


@pytest.mark.parametrize("backend", ["einsum", "itemwise"])
def test_attention_backends_agree(backend: str) -> None:
    model, chunks = make(), torch.randn(1, 2, 6_000) * 0.1
    with torch.inference_mode():
        expected = model(chunks)
        model.prepare(torch.float32, attention=backend)
        assert_near(model(chunks), expected)


def test_the_kernels_refuse_it() -> None:
    with pytest.raises(NotFusedError, match="it has no layers of gated MLPs and shared keys"):
        make().prepare(torch.float32, attention="fused")


def write_files(folder: Path, **changes: Any) -> Path:
    """A YAML that does not name the architecture, with what config.json says, and bfloat16 weights as published."""
    hyper = {key: list(value) if isinstance(value, tuple) else value for key, value in (SMALL | changes).items()}
    document = {
        "stems": STEMS[: hyper["num_stems"]],
        "audio": {"chunk_size": 6_000, "sample_rate": 44_100},
        "model": hyper | {"attention_dropout": 0.0, "initializer_range": 0.02, "dtype": "bfloat16"},
    }
    path = folder / "model.yaml"
    path.write_text(yaml.safe_dump(document | {"stems": list(document["stems"])}), encoding="utf-8")
    save_file({key: value.bfloat16() for key, value in make().state_dict().items()}, folder / "model.safetensors")
    return path


def test_published_weights_load_with_their_rounded_frequencies(tmp_path: Path) -> None:
    model = load_model(write_files(tmp_path))
    assert isinstance(model, MiniBSRoFormer) and model.stems == STEMS
    expected = make()
    expected.load({key: value.bfloat16().float() for key, value in expected.state_dict().items()})
    chunks = torch.randn(1, 2, 6_000) * 0.1
    with torch.inference_mode():
        assert_near(model(chunks), expected(chunks))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_hidden_layers": 3}, r"model\.num_hidden_layers is 3, the weights have 2"),
        ({"num_attention_heads": 8, "head_dim": 4}, r"model\.head_dim is 4, the weights have 8"),
        ({"num_key_value_heads": 3}, "num_attention_heads is no multiple of num_key_value_heads"),
        ({"stft_n_fft_out": 1024}, "freqs_per_bands_out adds up to 257 bins, but stft_n_fft_out 1024 has 513"),
        ({"freqs_per_bands_out": (5, 11, 25, 216)}, "must have as many bands"),
        ({"num_input_channels": 3}, "num_input_channels is 3: use 1 or 2"),
    ],
)
def test_an_invalid_configuration_is_a_one_line_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(write_files(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_the_public_checkpoint_has_so_many_parameters() -> None:
    description = read_config("mini_bs_roformer_v2_hidolen")
    model = build(description)
    assert isinstance(model, MiniBSRoFormer) and description.chunk_samples == 8 * 44_100
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())  # with the frequencies
    (file,) = description.files
    assert numbers == 46_838_324 and file.bytes is not None
    assert 0 < file.bytes - 2 * numbers < 150 * len(model.state_dict())  # in bfloat16
