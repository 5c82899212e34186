"""ONNX files are read as the onnx package reads them; damaged ones are errors."""

import random
from pathlib import Path

import numpy as np
import pytest

from separation.checkpoints.onnx_file import read_graph
from separation.checkpoints.state_dict import open_weights
from separation.documents import DocumentError
from separation.errors import CheckpointError

onnx = pytest.importorskip("onnx", reason="needs onnx")

from helpers.mdx_nets import MDXNetGraph  # noqa: E402  # needs onnx


@pytest.mark.parametrize("copies", [False, True])
def test_nodes_and_weights_are_those_of_the_onnx_package(tmp_path: Path, copies: bool) -> None:
    path = MDXNetGraph(copies=copies).write(tmp_path / "x.onnx")
    expected, found = onnx.load(path).graph, read_graph(path)
    assert [(node.op, node.inputs, node.outputs) for node in found.nodes] == [
        (node.op_type, tuple(node.input), tuple(node.output)) for node in expected.node
    ]
    assert found.nodes[0 if not copies else 2].attributes["strides"] == (1, 1)
    assert found.tensors.keys() == {tensor.name for tensor in expected.initializer}
    for tensor in expected.initializer:
        stored = found.tensors[tensor.name]
        assert stored.read is not None and stored.shape == tuple(tensor.dims)
        assert np.array_equal(stored.read().numpy(), onnx.numpy_helper.to_array(tensor))
    assert (found.input, found.output, found.input_shape) == ("input", "output", (0, 4, 32, 16))


def test_weights_as_lists_of_numbers_and_constants_are_read(tmp_path: Path) -> None:
    values = [1.5, -2.0, 0.25]
    listed = onnx.helper.make_tensor("listed", onnx.TensorProto.FLOAT, [3], values)
    constant = onnx.helper.make_node("Constant", [], ["constant"], value=listed)
    sums = [
        onnx.helper.make_node("Add", ["x", name], [result]) for name, result in (("listed", "y"), ("constant", "z"))
    ]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [3]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([constant, *sums], "sums", ends[:1], ends[1:], [listed])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "x.onnx")
    found = read_graph(tmp_path / "x.onnx")
    for name in ("listed", "constant"):
        read = found.tensors[name].read
        assert read is not None and read().tolist() == values


def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = MDXNetGraph().write(tmp_path / "x.onnx")
    content = path.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(
            CheckpointError, match=r"x\.onnx .* damaged, incomplete or not a ONNX|not a network in ONNX"
        ):
            open_weights(path)


@pytest.mark.slow
def test_no_damage_does_anything_but_raise_an_error(tmp_path: Path) -> None:
    """A few hundred files, each with some bytes changed, mostly in the graph; a change may also be harmless."""
    path = MDXNetGraph().write(tmp_path / "x.onnx")
    content, draw = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(min(len(content), 4000))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            open_weights(path)
        except CheckpointError:
            refused += 1
    assert refused > 50


def test_a_tensor_with_other_bytes_than_its_shape_needs_is_an_error(tmp_path: Path) -> None:
    path = MDXNetGraph().write(tmp_path / "x.onnx")
    model = onnx.load(path)
    model.graph.initializer[0].dims[0] = 2**40
    path.write_bytes(model.SerializeToString())
    with pytest.raises(DocumentError, match="which is not its size"):
        read_graph(path)
