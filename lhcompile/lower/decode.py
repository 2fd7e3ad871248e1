"""The step with the choice of the next token behind it: a loop over it never leaves the device.

    step     input_ids, states → logits [batch, 1, vocab], states'
    decode   input_ids, states, uniform, temperature, top_k, top_p → tokens int64 [batch, 1], states'

The last four are [batch], one setting a row; `lower.functions.sample_function` says what they mean.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from lhcompile.lower.body import DOMAIN

__all__ = ["SETTINGS", "TOKENS", "decoding"]

SETTINGS = {
    "uniform": ir.DataType.FLOAT,
    "temperature": ir.DataType.FLOAT,
    "top_k": ir.DataType.INT64,
    "top_p": ir.DataType.FLOAT,
}
"""Inputs of `decode` behind the states, in their order."""
TOKENS = "tokens"
"""Name of the first output."""


def decoding(step: ir.Model) -> ir.Model:
    """The decode graph of a step graph of tokens, which shares its weights and stays as it is."""
    model = step.clone()
    graph = model.graph
    ids, logits = graph.inputs[0], graph.outputs[0]
    assert ids.shape is not None
    row = ir.Shape([ids.shape[0]])
    settings = [ir.Value(name=name, shape=row, type=ir.TensorType(kind)) for name, kind in SETTINGS.items()]
    graph.inputs.extend(settings)
    sample = ir.node("Sample", [_narrow(logits), *settings], domain=DOMAIN)
    (tokens,) = sample.outputs
    tokens.name, tokens.shape, tokens.type = TOKENS, ids.shape, ids.type
    graph.append(sample)
    graph.outputs[0] = tokens
    graph.name = "decode"
    model.opset_imports[DOMAIN] = 1
    common.RemoveUnusedNodesPass()(model)
    return model


def _narrow(logits: ir.Value) -> ir.Value:
    """Logits as they were before they were cast to float32, which changes none of them."""
    node = logits.producer()
    if node is None or node.op_type != "Cast" or node.domain or node.inputs[0] is None:
        return logits
    return node.inputs[0] if node.inputs[0].dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) else logits
