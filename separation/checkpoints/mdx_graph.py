"""Finds the layers of an MDX-Net (models/mdx_net.py) in the graph of an ONNX file.

An exporter keeps few of the layers' names, and it folds batch norms into the convolutions before them, or leaves them
in the graph. So the graph is followed node by node. Whatever differs from an MDX-Net is an error: a network that is
only similar would give other stems.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from separation.checkpoints.onnx_file import Graph, Node, Stored, read_graph
from separation.documents import quoted
from separation.errors import CheckpointError

Weights = dict[str, Callable[[], Tensor]]

HOP_LENGTH, SAMPLE_RATE = 1024, 44100  # of all these models; their files state neither


class _OtherNetworkError(Exception):
    """The graph is not an MDX-Net's. The message says where it differs."""


def open_mdx_net(path: Path) -> tuple[Weights, dict[str, Any]]:
    """A function to read each weight, by its name in the model, and the network's sizes as a YAML states them.

    The sizes lack what no graph contains, `n_fft` and the chunk; `dim_t` is the number of frames.

    Raises CheckpointError for another network, DocumentError for a file that cannot be read.
    """
    graph = read_graph(path)
    try:
        found = _Network(graph)
        found.follow()
        return found.weights, found.document()
    except _OtherNetworkError as e:
        raise CheckpointError(
            f"{path} is a network in ONNX form, but not an MDX-Net of Ultimate Vocal Remover ({e}): use the program "
            "that it was made for"
        ) from e


@dataclass
class _Norm:
    """A batch norm: for each feature, a factor and a summand."""

    scale: partial[Tensor]
    shift: partial[Tensor]


@dataclass
class _Block:
    """The weights of a block of convolutions and linear layers, and the name of its result."""

    weights: Weights = field(default_factory=dict)
    value: str = ""


class _Network:
    """A walk along a graph."""

    def __init__(self, graph: Graph) -> None:
        self.weights: Weights = {}
        self._graph = graph
        same = {node.outputs[0]: node.inputs[0] for node in graph.nodes if node.op == "Identity" and node.inputs}
        self._same = {name: _end(same, name) for name in same}
        self._tensors = dict(graph.tensors)
        self._nodes = [node for node in graph.nodes if not self._is_constant(node)]
        self._at = 0  # the next node
        self._value = graph.input  # the result of the node before it
        self._sizes: dict[str, Any] = {}

    def follow(self) -> None:
        """Find all weights. Raises _OtherNetworkError."""
        self._convolution(self.weights, "first_conv", kernel=1, activated=True)
        self._transpose()
        blocks, downs = [self._block()], []
        while self._is_next("Conv", kernel=2):
            downs.append(self._layer("ds", kernel=2))
            blocks.append(self._block())
        names = [*(f"encoding_blocks.{number}" for number in range(len(downs))), "bottleneck_block"]
        for number, down in enumerate(downs):
            self._adopt(f"ds.{number}", down)
        for name, block in zip(names, blocks, strict=True):
            self._adopt(name, block.weights)
        for number in range(len(downs)):
            self._adopt(f"us.{number}", self._layer("us", kernel=2, op="ConvTranspose"))
            self._combine("Mul", blocks[-2 - number].value)
            self._adopt(f"decoding_blocks.{number}", self._block().weights)
        self._transpose()
        self._convolution(self.weights, "final_conv", kernel=1, activated=False)
        if self._at != len(self._nodes) or self._value != self._graph.output:
            raise _OtherNetworkError("it has more layers")
        self._sizes["num_scales"] = len(downs)

    def document(self) -> dict[str, Any]:
        """The network's sizes in the form of a YAML's content."""
        shape = self._graph.input_shape
        if len(shape) != 4 or shape[1] not in (2, 4) or shape[2] <= 0 or shape[3] < 0:
            raise _OtherNetworkError(f"its input has the shape {list(shape)}")
        return {
            "architecture": "mdx_net",
            "audio": {
                "sample_rate": SAMPLE_RATE,
                "hop_length": HOP_LENGTH,
                "dim_f": shape[2],
                "dim_t": shape[3] or 256,
                "num_channels": shape[1] // 2,
            },
            "model": self._sizes,
        }

    def _adopt(self, name: str, weights: Weights) -> None:
        self.weights |= {f"{name}.{key}": value for key, value in weights.items()}

    def _block(self) -> _Block:
        """Convolutions, then two linear layers over the bins of a frame, whose result is added."""
        block, layers = _Block(), 0
        kernel = self._kernel()
        while self._is_next("Conv", kernel=kernel) and self._kernel() != 2:
            self._convolution(block.weights, f"tfc.{layers}", kernel=kernel, activated=True)
            layers += 1
        before = self._value
        widths = [self._linear(block.weights, f"tdf.{number}") for number in range(2)]
        self._combine("Add", before)
        bins, narrow = widths[0]
        if widths[1] != (narrow, bins) or bins % narrow:
            raise _OtherNetworkError("its linear layers do not narrow the bins and widen them again")
        for name, value in {"tfc_layers": layers, "kernel_size": kernel, "bottleneck_factor": bins // narrow}.items():
            if self._sizes.setdefault(name, value) != value:
                raise _OtherNetworkError(f"its blocks differ in {name}")
        block.value = self._value
        return block

    def _layer(self, name: str, *, kernel: int, op: str = "Conv") -> Weights:
        weights: Weights = {}
        self._convolution(weights, "", kernel=kernel, activated=True, op=op)
        return {key.removeprefix("."): value for key, value in weights.items()}

    def _convolution(self, weights: Weights, name: str, *, kernel: int, activated: bool, op: str = "Conv") -> None:
        """A convolution with its batch norm, if that is a node of its own, and its activation."""
        node = self._take(op, 2)
        shape = self._shape(node, 1, 4)
        stride, padding = (2, 0) if kernel == 2 else (1, kernel // 2)
        expected = {"strides": (stride,) * 2, "pads": (padding,) * 4, "dilations": (1, 1), "group": 1}
        others = [key for key, value in expected.items() if node.attributes.get(key, value) != value]
        if shape[2:] != (kernel, kernel) or others or ("strides" not in node.attributes and stride != 1):
            raise _OtherNetworkError(f"node {self._at} is another convolution")
        axis = 1 if op == "ConvTranspose" else 0
        if name == "first_conv":
            self._sizes["num_channels"] = shape[0]
        weight = self._read(node, 1)
        bias = self._read(node, 2) if len(node.inputs) > 2 else partial(torch.zeros, shape[axis])
        if (norm := self._norm()) is not None:
            weight, bias = partial(scaled, weight, norm.scale, axis), partial(moved, bias, norm.scale, norm.shift)
        weights |= {f"{name}.weight": weight, f"{name}.bias": bias}
        if activated:
            self._take("Relu", 1)

    def _linear(self, weights: Weights, name: str) -> tuple[int, int]:
        """A linear layer with its batch norm and activation; returns its numbers of inputs and outputs."""
        node = self._take("MatMul", 2)
        shape = self._shape(node, 1, 2)
        weights[f"{name}.weight"] = partial(_transposed, self._read(node, 1))
        has_bias = self._is_next("Add")
        if has_bias:
            node = self._take("Add", 2, commutes=True)
            weights[f"{name}.bias"] = self._read(node, 1 if self._name(node.inputs[0]) == self._before else 0)
        if self._sizes.setdefault("bias", has_bias) != has_bias:
            raise _OtherNetworkError("only some of its linear layers have a bias")
        if (norm := self._norm()) is None:
            raise _OtherNetworkError(f"node {self._at} is no batch norm")
        weights |= {f"{name}.scale": norm.scale, f"{name}.shift": norm.shift}
        self._take("Relu", 1)
        return shape[0], shape[1]

    def _norm(self) -> _Norm | None:
        if not self._is_next("BatchNormalization"):
            return None
        node = self._take("BatchNormalization", 5)
        gain, bias, mean, variance = (self._read(node, number) for number in range(1, 5))
        epsilon = float(node.attributes.get("epsilon", 1e-5))  # type: ignore[arg-type]  # _take checks for lists
        scale = partial(norm_scale, gain, variance, epsilon)
        return _Norm(scale, partial(norm_shift, bias, mean, scale))

    def _transpose(self) -> None:
        if self._take("Transpose", 1).attributes.get("perm") != (0, 1, 3, 2):
            raise _OtherNetworkError(f"node {self._at} permutes other axes")

    def _combine(self, op: str, other: str) -> None:
        """The sum or the product of the last result and an earlier one."""
        node = self._take(op, 2, commutes=True)
        if {self._name(each) for each in node.inputs} != {self._before, other}:
            raise _OtherNetworkError(f"node {self._at} takes another value")

    # -----------------------------------------------------------------------------------------------------------------
    # Nodes

    def _is_constant(self, node: Node) -> bool:
        """Whether a node is no operation on the spectrogram. Transposed weights are added to the tensors."""
        weight = self._tensors.get(self._name(node.inputs[0])) if node.inputs else None
        if node.op != "Transpose" or weight is None or len(weight.shape) != 2 or weight.read is None:
            return node.op in ("Identity", "Constant")
        self._tensors[node.outputs[0]] = Stored(weight.shape[::-1], partial(_transposed, weight.read))
        return True

    def _is_next(self, op: str, *, kernel: int = 0) -> bool:
        return (
            self._at < len(self._nodes) and self._nodes[self._at].op == op and (not kernel or self._kernel() == kernel)
        )

    def _kernel(self) -> int:
        """The size of the next convolution's kernel; 0 if the next node is none."""
        node = self._nodes[self._at] if self._at < len(self._nodes) else None
        return self._shape(node, 1, 4)[2] if node is not None and node.op in ("Conv", "ConvTranspose") else 0

    def _take(self, op: str, least_inputs: int, *, commutes: bool = False) -> Node:
        """The next node, which must be this operation on the last result."""
        if self._at == len(self._nodes):
            raise _OtherNetworkError("it ends too early")
        node, self._at = self._nodes[self._at], self._at + 1
        given = [self._name(name) for name in node.inputs[: 2 if commutes else 1]]
        if node.op != op or len(node.inputs) < least_inputs or self._value not in given or not node.outputs:
            raise _OtherNetworkError(f"node {self._at} is {quoted(node.op)} instead of {op} on the result before it")
        self._before, self._value = self._value, node.outputs[0]
        return node

    def _name(self, name: str) -> str:
        """A value's name; of copies of a value, that of the value."""
        return self._same.get(name, name)

    def _shape(self, node: Node, number: int, axes: int) -> tuple[int, ...]:
        """The shape of the weights that are a node's input of this number."""
        stored = self._tensors.get(self._name(node.inputs[number])) if number < len(node.inputs) else None
        if stored is None or len(stored.shape) != axes or not prod(stored.shape):
            raise _OtherNetworkError(f"{node.op} has no weights with {axes} axes")
        return stored.shape

    def _read(self, node: Node, number: int) -> Any:
        stored = self._tensors.get(self._name(node.inputs[number]))
        if stored is None or stored.read is None:
            raise _OtherNetworkError(f"{node.op} has no weights")
        return stored.read


def _end(same: dict[str, str], name: str) -> str:
    """The value that a copy of a copy stands for."""
    for _ in range(len(same)):
        if name not in same:
            break
        name = same[name]
    return name


# ---------------------------------------------------------------------------------------------------------------------
# Weights that are computed from the file's


def _transposed(read: Callable[[], Tensor]) -> Tensor:
    return read().T.contiguous()


def norm_scale(read_gain: Callable[[], Tensor], read_variance: Callable[[], Tensor], epsilon: float) -> Tensor:
    return read_gain().double() / (read_variance().double() + epsilon).sqrt()


def norm_shift(read_bias: Callable[[], Tensor], read_mean: Callable[[], Tensor], scale: Callable[[], Tensor]) -> Tensor:
    return read_bias().double() - read_mean().double() * scale()


def scaled(read: Callable[[], Tensor], scale: Callable[[], Tensor], axis: int) -> Tensor:
    """The weights of a convolution, multiplied by the factors of the norm that follows."""
    return read().double() * scale().reshape([-1 if each == axis else 1 for each in range(4)])


def moved(read: Callable[[], Tensor], scale: Callable[[], Tensor], shift: Callable[[], Tensor]) -> Tensor:
    return read().double() * scale() + shift()
