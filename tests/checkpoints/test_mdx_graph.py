"""A graph is followed node by node: what is not an MDX-Net is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from separation.checkpoints.mdx_graph import open_mdx_net
from separation.checkpoints.state_dict import open_weights, read_weights
from separation.errors import CheckpointError

onnx = pytest.importorskip("onnx", reason="needs onnx")

from helpers.mdx_nets import MDXNetGraph  # noqa: E402  # needs onnx


def test_the_sizes_are_found(tmp_path: Path) -> None:
    path = MDXNetGraph(bias=True).write(tmp_path / "x.onnx", scales=3, kernel=5, layers=1)
    _, document = open_mdx_net(path)
    assert document["model"] == {
        "num_channels": 6,
        "num_scales": 3,
        "tfc_layers": 1,
        "kernel_size": 5,
        "bottleneck_factor": 4,
        "bias": True,
    }
    assert document["audio"] == {
        "sample_rate": 44100,
        "hop_length": 1024,
        "dim_f": 32,
        "dim_t": 16,
        "num_channels": 2,
    }


def test_a_folded_norm_is_the_norm(tmp_path: Path) -> None:
    path = MDXNetGraph(folded=False).write(tmp_path / "x.onnx")
    weights = read_weights(open_weights(path), {})
    tensors = {
        tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
        for tensor in onnx.load(path).graph.initializer
    }
    weight, bias, *norm = (tensors[f"weight{number}"].double() for number in range(6))
    scale = norm[0] / (norm[3] + 1e-3).sqrt()
    assert torch.allclose(weights["first_conv.weight"], weight * scale[:, None, None, None], rtol=1e-6)
    assert torch.allclose(weights["first_conv.bias"], (bias - norm[2]) * scale + norm[1], rtol=1e-6)


def edit(op: str, change: Callable[[Any], None], which: int = 0) -> Callable[[Any], None]:
    """An edit of one of the graph's nodes with this operation."""
    return lambda graph: change([node for node in graph.node if node.op_type == op][which])


def set_attribute(name: str, *values: int) -> Callable[[Any], None]:
    def change(node: Any) -> None:
        attribute = next(each for each in node.attribute if each.name == name)
        attribute.ints[:] = values

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (edit("Relu", lambda node: setattr(node, "op_type", "Sigmoid")), "'Sigmoid' instead of Relu"),
        (edit("Conv", set_attribute("dilations", 2, 2), 1), "another convolution"),
        (edit("Conv", set_attribute("pads", 0, 0, 0, 0), 1), "another convolution"),
        (edit("ConvTranspose", set_attribute("strides", 1, 1)), "another convolution"),
        (edit("Transpose", set_attribute("perm", 0, 1, 2, 3)), "permutes other axes"),
        (edit("Mul", lambda node: node.input.__setitem__(1, "input")), "takes another value"),
        (edit("Add", lambda node: node.input.__setitem__(1, "input")), "takes another value"),
        (edit("MatMul", lambda node: node.input.__setitem__(1, "none")), "MatMul has no weights with 2 axes"),
        (lambda graph: graph.node.append(onnx.helper.make_node("Relu", ["output"], ["more"])), "it has more layers"),
        (lambda graph: graph.node.pop(), "it ends too early"),
    ],
)
def test_another_network_is_refused(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    path = MDXNetGraph().write(tmp_path / "x.onnx")
    model = onnx.load(path)
    change(model.graph)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=rf"not an MDX-Net of Ultimate Vocal Remover \(.*{message}.*\): use the"):
        open_mdx_net(path)
