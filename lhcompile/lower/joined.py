"""Operators in a row as one: an input projection and the step of its outputs.

    y = Linear(x, …);  mixed, s' = HyenaStep(y, s, …)   →   y, mixed, s' = LinearHyenaStep(x, …, s, …)

For one sequence a kernel that waits for the one before it is idle for longer than it mixes. The operator is made of the
two, and so is its function.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common

from lhcompile.lower.body import Body, Type
from lhcompile.lower.functions import call

__all__ = ["joined", "linear_step_function"]

_LINEAR_INPUTS = 6
_SIGNALS = (Type.FLOAT16, Type.BFLOAT16)
"""Types of signals that have a kernel for both."""


def linear_step_function(linear: ir.Function, step: ir.Function) -> ir.Function:
    """LinearHyenaStep of a form of Linear and a form of HyenaStep, whose first input is what the other gives.

    Inputs: those of Linear, then those of HyenaStep without its first; and so the outputs.
    """
    inputs = [ir.Value(name=value.name) for value in (*linear.inputs, *step.inputs[1:])]
    (y,), first = _inlined(linear, inputs[:_LINEAR_INPUTS], "product_")
    after, then = _inlined(step, [y, *inputs[_LINEAR_INPUTS:]], "step_")
    body = Body()
    body.nodes += [*first, *then]
    attributes = {name: each.value for one in (linear, step) for name, each in one.attributes.items()}
    overload = f"{linear.overload}.{step.overload}"
    return body.function("LinearHyenaStep", overload, inputs, [y, *after], **attributes)


def _inlined(function: ir.Function, inputs: Sequence[ir.Value], prefix: str) -> tuple[list[ir.Value], list[ir.Node]]:
    """Outputs and nodes of a function whose inputs are given; its names get the prefix."""
    copy = function.clone()
    outputs, nodes = list(copy.outputs), list(copy)
    ir.convenience.replace_all_uses_with(list(copy.inputs), inputs)
    copy.outputs.clear()
    copy.remove(nodes)
    for node in nodes:
        node.name = f"{prefix}{node.name}"
        for value in node.outputs:
            value.name = f"{prefix}{value.name}"
    return outputs, nodes


def joined(model: ir.Model) -> ir.Model:
    """The model, in which pairs of operators whose forms are known are one."""
    graph = model.graph
    for step in list(graph):
        linear = step.inputs[0].producer() if step.op_type == "HyenaStep" and step.inputs[0] is not None else None
        if linear is None or linear.op_type != "Linear" or linear.outputs[0].dtype not in _SIGNALS:
            continue
        (y,) = linear.outputs
        if [node for node, _ in y.uses()] != [step]:
            continue
        function = linear_step_function(*(model.functions[node.op_identifier()] for node in (linear, step)))
        model.functions[function.identifier()] = function
        first = [*linear.inputs, *[None] * (_LINEAR_INPUTS - len(linear.inputs))]
        both = call(function, [*first, *step.inputs[1:]])
        old = [y, *step.outputs]
        ir.convenience.replace_nodes_and_values(graph, step, [step, linear], [both], old, list(both.outputs))
    common.RemoveUnusedFunctionsPass()(model)
    return model
