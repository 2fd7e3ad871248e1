"""Modal operators and small models as prefill graphs, for the benchmark of prefill."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor, nn

from lhcompile.artifacts import LoadedModel, Lowered, Program, State
from lhcompile.capture import capture
from lhcompile.config import DistillConfig, QuantizeConfig
from lhcompile.distill import distill
from lhcompile.load.safari import HyenaConfig, HyenaLM
from lhcompile.lower import portable
from lhcompile.lower.export import export_onnx
from lhcompile.quantize import Plan, quantize
from lhcompile.recognize import recognize
from lhcompile.sizes import BATCH, TIME, Size
from lhcompile.ssm import ModalSSM
from lhcompile.streamify import streamify

__all__ = ["LONG", "feeds", "in_turns", "model", "operator", "poles_of", "prefill_of", "quantized", "session"]

LONG = 4096
Feeds = dict[str, Any]


def poles_of(filters: int, order: int, radius: float, spread: float) -> ModalSSM:
    """Random conjugate pairs, the first of modulus `radius`, the others below it, of angles up to `spread`."""
    draw = torch.Generator().manual_seed(0)
    modulus, angle, *residue = torch.rand(4, filters, order // 2, generator=draw, dtype=torch.float64)
    modulus = 0.3 + (radius - 0.3) * modulus
    modulus[:, 0] = radius
    pole = torch.polar(modulus, spread * angle).to(torch.complex64).to(torch.complex128)  # as a graph can hold it
    residues = torch.complex(residue[0] - 0.5, residue[1] - 0.5)
    poles, residues = (torch.stack([x, x.conj()], -1).flatten(1) for x in (pole, residues))
    return ModalSSM(poles, residues, torch.zeros(filters, dtype=torch.float64))


class Operator(nn.Module):
    """One modal operator of a signal."""

    def __init__(self, system: ModalSSM) -> None:
        super().__init__()
        for name, table in vars(system.real()).items():
            self.register_buffer(name, table.float())

    def forward(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, after = torch.ops.lhc.modal_ssm(u, self.own, self.other, self.readout, self.direct, None, state, 1)
        return y, after


def operator(system: ModalSSM) -> Program:
    graph = torch.fx.symbolic_trace(Operator(system))
    next(iter(graph.graph.nodes)).meta["sizes"] = (BATCH, TIME, Size(0, 0, system.filters))
    return Program(graph, LONG, (State("past", "present", (system.poles.shape[1], system.filters), "modal", "it"),))


def model(width: int) -> Program:
    """Two Hyena layers of random weights, distilled to order 4."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"d_model": width, "n_layer": 2, "d_inner": 4 * width, "vocab_size": 256, "l_max": 1024}
    module = HyenaLM(HyenaConfig(**shape, filter_order=64, emb_dim=33, w=14.0)).eval().requires_grad_(False)
    program = recognize(capture(LoadedModel(module, "safari-hyena", 1024, 0, "random")))
    rows = torch.randint(0, 256, (2, 256), generator=torch.Generator().manual_seed(0))
    return streamify(distill(program, DistillConfig(order=4, method="hankel"), rows).program)


def prefill_of(program: Program, chunk: int | None = None) -> ir.Model:
    lowering = type("Prefill", (portable.Prefill,), {"chunk": chunk})
    return export_onnx(program, lowering, one_token=False)


def quantized(program: Program, prefill: ir.Model, target: str, precision: str) -> ir.Model:
    lowered = Lowered(prefill, prefill, target, program.states)
    config = QuantizeConfig(quantize=precision)
    return prefill if precision == "none" else quantize(lowered, config, Plan()).lowered.prefill


def session(graph: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(ir.to_proto(graph).SerializeToString(), options, providers=["CPUExecutionProvider"])


def feeds(program: Program, length: int) -> Feeds:
    states = {state.name: state.zeros(1).numpy() for state in program.states}
    return {program.signal.input: program.signal.random(1, length, 256).numpy(), **states}


def in_turns(runs: Mapping[Any, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median and least seconds of each, all of them in turns, the first turn not counted."""
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {str(name): (float(np.median(some[1:])), min(some[1:])) for name, some in times.items()}
