"""The step with the choice of the next token behind it: a loop over it never leaves the device.

    step     input_ids, states → logits [batch, 1, vocab], states'
    decode   input_ids, states, uniform, temperature, top_k, top_p → tokens int64 [batch, 1], states'

The last four are [batch], one setting a row; `lower.functions.sample_function` says what they mean. Tables of floating
point are looked up by `Embedding`, which takes a fraction of the time of onnxruntime's Gather.

The past of a short convolution is a window over the last tokens of a projection. In the step it is one state, of which
every call copies all but the oldest token. Here each token of it is a tensor of its own, and the newest is what the
projection writes: a loop gives the tensors new names from call to call, and nothing is copied.

    step     conv_state [batch, k − 1, C] → conv_state' [batch, k − 1, C]
    decode   conv_state.past_{k − 1}, …, conv_state.past_1, each [batch, 1, C] → conv_state'.newest [batch, 1, C]

The number is the age of a token, in calls. The tokens are of the projection's type: also those of a bfloat16 signal,
whose window is float32 in the other graphs.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from lhcompile.artifacts import Past
from lhcompile.lower.body import DOMAIN, SHORT

__all__ = ["SETTINGS", "TOKENS", "decoding"]

_MOST = 7
"""Tokens of a past that the kernels of HyenaStep take (kMostPast in runtimes/ops/src/args.h)."""

SETTINGS = {
    "uniform": ir.DataType.FLOAT,
    "temperature": ir.DataType.FLOAT,
    "top_k": ir.DataType.INT64,
    "top_p": ir.DataType.FLOAT,
}
"""Inputs of `decode` behind the states, in their order."""
TOKENS = "tokens"
"""Name of the first output."""


def decoding(step: ir.Model, prefill: ir.Model) -> tuple[ir.Model, dict[str, Past]]:
    """The decode graph of a step graph of tokens, which shares its weights and stays as it is; prefill: the graph whose
    states it goes on with.

    And the states, by their input in the step, whose tokens are tensors of their own in it.
    """
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
    _look_up(graph)
    model.opset_imports[DOMAIN] = 1
    past = {}
    filled = {name: signal for name, (_, signal) in _windows(prefill.graph).items()}
    for name, (mixer, signal) in _windows(graph).items():
        if _is_taken_apart(mixer) and filled.get(name) == signal:
            past[name] = _take_apart(graph, mixer)
    common.RemoveUnusedNodesPass()(model)
    return model, past


def _look_up(graph: ir.Graph) -> None:
    """Rows of tables, in floating point, that are gathered by the graph's own tokens are looked up by Embedding."""
    for node in list(graph):
        if node.op_type != "Gather" or node.domain or node.attributes.get_int("axis", 0) != 0:
            continue
        (table, tokens), (entries,) = node.inputs, node.outputs
        if tokens is not graph.inputs[0] or table is None or not table.is_initializer() or table.dtype not in SHORT:
            continue
        assert table.shape is not None
        if len(table.shape) == 2:
            look_up = ir.node("Embedding", [table, tokens], domain=DOMAIN)
            ir.convenience.replace_nodes_and_values(graph, node, [node], [look_up], [entries], look_up.outputs)


def _windows(graph: ir.Graph) -> dict[str, tuple[ir.Node, ir.DataType]]:
    """Mixers and the type of their signal, by the name of the state that is their past, where it holds the signal's
    tokens as they are."""
    found = {}
    for node in graph:
        if (node.domain, node.op_type) != (DOMAIN, "HyenaMixer"):
            continue
        (projected, before), after = node.inputs[:2], node.outputs[1]
        if projected is None or before is None or not before.is_graph_input() or len(before.uses()) != 1:
            continue
        if not after.is_graph_output() or after.uses() or projected.dtype is None:
            continue
        if (projected.dtype, before.dtype) in _HELD:
            found[str(before.name)] = (node, projected.dtype)
    return found


_HELD = {
    (ir.DataType.FLOAT, ir.DataType.FLOAT),
    (ir.DataType.FLOAT16, ir.DataType.FLOAT16),
    (ir.DataType.BFLOAT16, ir.DataType.FLOAT),
}
"""Types of a signal, and of windows that read as its tokens do. A window of float32 holds infinite numbers of float16,
which its tokens are cut at (`lower.functions`)."""


def _is_taken_apart(mixer: ir.Node) -> bool:
    projected, before = mixer.inputs[:2]
    assert projected is not None
    assert before is not None
    if projected.producer() is None or projected.is_graph_output() or before.shape is None:
        return False
    return before.shape[1] in range(1, _MOST + 1)


def _take_apart(graph: ir.Graph, mixer: ir.Node) -> Past:
    """The mixer becomes a HyenaStep, its state one tensor a token."""
    projected, before, *rest = mixer.inputs
    mixed, after, state = mixer.outputs
    assert projected is not None
    assert before is not None
    assert projected.dtype is not None
    assert before.shape is not None
    batch, count, channels = before.shape
    assert isinstance(count, int)
    shape = ir.Shape([batch, 1, channels])
    kind = ir.TensorType(projected.dtype)
    tokens = [ir.Value(name=f"{before.name}.past_{age}", shape=shape, type=kind) for age in range(count, 0, -1)]
    rest += [None] * (8 - len(rest))
    step = ir.node("HyenaStep", [projected, *rest, *tokens], mixer.attributes, domain=DOMAIN, num_outputs=2)
    graph.outputs[graph.outputs.index(after)] = projected
    ir.convenience.replace_nodes_and_values(graph, mixer, [mixer], [step], [mixed, state], list(step.outputs))
    place = graph.inputs.index(before)
    graph.inputs.pop(place)
    for token in reversed(tokens):
        graph.inputs.insert(place, token)
    projected.name, projected.shape = f"{after.name}.newest", shape
    dtype = None if projected.dtype == before.dtype else projected.dtype.name.lower()
    return Past([str(token.name) for token in tokens], str(projected.name), dtype)


def _narrow(logits: ir.Value) -> ir.Value:
    """Logits as they were before they were cast to float32, which changes none of them."""
    node = logits.producer()
    if node is None or node.op_type != "Cast" or node.domain or node.inputs[0] is None:
        return logits
    return node.inputs[0] if node.inputs[0].dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) else logits
