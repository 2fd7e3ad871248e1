"""Small stateful models with a float64 numpy reference, written as built directories.

A layer is a causal depthwise convolution of three taps over a state [batch, width, 2], then a bank of real
poles over a state [batch, width, modes], then tanh. A token model has an embedding before and a readout
after; a feature model has a matrix in place of the embedding. The step graph holds the nodes once; the
prefill graph holds the same nodes in the body of a Scan over seq.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, parser

Array = np.ndarray[Any, np.dtype[Any]]

_LAYER = """
    u3_{i} = Unsqueeze(h{i}, axis2)
    window_{i} = Concat<axis=2>(conv{i}, u3_{i})
    weighted_{i} = Mul(window_{i}, taps{i})
    v_{i} = ReduceSum<keepdims=0>(weighted_{i}, axis2)
    conv_new{i} = Slice(window_{i}, one, three, axis2)
    v3_{i} = Unsqueeze(v_{i}, axis2)
    decayed_{i} = Mul(modal{i}, poles{i})
    modal_new{i} = Add(decayed_{i}, v3_{i})
    read_{i} = Mul(modal_new{i}, residues{i})
    y_{i} = ReduceSum<keepdims=0>(read_{i}, axis2)
    h{j} = Tanh(y_{i})
"""


@dataclass(frozen=True)
class Toy:
    """Weights of a toy model; channels is None for a token model, whose vocabulary is `vocab`."""

    weights: dict[str, Array]
    layers: int
    width: int
    modes: int
    vocab: int
    channels: int | None

    def reference(self, values: Any) -> tuple[Array, dict[str, Array]]:
        """values [batch, seq, *tail] → outputs [batch, seq, vocab] and final states, in float64."""
        w = {name: weight.astype(np.float64) for name, weight in self.weights.items()}
        values = np.asarray(values)
        batch = values.shape[0]
        conv = [np.zeros((batch, self.width, 2)) for _ in range(self.layers)]
        modal = [np.zeros((batch, self.width, self.modes)) for _ in range(self.layers)]
        outputs = []
        for t in range(values.shape[1]):
            h = w["embedding"][values[:, t]] if self.channels is None else values[:, t] @ w["embedding"]
            for i in range(self.layers):
                window = np.concatenate([conv[i], h[:, :, None]], 2)
                conv[i] = window[:, :, 1:]
                v = (window * w[f"taps{i}"]).sum(2)
                modal[i] = modal[i] * w[f"poles{i}"] + v[:, :, None]
                h = np.tanh((modal[i] * w[f"residues{i}"]).sum(2))
            outputs.append(h @ w["readout"])
        states = {}
        for i in range(self.layers):
            states[f"past_key_values.{i}.conv_state"] = conv[i]
            states[f"past_key_values.{i}.recurrent_state"] = modal[i]
        return np.stack(outputs, 1), states


def toy(*, seed: int = 0, vocab: int = 256, channels: int | None = None, layers: int = 2) -> Toy:
    rng = np.random.default_rng(seed)
    width, modes = 8, 3
    shapes = {"embedding": (vocab if channels is None else channels, width), "readout": (width, vocab)}
    for i in range(layers):
        shapes |= {f"taps{i}": (width, 3), f"residues{i}": (width, modes)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for i in range(layers):
        weights[f"poles{i}"] = rng.uniform(0.3, 0.95, (width, modes)).astype(np.float32)
    return Toy(weights, layers, width, modes, vocab, channels)


def save(model: Toy, directory: Path, *, external: bool = False, batch: str = "batch") -> Path:
    """Write step.onnx, prefill.onnx and manifest.json; batch is a dimension name or a fixed number."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("step", "prefill"):
        graph = _graph(model, "1" if name == "step" else "seq", batch)
        path = directory / f"{name}.onnx"
        if external:
            onnx.save_model(
                graph, path, save_as_external_data=True, location=f"{name}.onnx.data", size_threshold=64
            )
        else:
            onnx.save_model(graph, path)
    write_manifest(directory, manifest_of(model))
    return directory


def manifest_of(model: Toy) -> dict[str, Any]:
    states = []
    for i in range(model.layers):
        for kind, name, size in (("fir", "conv_state", 2), ("modal_ssm", "recurrent_state", model.modes)):
            states.append(
                {
                    "input": f"past_key_values.{i}.{name}",
                    "output": f"present.{i}.{name}",
                    "shape": ["batch", model.width, size],
                    "dtype": "float32",
                    "kind": kind,
                    "module": f"layers.{i}",
                }
            )
    tokens = model.channels is None
    return {
        "format": "lhcompile",
        "format_version": 1,
        "lhcompile_version": "0.1.0",
        "target": "cpu",
        "model": {"family": "toy"} | ({"vocab_size": model.vocab} if tokens else {}),
        "tokenizer": {"kind": "bytes" if tokens else "none"},
        "graphs": {"step": {"file": "step.onnx"}, "prefill": {"file": "prefill.onnx"}},
        "inputs": {"tokens": "input_ids"} if tokens else {"features": "inputs"},
        "outputs": {"logits": "logits"} if tokens else {"values": "outputs"},
        "states": states,
    }


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json; `files` is filled in from what lies in the directory unless given."""
    files = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for path in sorted(directory.glob("*.onnx*"))
    }
    (directory / "manifest.json").write_text(json.dumps({"files": files} | manifest))


def _graph(model: Toy, seq: str, batch: str) -> onnx.ModelProto:
    tokens = model.channels is None
    source, target = ("input_ids", "logits") if tokens else ("inputs", "outputs")
    kinds = [("conv", "conv_state", 2), ("modal", "recurrent_state", model.modes)]
    names = [(f"{k}{i}", f"{k}_new{i}", f"{i}.{n}", s) for i in range(model.layers) for k, n, s in kinds]
    head = f"int64[{batch},{seq}]" if tokens else f"float[{batch},{seq},{model.channels}]"
    shape = {row[2]: f"float[{batch},{model.width},{row[3]}]" for row in names}
    inputs = [f"{head} {source}", *(f'{shape[n]} "past_key_values.{n}"' for _, _, n, _ in names)]
    outputs = [
        f"float[{batch},{seq},{model.vocab}] {target}",
        *(f'{shape[n]} "present.{n}"' for _, _, n, _ in names),
    ]
    layers = "".join(_LAYER.format(i=i, j=i + 1) for i in range(model.layers))
    embed = "h0 = Gather(embedding, x)" if tokens else "h0 = MatMul(x, embedding)"
    body = f"{embed}\n{layers}\nout = MatMul(h{model.layers}, readout)\n"
    if seq == "1":
        reads = "".join(f'{old} = Identity("past_key_values.{n}")\n' for old, _, n, _ in names)
        writes = "".join(f'"present.{n}" = Identity({new})\n' for _, new, n, _ in names)
        nodes = f"x = Squeeze({source}, axis1)\n{reads}{body}{target} = Unsqueeze(out, axis1)\n{writes}"
    else:
        nodes = _scan(body, names, source, target, "int64[B]" if tokens else f"float[B,{model.channels}]")
    text = f'<ir_version: 10, opset_import: ["" : 20]> toy ({", ".join(inputs)}) => ({", ".join(outputs)}) '
    graph: onnx.ModelProto = parser.parse_model(text + "{" + nodes + "}")
    constants = {"axis1": [1], "axis2": [2], "one": [1], "three": [3]}
    weights = model.weights | {name: np.array(value, np.int64) for name, value in constants.items()}
    graph.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return graph


def _scan(body: str, names: list[tuple[str, str, str, int]], source: str, target: str, x: str) -> str:
    carried = ", ".join(f"float[B,W,{size}] {old}" for old, _, _, size in names)
    written = ", ".join(f"float[B,W,{size}] {new}" for _, new, _, size in names)
    reads = ", ".join(f'"past_key_values.{n}"' for _, _, n, _ in names)
    writes = ", ".join(f'"present.{n}"' for _, _, n, _ in names)
    one_token = f"one_token ({carried}, {x} x) => ({written}, float[B,V] out) {{ {body} }}"
    attributes = f"body = {one_token}, num_scan_inputs = 1, scan_input_axes = [1], scan_output_axes = [1]"
    return f"{writes}, {target} = Scan<{attributes}>({reads}, {source})\n"
