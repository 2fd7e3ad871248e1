"""Which form of a fused operator each node is: from the types and shapes around it to its function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from lhcompile.lower.body import DOMAIN, VERSION
from lhcompile.lower.functions import mixer_function, sample_function
from lhcompile.lower.projections import embedding_function, linear_function, mlp_function

__all__ = ["with_functions"]

IR_VERSION = 10
"""The first in which a function may have several forms."""


def with_functions(model: ir.Model, target: str) -> ir.Model:
    """The model, whose nodes of fused operators name their form now, and which carries the functions for them.

    Functions that it had before are gone. The forms follow from the types and shapes of the nodes' values, and on `cpu`
    from what onnxruntime is fast at.
    """
    model.functions.clear()
    made: dict[object, ir.Function] = {}
    for node in model.graph.all_nodes():
        if node.domain != DOMAIN:
            continue
        function = _FORMS[node.op_type](node, target)
        function = made.setdefault(function.identifier(), function)
        model.functions[function.identifier()] = function
        node.overload = function.overload
        node.attributes.clear()
        node.attributes.update(function.attributes)
    if made:
        model.opset_imports[DOMAIN] = VERSION
        model.ir_version = max(IR_VERSION, model.ir_version)
    return model


def _mixer(node: ir.Node, target: str) -> ir.Function:
    apart = node.op_type == "HyenaStep"
    state, weight, bias, own, other = node.inputs[1:6] if apart else node.inputs[2:7]
    return mixer_function(
        taps=_size(weight, 0),
        order=_size(own, 0),
        block=node.attributes["block"].as_int(),
        outer=node.attributes["outer"].as_int(),
        complex_poles=other is not None,
        bias=bias is not None,
        packed=_there(node, 8 if apart else 9),
        one_token=_one_token(node),
        apart=apart,
        whole=node.attributes["block"].as_int() == _size(own, 1),
        signal=_type(node.inputs[0]),
        conv_state=_type(node.inputs[9 if apart else 1]),
        recurrent_state=_type(state),
    )


def _linear(node: ir.Node, target: str) -> ir.Function:
    blocks = _block_product(node) if target == "cpu" else None
    return linear_function(
        **_settings(node),
        bias=_there(node, 2),
        residual=_there(node, 3),
        norm_bias=_there(node, 5),
        bias_type=_type(node.inputs[2]) if _there(node, 2) else None,
        name=node.op_type,  # type: ignore[arg-type]
        byte_signals=blocks is not None,
        block_product=blocks,
    )


def _mlp(node: ir.Node, target: str) -> ir.Function:
    biases = [value for place in (2, 4) if (value := node.inputs[place]) is not None]
    assert len({_type(value) for value in biases}) <= 1
    return mlp_function(
        **_settings(node),
        up_bias=_there(node, 2),
        down_bias=_there(node, 4),
        residual=_there(node, 5),
        norm_bias=_there(node, 7),
        bias_type=_type(biases[0]) if biases else None,
    )


def _settings(node: ir.Node) -> dict[str, Any]:
    """What projections have in common."""
    return {
        "norm": node.attributes["norm"].as_string(),
        "activation": node.attributes["activation"].as_string(),
        "epsilon": node.attributes["epsilon"].as_float(),
        "one_token": _one_token(node),
        "signal": _type(node.inputs[0]),
    }


def _block_product(node: ir.Node) -> tuple[int, int] | None:
    """Outputs and inputs of a product of 4-bit codes."""
    if node.op_type != "LinearInt4":
        return None
    return _size(node.inputs[1], 0), _size(node.inputs[0], -1)


def _embedding(node: ir.Node, target: str) -> ir.Function:
    if node.op_type == "EmbeddingInt4":
        return embedding_function(int4=True)
    return embedding_function(signal=_type(node.inputs[0]))


def _sample(node: ir.Node, target: str) -> ir.Function:
    return sample_function(signal=_type(node.inputs[0]))


_FORMS: dict[str, Callable[[ir.Node, str], ir.Function]] = {
    "Embedding": _embedding,
    "EmbeddingInt4": _embedding,
    "HyenaMixer": _mixer,
    "HyenaStep": _mixer,
    "Linear": _linear,
    "LinearFp8": _linear,
    "LinearInt4": _linear,
    "MlpFp8": _mlp,
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
