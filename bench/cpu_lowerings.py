"""Which ONNX form of the short convolution and of the modal step is fastest on this CPU?

    python -m bench.cpu_lowerings --out docs/bench      writes cpu_lowerings.json and the table made from it

Each form is chained LAYERS times in one graph, one token a call, states bound in place. Figures are medians in
microseconds a layer; the floor is the bytes of state and weights over the measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
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


def fir_rows(g: Graph, u: str, state: str, new: str, i: int, channels: int, taps: int) -> str:
    """The step of lhcompile.lower.portable: channels innermost, [batch, taps, channels]."""
    window = g.add("Concat", [state, u], f"w{i}", axis=1)
    g.add("Slice", [window, *_slice(g, i, 1)], new)
    y = g.add("Mul", [window, g.constant(random(taps, channels), f"h{i}")], f"m{i}")
    y = g.add("ReduceSum", [y, g.constant(np.array([1]), f"axis{i}")], f"s{i}", keepdims=1)
    return g.add("Add", [y, g.constant(random(channels), f"b{i}")], f"y{i}")


def fir_product(g: Graph, u: str, state: str, new: str, i: int, channels: int, taps: int) -> str:
    window = g.add("Concat", [state, u], f"w{i}", axis=-1)
    g.add("Slice", [window, *_slice(g, i, -1)], new)
    y = g.add("Mul", [window, g.constant(random(channels, taps), f"h{i}")], f"m{i}")
    y = g.add("ReduceSum", [y, g.constant(np.array([-1]), f"axis{i}")], f"s{i}", keepdims=1)
    return g.add("Add", [y, g.constant(random(channels, 1), f"b{i}")], f"y{i}")


def fir_conv(g: Graph, u: str, state: str, new: str, i: int, channels: int, taps: int) -> str:
    window = g.add("Concat", [state, u], f"w{i}", axis=-1)
    g.add("Slice", [window, *_slice(g, i, -1)], new)
    weight, bias = g.constant(random(channels, 1, taps), f"h{i}"), g.constant(random(channels), f"b{i}")
    return g.add("Conv", [window, weight, bias], f"y{i}", group=channels)


def fir_fused(g: Graph, u: str, state: str, new: str, i: int, channels: int, taps: int) -> str:
    weight, bias = g.constant(random(channels, 1, taps), f"h{i}"), g.constant(random(channels), f"b{i}")
    return g.add("CausalConvWithState", [u, weight, bias, state], [f"y{i}", new], domain=MICROSOFT)


def modal_rows(g: Graph, u: str, state: str, new: str, i: int, channels: int, slots: int) -> str:
    """The step of lhcompile.lower.portable: channels innermost, state [batch, order, channels]."""
    table = partial(_table, g, i, 2 * slots, channels)
    halves = g.constant(np.roll(np.arange(2 * slots), slots), f"halves{i}")
    swapped = g.add("Gather", [state, halves], f"swapped{i}", axis=1)
    s = g.add(
        "Add", [g.add("Mul", [state, table("p")], f"a{i}"), g.add("Mul", [swapped, table("q")], f"b{i}")], f"c{i}"
    )
    s = g.add("Add", [s, u], new)
    one = g.constant(np.array([1]), f"one{i}")
    y = g.add("ReduceSum", [g.add("Mul", [s, table("r")], f"d{i}"), one], f"e{i}", keepdims=1)
    return g.add("Add", [y, g.add("Mul", [u, g.constant(random(channels), f"D{i}")], f"f{i}")], f"y{i}")


def modal_columns(g: Graph, u: str, state: str, new: str, i: int, channels: int, slots: int) -> str:
    """Slots innermost: state [batch, channels, 2, slots]."""
    table = partial(_table, g, i, channels, 2, slots)
    last, both = g.constant(np.array([-1]), f"last{i}"), g.constant(np.array([-2, -1]), f"both{i}")
    u4 = g.add("Unsqueeze", [u, last], f"u{i}")
    g.add("Split", [state], [f"s0{i}", f"s1{i}"], axis=-2, num_outputs=2)
    s = g.add(
        "Add", [g.add("Mul", [f"s0{i}", table("p")], f"a{i}"), g.add("Mul", [f"s1{i}", table("q")], f"b{i}")], f"c{i}"
    )
    s = g.add("Add", [s, u4], new)
    y = g.add("ReduceSum", [g.add("Mul", [s, table("r")], f"d{i}"), both], f"e{i}", keepdims=1)
    direct = g.add("Mul", [u4, g.constant(random(channels, 1, 1), f"D{i}")], f"f{i}")
    return g.add("Squeeze", [g.add("Add", [y, direct], f"g{i}"), last], f"y{i}")


def modal_attention(g: Graph, u: str, state: str, new: str, i: int, channels: int, slots: int) -> str:
    """com.microsoft LinearAttention alone: the turn of the outgoing state that a full step needs is left out."""
    width = channels * 2 * slots
    value = g.add("Reshape", [u, g.constant(np.array([0, 1, channels]), f"flat{i}")], f"v{i}")
    decay = g.constant(-rng.random((1, 1, width), dtype=np.float32), f"decay{i}")
    inputs = [*(g.constant(random(1, 1, width), f"{name}{i}") for name in "qk"), value, state, decay]
    attributes = {"q_num_heads": channels, "kv_num_heads": channels, "update_rule": "gated", "scale": 1.0}
    y = g.add("LinearAttention", inputs, [f"o{i}", new], domain=MICROSOFT, **attributes)
    return g.add("Reshape", [y, g.constant(np.array([0, channels, 1]), f"back{i}")], f"y{i}")


def _table(g: Graph, i: int, *shape_and_name: Any) -> str:
    *shape, name = shape_and_name
    return g.constant(0.5 * random(*shape), f"{name}{i}")


def _slice(g: Graph, i: int, axis: int) -> list[str]:
    values = {"from": 1, "to": 2**63 - 1, "on": axis}
    return [g.constant(np.array([value]), f"{name}{i}") for name, value in values.items()]


Form = Callable[[Graph, str, str, str, int, int, int], str]
FIR: dict[str, tuple[Form, Callable[[int, int], list[int]]]] = {
    "products, channels innermost": (fir_rows, lambda c, k: [1, k - 1, c]),
    "products, taps innermost": (fir_product, lambda c, k: [1, c, k - 1]),
    "Conv": (fir_conv, lambda c, k: [1, c, k - 1]),
    "com.microsoft CausalConvWithState": (fir_fused, lambda c, k: [1, c, k - 1]),
}
MODAL: dict[str, tuple[Form, Callable[[int, int], list[int]]]] = {
    "elementwise, channels innermost": (modal_rows, lambda c, n: [1, 2 * n, c]),
    "elementwise, slots innermost": (modal_columns, lambda c, n: [1, c, 2, n]),
    "com.microsoft LinearAttention, no turn": (modal_attention, lambda c, n: [1, c, 2 * n, 1]),
}


def session(form: Form, channels: int, size: int, shape: list[int]) -> ort.InferenceSession:
    """LAYERS copies of a form, one after another."""
    g, x = Graph(), "u"
    for i in range(LAYERS):
        x = form(g, x, f"past{i}", f"present{i}", i, channels, size)
    floats = TensorProto.FLOAT
    signal = [1, 1, channels] if shape[-1] == channels else [1, channels, 1]
    states = [helper.make_tensor_value_info(f"past{i}", floats, shape) for i in range(LAYERS)]
    news = [helper.make_tensor_value_info(f"present{i}", floats, shape) for i in range(LAYERS)]
    u, y = (helper.make_tensor_value_info(name, floats, signal) for name in ("u", x))
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


def measure() -> list[dict[str, Any]]:
    bandwidth, rows = copy_bandwidth(), []
    for what, forms, sizes in (
        ("short convolution, 3 taps", FIR, [(768, 3), (2304, 3)]),
        ("modal step", MODAL, [(256, 2), (768, 2), (768, 8)]),
    ):
        for channels, size in sizes:
            fir = forms is FIR
            numbers = channels * (2 * (size - 1) + size + 3 if fir else 2 * 2 * size + 3 * 2 * size + 3)
            for name, (form, shape) in forms.items():
                rows.append(
                    {
                        "what": what if fir else f"{what}, order {2 * size}",
                        "channels": channels,
                        "form": name,
                        "us": microseconds(session(form, channels, size, shape(channels, size))),
                        "floor_us": 1e6 * 4 * numbers / bandwidth,
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for cpu_lowerings.json and cpu_lowerings.md")
    out = parser.parse_args().out
    rows = measure()
    lines = ["| operator | channels | form | µs a layer | floor µs |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['what']} | {row['channels']} | {row['form']} | {row['us']:.1f} | {row['floor_us']:.2f} |"
        for row in rows
    ]
    print("\n".join(lines))
    if out is not None:
        result = {"command": "python -m bench.cpu_lowerings --out docs/bench", "machine": describe(), "rows": rows}
        out.mkdir(parents=True, exist_ok=True)
        (out / "cpu_lowerings.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "cpu_lowerings.md").write_text(
            "Made by `python -m bench.cpu_lowerings --out docs/bench`, batch 1, one token a call. The floor is the "
            "bytes of states and weights over the measured copy bandwidth.\n\n" + "\n".join(lines) + "\n"
        )


if __name__ == "__main__":
    main()
