"""Attention backends, and the choice of one for a device and a precision, with the reason.

A backend is a function `(q, k, v) -> out` of `[B, heads, tokens, dim_head]`, without mask or dropout. If the choice is
one of `LAYER_BACKENDS`, a RoFormer replaces whole layers instead (kernels/fused.py, kernels/roformer_gpu.py).
"""

import ctypes
import importlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from separation.errors import InputError
from separation.models.kernels.native import CODES, PANEL, NotFusedError, library
from separation.models.kernels.registry import triton_fault

AttentionBackend = Callable[[Tensor, Tensor, Tensor], Tensor]

CACHED_BYTES = 2**24  # scores of this size fit into a CPU's caches


def einsum_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(dim_head)) v in plain operations: the reference for the other backends."""
    return _weighted(torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5, v)


def _weighted(scores: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(dim=-1), v)


def itemwise_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same for a few batch items at once, or a few queries of long sequences, so that scores stay in the cache."""
    q = q * q.shape[-1] ** -0.5  # cheaper than scaling the scores, which are far larger
    scores_bytes = q.shape[1] * q.shape[2] * k.shape[2] * q.element_size()  # per item
    if scores_bytes <= CACHED_BYTES:
        items = CACHED_BYTES // scores_bytes
        return _part_by_part(zip(q.split(items), k.split(items), v.split(items), strict=True), 0)
    queries = max(1, CACHED_BYTES // 4 * q.shape[2] // scores_bytes)
    each = zip(q.split(1), k.contiguous().split(1), v.contiguous().split(1), strict=True)
    return torch.cat([_part_by_part(((part, k, v) for part in q.split(queries, 2)), 2) for q, k, v in each])


def _part_by_part(parts: Iterable[tuple[Tensor, Tensor, Tensor]], dim: int) -> Tensor:
    """Attention of each part, where q is already scaled, concatenated along `dim`."""
    return torch.cat([_weighted(torch.einsum("bhid,bhjd->bhij", q, k), v) for q, k, v in parts], dim)


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """fused.cpp's kernel, for CPUs. A `dim_head` that is no multiple of 32 falls back to `itemwise`."""
    batch, heads, queries, size = q.shape
    if size % PANEL:
        return itemwise_attention(q, k, v)
    q, k, v = (tensor if _has_rows(tensor) else _in_rows(tensor) for tensor in (q, k, v))
    if k.stride() != v.stride():
        k, v = _in_rows(k), _in_rows(v)
    out = q.new_empty(batch, queries, heads, size)
    sizes = (ctypes.c_long * 5)(batch, queries, k.shape[2], heads, size)
    strides = (ctypes.c_long * 4)(q.stride(0), q.stride(2), k.stride(0), k.stride(2))
    library().functions.attention(
        *(tensor.data_ptr() for tensor in (q, k, v, out)),
        ctypes.addressof(sizes),
        ctypes.addressof(strides),
        CODES[q.dtype],
        torch.get_num_threads(),
    )
    return out.transpose(1, 2)


def _has_rows(x: Tensor) -> bool:
    """Whether all heads of a token of `[B, heads, tokens, dim_head]` are contiguous in memory."""
    return x.stride(3) == 1 and x.stride(1) == x.shape[3]


def _in_rows(x: Tensor) -> Tensor:
    """A copy for which `_has_rows` is true."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's fused attention. PyTorch chooses a flash, memory-efficient or plain kernel by device and dtype."""
    return F.scaled_dot_product_attention(q, k, v)


def sage_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sageattention package's kernel with int8 scores, for CUDA GPUs (Zhang et al. 2024, arXiv:2410.02367)."""
    package: Any = importlib.import_module("sageattention")
    out: Tensor = package.sageattn(q, k, v, tensor_layout="HND", is_causal=False)
    return out


BACKENDS: dict[str, AttentionBackend] = {
    "fused": fused_attention,
    "triton": sdpa_attention,
    "sage": sage_attention,
    "sdpa": sdpa_attention,
    "itemwise": itemwise_attention,
    "einsum": einsum_attention,
}
NAMES = ("auto", *BACKENDS)
LAYER_BACKENDS = ("fused", "triton")


@runtime_checkable
class _Attends(Protocol):
    attend: AttentionBackend


def use_backend(network: nn.Module, name: str) -> None:
    """Have all attention in a network, which is in modules with an `attend`, use one of `BACKENDS`."""
    for module in network.modules():
        if isinstance(module, _Attends):
            module.attend = BACKENDS[name]


@dataclass(frozen=True)
class AttentionChoice:
    """A backend's name and the reason for choosing it."""

    name: str
    reason: str


def requested_attention(name: str) -> str:
    """The name itself, or for `auto` the one in SEPARATION_ATTENTION, if any."""
    return (os.environ.get("SEPARATION_ATTENTION") or name) if name == "auto" else name


def choose_attention(name: str, device: torch.device, dtype: torch.dtype, head_size: int = 64) -> AttentionChoice:
    """Resolve one of `NAMES` for heads of `head_size` features on a device and in a precision.

    `auto` means the backend that SEPARATION_ATTENTION names, else the fastest that works.
    Raises InputError if the name is unknown, or if it is not `auto` and that backend does not work.
    """
    requested_by = "requested" if name != "auto" else "requested by SEPARATION_ATTENTION"
    name = requested_attention(name)
    if name not in NAMES:
        raise InputError(f"unknown attention backend {name!r}: use {', '.join(NAMES)}")
    if name != "auto":
        if fault := _fault(name, device, dtype, head_size):
            raise InputError(f"attention backend {name!r} does not work here ({fault}): use auto")
        return AttentionChoice(name, requested_by + _kernel(name, device, dtype, head_size))
    faults: list[str] = []
    for candidate in _candidates(device, dtype):
        if not (fault := _fault(candidate, device, dtype, head_size)):
            reason = "; ".join([*faults, "the fastest that works here"])
            return AttentionChoice(candidate, reason + _kernel(candidate, device, dtype, head_size))
        faults.append(f"not {candidate}: {fault}")
    raise InputError(f"no attention backend works on {device} ({'; '.join(faults)}): use another device")


def _candidates(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The backends that `auto` tries, the fastest first."""
    if device.type == "cuda":
        return ("triton", "sdpa", "einsum") if dtype != torch.float32 else ("sdpa", "einsum")
    if device.type == "cpu":
        return ("fused", "itemwise" if dtype == torch.bfloat16 else "sdpa", "einsum")
    return ("sdpa", "einsum")


def _kernel(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """The end of a reason that names the kernels, such as ", with PyTorch's flash kernel"."""
    if name == "fused":
        return f", with kernels for {library()}"
    if name not in ("sdpa", "triton") or device.type not in ("cpu", "cuda"):
        return ""
    qkv = torch.zeros(1, 1, 48, head_size, device=device, dtype=dtype)
    kernel = SDPBackend(torch._fused_sdp_choice(qkv, qkv, qkv)).name.split("_")[0].lower()
    return f", with PyTorch's {kernel} kernel"


def _fault(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Why a backend does not work, or an empty string if it does. Runs it on a small input."""
    if name == "fused":
        if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
            return "it is for CPUs in fp32 and bf16"
        try:
            kind = library().kind
        except NotFusedError as e:
            return str(e)
        if dtype == torch.bfloat16 and "bf16" not in kind.precisions:
            return f"its kernels for {kind.name} are not for bf16"
        return ""
    if name == "triton":
        if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
            return "it is for CUDA GPUs in fp16 and bf16"
        if fault := triton_fault(device):
            return fault
    q, k, v = torch.randn(3, 2, 2, 48, head_size, generator=torch.Generator().manual_seed(0))
    expected = einsum_attention(q, k, v)
    try:
        got = BACKENDS[name](*(tensor.to(device, dtype) for tensor in (q, k, v))).to("cpu", torch.float32)
    except Exception as e:  # a missing package or an unsupported GPU can raise anything
        return (str(e).strip().splitlines() or [type(e).__name__])[0]
    error = float((got - expected).norm() / expected.norm())
    return "" if error < 0.05 else f"its result is wrong by {error:.0%}"
