"""Attention backends, and which one to use: chosen once for a device and a precision, with the reason.

A backend is `(q, k, v) -> out` over `[B, heads, tokens, dim_head]`, without mask or dropout. Where one of `LAYERS` is
chosen, a RoFormer replaces whole layers (kernels/fused.py, kernels/roformer_gpu.py) and only other models use it as a
backend.
"""

import ctypes
import importlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from separation.errors import InputError
from separation.models.kernels.native import PANEL, NotFusedError, library
from separation.models.kernels.operations import triton_fault

AttentionBackend = Callable[[Tensor, Tensor, Tensor], Tensor]

CACHED_BYTES = 2**24  # of scores that a CPU's caches hold


def einsum_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, softmax(q k^T / sqrt(dim_head)) v, in plain operations: the reference for the others."""
    return _weighted(torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5, v)


def _weighted(scores: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(dim=-1), v)


def itemwise_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition over a few items or, of long sequences, a few queries at a time: scores stay in the cache."""
    q = q * q.shape[-1] ** -0.5  # in place of the scores, of which there are far more
    scores_bytes = q.shape[1] * q.shape[2] * k.shape[2] * q.element_size()  # of an item
    if scores_bytes <= CACHED_BYTES:
        items = CACHED_BYTES // scores_bytes
        return _joined(zip(q.split(items), k.split(items), v.split(items), strict=True), 0)
    queries = max(1, CACHED_BYTES // 4 * q.shape[2] // scores_bytes)
    each = zip(q.split(1), k.contiguous().split(1), v.contiguous().split(1), strict=True)
    return torch.cat([_joined(((part, k, v) for part in q.split(queries, 2)), 2) for q, k, v in each])


def _joined(parts: Iterable[tuple[Tensor, Tensor, Tensor]], dim: int) -> Tensor:
    return torch.cat([_weighted(torch.einsum("bhid,bhjd->bhij", q, k), v) for q, k, v in parts], dim)


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """fused.cpp's kernel, for bfloat16 on the CPU and a multiple of 32 for `dim_head`; scores never leave the cache."""
    batch, heads, queries, size = q.shape
    if size % PANEL:
        return itemwise_attention(q, k, v)
    q, k, v = (tensor if _has_rows(tensor) else _in_rows(tensor) for tensor in (q, k, v))
    if k.stride() != v.stride():
        k, v = _in_rows(k), _in_rows(v)
    out = q.new_empty(batch, queries, heads, size)
    strides = (ctypes.c_long * 4)(q.stride(0), q.stride(2), k.stride(0), k.stride(2))
    pointers = (tensor.data_ptr() for tensor in (q, k, v, out))
    sizes = batch, queries, k.shape[2], heads, size
    library().attention(*pointers, *sizes, ctypes.addressof(strides), torch.get_num_threads())
    return out.transpose(1, 2)


def _has_rows(x: Tensor) -> bool:
    """Whether `[B, heads, tokens, dim_head]` has all heads of a token side by side."""
    return x.stride(3) == 1 and x.stride(1) == x.shape[3]


def _in_rows(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's fused kernel; it picks flash, memory-efficient or plain attention by device and dtype."""
    return F.scaled_dot_product_attention(q, k, v)


def sage_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sageattention package's kernel: int8 scores, on CUDA GPUs (Zhang et al. 2024, arXiv:2410.02367)."""
    return importlib.import_module("sageattention").sageattn(q, k, v, tensor_layout="HND", is_causal=False)


BACKENDS: dict[str, AttentionBackend] = {
    "fused": fused_attention,
    "triton": sdpa_attention,
    "sage": sage_attention,
    "sdpa": sdpa_attention,
    "itemwise": itemwise_attention,
    "einsum": einsum_attention,
}
NAMES = ("auto", *BACKENDS)
LAYERS = ("fused", "triton")


@dataclass(frozen=True)
class AttentionChoice:
    """A backend's name, and why."""

    name: str
    reason: str


def choose_attention(name: str, device: torch.device, dtype: torch.dtype, head_size: int = 64) -> AttentionChoice:
    """Resolve a name of `NAMES`; `auto` is what SEPARATION_ATTENTION says, else the fastest that works here.

    Here means on this device, in this precision and for heads of so many features.
    Raises InputError for an unknown name, and for one asked for that does not work here.
    """
    asked_by = "asked for"
    if name == "auto" and os.environ.get("SEPARATION_ATTENTION"):
        name, asked_by = os.environ["SEPARATION_ATTENTION"], "SEPARATION_ATTENTION asks for it"
    if name not in NAMES:
        raise InputError(f"unknown attention backend {name!r}: use {', '.join(NAMES)}")
    if name != "auto":
        if fault := _fault(name, device, dtype, head_size):
            raise InputError(f"attention backend {name!r} does not work here ({fault}): use auto")
        return AttentionChoice(name, asked_by + _kernel(name, device, dtype, head_size))
    faults: list[str] = []
    for candidate in _chain(device, dtype):
        if not (fault := _fault(candidate, device, dtype, head_size)):
            reason = "; ".join([*faults, "the fastest that works here"])
            return AttentionChoice(candidate, reason + _kernel(candidate, device, dtype, head_size))
        faults.append(f"not {candidate}: {fault}")
    raise InputError(f"no attention backend works on {device}: {'; '.join(faults)}")


def _chain(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The backends from the fastest to the plainest."""
    if device.type == "cuda":
        return ("triton", "sdpa", "einsum") if dtype != torch.float32 else ("sdpa", "einsum")
    if device.type == "cpu" and dtype == torch.bfloat16:
        return ("fused", "itemwise", "einsum")
    return ("sdpa", "einsum")


def _kernel(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Which of its kernels PyTorch takes here, as the end of a reason: ", by its flash kernel"; else nothing."""
    if name not in ("sdpa", "triton") or device.type not in ("cpu", "cuda"):
        return ""
    qkv = torch.zeros(1, 1, 48, head_size, device=device, dtype=dtype)
    kernel = SDPBackend(torch._fused_sdp_choice(qkv, qkv, qkv)).name.split("_")[0].lower()
    return f", by its {kernel} kernel"


def _fault(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Why a backend does not work here, empty if it does: it is tried on a little."""
    if name == "fused":
        if device.type != "cpu" or dtype != torch.bfloat16:
            return "it is for the CPU in bf16"
        try:
            library()
        except NotFusedError as e:
            return str(e)
        return ""
    if name == "triton" and (fault := _triton_fault(device, dtype)):
        return fault
    q, k, v = torch.randn(3, 2, 2, 48, head_size, generator=torch.Generator().manual_seed(0))
    expected = einsum_attention(q, k, v)
    try:
        got = BACKENDS[name](*(tensor.to(device, dtype) for tensor in (q, k, v))).to("cpu", torch.float32)
    except Exception as e:  # whatever a missing package or a kernel that this GPU does not have raises
        return (str(e).strip().splitlines() or [type(e).__name__])[0]
    error = float((got - expected).norm() / expected.norm())
    return "" if error < 0.05 else f"it is wrong by {error:.0%}"


def _triton_fault(device: torch.device, dtype: torch.dtype) -> str:
    """Why the layers of Triton kernels cannot be had here, empty if they can."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return "it is for CUDA GPUs in fp16 and bf16"
    return triton_fault(device)
