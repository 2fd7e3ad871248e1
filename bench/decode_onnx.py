"""The Transformer as an ONNX graph of onnxruntime's fused operators, with a cache that keys and values stay in.

A layer is SkipLayerNormalization, MatMul to queries, keys and values, GroupQueryAttention, MatMul,
SkipLayerNormalization, MatMul, FastGelu with its bias, MatMul. The cache is an input and an output in the same memory.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from bench.decode_model import Shape

__all__ = ["Graph", "write"]

_FUSED = "com.microsoft"
BLOCK = 32


def write(shape: Shape, path: Path, bits: int, seed: int = 0) -> None:
    """The graph, its weights beside it; bits: 32, or 4 for products with blocks of BLOCK weights that share a scale.

    Inputs: input_ids int64 [1, seq], seqlens_k int32 [1], total int32 [1]; per layer past key and value
    [1, heads, room, channels] in float32. Outputs: logits [1, seq, vocabulary], then the caches.
    """
    import onnx  # here, for a process that runs the graph shall not count it as its memory
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    draw = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    d, heads = shape.width, shape.heads

    def matrix(name: str, rows: int, columns: int, size: int) -> str:
        values = draw.standard_normal((rows, columns), np.float32) / np.float32(np.sqrt(size))
        weights.append(numpy_helper.from_array(values, name))
        return name

    def vector(name: str, value: float, width: int = d) -> str:
        weights.append(numpy_helper.from_array(np.full(width, value, np.float32), name))
        return name

    def node(kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def product(x: str, name: str, rows: int, columns: int) -> str:
        return node("MatMul", [x, matrix(f"{name}.weight", rows, columns, rows)], [f"{name}.y"])

    def norm(x: str, residual: str, name: str) -> tuple[str, str]:
        """(normed sum, sum)"""
        parameters = [vector(f"{name}.scale", 1), vector(f"{name}.shift", 0)]
        outputs = [f"{name}.y", "", "", f"{name}.sum"]
        node("SkipLayerNormalization", [x, residual, *parameters], outputs, _FUSED, epsilon=1e-5)
        return outputs[0], outputs[3]

    residual = node("Gather", [matrix("embedding", shape.vocabulary, d, d), "input_ids"], ["embedded"])
    branch = ""
    caches = []
    for layer in range(shape.layers):
        at = f"layers.{layer}"
        x, residual = norm(residual, branch, f"{at}.norm1") if layer else _first(node, vector, residual, at)
        qkv = product(x, f"{at}.qkv", d, 3 * d)
        past, present = ([f"{when}.{layer}.{one}" for one in ("key", "value")] for when in ("past", "present"))
        inputs = [qkv, "", "", *past, "seqlens_k", "total"]
        node("GroupQueryAttention", inputs, [f"{at}.heard", *present], _FUSED, num_heads=heads, kv_num_heads=heads)
        x, residual = norm(residual, product(f"{at}.heard", f"{at}.out", d, d), f"{at}.norm2")
        up = product(x, f"{at}.up", d, shape.inner)
        inner = node("FastGelu", [up, vector(f"{at}.up.bias", 0, shape.inner)], [f"{at}.inner"], _FUSED)
        branch = product(inner, f"{at}.down", shape.inner, d)
        caches.append((past, present))
    x, _ = norm(residual, branch, "final")
    node("MatMul", [x, matrix("head.weight", d, shape.vocabulary, d)], ["logits"])

    size: list[str | int | None] = [1, heads, "room", d // heads]
    given = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "seq"]),
        helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, [1]),
        helper.make_tensor_value_info("total", TensorProto.INT32, [1]),
    ]
    found = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "seq", shape.vocabulary])]
    for past, present in caches:
        given += [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name in past]
        found += [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name in present]
    graph = helper.make_graph(nodes, "transformer", given, found, weights)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(_FUSED, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    if bits == 4:
        logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
        quantizer = MatMulNBitsQuantizer(model, block_size=BLOCK, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        model = quantizer.model.model
    onnx.save(model, path, save_as_external_data=True, location=f"{path.stem}.bin")


def _first(node: Any, vector: Any, x: str, at: str) -> tuple[str, str]:
    """The first norm, with nothing to add: (normed, x)"""
    inputs = [x, vector(f"{at}.norm1.scale", 1), vector(f"{at}.norm1.shift", 0)]
    return node("LayerNormalization", inputs, [f"{at}.norm1.y"], epsilon=1e-5), x


class Graph:
    """Greedy decoding of one sequence whose cache is full to `context`."""

    def __init__(self, path: Path, context: int, threads: int, position: int | None = None) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        self.tokens = np.ones((1, 1), np.int64)
        self.lengths = [np.zeros(1, np.int32) for _ in range(2)]
        draw = np.random.default_rng(0)
        self.caches = []
        names = [value.name for value in self._session.get_outputs()]
        for value, output in zip(self._session.get_inputs()[3:], names[1:], strict=True):
            _, heads, _, channels = value.shape
            cache = draw.standard_normal((1, heads, context, channels), np.float32)
            held = ort.OrtValue.ortvalue_from_numpy(cache)
            self._binding.bind_ortvalue_input(value.name, held)
            self._binding.bind_ortvalue_output(output, held)
            self.caches.append((cache, held))
        for value, array in zip(self._session.get_inputs()[:3], [self.tokens, *self.lengths], strict=True):
            self._binding.bind_ortvalue_input(value.name, ort.OrtValue.ortvalue_from_numpy(array))
        self.logits = np.empty((1, 1, self._session.get_outputs()[0].shape[-1]), np.float32)
        self._binding.bind_ortvalue_output(names[0], ort.OrtValue.ortvalue_from_numpy(self.logits))
        self.cache_bytes = sum(cache.nbytes for cache, _ in self.caches)
        self.place(context - 1 if position is None else position)

    def place(self, position: int) -> None:
        """Where the next token goes."""
        for array, value in zip(self.lengths, (position, position + 1), strict=True):
            array[0] = value

    def step(self) -> None:
        """One token."""
        self._session.run_with_iobinding(self._binding)
        self.tokens[0, 0] = self.logits[0, 0].argmax()

    def rewind(self) -> None:
        """The position does not move: nothing is to be forgotten."""
