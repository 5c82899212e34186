"""CUDA graphs: what a model launches on a CUDA GPU, recorded once and replayed as a whole.

A replay leaves the CPU next to nothing to do. It works for batches of one shape, and for a model that never waits for
the CPU. Everything here runs on the device's compute thread.
"""

import contextlib
import logging
import threading
import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from separation.device import is_out_of_memory
from separation.engine.batch_memory import Model

# How far a replay may be from the model itself, by norm: sums of atomic additions differ a little each time.
REPLAY_TOLERANCE = 1e-3
COPIES = ("_to_copy", "copy_", "to")
# Operations whose results the CPU must know before it goes on.
WAITS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "unique_dim")

logger: logging.Logger = logging.getLogger("separation")


class _Watch(TorchDispatchMode):
    """Watches the operations of a model on a GPU: which of them wait for the CPU, and which existing tensors they use.

    Args:
        decompose: also look inside operations that are made of others.
    """

    def __init__(self, *, decompose: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch annotates no __init__ here
        self.waits: list[str] = []
        self.used: dict[int, UntypedStorage] = {}  # memory that existed before, by address
        self._made: set[int] = set()
        self._decompose = decompose

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise PyTorch imports its compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._decompose and func.namespace == "aten" and func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in given:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._made:
                self.used[storage._cdata] = storage
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._made |= {tensor.untyped_storage()._cdata for tensor in made} - self.used.keys()
        name = func._schema.name.partition("::")[2]
        if self._waits(name, given, made):
            self.waits.append(name)
        return result

    @staticmethod
    def _waits(name: str, given: list[Tensor], made: list[Tensor]) -> bool:
        if not any(tensor.is_cuda for tensor in (*given, *made)):
            return False
        if name in WAITS:
            return True
        if name == "lift_fresh":  # of torch.tensor(…, device="cuda"), which has just copied its values from the CPU
            return True
        if name.startswith("index") and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in given[1:]):
            return True  # indexing with a mask
        # A zero-dimensional tensor on the CPU is passed to the kernel as a number; any other is copied.
        return len({tensor.device for tensor in (*given, *made) if tensor.ndim or name in COPIES}) > 1


class _Captures:
    """What all graphs of a device share."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        # The graphs that are alive. They share one memory pool: they never run at the same time, and their results are
        # copied.
        self.graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self.failed: list[torch.cuda.CUDAGraph] = []  # kept, because PyTorch's allocator may still refer to them


_capture_lock = threading.Lock()  # PyTorch allows one capture at a time in a process


@cache
def _captures(device: torch.device) -> _Captures:
    return _Captures()


class Graphed:
    """A model whose batches of one shape are replayed from a CUDA graph; the model itself computes all others.

    Raises whatever goes wrong in the capture.

    Args:
        model: chunks `[B, C, T]` to estimates `[B, S, C, T]`.
        example: a batch of the shape to replay.
    """

    def __init__(self, model: Model, example: Tensor) -> None:
        shared = _captures(example.device)
        self.model = model
        self._input = example
        self._graph = torch.cuda.CUDAGraph()
        # A memory pool lives as long as one of its graphs: this reference keeps it until the new graph shares it.
        neighbour = next(iter(shared.graphs), None)
        pool = neighbour.pool() if neighbour is not None else torch.cuda.graph_pool_handle()
        # thread_local: other threads may use the GPU meanwhile, for example to load a model.
        capture = torch.cuda.graph(self._graph, pool, shared.stream, capture_error_mode="thread_local")
        try:
            # The outer `stream` restores the current stream: `graph` does not if the end of a capture fails.
            with torch.cuda.stream(shared.stream), capture, _Watch(decompose=False) as watch:
                self._output = model(example)
        except BaseException:
            # If the end of a capture fails, PyTorch 2.11 does not tell its allocator, and emptying the cache becomes an
            # error. If the allocator does know, the first call raises, and there is nothing to clean up.
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(example.device.index, pool)
                torch._C._cuda_releasePool(example.device.index, pool)
                shared.failed.append(self._graph)
            raise
        shared.graphs.add(self._graph)
        self._used = watch.used  # windows and tables: a cache may drop them while the graph still reads them

    def __call__(self, batch: Tensor) -> Tensor:
        if batch.shape != self._input.shape or batch.dtype != self._input.dtype:
            return self.model(batch)
        return self.replay(batch).clone()

    def replay(self, batch: Tensor) -> Tensor:
        """The estimates of a batch of the example's shape. The next replay of any graph overwrites them."""
        self._input.copy_(batch)
        self._graph.replay()
        return self._output


@torch.inference_mode()
def captured(name: str, model: Model, shape: tuple[int, ...], device: torch.device) -> Model:
    """Warm a model up with a batch of `shape`, `[B, C, T]`, and capture it as a graph.

    Returns the model itself if it cannot be captured; the log says why. Raises an error for which `is_out_of_memory` is
    true if memory runs out.
    """
    try:
        with _capture_lock:
            fault, graphed = _capture(model, _noise(shape, device))
    except Exception as e:  # the model has run before, so any error is the capture's
        # No error is stored in another variable or as another error's context: it would keep the model's tensors alive.
        if is_out_of_memory(e):
            raise
        # A capture that ran out of memory may raise another error at its end.
        if e.__context__ is not None and is_out_of_memory(e.__context__):
            raise torch.OutOfMemoryError(str(e.__context__)) from None
        fault, graphed = str(e).strip().partition("\n")[0] or type(e).__name__, None
    if graphed is None:
        logger.info("%s: runs without a CUDA graph (%s)", name, fault)
        return model
    logger.info("%s: runs as a CUDA graph, batches of %d", name, shape[0])
    return graphed


def _noise(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Noise that is the same each time and does not touch the user's random generator."""
    numbers = torch.arange(torch.Size(shape).numel(), device=device, dtype=torch.float32)
    return (numbers.mul(12.9898).sin().mul(43758.5453).frac() * 0.1).view(shape)


def _capture(model: Model, example: Tensor) -> tuple[str, Graphed | None]:
    """The graph of a model, or the reason why it has none."""
    shared = _captures(example.device)
    # On the capturing stream, so that the workspace that cuBLAS allocates per stream does not belong to the graph.
    shared.stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(shared.stream), _Watch(decompose=True) as watch:
        expected = model(example)
    torch.cuda.synchronize()
    if watch.waits:
        return f"it waits for the CPU: {', '.join(dict.fromkeys(watch.waits))}", None
    if shared.failed:
        return "an earlier capture failed", None
    torch.cuda.empty_cache()  # frees the warm-up's memory: the graph allocates from a pool of its own
    graphed = Graphed(model, example.clone())
    if _differs(graphed.replay(example), expected):
        return "its replay differs from its own estimates", None
    return "", graphed


def _differs(replayed: Tensor, expected: Tensor) -> bool:
    """Whether two batches of estimates differ by more than rounding; compared chunk by chunk to save memory."""
    # Noise may overflow where music does not, so NaN and Inf count as 0.
    pairs = ((a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)) for a, b in zip(replayed, expected, strict=True))
    apart, whole = zip(*(((a - b).norm(), b.norm()) for a, b in pairs), strict=True)
    return bool(torch.stack(apart).norm() > REPLAY_TOLERANCE * torch.stack(whole).norm())
