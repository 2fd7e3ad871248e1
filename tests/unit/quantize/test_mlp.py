"""Projections in 8 bits of which the second alone hears the first: what is joined, what not, and the bound between."""

from __future__ import annotations

from collections import Counter

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from lhcompile.quantize.fp8 import JoinMlp

WIDTH, HIDDEN = 32, 64
FLOAT = ir.TensorType(ir.DataType.FLOAT)


class Graph:
    """A graph of projections, of one signal x [1, 2, WIDTH]."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)
        self.x = ir.Value(name="x", shape=ir.Shape([1, 2, WIDTH]), type=FLOAT)
        self.graph = ir.Graph([self.x], [], nodes=[], opset_imports={"": 21, "lhcompile": 1}, name="projections")

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        self.graph.register_initializer(value)
        return value

    def weight(self, name: str, width: int, out: int) -> tuple[ir.Value, ir.Value]:
        codes = (100 * self.generator.standard_normal((out, width))).astype(ml_dtypes.float8_e4m3fn)
        scales = (0.01 * self.generator.random(out)).astype(np.float32)
        return self.constant(f"{name}.fp8", codes), self.constant(f"{name}.fp8_scales", scales)

    def bias(self, name: str, out: int) -> ir.Value:
        return self.constant(name, self.generator.standard_normal(out).astype(np.float32))

    def project(
        self, x: ir.Value, weight: tuple[ir.Value, ir.Value], bias: ir.Value | None = None,
        residual: ir.Value | None = None, norm: str = "none", activation: str = "none", kind: str = "LinearFp8",
    ) -> ir.Value:  # fmt: skip
        codes, scales = weight
        scale = None if norm == "none" else self.constant(f"scale.{len(self.graph)}", np.ones(WIDTH, np.float32))
        attributes = {"norm": norm, "activation": activation, "epsilon": 1e-5}
        node = ir.node(kind, [x, codes, bias, residual, scale, None, scales], attributes, domain="lhcompile")
        node.outputs[0].name = f"y.{len(self.graph)}"
        self.graph.append(node)
        return node.outputs[0]

    def joined(self, *outputs: ir.Value) -> list[ir.Node]:
        self.graph.outputs.extend(outputs)
        model = ir.Model(self.graph, ir_version=10)
        changed = JoinMlp()(model).modified
        nodes = list(model.graph)
        assert changed == any(node.op_type == "MlpFp8" for node in nodes)
        return nodes


def test_both_halves_become_one() -> None:
    graph = Graph()
    up, down = graph.weight("up", WIDTH, HIDDEN), graph.weight("down", HIDDEN, WIDTH)
    biases = graph.bias("b1", HIDDEN), graph.bias("b2", WIDTH)
    h = graph.project(graph.x, up, biases[0], norm="layer", activation="gelu_tanh")
    y = graph.project(h, down, biases[1], residual=graph.x)
    (mlp,) = graph.joined(y)
    x, up_weight, up_bias, down_weight, down_bias, residual, scale, shift, up_scale, down_scale, reach = mlp.inputs
    assert (x, residual, shift) == (graph.x, graph.x, None)
    assert (up_weight, up_scale, down_weight, down_scale) == (*up, *down)
    assert (up_bias, down_bias) == biases
    assert scale is not None
    assert mlp.attributes["norm"].as_string() == "layer"
    assert mlp.attributes["activation"].as_string() == "gelu_tanh"
    assert mlp.outputs[0] is graph.graph.outputs[0]
    assert mlp.outputs[0].name == "y.1"
    assert reach is not None
    assert reach.const_value is not None
    codes, scales = (torch.from_numpy(each.const_value.numpy().astype(np.float64)) for each in up if each.const_value)
    slope, least = reach.const_value.numpy()
    assert slope == pytest.approx(1.07 * float((codes * scales[:, None]).norm(dim=1).max()), rel=1e-6)
    assert biases[0].const_value is not None
    assert least == np.abs(biases[0].const_value.numpy()).max()


def test_nothing_exceeds_the_bound() -> None:
    """Signals along each row of the weight, which reach as far as any of their norm, in codes that are multiplied."""
    graph = Graph()
    up = graph.weight("up", WIDTH, HIDDEN)
    (mlp,) = graph.joined(graph.project(graph.project(graph.x, up), graph.weight("down", HIDDEN, WIDTH)))
    assert mlp.inputs[-1] is not None
    assert mlp.inputs[-1].const_value is not None
    slope, least = mlp.inputs[-1].const_value.numpy()
    assert least == 0
    codes, scales = (torch.from_numpy(each.const_value.numpy().astype(np.float64)) for each in up if each.const_value)
    rows = codes * scales[:, None]
    for z in (rows, rows + 0.06 * rows.abs().amax(1, keepdim=True)):
        unit = z.abs().amax(1, keepdim=True) / 448
        heard = (z / unit).to(torch.float8_e4m3fn).double() * unit
        assert ((heard @ rows.T).abs() <= slope * z.norm(dim=1, keepdim=True)).all()


def test_what_others_hear_stays() -> None:
    graph = Graph()
    down = graph.weight("down", HIDDEN, WIDTH)
    h = graph.project(graph.x, graph.weight("up", WIDTH, HIDDEN))
    nodes = graph.joined(graph.project(h, down), graph.project(h, down))
    assert [node.op_type for node in nodes] == ["LinearFp8"] * 3


def test_what_the_graph_gives_stays() -> None:
    graph = Graph()
    h = graph.project(graph.x, graph.weight("up", WIDTH, HIDDEN))
    nodes = graph.joined(graph.project(h, graph.weight("down", HIDDEN, WIDTH)), h)
    assert [node.op_type for node in nodes] == ["LinearFp8"] * 2


@pytest.mark.parametrize(
    ("up", "down"),
    [
        ({"residual": True}, {}),
        ({}, {"norm": "layer"}),
        ({}, {"activation": "gelu"}),
        ({"kind": "Linear"}, {}),
        ({}, {"kind": "LinearInt4"}),
    ],
)
def test_others_stay(up: dict[str, object], down: dict[str, object]) -> None:
    graph = Graph()
    up = {name: graph.x if name == "residual" else value for name, value in up.items()}
    h = graph.project(graph.x, graph.weight("up", WIDTH, WIDTH), **up)  # type: ignore[arg-type]
    y = graph.project(h, graph.weight("down", WIDTH, WIDTH), **down)  # type: ignore[arg-type]
    assert "MlpFp8" not in {node.op_type for node in graph.joined(y)}


def test_of_three_in_a_row_two_are_joined() -> None:
    graph = Graph()
    y = graph.x
    for index in range(3):
        y = graph.project(y, graph.weight(str(index), WIDTH, WIDTH))
    assert [node.op_type for node in graph.joined(y)] == ["MlpFp8", "LinearFp8"]


def test_one_weight_behind_two_biases() -> None:
    """Each MLP has the reach of its own bias."""
    graph = Graph()
    up, down = graph.weight("up", WIDTH, HIDDEN), graph.weight("down", HIDDEN, WIDTH)
    outputs = [graph.project(graph.project(graph.x, up, graph.bias(name, HIDDEN)), down) for name in ("b1", "b2")]
    nodes = graph.joined(*outputs)
    assert Counter(node.op_type for node in nodes) == {"MlpFp8": 2}
    reaches = [node.inputs[-1].const_value.numpy()[1] for node in nodes]  # type: ignore[union-attr]
    assert reaches[0] != reaches[1]
