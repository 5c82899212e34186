"""A simulated CUDA GPU: tensors report the device cuda:0 but are computed on the CPU, so GPU code runs without a GPU.

    with simulated_gpu() as gpu, gpu.counted() as counts:
        model(chunks.to("cuda"))
    assert not counts.waits

It is as strict as a GPU. Operations on tensors of two devices fail. An asynchronous copy to page-locked memory arrives
when the host waits for an event, a stream or the device; until then the memory contains NaN. Memory is counted, and
exceeding it raises `torch.OutOfMemoryError`. A CUDA graph computes nothing until it is replayed, and then uses the
current contents of its inputs.

`Counts` records the work of the GPU. Within `shapes_alone()` nothing is computed, so that chunks of any size take
neither time nor memory. Importing this module changes nothing, and leaving the context restores everything.
"""

import contextlib
import functools
import importlib
import inspect
import itertools
import math
import sys
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

DEVICE = torch.device("cuda", 0)
ALIGNED_BYTES = 16  # the alignment of the rows of q, k and v that attention kernels need

# Operations of the namespace aten. In other namespaces every operation is one kernel.
COPIES = {"copy_", "_to_copy"}
WAITING = {"equal", "allclose", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
LAUNCHING_NOTHING = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
LAUNCHING_NOTHING |= {"_unsafe_view", "_reshape_alias", "detach", "alias", "lift", "lift_fresh", "_local_scalar_dense"}
ONLY_WRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_"}  # these do not read the tensor that they change
ATTENTION = {f"_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn")}
# In half precision these accumulate in float32, as on a GPU. CPUs are slow at them or do not support them.
IN_FLOAT32 = {"mm", "addmm", "bmm", "baddbmm", "_addmm_activation", "convolution", "lstm", "gru", "cudnn_batch_norm"}
WHOLE = {"lstm", "gru"}  # not divided into other operations, because cuDNN has kernels for them


@dataclass
class Counts:
    """The work of the GPU. Places are the innermost source lines outside of PyTorch."""

    kernels: int = 0  # operations that launch kernels
    bytes: int = 0  # that they read and write: each argument and result once, views not at all
    names: Counter[str] = field(default_factory=Counter)  # the number of kernels by operation
    waits: list[str] = field(default_factory=list)  # where the host waits for the GPU, and for what
    uploads: list[str] = field(default_factory=list)  # blocking copies, or copies from memory that is not page-locked
    hazards: list[str] = field(default_factory=list)  # operations that real GPUs compute differently from CPUs


class SimulatedTensor(torch.Tensor):
    """A tensor that reports the device cuda:0. `inner` is on the CPU or the meta device."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "SimulatedTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _installed().run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = self.detach().clone()
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if is_parameter else copied
        return memo[id(self)]

    def record_stream(self, stream: "Stream") -> None:
        """Does nothing, because memory is never reused too early."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"SimulatedTensor({self.inner!r})"


class _Mode(TorchDispatchMode):
    """Intercepts operations without tensor arguments too. Each thread has its own mode for its whole lifetime."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the guard against torch.compile takes as long as a small operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _gpus:
            return _installed().run(func, args, kwargs)
        return func(*args, **kwargs)


_gpus: list["SimulatedGPU"] = []  # the one that is installed, if any


def _installed() -> "SimulatedGPU":
    if not _gpus:
        raise RuntimeError("a tensor of a simulated GPU is used after the GPU was removed")
    return _gpus[0]


class Stream:
    """A queue of work. `clock` maps each stream to the piece of its work for which the next piece here must wait."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = DEVICE
        self.clock: dict[Stream, int] = {}

    def wait_event(self, event: "Event") -> None:
        self._follow(event.clock)

    def wait_stream(self, stream: "Stream") -> None:
        self._follow(stream.clock)

    def _follow(self, clock: dict["Stream", int]) -> None:
        self.clock |= {stream: max(number, self.clock.get(stream, 0)) for stream, number in clock.items()}

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        _installed().arrive(self.clock)
        return True

    def synchronize(self) -> None:
        _installed().wait("Stream.synchronize", self.clock)


class Event:
    """A position in a stream's work."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.clock: dict[Stream, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict((stream or _installed().stream).clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or _installed().stream).wait_event(self)

    def query(self) -> bool:
        _installed().arrive(self.clock)
        return True

    def synchronize(self) -> None:
        _installed().wait("Event.synchronize", self.clock)

    def elapsed_time(self, end: "Event") -> float:
        return 1.0


class Graph:
    """A CUDA graph. Each replay repeats the captured work on the captured memory."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._work: list[tuple[Callable[[], Any], Callable[[Any], Any], Any]] = []  # see `add`
        self._touched: list[Tensor] = []

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        _installed().capture = self

    def capture_end(self) -> None:
        gpu = _installed()
        gpu.capture = None
        for _, _, results in self._work:
            for result in _tensors(results):
                _poison(result)

    def add(self, compute: Callable[[], Any], new: Callable[[Any], Any], results: Any, touched: list[Tensor]) -> None:
        """Add a piece of work.

        `compute` does it, `new` selects its new results, `results` are those of the capture, and `touched` are all
        tensors that it reads and writes.
        """
        self._work.append((compute, new, results))
        self._touched += touched

    def replay(self) -> None:
        _installed().order(self._touched, self._touched)
        with torch.inference_mode():
            for compute, new, results in self._work:
                for old, result in zip(_tensors(results), _tensors(new(compute())), strict=True):
                    old.copy_(result)

    def reset(self) -> None:
        self._work.clear()
        self._touched.clear()

    def pool(self) -> tuple[int, int]:
        return (0, 0)


@contextlib.contextmanager
def _capturing(
    graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
) -> Iterator[None]:
    """torch.cuda.graph."""
    with _on_stream(stream or Stream()):
        graph.capture_begin(pool, capture_error_mode)
        try:
            yield
        finally:
            graph.capture_end()


@contextlib.contextmanager
def _on_stream(stream: Stream | None) -> Iterator[None]:
    """torch.cuda.stream."""
    gpu = _installed()
    before = gpu.stream
    gpu.stream = stream or before
    try:
        yield
    finally:
        gpu.stream = before


def _poison(tensor: Tensor) -> None:
    """Fill a tensor with values that cannot be mistaken for a result."""
    if not tensor.is_meta:
        floating = tensor.dtype.is_floating_point or tensor.dtype.is_complex
        with torch.inference_mode():
            tensor.fill_(math.nan if floating else True if tensor.dtype == torch.bool else 85)


class SimulatedGPU:
    """The GPU's memory, its pending work, and the counters."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability
        self.total_bytes = 80 * 2**30
        self.memory_fraction = 1.0  # the share of the total that this process may use
        self.out_of_memory: Exception = torch.OutOfMemoryError("CUDA out of memory.")  # raised if memory runs out
        self.races: list[str] = []  # uses of memory with which another stream or the host has not finished
        self.peak_bytes = 0
        self._shapes_alone = False
        self._allocated = 0
        self._freed: deque[int] = deque()  # appended to by finalizers, which may run in any thread
        self._storages: set[int] = set()
        self._pinned: dict[int, Tensor] = {}  # page-locked memory by address; kept, so that no address is reused
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._pending: list[tuple[Stream, int, Callable[[], object]]] = []  # copies that have not arrived
        self._writers: dict[
            int, tuple[Stream, int]
        ] = {}  # by storage: the last stream that wrote, and its work's number
        self._latest: dict[Stream, int] = {}  # the number of the last piece of each stream's work
        self._seen: dict[Stream, int] = {}  # the last piece for which the host has waited
        self._default_stream = Stream()
        self._own = threading.local()  # a thread's current stream and the graph that it is capturing
        self._counters: list[Counts] = []

    @contextlib.contextmanager
    def counted(self) -> Iterator[Counts]:
        """Count the work of all threads on the GPU within the context."""
        counts = Counts()
        self._counters.append(counts)
        try:
            yield counts
        finally:
            self._counters.remove(counts)

    @contextlib.contextmanager
    def shapes_alone(self) -> Iterator[None]:
        """Within the context, results have shapes but no values; reading a value returns one that passes checks."""
        self._shapes_alone = True
        try:
            yield
        finally:
            self._shapes_alone = False

    # Memory

    @property
    def allocated_bytes(self) -> int:
        with self._lock:
            while self._freed:
                storage, n_bytes = self._freed.popleft(), self._freed.popleft()
                self._storages.discard(storage)
                self._writers.pop(storage, None)
                self._allocated -= n_bytes
            return self._allocated

    def _allocate(self, inner: Tensor) -> None:
        """Count the memory of a tensor, unless it is a view of one that is counted."""
        storage = inner.untyped_storage()
        key, n_bytes = storage._cdata, storage.nbytes()
        with self._lock:
            allocated = self.allocated_bytes
            if key in self._storages:
                return
            if allocated + n_bytes > self.memory_fraction * self.total_bytes:
                raise type(self.out_of_memory)(*self.out_of_memory.args)
            self._storages.add(key)
            self._allocated += n_bytes
            self.peak_bytes = max(self.peak_bytes, self._allocated)
        weakref.finalize(storage, self._freed.extend, (key, n_bytes)).atexit = False

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    # Pending work

    @property
    def stream(self) -> Stream:
        """The current thread's stream."""
        return getattr(self._own, "stream", self._default_stream)

    @stream.setter
    def stream(self, stream: Stream) -> None:
        self._own.stream = stream

    @property
    def capture(self) -> Graph | None:
        """The graph that the current thread is capturing."""
        return getattr(self._own, "capture", None)

    @capture.setter
    def capture(self, graph: Graph | None) -> None:
        self._own.capture = graph

    def order(self, read: Iterable[Tensor], written: Iterable[Tensor]) -> None:
        """Queue a piece of work in the current stream. Records a race if the tensors it reads are not ready."""
        if self.capture is not None or self._shapes_alone:
            return
        stream = self.stream
        with self._lock:
            for tensor in read:
                writer, number = self._writers.get(tensor.untyped_storage()._cdata, (stream, 0))
                if writer is not stream and number > max(stream.clock.get(writer, 0), self._seen.get(writer, 0)):
                    self.races.append(f"a tensor of another stream is used without waiting for it, at {_place()}")
            stream.clock[stream] = self._latest[stream] = number = next(self._numbers)
            self._writers |= {tensor.untyped_storage()._cdata: (stream, number) for tensor in written}

    def _later(self, finish: Callable[[], object]) -> None:
        """Finish the current stream's last piece of work only when the host waits for it."""
        with self._lock:
            self._pending.append((self.stream, self._latest.get(self.stream, 0), finish))

    def arrive(self, clock: dict[Stream, int]) -> None:
        """Finish the pending work up to `clock`: the host knows that it is done."""
        with self._lock, torch.inference_mode():
            self._seen |= {stream: max(number, self._seen.get(stream, 0)) for stream, number in clock.items()}
            due = [work for work in self._pending if work[1] <= clock.get(work[0], 0)]
            self._pending = [work for work in self._pending if work not in due]
            for _, _, finish in due:
                finish()

    def wait(self, what: str, clock: dict[Stream, int] | None = None) -> None:
        """Count a wait of the host, and finish the work up to `clock`, by default that of the current stream."""
        if self.capture is not None:
            raise _not_while_capturing(what)
        self._note("waits", what)
        self.arrive(self.stream.clock if clock is None else clock)

    def synchronize(self, device: Any = None) -> None:
        self.wait("torch.cuda.synchronize", dict(self._latest))

    def finish(self) -> None:
        """Finish all copies without counting a wait."""
        self.arrive(dict(self._latest))

    def _note(self, counter: str, what: str) -> None:
        for counts in self._counters:
            getattr(counts, counter).append(f"{what} at {_place()}")

    # Operations

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves = [*_tensors((*args, *kwargs.values()))]
        ours = [leaf for leaf in leaves if isinstance(leaf, SimulatedTensor)]
        device = kwargs.get("device", next((each for each in args if isinstance(each, torch.device)), None))
        to_gpu = bool(ours) if device is None else torch.device(device).type == "cuda"
        name = func._schema.name.removeprefix("aten::")
        if not ours and not to_gpu:
            return self._on_cpu(func, name, args, kwargs)
        if name not in WHOLE and _is_composite(func):
            with _Mode():  # intercepts the tensors that it creates
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        if name in COPIES and (len(ours) < len(leaves) or not to_gpu):
            return self._transfer(func, name, args, kwargs)
        if ours:
            self._check_devices(func, name, leaves)
        self._check_waits(name, args)
        self._check_hazards(name, args)
        return self._compute(func, name, args, kwargs)

    def _on_cpu(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "is_pinned":
            return self._is_pinned(args[0])
        if name in ("pin_memory", "_pin_memory"):
            return args[0] if self._is_pinned(args[0]) else self._pin(args[0].clone())
        if kwargs.get("pin_memory"):
            return self._pin(func(*args, **kwargs | {"pin_memory": False}))
        return func(*args, **kwargs)

    def _transfer(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A copy between the host and the GPU."""
        source = args[1] if name == "copy_" else args[0]
        non_blocking = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
        what = f"copy of {list(source.shape)}"
        if isinstance(source, SimulatedTensor):
            self.order([source.inner], [])
            target = args[0] if name == "copy_" else None
            if target is None:
                inner = torch.zeros(source.shape, dtype=source.dtype) if self._shapes_alone else source.inner
                target = func(inner, **kwargs).clone()
                if non_blocking:
                    self._pin(target)
            arrived = torch.zeros_like(target) if self._shapes_alone else source.inner.to(target.dtype, copy=True)
            if non_blocking and self._is_pinned(target):
                if self.capture is not None:
                    raise RuntimeError("a simulated CUDA graph supports no copies to the host")
                _poison(target)
                self._later(functools.partial(target.copy_, arrived))
            else:
                self.wait(f"{what} to the host")
                target.copy_(arrived)
            return target
        result = self._execute(func, args, kwargs)
        self.order([], [result.inner])
        if non_blocking and self._is_pinned(source):
            self._later(functools.partial(self._check_unchanged, source, source.clone(), _place()))
        elif self.capture is not None:
            raise _not_while_capturing("a copy from memory that is not page-locked")
        else:
            self._note("uploads", f"{what} from the host")
            self.arrive(self.stream.clock)
        return result

    def _check_unchanged(self, source: Tensor, as_queued: Tensor, place: str) -> None:
        if not torch.equal(source.contiguous().view(torch.uint8), as_queued.contiguous().view(torch.uint8)):
            self.races.append(f"page-locked memory was written while the GPU copied it, as requested at {place}")

    def _check_devices(self, func: Any, name: str, leaves: list[Tensor]) -> None:
        others = [leaf for leaf in leaves if not isinstance(leaf, SimulatedTensor) and leaf.dim() > 0]
        if others and name in INDEXING:  # a GPU accepts indices on the host and copies them
            self._note("uploads", f"indices {list(others[0].shape)} from the host")
        elif others:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{DEVICE} and {others[0].device}! ({func.name()} at {_place()})"
            )

    def _check_waits(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "_local_scalar_dense":
            self.wait("item")
        elif name in WAITING or (name == "repeat_interleave" and isinstance(args[0], Tensor)):
            self.wait(name)
        elif name in INDEXING:
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            if masks and not (len(args) > 2 and args[2].numel() == 1):  # filling in a single value needs no wait
                self.wait("boolean mask")

    def _check_hazards(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "_fft_c2r" and not self._shapes_alone:
            spectrum, (*_, dim), _, length = args
            ends = spectrum.inner.select(dim, 0).imag, spectrum.inner.select(dim, -1).imag
            if bool(ends[0].any()) or (length % 2 == 0 and bool(ends[1].any())):
                self._note("hazards", "irfft of imaginary parts at 0 Hz or the Nyquist frequency")
        if name in ATTENTION:
            for tensor in args[:3]:
                sizes = [tensor.storage_offset(), *tensor.stride()[:-1]]
                if tensor.stride(-1) != 1 or any(n * tensor.element_size() % ALIGNED_BYTES for n in sizes):
                    self._note("hazards", "attention over rows that do not begin at multiples of 16 bytes")

    def _compute(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.Tag.inplace_view in func.tags:
            args[0].inner = func(args[0].inner.detach(), *args[1:], **kwargs)
            return return_and_correct_aliasing(func, args, kwargs, args[0])
        result = self._execute(func, args, kwargs)
        if _launches(func, name, result):
            self.order(_inners((*args, *kwargs.values())), _inners((*_written(func, args, kwargs).values(), result)))
            n_bytes = _traffic_bytes(func, name, args, kwargs, result)
            with self._lock:
                for counts in self._counters:
                    counts.kernels += 1
                    counts.bytes += n_bytes
                    counts.names[name] += 1
        return result

    def _execute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute on the inner tensors and return the results as the GPU's tensors."""
        inner_args = tuple(_mapped(self._inner, value) for value in args)
        inner_kwargs = {key: _mapped(self._inner, value) for key, value in kwargs.items()}
        if inner_kwargs.get("device") is not None:
            inner_kwargs["device"] = torch.device("meta" if self._shapes_alone else "cpu")
        compute = functools.partial(self._kernel(func), *inner_args, **inner_kwargs)
        result = compute()
        aliased = _returns_views(func)
        if self.capture is not None and not aliased:
            touched = [*_tensors((*inner_args, *inner_kwargs.values(), result))]
            self.capture.add(compute, functools.partial(_new, func), _new(func, result), touched)
        # Even in inference mode, a view of a tensor that was made outside of it is not an inference tensor.
        inference = torch.is_inference_mode_enabled() and not (aliased and not args[0].is_inference())
        with torch.inference_mode(inference):
            return self._returned(func, args, kwargs, result)

    def _returned(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """The results as the GPU's tensors. A result that is a changed argument is that argument itself."""
        changed = _written(func, args, kwargs)
        if not changed:
            return _mapped(self._wrap, result)
        results = [
            changed[alias] if (alias := _changed_alias(output)) else _mapped(self._wrap, value)
            for output, value in zip(func._schema.returns, _listed(func, result), strict=True)
        ]
        return tuple(results) if len(results) > 1 else results[0] if results else None

    def _inner(self, tensor: Tensor) -> Tensor:
        inner = tensor.inner if isinstance(tensor, SimulatedTensor) else tensor
        return inner.to("meta") if self._shapes_alone else inner

    def _wrap(self, inner: Tensor) -> SimulatedTensor:
        self._allocate(inner)
        return SimulatedTensor(inner)

    def _kernel(self, func: Any) -> Callable[..., Any]:
        """The function that computes an operation on the CPU or, without values, on shapes."""
        name = func._schema.name.removeprefix("aten::")
        if name in ATTENTION:
            return functools.partial(_attention, n_results=len(func._schema.returns))
        if name == "_fused_sdp_choice":
            return _attention_choice
        if name == "_softmax":
            return _softmax
        if name == "lstm" and self._shapes_alone:
            return _lstm_shapes
        if name == "convolution" and self._shapes_alone:
            return functools.partial(_convolution_shapes, func)
        if self._shapes_alone and name == "_local_scalar_dense":
            return lambda tensor: True  # passes checks
        if self._shapes_alone and name == "equal":
            return lambda first, second: False
        if self._shapes_alone and func.namespace != "aten" and not _has_kernel(func, "Meta"):
            cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
            return functools.partial(func.redispatch, cpu)  # the operation's reference
        plain = _batch_norm if name == "cudnn_batch_norm" else func
        return functools.partial(_in_float32, plain) if name in IN_FLOAT32 and not _changes(func) else plain


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments or results, also within lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _inners(values: Iterable[Any]) -> Iterator[Tensor]:
    return (tensor.inner for tensor in _tensors(values) if isinstance(tensor, SimulatedTensor))


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """An argument or a result, with the function applied to it if it is a tensor, or to the tensors in it."""
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(_mapped(function, each) for each in value) if isinstance(value, list | tuple) else value


def _place() -> str:
    """The innermost source line outside of PyTorch and this file."""
    frame = inspect.currentframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path != Path(__file__) and "torch" not in path.parts and path.is_file():
            return f"{path.parent.name}/{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def _not_while_capturing(what: str) -> RuntimeError:
    return RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what} at {_place()})")


@functools.cache
def _has_kernel(func: Any, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def _is_composite(func: Any) -> bool:
    """Whether the operation is composed of others on every device, so that a GPU only runs those."""
    return func.namespace == "aten" and _has_kernel(func, "CompositeImplicitAutograd")


@functools.cache
def _returns_views(func: Any) -> bool:
    return any(output.alias_info is not None and not output.alias_info.is_write for output in func._schema.returns)


def _changed_alias(value: Any) -> str | None:
    """The letter in an operation's schema for an argument that it changes, or for a result that is such an argument."""
    info = value.alias_info
    return next(iter(info.before_set)) if info is not None and info.is_write else None


@functools.cache
def _changes(func: Any) -> dict[str, str]:
    """The arguments that the operation changes, each mapped to its letter."""
    return {argument.name: alias for argument in func._schema.arguments if (alias := _changed_alias(argument))}


def _named(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the operation changes, by letter."""
    changes = _changes(func)
    given = _named(func, args, kwargs) if changes else {}
    return {alias: given[name] for name, alias in changes.items() if name in given}


def _listed(func: Any, result: Any) -> tuple[Any, ...]:
    """The operation's results, one value for each return of its schema."""
    n_results = len(func._schema.returns)
    return tuple(result) if n_results > 1 else (result,) if n_results else ()


def _new(func: Any, result: Any) -> list[Any]:
    """The results that are neither views nor arguments."""
    pairs = zip(func._schema.returns, _listed(func, result), strict=True)
    return [value for output, value in pairs if output.alias_info is None]


def _launches(func: Any, name: str, result: Any) -> bool:
    if name in LAUNCHING_NOTHING or _returns_views(func):
        return False
    return bool(_changes(func)) or any(tensor.numel() for tensor in _tensors((result,)))


def _traffic_bytes(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """The bytes of all arguments that are read, and of all arguments and new results that are written."""
    changes = _changes(func)
    total = _size_bytes(_new(func, result))
    for argument, value in _named(func, args, kwargs).items():
        is_read = argument not in changes or not (name in ONLY_WRITING or argument.startswith("out"))
        total += _size_bytes((value,)) * (is_read + (argument in changes))
    return total


def _size_bytes(values: Iterable[Any]) -> int:
    """The size of tensors. Values that are repeated along a dimension count once."""
    return sum(
        tensor.element_size() * math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        for tensor in _tensors(values)
        if tensor.numel()
    )


_PLAIN_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def _attention(q: Tensor, k: Tensor, v: Tensor, *options: Any, n_results: int, **named: Any) -> tuple[Any, ...]:
    """A GPU's fused kernels, whose result is contiguous by token."""
    rows = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    if not q.is_meta:
        rows.copy_(_PLAIN_ATTENTION(q, k, v, scale=named.get("scale")))
    if n_results == 4:
        return (rows, None, None, None)
    return (rows, None, None, None, q.shape[2], k.shape[2], None, None, None)


def _attention_choice(q: Tensor, *options: Any, **named: Any) -> int:
    return int((SDPBackend.FLASH_ATTENTION if q.itemsize == 2 else SDPBackend.EFFICIENT_ATTENTION).value)


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return torch.ops.aten._softmax(x.float() if half_to_float else x, dim, False)


def _in_float32(compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Compute in float32 and return results of the first argument's type."""
    dtype = next(_tensors(args)).dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return compute(*args, **kwargs)
    results = compute(*(_mapped(Tensor.float, value) for value in args), **kwargs)
    return _mapped(lambda result: result.to(dtype), results)


def _batch_norm(x: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return (*torch.ops.aten.native_batch_norm(x, *options), x.new_empty(0, dtype=torch.uint8))


def _lstm_shapes(x: Tensor, states: list[Tensor], weights: list[Tensor], *options: Any) -> tuple[Tensor, ...]:
    *_, bidirectional, _ = options
    features = weights[0].shape[0] // 4 * (2 if bidirectional else 1)
    return x.new_empty(*x.shape[:-1], features), torch.empty_like(states[0]), torch.empty_like(states[1])


def _convolution_shapes(convolve: Callable[..., Tensor], x: Tensor, weight: Tensor, *options: Any) -> Tensor:
    """Like cuDNN, return channels last if the input or the weight has channels last."""
    y = convolve(x, weight, *options)
    last = torch.channels_last
    are_last = (t.ndim == 4 and t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (x, weight))
    return y.contiguous(memory_format=last) if any(are_last) else y


def _attend(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """F.scaled_dot_product_attention, which would ask the GPU's driver which kernel to use."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *options: Any, **named: Any) -> Tensor:
        if not isinstance(q, SimulatedTensor):
            return plain(q, k, v, *options, **named)
        if options or named.keys() - {"scale"}:
            raise RuntimeError("a simulated GPU supports no attention with a mask, dropout or grouped heads")
        if q.itemsize == 2:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, **named)[0]
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, False, **named)[0]

    return attend


def _starting(start: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    """threading.Thread.start for threads that see the simulated GPU too."""

    def start_within(thread: threading.Thread) -> None:
        run = thread.run

        def run_within() -> None:
            with _Mode():
                run()

        thread.run = run_within  # type: ignore[method-assign]
        start(thread)

    return start_within


def _forget_by_device() -> None:
    """Clear the caches of this project's functions that depend on a device."""
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "separation"]:
        for value in vars(module).values():
            if isinstance(value, functools._lru_cache_wrapper) and any(
                parameter.annotation in (torch.device, "torch.device")
                for parameter in inspect.signature(value.__wrapped__).parameters.values()
            ):
                value.cache_clear()


def _cuda_functions(gpu: SimulatedGPU) -> dict[str, Any]:
    """The replacements of torch.cuda's functions and classes."""

    def properties(device: Any = None) -> SimpleNamespace:
        major, minor = gpu.capability
        return SimpleNamespace(
            name="simulated GPU",
            major=major,
            minor=minor,
            total_memory=gpu.total_bytes,
            multi_processor_count=132,
            warp_size=32,
            L2_cache_size=50 * 2**20,
        )

    def reset_peak(device: Any = None) -> None:
        gpu.peak_bytes = gpu.allocated_bytes

    def memory_stats(device: Any = None) -> dict[str, int]:
        return {"allocated_bytes.all.current": gpu.allocated_bytes, "allocated_bytes.all.peak": gpu.peak_bytes}

    def empty_cache() -> None:
        if gpu.capture is not None:
            raise _not_while_capturing("torch.cuda.empty_cache")

    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": gpu.capability[0] >= 8,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": gpu.capability,
        "get_device_name": "simulated GPU",
        "graph_pool_handle": (0, 0),
        "get_sync_debug_mode": 0,
    }
    doing_nothing = ("_lazy_init", "set_device", "ipc_collect", "manual_seed", "manual_seed_all", "set_sync_debug_mode")
    return (
        {name: lambda *arguments, answer=answer, **options: answer for name, answer in answers.items()}
        | {name: lambda *arguments, **options: None for name in doing_nothing}
        | {
            "empty_cache": empty_cache,
            "get_device_properties": properties,
            "mem_get_info": lambda device=None: (gpu.total_bytes - gpu.allocated_bytes, gpu.total_bytes),
            "memory_allocated": lambda device=None: gpu.allocated_bytes,
            "memory_reserved": lambda device=None: gpu.allocated_bytes,
            "max_memory_allocated": lambda device=None: gpu.peak_bytes,
            "max_memory_reserved": lambda device=None: gpu.peak_bytes,
            "memory_stats": memory_stats,
            "get_per_process_memory_fraction": lambda device=None: gpu.memory_fraction,
            "set_per_process_memory_fraction": lambda fraction, device=None: setattr(gpu, "memory_fraction", fraction),
            "reset_peak_memory_stats": reset_peak,
            "synchronize": gpu.synchronize,
            "device": contextlib.nullcontext,
            "Stream": Stream,
            "Event": Event,
            "stream": _on_stream,
            "current_stream": lambda device=None: gpu.stream,
            "default_stream": lambda device=None: gpu._default_stream,
            "set_stream": lambda stream: setattr(gpu, "stream", stream),
            "CUDAGraph": Graph,
            "graph": _capturing,
            "is_current_stream_capturing": lambda: gpu.capture is not None,
        }
    )


@contextlib.contextmanager
def simulated_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[SimulatedGPU]:
    """Within the context, there is a CUDA GPU for this thread and for threads that it starts."""
    assert not _gpus, "one simulated GPU at a time"
    importlib.import_module(
        "torch._dynamo"
    )  # on import it lists PyTorch's functions, which must not be the replaced ones
    gpu = SimulatedGPU(capability)
    torch._C._ensureCUDADeviceGuardSet()
    lifted = torch._C._only_lift_cpu_tensors()
    overwritten = torch.__future__.get_overwrite_module_params_on_conversion()
    _forget_by_device()
    with pytest.MonkeyPatch.context() as patch:
        for name, function in _cuda_functions(gpu).items():
            patch.setattr(torch.cuda, name, function)
        # Otherwise PyTorch would rearrange an LSTM's weights for cuDNN.
        patch.setattr(torch.backends.cudnn, "is_acceptable", lambda tensor: False)
        patch.setattr(F, "scaled_dot_product_attention", _attend(F.scaled_dot_product_attention))
        patch.setattr(threading.Thread, "start", _starting(threading.Thread.start))
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # the GPU's tensors have another class
        torch._C._set_only_lift_cpu_tensors(True)  # makes torch.tensor(values, device="cuda") a copy from the CPU
        _gpus.append(gpu)
        try:
            with _Mode():
                yield gpu
            gpu.finish()
        finally:
            _gpus.clear()
            torch._C._set_only_lift_cpu_tensors(lifted)
            torch.__future__.set_overwrite_module_params_on_conversion(overwritten)
            _forget_by_device()
