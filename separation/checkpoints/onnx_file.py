"""Reads the graph and the weights in ONNX files, without the onnx package.

An ONNX file is a protocol buffer, and a graph needs few of its messages. The weights are not read, only found: in place
of each is a function that reads it. No size in the file is believed that the file's own length does not allow.
"""

import mmap
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from separation.checkpoints.torch_file import MOST_AXES, Storage, read_tensor
from separation.documents import DocumentError, quoted

MOST_NODES = 20_000
MOST_VALUES = 64  # of a node's inputs, outputs and attributes, and of a list in an attribute
MOST_NAME_BYTES = 500
DTYPES = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}

Attribute = int | float | tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """An operation: its name in ONNX, the names of its inputs and outputs, and its attributes that are numbers."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Attribute]


@dataclass(frozen=True)
class Stored:
    """A tensor in the file: its shape, and a function that reads it; None for types that no network's weights have."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor] | None


@dataclass(frozen=True)
class Graph:
    """A network with one input and one output. Sizes of the input's axes that are names, not numbers, are 0."""

    nodes: list[Node]  # each after those that it depends on
    tensors: dict[str, Stored]
    input: str
    input_shape: tuple[int, ...]
    output: str


def read_graph(path: Path) -> Graph:
    """The graph in an ONNX file. Raises DocumentError for a file that is damaged or beyond a limit."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        graph = _Message(path, data, 0, len(data)).message(7)
        tensors = dict(_tensor(each) for each in graph.messages(5))
        nodes = [_node(each, tensors) for each in graph.messages(1)]
        inputs = [found for found in map(_value, graph.messages(11)) if found[0] not in tensors]
        outputs = [_value(each) for each in graph.messages(12)]
    if len(inputs) != 1 or len(outputs) != 1:
        raise DocumentError(f"has a network with {len(inputs)} inputs and {len(outputs)} outputs instead of one each")
    return Graph(nodes, tensors, *inputs[0], outputs[0][0])


@dataclass(frozen=True)
class _Message:
    """A message of a protocol buffer: bytes `[start, stop)` of the file."""

    path: Path
    data: mmap.mmap
    start: int
    stop: int

    def fields(self) -> Iterator[tuple[int, "int | _Message"]]:
        """The number and the value of each field; strings and fixed-size numbers are messages of their bytes."""
        position = self.start
        while position < self.stop:
            tag, position = self._varint(position)
            number, kind = tag >> 3, tag & 7
            if kind == 0:
                value, position = self._varint(position)
                yield number, value
                continue
            if kind == 2:
                size, position = self._varint(position)
            elif kind in (1, 5):
                size = 8 if kind == 1 else 4
            else:
                raise DocumentError(f"has a field of the unknown type {kind}")
            if position + size > self.stop:
                raise DocumentError("ends too early")
            yield number, _Message(self.path, self.data, position, position + size)
            position += size

    def messages(self, number: int) -> list["_Message"]:
        """The values of all fields of this number that are not integers."""
        found = [value for each, value in self.fields() if each == number and isinstance(value, _Message)]
        if len(found) > MOST_NODES:
            raise DocumentError(f"has more than {MOST_NODES:,} nodes or tensors")
        return found

    def message(self, number: int) -> "_Message":
        """The only field of this number."""
        found = self.messages(number)
        if len(found) != 1:
            raise DocumentError("is not a network in ONNX form")
        return found[0]

    def integers(self, number: int) -> tuple[int, ...]:
        """The values of a field of integers, each in a field of its own or packed into one."""
        found: list[int] = []
        for each, value in self.fields():
            if each == number:
                found += [value] if isinstance(value, int) else value._packed()
            if len(found) > MOST_VALUES:
                raise DocumentError(f"has a list of more than {MOST_VALUES} values")
        return tuple(found)

    def texts(self, number: int) -> tuple[str, ...]:
        """The values of a field of strings."""
        found = self.messages(number)
        if len(found) > MOST_VALUES or any(each.stop - each.start > MOST_NAME_BYTES for each in found):
            raise DocumentError("has too many or too long names")
        return tuple(self.data[each.start : each.stop].decode("utf-8") for each in found)

    def text(self, number: int) -> str:
        """The value of a string that may be missing."""
        return next(iter(self.texts(number)), "")

    def _packed(self) -> list[int]:
        position = self.start
        found: list[int] = []
        while position < self.stop and len(found) <= MOST_VALUES:
            value, position = self._varint(position)
            found.append(value)
        return found

    def _varint(self, position: int) -> tuple[int, int]:
        """A signed 64-bit integer, and the position after it."""
        value = 0
        for shift in range(0, 70, 7):
            if position >= self.stop:
                raise DocumentError("ends too early")
            byte = self.data[position]
            position += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value - (1 << 64 if value >> 63 else 0), position
        raise DocumentError("has an integer of more than 64 bits")


def _node(message: _Message, tensors: dict[str, Stored]) -> Node:
    """A node. The tensor of a `Constant` is added to `tensors`."""
    attributes: dict[str, Attribute] = {}
    outputs = message.texts(2)
    for attribute in message.messages(5)[:MOST_VALUES]:
        name, kind = attribute.text(1), attribute.integers(20)
        if kind == (2,):
            attributes[name] = next(iter(attribute.integers(3)), 0)
        elif kind == (7,):
            attributes[name] = attribute.integers(8)
        elif kind == (4,) and outputs:
            tensors[outputs[0]] = _tensor(attribute.message(5))[1]
        elif kind == (1,):
            attributes[name] = _float(attribute.message(2))
    return Node(message.text(4), message.texts(1), outputs, attributes)


def _float(message: _Message) -> float:
    value: float = struct.unpack("<f", message.data[message.start : message.stop])[0]
    return value


def _tensor(message: _Message) -> tuple[str, Stored]:
    """A tensor's name, and where it is."""
    name, shape, kind = message.text(8), message.integers(1), message.integers(2)
    if any(value != 0 for value in message.integers(14)):
        raise DocumentError("has its weights in another file")
    if len(shape) > MOST_AXES or any(size < 0 for size in shape):
        raise DocumentError(f"has the tensor {quoted(name)} of an impossible shape")
    dtype = DTYPES.get(kind[0] if kind else 0)
    places = message.messages(9) or (message.messages(4) if dtype == torch.float32 else [])
    if dtype is None or len(places) != 1:
        return name, Stored(shape, None)
    start, stop = places[0].start, places[0].stop
    if stop - start != prod(shape) * dtype.itemsize:
        raise DocumentError(f"has the tensor {quoted(name)} with {stop - start:,} bytes, which is not its size")
    strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
    storage = Storage(dtype, prod(shape), start)
    return name, Stored(shape, partial(read_tensor, message.path, storage, 0, shape, strides))


def _value(message: _Message) -> tuple[str, tuple[int, ...]]:
    """The name and the shape of the network's input or output."""
    shape: list[int] = []
    for types in message.messages(2):  # TypeProto, its tensor type, the shape, its axes
        for tensor in types.messages(1):
            for axes in tensor.messages(2):
                shape += [next(iter(axis.integers(1)), 0) for axis in axes.messages(1)[:MOST_AXES]]
    return message.text(1), tuple(shape)
