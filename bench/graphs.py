"""What a step moves of its graph."""

from __future__ import annotations

from pathlib import Path

import onnx

__all__ = ["initializer_bytes"]

_LOOK_UP = {"Gather", "Embedding", "EmbeddingInt4"}


def initializer_bytes(file: Path) -> tuple[int, int]:
    """Bytes of a graph's initializers: of those that a step reads, and of tables of which it reads an entry a token.

    A table that something else reads as well, a tied head, is one that a step reads.
    """
    graph = onnx.load(file, load_external_data=False).graph
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    whole = tables = 0
    for tensor in graph.initializer:
        if readers.get(tensor.name) and readers[tensor.name] <= _LOOK_UP:
            tables += _bytes(tensor)
        else:
            whole += _bytes(tensor)
    return whole, tables


def _bytes(tensor: onnx.TensorProto) -> int:
    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    return int(tensor.ByteSize())
