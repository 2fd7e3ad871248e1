"""Which form of a fused operator each node is: from the types and shapes around it to its function."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import onnx_ir.passes.common as common

from lhcompile.lower.functions import DOMAIN, VERSION, linear_function, mixer_function, sample_function

__all__ = ["StatesAsKept", "with_functions"]

IR_VERSION = 10
"""The first in which a function may have several forms."""


def with_functions(model: ir.Model) -> ir.Model:
    """The model, whose nodes of fused operators name their form now, and which carries the functions for them.

    Functions that it had before are gone. The forms follow from the types and shapes of the nodes' values.
    """
    model.functions.clear()
    made: dict[object, ir.Function] = {}
    for node in model.graph.all_nodes():
        if node.domain != DOMAIN:
            continue
        function = _FORMS[node.op_type](node)
        function = made.setdefault(function.identifier(), function)
        model.functions[function.identifier()] = function
        node.overload = function.overload
        node.attributes.clear()
        node.attributes.update(function.attributes)
    if made:
        model.opset_imports[DOMAIN] = VERSION
        model.ir_version = max(IR_VERSION, model.ir_version)
    return model


class StatesAsKept(ir.passes.InPlacePass):
    """Mixers that read and write states in fewer bits themselves.

    Before: Cast(s₁₆) → HyenaMixer → Cast(Clip(s')).   After: s₁₆ → HyenaMixer → s'₁₆. A number beyond those of 16 bits
    becomes infinite then, where Clip left the largest; it is seen in the next logits.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        changed = False
        for node in model.graph:
            if node.domain == DOMAIN and node.op_type == "HyenaMixer":
                for place in (1, 2):
                    changed |= _keep(model.graph, node, place)
        if changed:
            common.RemoveUnusedNodesPass()(model)  # and the ends of a Clip
        return ir.passes.PassResult(model, changed)


def _keep(graph: ir.Graph, node: ir.Node, place: int) -> bool:
    """Input and output `place` in the type that the state has outside, if both are cast and neither is heard else."""
    wide, new = node.inputs[place], node.outputs[place]
    assert wide is not None
    read, written = wide.producer(), _only_user(new)
    clip = None
    if written is not None and written.op_type == "Clip":
        clip, written = written, _only_user(written.outputs[0])
    if read is None or written is None or read.op_type != "Cast" or written.op_type != "Cast":
        return False
    kept, left = read.inputs[0], written.outputs[0]
    assert kept is not None
    halves = kept.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    if not halves or kept.dtype != left.dtype or new.is_graph_output():
        return False
    node.replace_input_with(place, kept)
    name = left.name
    new.type = left.type
    ir.convenience.replace_all_uses_with(left, new, replace_graph_outputs=True)
    graph.remove([step for step in (written, clip) if step is not None], safe=True)
    new.name = name
    if not wide.uses():
        graph.remove(read, safe=True)
    return True


def _only_user(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 else None


def _mixer(node: ir.Node) -> ir.Function:
    _, _, _, weight, bias, own, other, *_ = node.inputs
    signal, conv, recurrent = (_type(node.inputs[index]) for index in range(3))
    return mixer_function(
        taps=_size(weight, 0),
        order=_size(own, 0),
        block=node.attributes["block"].as_int(),
        outer=node.attributes["outer"].as_int(),
        complex_poles=other is not None,
        bias=bias is not None,
        packed=_there(node, 9),
        one_token=_one_token(node),
        signal=signal,
        conv_state=conv,
        recurrent_state=recurrent,
    )


def _linear(node: ir.Node) -> ir.Function:
    return linear_function(
        norm=node.attributes["norm"].as_string(),  # type: ignore[arg-type]
        activation=node.attributes["activation"].as_string(),  # type: ignore[arg-type]
        epsilon=node.attributes["epsilon"].as_float(),
        bias=_there(node, 2),
        residual=_there(node, 3),
        norm_bias=_there(node, 5),
        one_token=_one_token(node),
        signal=_type(node.inputs[0]),
        bias_type=_type(node.inputs[2]) if _there(node, 2) else None,
        fp8=node.op_type == "LinearFp8",
    )


def _sample(node: ir.Node) -> ir.Function:
    return sample_function(signal=_type(node.inputs[0]))


_FORMS: dict[str, Callable[[ir.Node], ir.Function]] = {
    "HyenaMixer": _mixer,
    "Linear": _linear,
    "LinearFp8": _linear,
    "Sample": _sample,
}


def _there(node: ir.Node, index: int) -> bool:
    return len(node.inputs) > index and node.inputs[index] is not None


def _one_token(node: ir.Node) -> bool:
    """Whether signals have one token: their second axis is of that size."""
    shape = node.inputs[0].shape  # type: ignore[union-attr]
    assert shape is not None
    return bool(shape[1] == 1)


def _type(value: ir.Value | None) -> ir.DataType:
    assert value is not None
    cast = value.producer()
    if value.dtype is None and cast is not None and cast.op_type == "Cast":
        return ir.DataType(cast.attributes["to"].as_int())
    assert value.dtype is not None
    return value.dtype


def _size(value: ir.Value | None, axis: int) -> int:
    assert value is not None
    assert value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int)
    return size
