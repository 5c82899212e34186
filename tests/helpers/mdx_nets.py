"""MDX-Nets with random weights as ONNX files, in the forms that exporters give them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from onnx import TensorProto, helper, numpy_helper

from separation import load_model
from separation.models.mdx_net import MDXNet

AUDIO = {"n_fft": 80, "hop_length": 16}
SMALL: dict[str, Any] = {"bins": 32, "frames": 16, "features": 6, "scales": 2, "layers": 2, "kernel": 3, "narrow": 4}


@dataclass
class MDXNetGraph:
    """Nodes and weights of an MDX-Net. `folded`: norms are part of the convolutions, as most exporters write them."""

    folded: bool = True
    bias: bool = False
    copies: bool = False  # a weight is used through a copy of it
    seed: int = 0
    nodes: list[Any] = field(default_factory=list)
    tensors: list[Any] = field(default_factory=list)
    value: str = "input"

    def __post_init__(self) -> None:
        self._random = np.random.Generator(np.random.PCG64(self.seed))

    def write(self, path: Path, **changes: int) -> Path:
        """Write the whole network."""
        size = SMALL | changes
        features, bins = size["features"], size["bins"]
        self.convolution(4, features, 1)
        self.node("Transpose", perm=[0, 1, 3, 2])
        skips = []
        for scale in range(size["scales"]):
            self.block(features * (scale + 1), bins >> scale, size)
            skips.append(self.value)
            self.convolution(features * (scale + 1), features * (scale + 2), 2, stride=2)
        self.block(features * (size["scales"] + 1), bins >> size["scales"], size)
        for scale in reversed(range(size["scales"])):
            self.convolution(features * (scale + 2), features * (scale + 1), 2, stride=2, op="ConvTranspose")
            self.node("Mul", skips[scale])
            self.block(features * (scale + 1), bins >> scale, size)
        self.node("Transpose", perm=[0, 1, 3, 2])
        self.convolution(features, 4, 1, activated=False)
        self.nodes[-1].output[0] = "output"
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch_size", 4, bins, size["frames"]])
            for name in ("input", "output")
        ]
        graph = helper.make_graph(self.nodes, "net", ends[:1], ends[1:], self.tensors)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7), path)
        return path

    def node(self, op: str, *others: str, **attributes: Any) -> None:
        """An operation on the last result."""
        result = f"value{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [self.value, *others], [result], **attributes))
        self.value = result

    def weight(self, *shape: int, around: float = 0.0) -> str:
        name = f"weight{len(self.tensors)}"
        scale = (1.5 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.2
        values = around + self._random.standard_normal(shape) * scale
        self.tensors.append(
            numpy_helper.from_array(np.abs(values).astype(np.float32) if around else values.astype(np.float32), name)
        )
        if self.copies:
            self.nodes.append(helper.make_node("Identity", [name], [f"copy of {name}"]))
            return f"copy of {name}"
        return name

    def norm(self, size: int) -> None:
        gain, bias, mean, variance = (
            self.weight(size, around=1),
            self.weight(size),
            self.weight(size),
            self.weight(size, around=1),
        )
        self.node("BatchNormalization", gain, bias, mean, variance, epsilon=1e-3)

    def convolution(
        self, size_in: int, size: int, kernel: int, *, stride: int = 1, op: str = "Conv", activated: bool = True
    ) -> None:
        shape = (size_in, size) if op == "ConvTranspose" else (size, size_in)
        padding = kernel // 2 if stride == 1 else 0
        sizes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [padding] * 4}
        self.node(op, self.weight(*shape, kernel, kernel), self.weight(size), **sizes, dilations=[1, 1], group=1)
        if activated:
            if not self.folded:
                self.norm(size)
            self.node("Relu")

    def block(self, features: int, bins: int, size: dict[str, int]) -> None:
        for _ in range(size["layers"]):
            self.convolution(features, features, size["kernel"])
        before = self.value
        for widths in ((bins, bins // size["narrow"]), (bins // size["narrow"], bins)):
            self.node("MatMul", self.weight(*widths))
            if self.bias:
                self.node("Add", self.weight(widths[1]))
            self.norm(features)
            self.node("Relu")
        self.node("Add", before)


def small_mdx_net(folder: Path, *, compensate: float = 1.0, form: dict[str, Any] | None = None, **sizes: int) -> MDXNet:
    """A model from an ONNX file that is in no table, with its YAML beside it."""
    path = MDXNetGraph(**form or {}).write(folder / "small.onnx", **sizes)
    document = {"stems": ["vocals"], "audio": AUDIO, "model": {"compensate": compensate}}
    path.with_suffix(".yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    model = load_model(path)
    assert isinstance(model, MDXNet)
    return model
