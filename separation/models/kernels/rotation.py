"""Rotations of a RoFormer's features that leave its function as it is and spread outliers, for products in bytes.

A row in bytes has one scale, so a feature that is far larger than the others leaves them few steps. A rotation mixes
all features, after which none is large. It costs nothing when the model runs: a norm without gains commutes with it,
and the linear layers before and after absorb it (Ashkboos et al. 2024, arXiv:2404.00456). This needs no statistics of
songs. Everything returned here is a copy.
"""

import copy
import math
from collections.abc import Iterable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from separation.models.layers import Attention, BandSplit, MaskEstimator, Pair, RMSNorm, Transformer, fusable_layers


@cache
def rotation(size: int) -> Tensor:
    """An orthogonal matrix `[size, size]` whose entries are all small; rows of features are multiplied by it.

    It is that of the Hartley transform, which exists for every size, behind random signs: without them, features of one
    sign would add up to a new outlier.
    """
    steps = torch.arange(size, dtype=torch.float64)
    angles = 2 * math.pi / size * torch.outer(steps, steps).remainder(size)
    signs = 2.0 * torch.randint(2, (size, 1), generator=torch.Generator().manual_seed(0)) - 1
    return (signs * (angles.cos() + angles.sin()) / math.sqrt(size)).float()


def rotated_transformer(transformer: Transformer, *, features: bool) -> Transformer:
    """The transformer with the values of each head rotated and, if asked for, input and output features as well.

    Gains of norms become part of the weights behind them if `features`. Raises NotFusedError for layers that no kernel
    supports.
    """
    result = copy.deepcopy(transformer)
    for attention, feed_forward in fusable_layers(result):
        _rotate_values(attention)
        if features:
            norm, up, _, _, down = feed_forward.net
            _rotate_input(attention.norm, attention.to_qkv, attention.to_gates)
            _rotate_output(cast(nn.Linear, attention.to_out[0]))
            _rotate_input(norm, up)
            _rotate_output(down)
    assert not features or isinstance(result.norm, nn.Identity), "gains of the output do not commute with a rotation"
    return result


def rotated_split(split: BandSplit) -> BandSplit:
    """The band split with rotated output features."""
    result = copy.deepcopy(split)
    for _, linear in cast(Iterable[Pair], result.to_features):
        _rotate_output(linear)
    return result


def rotated_estimator(norm: RMSNorm, estimator: MaskEstimator) -> tuple[RMSNorm, MaskEstimator]:
    """The norm and the mask estimator behind it, for rotated input features."""
    plain, result = copy.deepcopy(norm), copy.deepcopy(estimator)
    _rotate_input(plain, *(network[0][0] for network in cast(Iterable[Any], result.to_freqs)))
    return plain, result


def _rotate_input(norm: RMSNorm, *linears: nn.Linear) -> None:
    """Fold the norm's gains into the layers behind it, and rotate what they take."""
    for linear in linears:
        _set(linear, "weight", linear.weight.float() * norm.gamma.float() @ rotation(linear.in_features))
    _set(norm, "gamma", torch.ones_like(norm.gamma))


def _rotate_output(linear: nn.Linear) -> None:
    turn = rotation(linear.out_features)
    _set(linear, "weight", turn.T @ linear.weight.float())
    if linear.bias is not None:
        _set(linear, "bias", linear.bias.float() @ turn)


def _rotate_values(attention: Attention) -> None:
    """Rotate the values of each head, which its weights, its gate and the sums over tokens leave apart."""
    to_qkv, to_out = attention.to_qkv, cast(nn.Linear, attention.to_out[0])
    turn = rotation(to_out.in_features // attention.heads)
    q, k, v = to_qkv.weight.float().chunk(3)
    v = torch.einsum("hsd,st->htd", v.unflatten(0, (attention.heads, -1)), turn).flatten(0, 1)
    _set(to_qkv, "weight", torch.cat([q, k, v]))
    if to_qkv.bias is not None:
        q, k, v = to_qkv.bias.float().chunk(3)
        _set(to_qkv, "bias", torch.cat([q, k, (v.unflatten(0, (attention.heads, -1)) @ turn).flatten()]))
    _set(to_out, "weight", (to_out.weight.float().unflatten(1, (attention.heads, -1)) @ turn).flatten(1))


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    setattr(module, name, nn.Parameter(value.detach(), requires_grad=False))
