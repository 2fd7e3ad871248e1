"""Which ONNX form of the short convolution and of the modal step is fastest on this CPU?

    python -m bench.cpu_lowerings [--out FILE.json]

Each form is chained LAYERS times in one graph, one token a call, states bound in place. Figures are medians in
microseconds a layer; the floor is the bytes of state and weights over the measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from bench.machine import copy_bandwidth, describe

LAYERS, CALLS = 8, 400
MICROSOFT = "com.microsoft"
Nodes = list[onnx.NodeProto]
rng = np.random.default_rng(0)


class Graph:
    """Nodes and constants of one chained graph."""

    def __init__(self) -> None:
        self.nodes: Nodes = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, value: np.ndarray[Any, Any], name: str) -> str:
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def add(self, op: str, inputs: list[str], output: str | list[str], **attributes: Any) -> str:
        outputs = [output] if isinstance(output, str) else output
        self.nodes.append(helper.make_node(op, inputs, outputs, **attributes))
        return outputs[0]


def random(*shape: int) -> np.ndarray[Any, Any]:
    return rng.standard_normal(shape, dtype=np.float32)


def fir_product(g: Graph, u: str, state: str, new: str, i: int, channels: int, taps: int) -> str:
    window = g.add("Concat", [state, u], f"w{i}", axis=-1)
    g.add("Slice", [window, *_slice(g, i)], new)
    y = g.add("Mul", [window, g.constant(random(channels, taps), f"h{i}")], f"m{i}")
    axis = g.constant(np.array([-1]), f"axis{i}")
    y = g.add("ReduceSum", [y, axis], f"s{i}", keepdims=1)
    return g.add("Add", [y, g.constant(random(channels, 1), f"b{i}")], f"y{i}")


def fir_conv(g: Graph, u: str, state: str, new: str, i: int, channels: int, taps: int) -> str:
    window = g.add("Concat", [state, u], f"w{i}", axis=-1)
    g.add("Slice", [window, *_slice(g, i)], new)
    weight, bias = g.constant(random(channels, 1, taps), f"h{i}"), g.constant(random(channels), f"b{i}")
    return g.add("Conv", [window, weight, bias], f"y{i}", group=channels)


def fir_fused(g: Graph, u: str, state: str, new: str, i: int, channels: int, taps: int) -> str:
    weight, bias = g.constant(random(channels, 1, taps), f"h{i}"), g.constant(random(channels), f"b{i}")
    return g.add("CausalConvWithState", [u, weight, bias, state], [f"y{i}", new], domain=MICROSOFT)


def modal_plain(g: Graph, u: str, state: str, new: str, i: int, channels: int, slots: int) -> str:
    """The step of lhcompile.lower.portable."""
    table = lambda name: g.constant(0.5 * random(channels, 2, slots), f"{name}{i}")  # noqa: E731
    last, both = g.constant(np.array([-1]), f"last{i}"), g.constant(np.array([-2, -1]), f"both{i}")
    u4 = g.add("Unsqueeze", [u, last], f"u{i}")
    g.add("Split", [state], [f"s0{i}", f"s1{i}"], axis=-2, num_outputs=2)
    s = g.add("Add", [g.add("Mul", [f"s0{i}", table("c0")], f"a{i}"), g.add("Mul", [f"s1{i}", table("c1")], f"b{i}")], f"c{i}")
    s = g.add("Add", [s, u4], new)
    y = g.add("ReduceSum", [g.add("Mul", [s, table("r")], f"d{i}"), both], f"e{i}", keepdims=1)
    direct = g.add("Mul", [u4, g.constant(random(channels, 1, 1), f"D{i}")], f"f{i}")
    return g.add("Squeeze", [g.add("Add", [y, direct], f"g{i}"), last], f"y{i}")


def modal_attention(g: Graph, u: str, state: str, new: str, i: int, channels: int, slots: int) -> str:
    """com.microsoft LinearAttention alone: the turn of the outgoing state that a full step needs is left out."""
    packed = lambda name, value: g.constant(value, f"{name}{i}")  # noqa: E731
    width = channels * 2 * slots
    value = g.add("Reshape", [u, g.constant(np.array([0, 1, channels]), f"flat{i}")], f"v{i}")
    decay = packed("decay", -rng.random((1, 1, width), dtype=np.float32))
    inputs = [packed("q", random(1, 1, width)), packed("k", random(1, 1, width)), value, state, decay]
    attributes = {"q_num_heads": channels, "kv_num_heads": channels, "update_rule": "gated", "scale": 1.0}
    y = g.add("LinearAttention", inputs, [f"o{i}", new], domain=MICROSOFT, **attributes)
    return g.add("Reshape", [y, g.constant(np.array([0, channels, 1]), f"back{i}")], f"y{i}")


def _slice(g: Graph, i: int) -> list[str]:
    values = {"from": 1, "to": 2**63 - 1, "on": -1}
    return [g.constant(np.array([value]), f"{name}{i}") for name, value in values.items()]


Form = Callable[[Graph, str, str, str, int, int, int], str]


def session(form: Form, channels: int, size: int, shape: list[int]) -> ort.InferenceSession:
    """LAYERS copies of a form, one after another."""
    g, x = Graph(), "u"
    for i in range(LAYERS):
        x = form(g, x, f"past{i}", f"present{i}", i, channels, size)
    floats = TensorProto.FLOAT
    states = [helper.make_tensor_value_info(f"past{i}", floats, shape) for i in range(LAYERS)]
    news = [helper.make_tensor_value_info(f"present{i}", floats, shape) for i in range(LAYERS)]
    u = helper.make_tensor_value_info("u", floats, [1, channels, 1])
    y = helper.make_tensor_value_info(x, floats, [1, channels, 1])
    graph = helper.make_graph(g.nodes, "bench", [u, *states], [y, *news], g.weights)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def microseconds(run: ort.InferenceSession) -> float:
    """Median microseconds a layer, states bound in place."""
    binding = run.io_binding()
    for value in run.get_inputs():
        binding.bind_ortvalue_input(value.name, ort.OrtValue.ortvalue_from_numpy(0.1 * random(*value.shape)))
    for value in run.get_outputs():
        binding.bind_output(value.name, "cpu")
    times = []
    for _ in range(CALLS):
        started = time.perf_counter()
        run.run_with_iobinding(binding)
        times.append(time.perf_counter() - started)
    return 1e6 * float(np.median(times[CALLS // 4 :])) / LAYERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    bandwidth = copy_bandwidth()
    rows = []
    for channels in (768, 2304):
        floor = 1e6 * 4 * channels * (3 + 1 + 2 * 2) / bandwidth
        for name, form in (("product", fir_product), ("Conv", fir_conv), ("CausalConvWithState", fir_fused)):
            run = session(form, channels, 3, [1, channels, 2])
            rows.append({"what": "fir, 3 taps", "channels": channels, "form": name, "us": microseconds(run), "floor_us": floor})
    for channels, slots in ((256, 2), (768, 2), (768, 8)):
        floor = 1e6 * 4 * channels * 2 * slots * 5 / bandwidth
        for name, form, shape in (
            ("plain", modal_plain, [1, channels, 2, slots]),
            ("LinearAttention", modal_attention, [1, channels, 2 * slots, 1]),
        ):
            run = session(form, channels, slots, shape)
            what = f"modal, order {2 * slots}"
            rows.append({"what": what, "channels": channels, "form": name, "us": microseconds(run), "floor_us": floor})
    result = {"command": "python -m bench.cpu_lowerings", "machine": describe(), "bandwidth": bandwidth, "rows": rows}
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(f"{row['what']:<18}{row['channels']:>6} channels  {row['form']:<20}{row['us']:8.1f} µs  floor {row['floor_us']:.1f}")


if __name__ == "__main__":
    main()
