"""BS-RoFormer's bands."""

import pytest

from helpers.small_model import HYPER_PARAMETERS, identity, small_model
from separation.models.bs_roformer import BSRoFormer, BSRoFormerConfig
from separation.models.layers import Attention
from separation.models.shapes import Shapes


def test_bands_that_do_not_fill_the_spectrum_are_an_error_with_both_counts() -> None:
    with pytest.raises(ValueError, match=r"adds up to 10 bins.*1025"):
        BSRoFormerConfig(dim=8, depth=1, freqs_per_bands=(5, 5))


def test_the_shapes_of_weights_tell_the_bands_and_whether_they_are_stereo() -> None:
    for stereo in (True, False):
        hyper = HYPER_PARAMETERS | {"freqs_per_bands": (3, 10, 20), "stereo": stereo, "mask_estimator_depth": 3}
        config = BSRoFormerConfig(**hyper)
        state = BSRoFormer(config, identity()).state_dict()
        found = BSRoFormer.sizes_in(Shapes({key: tuple(value.shape) for key, value in state.items()}), config)
        assert all(found[name] == hyper[name] for name in ("freqs_per_bands", "stereo", "mask_estimator_depth"))
        assert found["stft_n_fft"] == 64 and found["use_shared_bias"] is False


def test_shared_biases_are_one_parameter_for_all_layers() -> None:
    model = small_model(use_shared_bias=True, depth=2)
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    assert len(layers) == 4
    assert all(layer.to_qkv.bias is model.linear_62_bias_0 for layer in layers)
    assert all(layer.to_out[0].bias is model.linear_64_bias_0 for layer in layers)
