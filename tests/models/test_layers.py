"""The parts that the RoFormers share."""

import math

import torch

from separation.models.layers import PolarEmbedding


def test_the_bias_of_polar_keys_turns_them_back_by_at_most_one_turn() -> None:
    embedding = PolarEmbedding(2, heads=5)
    biases = torch.tensor([1.0, 0.0, -4.0, -2 * math.pi + 0.5, -9.0])
    expected = torch.tensor([0.0, 0.0, -4.0, -2 * math.pi + 0.5, -2 * math.pi])
    embedding.bias.data[:] = biases[:, None]
    with torch.no_grad():
        across, along = embedding(torch.zeros(1, 5, 1, 2), is_key=True).unflatten(-1, (2, 2)).unbind(dim=-2)
    angles = torch.atan2(along, across)[0, :, 0]  # of the token at position 0: the bias alone
    distance = torch.remainder(angles - expected[:, None] + math.pi, 2 * math.pi) - math.pi
    assert distance.abs().max() < 1e-5
