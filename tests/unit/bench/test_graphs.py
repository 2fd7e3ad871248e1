"""What a step reads of its graph."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from bench.graphs import initializer_bytes

WEIGHT, SCALE, BIAS = 4 * 6 * 8, 4 * 6, 4 * 4  # bytes of a table, of its scales and of what else a step reads


@pytest.mark.parametrize("operator", ["Gather", "Embedding", "EmbeddingInt4"])
@pytest.mark.parametrize("tied", [False, True])
def test_of_a_table_a_step_reads_an_entry(tmp_path: Path, operator: str, tied: bool) -> None:
    """Unless the head multiplies with it too."""
    inputs = ["table", "ids", "scale"] if operator == "EmbeddingInt4" else ["table", "ids"]
    nodes = [
        helper.make_node(operator, inputs, ["x"], domain="" if operator == "Gather" else "lhcompile"),
        helper.make_node("Add", ["x", "bias"], ["y"]),
        helper.make_node("MatMul", ["y", "table"], ["z"]) if tied else helper.make_node("Relu", ["y"], ["z"]),
    ]
    bytes_of = {"table": WEIGHT, "bias": BIAS} | ({"scale": SCALE} if operator == "EmbeddingInt4" else {})
    shapes = {"table": (6, 8), "scale": (6,), "bias": (4,)}
    tensors = [
        helper.make_tensor(name, TensorProto.FLOAT, shapes[name], bytes(size), raw=True)
        for name, size in bytes_of.items()
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("ids", "z")]
    graph = helper.make_graph(nodes, "step", values[:1], values[1:], tensors)
    onnx.save(helper.make_model(graph), tmp_path / "step.onnx", save_as_external_data=True, size_threshold=0)
    scale = bytes_of.get("scale", 0)
    expected = (BIAS + WEIGHT, scale) if tied else (BIAS, WEIGHT + scale)
    assert initializer_bytes(tmp_path / "step.onnx") == expected
