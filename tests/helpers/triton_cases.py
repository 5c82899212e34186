"""Small inputs for the RoFormers' Triton kernels. Under TRITON_INTERPRET=1, compares each with its reference.

Prints a JSON object: the relative error for each operation and precision.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from separation.models.kernels import roformer_ops as ops

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}  # Triton's interpreter is wrong in bf16
TOKENS, SEQUENCES, HEADS, SIZE = 13, 5, 3, 32


def cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...], Callable[..., Tensor]]]:
    """The name of each operation, its arguments, and a function `(result, *arguments)` that returns its output."""
    torch.manual_seed(0)
    inner, total = HEADS * SIZE, TOKENS * SEQUENCES
    rows = torch.randn(total, 3 * inner + 8).to(dtype)
    angles = torch.outer(torch.arange(TOKENS).float(), torch.rand(SIZE // 2))
    tables = angles.cos(), angles.sin()
    yield "rms_norm", (torch.randn(37, 72), torch.randn(72), torch.randn(72), dtype), returned
    yield "rms_norm", (torch.randn(37, 72)[:, 3:11], torch.randn(8), torch.randn(8), dtype), returned
    yield "rotate_", (rows, *tables, 2 * HEADS, 1), changed
    yield "rotate_", (rows, *tables, 2 * HEADS, SEQUENCES), changed
    attended = torch.randn(SEQUENCES, HEADS, TOKENS, SIZE).to(dtype)
    yield "gate", (attended.permute(2, 0, 1, 3), rows, 3 * inner), returned
    yield "gate", (attended.transpose(1, 2), rows, 3 * inner), returned
    yield "attend_short", (rows, *tables, HEADS), returned
    masks = torch.zeros(37, 30)
    yield "glu_into_", (masks[:, 4:25], torch.randn(3, 37, 14).to(dtype)), changed


def returned(result: Any, *arguments: Any) -> Tensor:
    return result


def changed(result: Any, *arguments: Any) -> Tensor:
    return arguments[0]


def copied(arguments: tuple[Any, ...]) -> list[Any]:
    """Copies of the arguments with the same strides."""
    return [_copy(a) if isinstance(a, Tensor) else a for a in arguments]


def _copy(tensor: Tensor) -> Tensor:
    storage = torch.empty(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=tensor.dtype)
    return storage.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


if __name__ == "__main__":
    from separation.models.kernels import roformer_triton as triton_kernels

    errors: dict[str, float] = {}
    for precision, dtype in PRECISIONS.items():
        for name, arguments, output in cases(dtype):
            by_kernel, by_reference = copied(arguments), copied(arguments)
            got = output(getattr(triton_kernels, name)(*by_kernel), *by_kernel).float()
            expected = output(getattr(ops, name)(*by_reference), *by_reference).float()
            error = float((got - expected).norm() / expected.norm())
            errors[f"{name} {precision}"] = max(error, errors.get(f"{name} {precision}", 0.0))
    print(json.dumps(errors))
