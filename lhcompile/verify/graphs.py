"""What every built graph must be, read off the graph itself."""

from __future__ import annotations

from collections import Counter

import onnx_ir.passes.common as common

from lhcompile.artifacts import Lowered, Signal
from lhcompile.errors import ParityError
from lhcompile.verify.model import GraphReport

__all__ = ["check_graphs"]

LATEST_OPSET = 21
STEP_FORBIDDEN = {"Scan", "Loop", "If", "Range", "Sin", "Cos", "SequenceAt", "SplitToSequence"}
SHAPING = {"Slice", "Squeeze", "Unsqueeze", "Transpose", "Reshape", "Split"}


def check_graphs(lowered: Lowered, signal: Signal) -> GraphReport:
    """Raise ParityError unless both graphs keep the contract; returns the step graph's size in nodes.

    Standard operators of opset ≤ 21, or such as the graph carries the functions of; in the step graph no control flow
    and no operator that only rearranges a weight; inputs and outputs in the contract's order.
    """
    inputs = [signal.input, *(state.name for state in lowered.states)]
    outputs = [signal.output, *(state.output for state in lowered.states)]
    graphs = {"step": lowered.step, "prefill": lowered.prefill}
    for name, model in list(graphs.items())[: 1 if lowered.prefill is lowered.step else 2]:
        _expect([v.name for v in model.graph.inputs] == inputs, f"{name}: inputs are not in the contract's order")
        _expect([v.name for v in model.graph.outputs] == outputs, f"{name}: outputs are not in the contract's order")
        others = {node.op_identifier() for node in model.graph.all_nodes() if node.domain} - set(model.functions)
        _expect(not others, f"{name}: operators of {sorted({domain for domain, *_ in others})}")
        _expect(model.opset_imports.get("", 0) <= LATEST_OPSET, f"{name}: opset {model.opset_imports.get('')}")
        common.CheckerPass()(model.clone())  # without large weights; of a clone, as it puts them back in another order
    counts = Counter(node.op_type for node in lowered.step.graph)
    _expect(not STEP_FORBIDDEN & set(counts), f"step: holds {sorted(STEP_FORBIDDEN & set(counts))}")
    for node in lowered.step.graph:
        folded = node.op_type not in SHAPING or node.inputs[0] is None or not node.inputs[0].is_initializer()
        _expect(folded, f"step: {node.op_type} {node.name} rearranges a weight at run time")
    return GraphReport(step_nodes=sum(counts.values()))


def _expect(kept: bool, broken: str) -> None:
    if not kept:
        raise ParityError(f"the graph does not keep its contract: {broken}")
