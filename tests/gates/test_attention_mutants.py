"""Parity gates catch what can go wrong with attention, its caches and the counter of positions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from lhruntime import Session
from models import CONTEXT, VOCAB
from onnx import ModelProto, numpy_helper
from streams import assert_parity, onnx_stream, torch_stream, write_directory
from torch import Tensor
from torch.fx import Node

from lhcompile.artifacts import Lowered, Program
from lhcompile.errors import ParityError
from lhcompile.verify import SessionModel, check_session, check_streamed, fed

FEEDS = {"ones": [1] * CONTEXT, "odd": [3, 1, 1, 20]}
aten, lhc = torch.ops.aten, torch.ops.lhc


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def right(built: Callable) -> tuple[Program, Lowered]:
    made = built("hybrid", "modal")
    return made.program, made.lowered


# ---- streamed programs -----------------------------------------------------------------------------------------------


def attention(program: Program) -> Node:
    return next(node for node in program.graph.graph.nodes if node.target == lhc.attention.default)


def position(program: Program) -> Node:
    (node,) = [node for node in program.graph.graph.nodes if node.target == lhc.position.default]
    return node


def with_argument(program: Program, node: Node, place: int, change: Callable[[Node], Node]) -> None:
    with program.graph.graph.inserting_before(node):
        node.update_arg(place, change(node.args[place]))


def successor_is(program: Program, kind: str, change: Callable[[Node, Node], Node]) -> None:
    """Another successor for the first state of a kind: change(successor, state)."""
    index = 1 + next(i for i, state in enumerate(program.states) if state.kind == kind)
    (output,) = [node for node in program.graph.graph.nodes if node.op == "output"]
    old = [node for node in program.graph.graph.nodes if node.op == "placeholder"][index]
    results = list(output.args[0])
    with program.graph.graph.inserting_before(output):
        results[index] = change(results[index], old)
    output.args = (tuple(results),)


def place_one_late(program: Program) -> None:
    """Attention takes every row to stand one position further: written late, and one position too many heard."""
    graph = program.graph.graph
    with_argument(program, attention(program), 5, lambda at: graph.call_function(aten.add.Tensor, (at, 1)))


def cache_started_anew(program: Program) -> None:
    graph = program.graph.graph
    with_argument(program, attention(program), 5, lambda at: graph.call_function(torch.zeros_like, (at,)))


def tables_one_off(program: Program) -> None:
    """Rotary tables read for the position before."""
    reads = [node for node in program.graph.graph.nodes if node.target == aten.embedding.default]
    for name in {read.args[0].target for read in reads if read.args[1].target is not None}:
        table = getattr(program.graph, name)
        if table.shape == (CONTEXT, 1):
            table.copy_(table.roll(1, 0))


def positions_begin_anew(program: Program) -> None:
    """What reads positions believes that every piece is a beginning."""
    graph = program.graph.graph
    (places,) = [user for user in position(program).users if user.args[1] == 0]
    with graph.inserting_after(places):
        start = graph.call_function(aten.select.int, (places, 1, 0))
    with graph.inserting_after(start):
        column = graph.call_function(aten.unsqueeze.default, (start, 1))
    with graph.inserting_after(column):
        anew = graph.call_function(aten.sub.Tensor, (places, column))
    places.replace_all_uses_with(anew, delete_user_cb=lambda user: user not in (start, anew))


def counter_not_advanced(program: Program) -> None:
    successor_is(program, "position", lambda _, old: old)


def counter_one_ahead(program: Program) -> None:
    graph = program.graph.graph
    successor_is(program, "position", lambda new, _: graph.call_function(aten.add.Tensor, (new, 1)))


def heads_of_keys_swapped(program: Program) -> None:
    graph = program.graph.graph
    with_argument(program, attention(program), 1, lambda k: graph.call_function(aten.flip.default, (k, [2])))


def values_kept(program: Program) -> None:
    successor_is(program, "value", lambda _, old: old)


def scale_of_the_width_forgotten(program: Program) -> None:
    attention(program).update_arg(6, 1.0)


PROGRAMS = [
    cache_started_anew,
    tables_one_off,
    positions_begin_anew,
    counter_not_advanced,
    heads_of_keys_swapped,
    values_kept,
    scale_of_the_width_forgotten,
]


def mutated(program: Program, change: Callable[[Program], None]) -> Program:
    changed = Program(copy.deepcopy(program.graph), program.context, program.states)
    change(changed)
    changed.graph.recompile()
    return changed


@pytest.mark.parametrize("change", PROGRAMS, ids=lambda change: change.__name__)
def test_programs(right: tuple[Program, Lowered], change: Callable[[Program], None]) -> None:
    program, wrong = right[0], mutated(right[0], change)
    for cuts in FEEDS.values():
        with pytest.raises(AssertionError, match="differs by"):
            assert_parity(torch_stream(wrong), torch_stream(program), program.states, tokens(), cuts)
    with pytest.raises(ParityError, match=r"streamed: (logits|state) .* differs by"):
        check_streamed(wrong, program, tokens())


@pytest.mark.parametrize("change", [place_one_late, counter_one_ahead], ids=lambda change: change.__name__)
def test_programs_that_run_out_of_room(right: tuple[Program, Lowered], change: Callable[[Program], None]) -> None:
    """One position further than there are: the last is not fed."""
    program, wrong, few = right[0], mutated(right[0], change), tokens()[:, :16]
    for cuts in ([1] * 16, [3, 1, 1]):
        with pytest.raises(AssertionError, match="differs by"):
            assert_parity(torch_stream(wrong), torch_stream(program), program.states, few, cuts)
    with pytest.raises(ParityError, match=r"streamed: (logits|state) .* differs by"):
        check_streamed(wrong, program, few)


# ---- graphs ----------------------------------------------------------------------------------------------------------


def nodes_of(model: ModelProto, operator: str, reads: str = "") -> list[onnx.NodeProto]:
    found = [node for node in model.graph.node if node.op_type == operator and (not reads or reads in node.input)]
    assert found
    return found


def constant(model: ModelProto, value: np.ndarray, name: str) -> str:
    model.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def shifted(model: ModelProto, name: str, by: int) -> str:
    """Another value: `name` plus a number."""
    number = constant(model, np.array([by]), f"{name}.by")
    model.graph.node.insert(0, onnx.helper.make_node("Add", [name, number], [f"{name}.shifted"]))
    return f"{name}.shifted"


def own_position_hidden(model: ModelProto) -> None:
    """The mask hides one position too many."""
    for node in nodes_of(model, "Greater"):
        node.op_type = "GreaterOrEqual"


def next_position_heard(model: ModelProto) -> None:
    """The mask hides one position too few: rows hear what a cache holds behind them, here nothing, with a weight."""
    for node in nodes_of(model, "Greater", "past.position"):
        node.input[1] = shifted(model, "past.position", 1)


def written_one_late(model: ModelProto) -> None:
    """The last position but one is written over the last, which is not written at all."""
    last = constant(model, np.array([[CONTEXT - 1]]), "last")
    late = shifted(model, "past.position", 1)
    model.graph.node.insert(1, onnx.helper.make_node("Min", [late, last], ["late"]))
    for node in nodes_of(model, "Unsqueeze", "past.position"):
        node.input[0] = "late"


def gathered_one_late(model: ModelProto) -> None:
    for node in nodes_of(model, "Sub", "past.position"):
        node.input[1] = shifted(model, "past.position", 1)


def tables_read_one_before(model: ModelProto) -> None:
    """Position 0 reads the last row."""
    before = shifted(model, "past.position", -1)
    for node in nodes_of(model, "Gather", "past.position"):
        node.input[1] = before


def counter_not_advanced_by_graphs(model: ModelProto) -> None:
    (node,) = [node for node in model.graph.node if node.output[0] == "present.position"]
    node.CopyFrom(onnx.helper.make_node("Identity", ["past.position"], ["present.position"]))


def keys_taken_for_values(model: ModelProto) -> None:
    names = {"past_key_values.2.key": "past_key_values.2.value", "past_key_values.2.value": "past_key_values.2.key"}
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)


GRAPHS = [
    ("step", own_position_hidden),
    ("prefill", own_position_hidden),
    ("step", next_position_heard),
    ("step", written_one_late),
    ("prefill", gathered_one_late),
    ("step", tables_read_one_before),
    ("step", counter_not_advanced_by_graphs),
    ("prefill", counter_not_advanced_by_graphs),
    ("step", keys_taken_for_values),
    ("prefill", keys_taken_for_values),
]


def edited(model: ir.Model, edit: Callable[[ModelProto], None]) -> ir.Model:
    proto = ModelProto()
    proto.CopyFrom(ir.to_proto(model))
    edit(proto)
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


def test_right_graphs_pass(right: tuple[Program, Lowered], tmp_path: Path) -> None:
    program, lowered = right
    for cuts in FEEDS.values():
        assert_parity(onnx_stream(lowered), torch_stream(program), program.states, tokens(), cuts)
    builds_gate(program, lowered, tmp_path)
    check_streamed(program, program, tokens())


def builds_gate(program: Program, lowered: Lowered, folder: Path) -> None:
    directory = write_directory(program, lowered, folder / "out")
    check_session(SessionModel(lambda batch: Session.load(directory, batch=batch, threads=1)), fed(program, tokens()))


@pytest.mark.parametrize(("graph", "edit"), GRAPHS, ids=lambda part: getattr(part, "__name__", part))
def test_graphs(
    right: tuple[Program, Lowered], graph: str, edit: Callable[[ModelProto], None], tmp_path: Path
) -> None:
    program, lowered = right
    models = {name: getattr(lowered, name) for name in ("step", "prefill")}
    models[graph] = edited(models[graph], edit)
    wrong = Lowered(models["step"], models["prefill"], lowered.target, lowered.states)
    for cuts in FEEDS.values():
        if graph == "prefill" and cuts == FEEDS["ones"]:
            continue  # which runs nothing but steps
        with pytest.raises(AssertionError, match=r"differs by|not finite"):
            assert_parity(onnx_stream(wrong), torch_stream(program), program.states, tokens(), cuts)
    with pytest.raises(ParityError, match=r"onnx: (logits|state) .* differs by"):
        builds_gate(program, wrong, tmp_path)
