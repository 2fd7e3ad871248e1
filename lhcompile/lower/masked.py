"""Both graphs with an attention_mask that stops rows: where it is 0, a token leaves its row's states as they were.

    step      s' = step(ids, s)        s' = where(mask[:, −1], step(ids, s), s)
    prefill   s' = prefill(ids, s)     if the last T columns of mask are all 1: prefill(ids, s)
                                       else the masked step, token by token, in a Scan

A modal state decays by itself, so masking what it hears does not stop it; the states are stopped, whatever they are,
bit for bit. attention_mask: int64 [batch, total], total ≥ T, follows the tokens in both graphs' inputs; what a stopped
token says is undefined. Weights that both branches read are there once.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import onnx_ir as ir
from onnx_ir.tape import Tape

from lhcompile.artifacts import MASK, Lowered

__all__ = ["masked"]

_END = 2**63 - 1


def masked(lowered: Lowered, inner_step: ir.Model | None = None) -> Lowered:
    """The same model with the mask; `lowered` stays as it is.

    inner_step: the step graph in the form that the Scan runs, where its own does not run inside of another graph
    """
    prefill = _prefill(lowered.prefill, inner_step or lowered.step)
    return dataclasses.replace(lowered, step=_step(lowered.step), prefill=prefill)


def _step(step: ir.Model) -> ir.Model:
    graph = step.graph.clone()
    ids, *states = graph.inputs
    mask = _mask_input(ids)
    graph.inputs.insert(1, mask)
    tape = Tape(graph)
    last = tape.op("Slice", [mask, _ints(tape, -1), _ints(tape, _END), _ints(tape, 1)])
    names = [output.name for output in graph.outputs]
    successors = _frozen(tape, last, graph.outputs[1:], states)
    for value, name in zip(graph.outputs[1:], names[1:], strict=True):
        value.name = f"{name}.free"
    graph.outputs[1:] = successors
    for value, name in zip(successors, names[1:], strict=True):
        value.name = name
    return _model(step, graph)


def _prefill(prefill: ir.Model, step: ir.Model) -> ir.Model:
    ids, *states = (_like(value) for value in prefill.graph.inputs)
    mask = _mask_input(ids)
    graph = ir.Graph([ids, mask, *states], [], nodes=[], opset_imports=prefill.graph.opset_imports, name="prefill")
    tape = Tape(graph)
    count = tape.op("Shape", [ids], {"start": 1, "end": 2})
    recent = tape.op("Slice", [mask, tape.op("Neg", [count]), _ints(tape, _END), _ints(tape, 1)])
    every = tape.op("Cast", [tape.op("ReduceMin", [recent], {"keepdims": 0})], {"to": ir.DataType.BOOL})
    _number(graph, MASK)
    weights: dict[bytes, ir.Value] = {}
    whole, whole_outputs = _inlined(prefill.graph, [ids, *states], graph, weights, "whole")
    at_once = ir.Graph([], whole_outputs, nodes=whole, name="at_once")
    one_by_one = _one_by_one(step.graph, [ids, recent, *states], graph, weights)
    branches = {"then_branch": at_once, "else_branch": one_by_one}
    results = tape.op_multi_out("If", [every], branches, num_outputs=len(prefill.graph.outputs))
    for value, like in zip(results, prefill.graph.outputs, strict=True):
        value.name, value.shape, value.type = like.name, like.shape, like.type
        graph.outputs.append(value)
    return _model(prefill, graph)


def _one_by_one(
    step: ir.Graph, inputs: Sequence[ir.Value], outer: ir.Graph, weights: dict[bytes, ir.Value]
) -> ir.Graph:
    """The branch that scans the masked step over the tokens; inputs: ids [B, T], mask [B, T], states"""
    ids, recent, *states = inputs
    row = ir.Shape([_batch(ids)])
    token, heard = (ir.Value(name=f"token.{name}", shape=row, type=ids.type) for name in ("id", "mask"))
    old = [_like(value, f"token.{value.name}") for value in states]
    body = ir.Graph([*old, token, heard], [], nodes=[], name="token")
    tape = Tape(body)
    nodes, results = _inlined(step, [tape.op("Unsqueeze", [token, _ints(tape, 1)]), *old], outer, weights, "token")
    body.extend(nodes)
    body.outputs.extend(_frozen(tape, tape.op("Unsqueeze", [heard, _ints(tape, 1)]), results[1:], old))
    body.outputs.append(tape.op("Squeeze", [results[0], _ints(tape, 1)]))
    _number(body, "token")
    logits = body.outputs[-1]
    logits.shape, logits.type = ir.Shape([_batch(ids), step.outputs[0].shape[2]]), step.outputs[0].type  # type: ignore[index]
    scan = ir.node(
        "Scan",
        [*states, ids, recent],
        {"body": body, "num_scan_inputs": 2, "scan_input_axes": [1, 1], "scan_output_axes": [1]},
        num_outputs=len(body.outputs),
    )
    for index, value in enumerate(scan.outputs):
        value.name = f"one_by_one.{index}"
    *new, said = scan.outputs
    return ir.Graph([], [said, *new], nodes=[scan], name="one_by_one")


def _frozen(tape: Tape, heard: ir.Value, new: Sequence[ir.Value], old: Sequence[ir.Value]) -> list[ir.Value]:
    """new where the row's entry of heard [batch, 1] is 1, else old"""
    flag, result = tape.op("Cast", [heard], {"to": ir.DataType.BOOL}), []
    for after, before in zip(new, old, strict=True):
        assert before.shape is not None
        wide = tape.op("Reshape", [flag, _ints(tape, -1, *[1] * (len(before.shape) - 1))])
        value = tape.op("Where", [wide, after, before])
        value.shape, value.type = before.shape, before.type
        result.append(value)
    return result


def _inlined(
    graph: ir.Graph, inputs: Sequence[ir.Value], outer: ir.Graph, weights: dict[bytes, ir.Value], prefix: str
) -> tuple[list[ir.Node], list[ir.Value]]:
    """The nodes of a copy of `graph` that read `inputs`, and its outputs; its weights become those of `outer`."""
    copy = graph.clone()
    for value, given in zip(copy.inputs, inputs, strict=True):
        ir.convenience.replace_all_uses_with(value, given)
    for value in list(copy.initializers.values()):
        tensor = value.const_value
        assert tensor is not None
        key = hashlib.sha256(f"{tensor.dtype}{tensor.shape}".encode() + tensor.tobytes()).digest()
        if key not in weights:
            name = f"{prefix}.{value.name}"
            held = ir.LazyTensor(_as_it_is(tensor), tensor.dtype, ir.Shape(tensor.shape.numpy()), name=name)
            weights[key] = ir.Value(name=name, shape=value.shape, type=value.type, const_value=held)
            outer.register_initializer(weights[key])
        ir.convenience.replace_all_uses_with(value, weights[key])
    outputs, nodes = list(copy.outputs), list(copy)
    copy.outputs.clear()
    copy.remove(nodes)
    for node in nodes:
        for value in node.outputs:
            value.name = f"{prefix}.{value.name}"
    return nodes, outputs


def _number(graph: ir.Graph, prefix: str) -> None:
    """Names for the values a graph has so far, which no graph around it or inside it uses."""
    for index, value in enumerate(value for node in graph for value in node.outputs):
        value.name = f"{prefix}.{index}"


def _as_it_is(tensor: ir.TensorProtocol) -> Callable[[], ir.TensorProtocol]:
    """A tensor under another name: LazyTensor asks for it when it is read."""
    return lambda: tensor


def _mask_input(ids: ir.Value) -> ir.Value:
    return ir.Value(name=MASK, shape=ir.Shape([_batch(ids), "total"]), type=ir.TensorType(ir.DataType.INT64))


def _batch(ids: ir.Value) -> int | ir.SymbolicDim:
    assert ids.shape is not None
    return ids.shape[0]


def _like(value: ir.Value, name: str | None = None) -> ir.Value:
    return ir.Value(name=name or value.name, shape=value.shape, type=value.type)


def _ints(tape: Tape, *values: int) -> ir.Value:
    return tape.op("Constant", [], {"value_ints": list(values)})


def _model(like: ir.Model, graph: ir.Graph) -> ir.Model:
    return ir.Model(graph, ir_version=like.ir_version, producer_name=like.producer_name)
