"""The layers of the RoFormers."""

import math

import pytest
import torch

from separation.models.layers import LinearAttention, PolarEmbedding, RotaryEmbedding


def test_the_bias_of_polar_keys_turns_them_back_by_at_most_one_turn() -> None:
    embedding = PolarEmbedding(2, heads=5)
    biases = torch.tensor([1.0, 0.0, -4.0, -2 * math.pi + 0.5, -9.0])
    expected = torch.tensor([0.0, 0.0, -4.0, -2 * math.pi + 0.5, -2 * math.pi])
    embedding.bias.data[:] = biases[:, None]
    with torch.no_grad():
        across, along = embedding(torch.zeros(1, 5, 1, 2), is_key=True).unflatten(-1, (2, 2)).unbind(dim=-2)
    angles = torch.atan2(along, across)[0, :, 0]  # at position 0 these are the biases
    distance = torch.remainder(angles - expected[:, None] + math.pi, 2 * math.pi) - math.pi
    assert distance.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_embedding_turns_each_pair_of_features_by_its_angle(dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, 300, 16).to(dtype)
    rotary = RotaryEmbedding(16)
    frequencies = torch.tensor([10_000 ** (-i / 16) for i in range(0, 16, 2)], dtype=torch.float64)
    torch.testing.assert_close(rotary.freqs.double(), frequencies, rtol=1e-6, atol=0)
    assert dict(rotary.named_buffers()) == {} and list(rotary.state_dict()) == ["freqs"]
    turn = torch.polar(torch.ones(300, 8, dtype=torch.float64), torch.outer(torch.arange(300).double(), frequencies))
    turned = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turn).flatten(-2)
    assert rotary(x).dtype == dtype
    # A float32 angle of up to 300 radians has a rounding error of up to 1.5e-5.
    tolerance = 2e-4 if dtype == torch.float32 else 2**-7
    assert ((rotary(x).double() - turned).abs() / (1 + turned.abs())).max() <= tolerance


def test_an_attention_head_too_small_for_positions_is_an_error() -> None:
    with pytest.raises(ValueError, match="dim_head is too small"):
        RotaryEmbedding(2)


def test_linear_attention_equals_its_definition_head_by_head() -> None:
    torch.manual_seed(0)
    layer = LinearAttention(24, heads=3, dim_head=8).eval()
    layer.norm.gamma.data += torch.randn(24) * 0.1
    layer.temperature.data += torch.randn(3, 1, 1) * 0.1
    x = torch.randn(1, 50, 24)
    normed = layer.norm(x)[0]
    heads = []
    for head in range(3):
        q, k, v = (layer.to_qkv[0].weight[part * 24 + head * 8 :][:8] @ normed.T for part in range(3))  # [8, tokens]
        q, k = q / q.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True)
        heads.append(torch.softmax(8 * layer.temperature[head].exp() * q @ k.T, dim=1) @ v)
    assert (layer(x)[0] - torch.cat(heads).T @ layer.to_out[1].weight.T).abs().max() <= 1e-6
