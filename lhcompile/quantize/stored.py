"""What is stored in the place of a weight, once for every graph that reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from lhcompile.quantize.weights import Use
from lhcompile.quantize.writer import Writer

__all__ = ["Form", "Store", "Stored", "Write"]


@dataclass(frozen=True)
class Stored:
    """A weight as stored.

    tensors: by their roles; values: computes what they mean, float32 in the layout of `Use.rows`
    """

    tensors: dict[str, ir.TensorProtocol]
    values: Callable[[], NDArray[Any]]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


Store = Callable[[Use], Stored]
Write = Callable[[Writer, Use, Stored], None]


@dataclass(frozen=True)
class Form:
    """How one kind of weight is stored, and how the operators of either graph read it."""

    store: Store
    step: Write
    prefill: Write
