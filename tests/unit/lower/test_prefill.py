"""Modal systems over many tokens, as graphs, against the operator's own body in double precision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from models import VOCAB, of_orders, random_modal
from streams import serialized
from torch import Tensor, nn

from lhcompile.artifacts import Program, State
from lhcompile.lower.chunks import chunk_size
from lhcompile.lower.export import export_onnx
from lhcompile.lower.portable import Prefill
from lhcompile.lower.web import without_kernel
from lhcompile.sizes import BATCH, TIME, Size

ROUNDED = 1e-5
CHUNK = 4


@dataclass(frozen=True)
class Layout:
    """Channels as [outer, filters, inner], and the system's orders, one a filter; None: the same for all."""

    outer: int = 1
    filters: int = 5
    inner: int = 1
    orders: tuple[int, ...] | None = None
    real: bool = False

    @property
    def channels(self) -> int:
        return self.outer * self.filters * self.inner


LAYOUTS = {
    "one each": Layout(),
    "real poles": Layout(real=True),
    "heads outermost": Layout(filters=2, inner=3),
    "heads innermost": Layout(outer=3, filters=2),
    "heads between": Layout(outer=2, filters=2, inner=3),
    "packed": Layout(orders=(5, 2, 0, 1, 6)),
    "packed heads": Layout(outer=2, filters=2, inner=3, orders=(3, 6)),
}


class Operator(nn.Module):
    """One modal operator, float32 or float64."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        system = random_modal(layout.filters, 1 if layout.real else 3, torch.Generator().manual_seed(0))
        system = system if layout.orders is None else of_orders(system, layout.orders)
        real, self.inner = system.real(), layout.inner
        for name, table in vars(real).items():
            self.register_buffer(name, table.float())
        self.register_buffer("kept", None if layout.orders is None else real.kept)

    def forward(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, after = torch.ops.lhc.modal_ssm(
            u, self.own, self.other, self.readout, self.direct, self.kept, state, self.inner
        )
        return y, after


def shape_of(layout: Layout, module: Operator) -> tuple[int, int]:
    if module.kept is None:
        return module.own.shape[0], layout.channels
    return 1, layout.outer * len(module.kept) * layout.inner


def graph_of(layout: Layout, module: Operator, lowering: type[Prefill]) -> ir.Model:
    graph = torch.fx.symbolic_trace(module)
    next(iter(graph.graph.nodes)).meta["sizes"] = (BATCH, TIME, Size(0, 0, layout.channels))
    program = Program(graph, VOCAB, (State("past", "present", shape_of(layout, module), "modal", "it"),))
    rows = None if lowering.time is None else 1
    return export_onnx(program, lowering, one_token=False, batch=rows, time=lowering.time)


def assert_same(graph: ir.Model, layout: Layout, module: Operator, rows: int, time: int) -> None:
    """From a state that is not zero."""
    generator = torch.Generator().manual_seed(time)
    u = torch.randn(rows, time, layout.channels, generator=generator)
    state = torch.randn(rows, *shape_of(layout, module), generator=generator)
    session = onnxruntime.InferenceSession(serialized(graph), providers=["CPUExecutionProvider"])
    found = session.run(None, {"inputs": u.numpy(), "past": state.numpy()})
    for mine, truth in zip(found, module(u.double(), state.double()), strict=True):
        assert mine.shape == tuple(truth.shape)
        assert np.abs(mine - truth.numpy()).max() <= ROUNDED * float(truth.abs().max()), time


@pytest.mark.parametrize("name", LAYOUTS)
def test_chunks(name: str) -> None:
    """Lengths around a chunk's, two rows."""
    layout = LAYOUTS[name]
    module = Operator(layout)
    graph = graph_of(layout, module, type("Prefill", (Prefill,), {"chunk": CHUNK}))
    for time in (1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 2):
        assert_same(graph, layout, module, 2, time)


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_chunk(name: str) -> None:
    """A fixed number of tokens: no loop, and no size that is read."""
    layout = LAYOUTS[name]
    module = Operator(layout)
    graph = graph_of(layout, module, type("Prefill", (Prefill.of(7),), {"gathers": True}))
    assert without_kernel(graph) == []
    assert not {"Shape", "Pad", "Scan"} & {node.op_type for node in graph.graph}
    assert_same(graph, layout, module, 1, 7)


def test_real_poles_exchange_nothing() -> None:
    """Neither in the Scan nor behind it."""
    gathers = {}
    for name in ("one each", "real poles"):
        layout = LAYOUTS[name]
        nodes = graph_of(layout, Operator(layout), Prefill).graph.all_nodes()
        gathers[name] = sum(node.op_type == "Gather" for node in nodes)
    assert gathers["one each"] == gathers["real poles"] + 2


@pytest.mark.parametrize(("order", "size"), [(2, 16), (8, 16), (9, 32), (16, 32)])
def test_chunks_are_longer_at_higher_orders(order: int, size: int) -> None:
    assert chunk_size(order) == size
