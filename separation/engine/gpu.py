"""How models run on a CUDA GPU: all on the device's one compute thread, and as CUDA graphs where that works.

PyTorch keeps cuDNN's plans and cuBLAS' handles a thread: in a new thread for each song they would be made anew.

A CUDA graph is what a model starts on the GPU, recorded once and started again as a whole: the CPU then has next to
nothing to do. It works for batches of one shape, and for a model that waits for nothing on the way.
"""

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from separation.device import is_out_of_memory, settle_numerics
from separation.system.threads import Threads

SAME = 1e-3  # how far a replayed graph may be from the model itself, by norm: sums of atomic additions differ a little
COPIES = ("_to_copy", "copy_", "to")
# Operations whose results the CPU must know before it goes on.
WAITS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "unique_dim")

logger = logging.getLogger("separation")

P = ParamSpec("P")
T = TypeVar("T")

Model = Callable[[Tensor], Tensor]


class ComputeThread:
    """The thread that runs everything on a device, one job after the other, as long as the program lives."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._executor = Threads(1, f"compute on {device}", self._begin)

    def _begin(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def submit(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue a job behind those that were given before."""
        return self._executor.submit(job, *args, **kwargs)

    def run(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do a job and wait for it."""
        return self.submit(job, *args, **kwargs).result()


_threads: dict[torch.device, ComputeThread] = {}
_threads_lock = threading.Lock()


def compute_thread(device: torch.device) -> ComputeThread:
    """The compute thread of a device, which is started when first asked for."""
    if device.type == "cuda":
        settle_numerics()
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    with _threads_lock:
        if device not in _threads:
            _threads[device] = ComputeThread(device)
        return _threads[device]


class _Watch(TorchDispatchMode):
    """Looks at each operation of a model on a GPU: which wait for the CPU, and which tensors it takes from outside."""

    def __init__(self, *, closely: bool) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.taken: dict[int, UntypedStorage] = {}  # of tensors that were there before
        self._made: set[int] = set()
        self._closely = closely  # whether to look into operations that are made of others

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else PyTorch imports its compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._closely and func.namespace == "aten" and func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in given:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._made:
                self.taken[storage._cdata] = storage
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._made |= {tensor.untyped_storage()._cdata for tensor in made} - self.taken.keys()
        name = func._schema.name.partition("::")[2]
        if self._waits(name, given, made):
            self.waits.append(name)
        return result

    @staticmethod
    def _waits(name: str, given: list[Tensor], made: list[Tensor]) -> bool:
        if not any(tensor.is_cuda for tensor in (*given, *made)):
            return False
        masks = name.startswith("index") and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in given[1:])
        # The second is of torch.tensor(…, device="cuda"), which has copied its values by then.
        if name in WAITS or name == "lift_fresh" or masks:
            return True
        # A number on the CPU, which has no dimension, goes along with the kernel; all else is copied.
        return len({tensor.device for tensor in (*given, *made) if tensor.ndim or name in COPIES}) > 1


class _Captures:
    """What the graphs of a device share."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        # Those that are alive. They have one memory: they never run at the same time, and what comes out is copied.
        self.graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self.failed: list[torch.cuda.CUDAGraph] = []  # to which PyTorch's allocators may still refer


_one_at_a_time = threading.Lock()  # by PyTorch's rule, in the whole process


@cache
def _captures(device: torch.device) -> _Captures:
    return _Captures()


class Graphed:
    """A model over batches; those of the example's shape are replayed, others are computed by the model itself."""

    def __init__(self, model: Model, example: Tensor) -> None:
        """Capture the graph. Raises what goes wrong there, of whatever kind."""
        shared = _captures(example.device)
        self.model = model
        self._input = example
        self._graph = torch.cuda.CUDAGraph()
        # A pool lives as long as a graph that has it, which this keeps until the new one has it too.
        neighbour = next(iter(shared.graphs), None)
        pool = neighbour.pool() if neighbour is not None else torch.cuda.graph_pool_handle()
        # What other threads do meanwhile, such as loading a model, does not matter: hence thread_local.
        capture = torch.cuda.graph(self._graph, pool, shared.stream, capture_error_mode="thread_local")
        try:
            # Where the end of a capture fails, `graph` leaves its stream the current one.
            with torch.cuda.stream(shared.stream), capture, _Watch(closely=False) as watch:
                self._output = model(example)
        except BaseException:
            # PyTorch 2.11 does not tell its allocator of a capture whose end failed, and to empty the cache would then
            # be an error. Where it did tell, the first call raises: there is nothing to end.
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(example.device.index, pool)
                torch._C._cuda_releasePool(example.device.index, pool)
                shared.failed.append(self._graph)
            raise
        shared.graphs.add(self._graph)
        self._taken = watch.taken  # windows and tables, which a cache may drop and the graph goes on to read

    def __call__(self, batch: Tensor) -> Tensor:
        if batch.shape != self._input.shape or batch.dtype != self._input.dtype:
            return self.model(batch)
        return self.replay(batch).clone()

    def replay(self, batch: Tensor) -> Tensor:
        """The estimates of a batch of the example's shape; the next replay, of any graph, takes their memory."""
        self._input.copy_(batch)
        self._graph.replay()
        return self._output


@torch.inference_mode()
def captured(name: str, model: Model, shape: tuple[int, ...], device: torch.device) -> Model:
    """Warm the model up with a batch of that shape, and capture it; the model itself where that cannot be.

    For the compute thread of a CUDA device. Raises what `is_out_of_memory` knows.
    """
    try:
        with _one_at_a_time:
            fault, graphed = _capture(model, _noise(shape, device))
    except Exception as e:  # the model is known to run: whatever it is, it is the capture's
        # No error is given another name, or made another's context: it and this frame, or a frame of the other, would
        # keep each other alive, and with them the tensors of the model's frames.
        if is_out_of_memory(e):
            raise
        # The end of a capture that ran out of memory may raise an error of its own.
        if e.__context__ is not None and is_out_of_memory(e.__context__):
            raise torch.OutOfMemoryError(str(e.__context__)) from None
        fault, graphed = str(e).strip().partition("\n")[0] or type(e).__name__, None
    if graphed is None:
        logger.info("%s: runs without a CUDA graph (%s)", name, fault)
        return model
    logger.info("%s: runs as a CUDA graph, batches of %d", name, shape[0])
    return graphed


def _noise(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The same each time, and no user's generator is touched."""
    numbers = torch.arange(torch.Size(shape).numel(), device=device, dtype=torch.float32)
    return (numbers.mul(12.9898).sin().mul(43758.5453).frac() * 0.1).view(shape)


def _capture(model: Model, example: Tensor) -> tuple[str, Graphed | None]:
    """Why a model has no graph, and the graph if it has one."""
    shared = _captures(example.device)
    # On the stream that captures: what cuBLAS allocates for each stream then belongs to no graph.
    shared.stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(shared.stream), _Watch(closely=True) as watch:
        expected = model(example)
    torch.cuda.synchronize()
    if watch.waits:
        return f"it waits for the CPU: {', '.join(dict.fromkeys(watch.waits))}", None
    if shared.failed:
        return "a capture has failed before", None
    torch.cuda.empty_cache()  # what the warm-up took: the graph's memory is a pool of its own
    graphed = Graphed(model, example.clone())
    if _differs(graphed.replay(example), expected):
        return "its replay differs from what it computes itself", None
    return "", graphed


def _differs(replayed: Tensor, expected: Tensor) -> bool:
    """Whether two batches of estimates differ by more than rounding; compared chunk by chunk, for want of memory."""
    # Noise may overflow where music does not.
    pairs = ((a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)) for a, b in zip(replayed, expected, strict=True))
    apart, whole = zip(*(((a - b).norm(), b.norm()) for a, b in pairs), strict=True)
    return bool(torch.stack(apart).norm() > SAME * torch.stack(whole).norm())
