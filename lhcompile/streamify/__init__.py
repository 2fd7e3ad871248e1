"""Stage: program of whole sequences in, program with states in and out.

    before                                       after
    y, _ = lhc.fir(x, w, b, None, groups)        y, s' = lhc.fir(x, w, b, s, groups)      s a graph input
    return logits                                return logits, s', …

Everything else in a recognized program treats each position on its own and passes through. The result takes any
number of tokens, so a sequence may be fed whole, in cuts or token by token.
"""

from __future__ import annotations

import copy
import operator
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lhcompile.artifacts import Program, State, module_path

__all__ = ["streamify"]

lhc = torch.ops.lhc
_STATE_ARGUMENT = {lhc.fir.default: 3, lhc.long_conv.default: 2, lhc.modal_ssm.default: 6}
_KIND = {lhc.fir.default: "fir", lhc.long_conv.default: "long_conv", lhc.modal_ssm.default: "modal"}
_LAYER_STATE = {"fir": "conv_state", "modal": "recurrent_state"}


def streamify(program: Program) -> Program:
    """Give every operator with memory its state as a graph input and its successor as an output."""
    module = copy.copy(program.graph)
    module.graph = copy.deepcopy(program.graph.graph)
    graph = module.graph
    keepers = [node for node in graph.nodes if node.target in _STATE_ARGUMENT]
    names = _names([(_KIND[node.target], module_path(node)) for node in keepers])
    (output,) = [node for node in graph.nodes if node.op == "output"]
    last_input = next(node for node in graph.nodes if node.op == "placeholder")
    states, successors = [], []
    for node, (name, successor) in zip(keepers, names, strict=True):
        with graph.inserting_after(last_input):
            last_input = graph.placeholder(re.sub(r"\W", "_", name))
        place = _STATE_ARGUMENT[node.target]
        node.args = (*node.args[:place], last_input, *node.args[place + 1 :])
        with graph.inserting_before(output):
            successors.append(graph.call_function(operator.getitem, (node, 1)))
        states.append(State(name, successor, _shape(module, node), _KIND[node.target], module_path(node)))
    output.args = ((output.args[0], *successors),)
    module.recompile()
    return Program(graph=module, context=program.context, states=tuple(states))


def _names(layers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(input name, output name) of each state, from its (kind, module path).

    A layer with exactly one fir and one modal state, the only such layer of its number, has the names that
    generation runtimes look for; any other layout is named by module and kind.
    """
    numbers = [re.match(r"(.*?\b(\d+))\b", path) for _, path in layers]
    prefixes = [match.group(1) if match else "" for match in numbers]
    kinds: dict[str, list[str]] = {}
    for prefix, (kind, _) in zip(prefixes, layers, strict=True):
        kinds.setdefault(prefix, []).append(kind)
    pairs = {prefix for prefix, held in kinds.items() if prefix and sorted(held) == ["fir", "modal"]}
    per_number = Counter(re.findall(r"\d+$", prefix)[0] for prefix in pairs)
    seen: Counter[str] = Counter()
    names = []
    for prefix, match, (kind, path) in zip(prefixes, numbers, layers, strict=True):
        if match and prefix in pairs and per_number[match.group(2)] == 1:
            stem = f"{match.group(2)}.{_LAYER_STATE[kind]}"
            names.append((f"past_key_values.{stem}", f"present.{stem}"))
            continue
        stem = f"{path}.{kind}".replace(" ", "_")
        seen[stem] += 1
        stem += f".{seen[stem] - 1}" if seen[stem] > 1 else ""
        names.append((f"past.{stem}", f"present.{stem}"))
    return names


def _shape(module: GraphModule, node: Node) -> tuple[int, ...]:
    """The state's shape without batch, from the operator's weights and its input's channels."""
    weight = _buffer(module, node.args[1])
    if node.target == lhc.fir.default:
        groups = node.args[4]
        assert isinstance(groups, int)
        return (weight.shape[2] - 1, weight.shape[1] * groups)
    channels = node.args[0].meta["sizes"][2].offset  # type: ignore[union-attr]
    if node.target == lhc.long_conv.default:
        return (weight.shape[-1] - 1, channels)
    if node.args[5] is None:
        return (weight.shape[0], channels)
    return (1, channels // weight.shape[1] * len(_buffer(module, node.args[5])))


def _buffer(module: GraphModule, node: Any) -> Tensor:
    return getattr(module, str(node.target))
