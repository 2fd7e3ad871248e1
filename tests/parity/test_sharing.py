"""The modal operator alone: its step and prefill graphs against its torch body, however filters share channels."""

from __future__ import annotations

import pytest
import torch
from models import ORDERS, of_orders, random_modal
from streams import assert_parity, onnx_stream, torch_stream
from torch import Tensor, fx, nn

from lhcompile import sizes
from lhcompile.artifacts import Lowered, Program, State
from lhcompile.lower.export import export_onnx
from lhcompile.lower.portable import Prefill, Step

VOCAB, FILTERS, TIME = 11, 3, 70


class Modal(nn.Module):
    """input_ids [batch, time], state → the operator's answer to embedded tokens [batch, time, channels]"""

    def __init__(self, outer: int, inner: int, packed: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        channels = outer * FILTERS * inner
        self.embed = nn.Embedding(VOCAB, channels, _weight=torch.randn(VOCAB, channels, generator=generator))
        system = random_modal(FILTERS, 3, generator)
        real = (of_orders(system, ORDERS[:FILTERS]) if packed else system).real()
        for name in ("own", "other", "readout", "direct"):
            self.register_buffer(name, getattr(real, name).float())
        self.register_buffer("kept", real.kept if packed else None)
        self.inner = inner
        self.shape = (1, outer * len(real.kept) * inner) if packed else (len(real.own), channels)

    def forward(self, input_ids: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        weights = (self.own, self.other, self.readout, self.direct, self.kept)
        return torch.ops.lhc.modal_ssm(self.embed(input_ids), *weights, state, self.inner)


@pytest.mark.parametrize("packed", [False, True], ids=["rectangular", "packed"])
@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (2, 1), (3, 1), (1, 2), (1, 3), (2, 5), (3, 3)])
def test_graphs_of_the_operator(outer: int, inner: int, packed: bool) -> None:
    module = Modal(outer, inner, packed).eval().requires_grad_(False)
    states = (State("past", "present", module.shape, "modal", "the model"),)
    graph = fx.symbolic_trace(module)
    next(iter(graph.graph.nodes)).meta["sizes"] = (sizes.BATCH, sizes.TIME)
    program = Program(graph, TIME, states)
    stream = onnx_stream(
        Lowered(export_onnx(program, Step, True), export_onnx(program, Prefill, False), "portable", states)
    )
    tokens = torch.randint(0, VOCAB, (3, TIME), generator=torch.Generator().manual_seed(0))
    for cuts in ([], [1] * TIME, [33, 1, 1, 31]):
        assert_parity(stream, torch_stream(program), states, tokens, cuts)
