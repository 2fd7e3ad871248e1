"""Parity gates can fail: every gate catches every mutant, and passes what is not mutated.

The gates are `assert_parity` of the tests and those of the build itself (`lhcompile.verify`). A mutant is a streamed
program, or its graphs, with one thing wrong, the mildest being one pole of one filter that is one per cent too small.
"""

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
from models import VOCAB
from onnx import ModelProto, NodeProto, numpy_helper
from streams import assert_parity, onnx_stream, torch_stream, write_directory
from torch import Tensor
from torch.fx import Node

from lhcompile.artifacts import Lowered, Program
from lhcompile.errors import ParityError
from lhcompile.lower.export import export_onnx
from lhcompile.lower.portable import Prefill, Step
from lhcompile.verify import SessionModel, check_session, check_streamed, fed

FEEDS = {"whole": [], "ones": [1] * 100, "odd": [3, 33, 1, 1, 40]}
MUTANTS: dict[str, Callable[[Program], None]] = {}


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (3, 100), generator=torch.Generator().manual_seed(0))


def mutant(change: Callable[[Program], None]) -> Callable[[Program], None]:
    MUTANTS[change.__name__.replace("_", " ")] = change
    return change


def mutated(program: Program, change: Callable[[Program], None]) -> Program:
    changed = Program(copy.deepcopy(program.graph), program.context, program.states)
    change(changed)
    changed.graph.recompile()
    return changed


def operators(program: Program, *names: str) -> list[Node]:
    wanted = {f"lhc.{name}.default" for name in names}
    return [node for node in program.graph.graph.nodes if str(node.target) in wanted]


def weight(program: Program, node: Node, place: int) -> Tensor:
    return getattr(program.graph, node.args[place].target)


@mutant
def scaled_by_two(program: Program) -> None:
    node = operators(program, "modal_ssm", "long_conv")[0]
    weight(program, node, 3 if len(node.args) > 4 else 1).mul_(2)
    if len(node.args) > 4:
        weight(program, node, 4).mul_(2)


@mutant
def two_channels_swapped(program: Program) -> None:
    """Two filters of the long convolution stand in each other's place."""
    node = operators(program, "modal_ssm", "long_conv")[0]
    modal = len(node.args) > 4
    for place in range(1, 5 if modal else 2):
        axis = -1 if modal else 0
        table = weight(program, node, place)
        first, second = table.select(axis, 0).clone(), table.select(axis, 1).clone()
        table.select(axis, 0).copy_(second)
        table.select(axis, 1).copy_(first)


@mutant
def two_inputs_swapped(program: Program) -> None:
    """Two channels of the short convolution's state and input are taken for each other."""
    table = weight(program, operators(program, "fir")[0], 1)
    table[[0, 1]] = table[[1, 0]]


@mutant
def taps_reversed(program: Program) -> None:
    table = weight(program, operators(program, "fir")[0], 1)
    table.copy_(table.flip(-1))


@mutant
def state_dropped(program: Program) -> None:
    """The state that comes out is zero."""
    replace_successor(program, lambda graph, new, _: graph.call_function(torch.zeros_like, (new,)))


@mutant
def state_kept(program: Program) -> None:
    """The state that comes out is the one that went in."""
    replace_successor(program, lambda _, __, old: old)


@mutant
def state_not_read(program: Program) -> None:
    node = operators(program, "modal_ssm", "long_conv")[0]
    place = 6 if len(node.args) > 4 else 2
    with program.graph.graph.inserting_before(node):
        zero = program.graph.graph.call_function(torch.zeros_like, (node.args[place],))
    node.args = (*node.args[:place], zero, *node.args[place + 1 :])


@mutant
def one_pole_perturbed(program: Program) -> None:
    """One conjugate pair of one filter decays one per cent faster; kept taps decay so in one filter."""
    node = operators(program, "modal_ssm", "long_conv")[0]
    if len(node.args) > 4:
        own, other = weight(program, node, 1), weight(program, node, 2)
        half = own.shape[0] // 2
        for table in (own, other):
            table[1, 0] *= 0.99
            table[1 + half, 0] *= 0.99
    else:
        table = weight(program, node, 1)
        table[0] *= 0.99 ** torch.arange(table.shape[-1])


def entry_mistaken(program: Program) -> None:
    """A state that is read is not among those kept; one that nothing uses is, in its place."""
    node = operators(program, "modal_ssm")[0]
    kept, readout = weight(program, node, 5), weight(program, node, 3).flatten()
    (unused,) = np.setdiff1d(np.arange(len(readout)), kept.numpy())[:1]
    wrong = torch.cat([kept[readout[kept] != 0][1:], kept[readout[kept] == 0], torch.tensor([unused])])
    kept.copy_(wrong.sort().values)


def replace_successor(program: Program, new: Callable) -> None:
    """Another successor for the first long convolution's state."""
    index = next(i for i, state in enumerate(program.states) if state.kind in ("modal", "long_conv"))
    graph = program.graph.graph
    (output,) = [node for node in graph.nodes if node.op == "output"]
    old = [node for node in graph.nodes if node.op == "placeholder"][1 + index]
    results = list(output.args[0])
    with graph.inserting_before(output):
        results[1 + index] = new(graph, results[1 + index], old)
    output.args = (tuple(results),)


# ---- streamed programs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["modal", "packed", "exact"])
def program(request: pytest.FixtureRequest, built: Callable) -> Program:
    return built("per channel", request.param).program


@pytest.mark.parametrize("cuts", FEEDS.values(), ids=FEEDS)
@pytest.mark.parametrize("name", MUTANTS)
def test_parity_of_programs(program: Program, name: str, cuts: list[int]) -> None:
    wrong = mutated(program, MUTANTS[name])
    reference, states = torch_stream(program), program.states
    assert_parity(torch_stream(mutated(program, lambda _: None)), reference, states, tokens(), cuts)
    unheard = name == "state not read" and not cuts
    if unheard:  # from a zero state in one piece there is nothing to read
        assert_parity(torch_stream(wrong), reference, states, tokens(), cuts)
        return
    with pytest.raises(AssertionError, match="differs by"):
        assert_parity(torch_stream(wrong), reference, states, tokens(), cuts)


def builds_gate_for_programs(program: Program, wrong: Program) -> None:
    def whole(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return program.graph(ids, *program.start(len(ids)))[0]

    check_streamed(program, whole, tokens())
    with pytest.raises(ParityError, match=r"streamed: (logits|state) .* differs by"):
        check_streamed(wrong, whole, tokens())


@pytest.mark.parametrize("name", MUTANTS)
def test_the_builds_own_gate_for_programs(program: Program, name: str) -> None:
    builds_gate_for_programs(program, mutated(program, MUTANTS[name]))


def test_an_entry_mistaken(built: Callable) -> None:
    program = built("per channel", "packed").program
    wrong = mutated(program, entry_mistaken)
    for cuts in FEEDS.values():
        with pytest.raises(AssertionError, match="differs by"):
            assert_parity(torch_stream(wrong), torch_stream(program), program.states, tokens(), cuts)
    builds_gate_for_programs(program, wrong)


# ---- graphs ----------------------------------------------------------------------------------------------------------

GRAPHS = Callable[[Lowered, Program], Lowered]
"""a lowered model and its program → the same with something wrong"""


def edited(model: ir.Model, edit: Callable[[ModelProto], None]) -> ir.Model:
    proto = ModelProto()
    proto.CopyFrom(ir.to_proto(model))
    edit(proto)
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


def both(edit: Callable[[ModelProto], None]) -> GRAPHS:
    return lambda lowered, _: Lowered(
        edited(lowered.step, edit), edited(lowered.prefill, edit), lowered.target, lowered.states
    )


def only(graph: str, edit: Callable[[ModelProto], None]) -> GRAPHS:
    def change(lowered: Lowered, _: Program) -> Lowered:
        step, prefill = lowered.step, lowered.prefill
        if graph == "step":
            step = edited(step, edit)
        else:
            prefill = edited(prefill, edit)
        return Lowered(step, prefill, lowered.target, lowered.states)

    return change


def another(graph: str, change: Callable[[Program], None]) -> GRAPHS:
    """One of the two graphs is lowered from a mutated program."""

    def exchanged(lowered: Lowered, program: Program) -> Lowered:
        wrong = mutated(program, change)
        if graph == "step":
            return Lowered(export_onnx(wrong, Step, True), lowered.prefill, lowered.target, lowered.states)
        return Lowered(lowered.step, export_onnx(wrong, Prefill, False), lowered.target, lowered.states)

    return exchanged


def freed(model: ModelProto, name: str) -> str:
    """Gives an output's value another name, so that the output can be something else."""
    inner = f"{name}.right"
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, each in enumerate(names):
                if each == name:
                    names[i] = inner
    return inner


def add(model: ModelProto, operator: str, inputs: list[str], output: str, **attributes: int) -> None:
    model.graph.node.append(onnx.helper.make_node(operator, inputs, [output], **attributes))


def constant(model: ModelProto, value: np.ndarray, name: str) -> str:
    model.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def logits_doubled(model: ModelProto) -> None:
    inner = freed(model, "logits")
    add(model, "Mul", [inner, constant(model, np.array(2, np.float32), "two")], "logits")


def recurrent_state_kept(model: ModelProto) -> None:
    freed(model, "present.0.recurrent_state")
    add(model, "Identity", ["past_key_values.0.recurrent_state"], "present.0.recurrent_state")


def conv_state_dropped(model: ModelProto) -> None:
    inner = freed(model, "present.0.conv_state")
    add(model, "Sub", [inner, inner], "present.0.conv_state")


def channels_rolled(model: ModelProto) -> None:
    """The channels of a state are one place off."""
    inner = freed(model, "present.0.recurrent_state")
    (state,) = [output for output in model.graph.output if output.name == "present.0.recurrent_state"]
    order = constant(model, np.roll(np.arange(state.type.tensor_type.shape.dim[2].dim_value), 1), "rolled")
    add(model, "Gather", [inner, order], "present.0.recurrent_state", axis=2)


def reads_state(node: NodeProto) -> bool:
    return node.op_type == "GatherElements" and node.input[0] == "past_key_values.0.recurrent_state"


def writes_state(node: NodeProto) -> bool:
    return node.op_type == "GatherElements" and node.output[0] == "present.0.recurrent_state"


def reads_input(node: NodeProto) -> bool:
    return node.op_type == "GatherElements" and not reads_state(node)


def adds_up(node: NodeProto) -> bool:
    return node.op_type == "ScatterElements"


def indexed_wrongly(chosen: Callable[[NodeProto], bool]) -> Callable[[ModelProto], None]:
    """The first such node reads or writes one place beside where it should."""

    def change(model: ModelProto) -> None:
        place = next(i for i, node in enumerate(model.graph.node) if chosen(node))
        node = model.graph.node[place]
        (spread,) = [each for each in model.graph.node if each.output[0] == node.input[1]]
        (index,) = [tensor for tensor in model.graph.initializer if tensor.name in spread.input]
        (zeros,) = [name for name in spread.input if name != index.name]
        rolled = constant(model, np.roll(numpy_helper.to_array(index), 1), "rolled")
        node.input[1] = "rolled.spread"
        model.graph.node.insert(place, onnx.helper.make_node(spread.op_type, [zeros, rolled], ["rolled.spread"]))

    return change


def wrong_remainder(model: ModelProto) -> None:
    """A first chunk of k tokens advances the state by Q − k tokens."""
    fillings = {node.output[0] for node in model.graph.node if node.op_type == "Mod"}
    counts = {
        node.output[0]: node.input[1]
        for node in model.graph.node
        if node.op_type == "Sub" and node.input[1] in fillings
    }
    powers = [node for node in model.graph.node if node.op_type == "Gather" and node.input[1] in counts]
    assert powers
    for node in powers:
        node.input[1] = counts[node.input[1]]


def wrong_leap(model: ModelProto) -> None:
    """From chunk to chunk the state decays one per cent too fast."""
    bodies = [each.g for node in model.graph.node if node.op_type == "Scan" for each in node.attribute if each.g.node]
    names = {name for body in bodies for node in body.node if node.op_type == "Mul" for name in node.input}
    leaps = [tensor for tensor in model.graph.initializer if tensor.name in names]
    leaps += [tensor for body in bodies for tensor in body.initializer if tensor.name in names]
    assert leaps
    for tensor in leaps:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(0.99), tensor.name))


GRAPH_MUTANTS: dict[str, GRAPHS] = {
    "logits doubled": both(logits_doubled),
    "logits of steps doubled": only("step", logits_doubled),
    "modal state kept by steps": only("step", recurrent_state_kept),
    "modal state kept by prefill": only("prefill", recurrent_state_kept),
    "conv state dropped": both(conv_state_dropped),
    "channels of a state rolled": only("prefill", channels_rolled),
    "wrong remainder of a chunk": only("prefill", wrong_remainder),
    "wrong leap between chunks": only("prefill", wrong_leap),
    "step with a pole perturbed": another("step", one_pole_perturbed),
    "prefill with a pole perturbed": another("prefill", one_pole_perturbed),
    "step with channels swapped": another("step", two_channels_swapped),
    "step with taps reversed": another("step", taps_reversed),
}
PACKED_MUTANTS: dict[str, GRAPHS] = {
    **GRAPH_MUTANTS,
    "another state taken for the partner": only("step", indexed_wrongly(reads_state)),
    "another filter's input heard": only("step", indexed_wrongly(reads_input)),
    "spoken for another filter": only("step", indexed_wrongly(adds_up)),
    "states of a prompt unpacked wrongly": only("prefill", indexed_wrongly(reads_state)),
    "states of a prompt packed wrongly": only("prefill", indexed_wrongly(writes_state)),
    "prefill with an entry mistaken": another("prefill", entry_mistaken),
    "step with an entry mistaken": another("step", entry_mistaken),
}
WRONG = [
    *(("modal", name) for name in GRAPH_MUTANTS),
    *(("packed", name) for name in PACKED_MUTANTS),
]
WAYS = [[], [70, *[1] * 30], [3, 33, 1, 63]]


@pytest.fixture(scope="module", params=WRONG, ids=": ".join)
def wrong(request: pytest.FixtureRequest, built: Callable) -> tuple[Program, Lowered]:
    """(the right program, wrong graphs of it)"""
    form, name = request.param
    made = built("per channel", form)
    return made.program, PACKED_MUTANTS[name](made.lowered, made.program)


def gate(lowered: Lowered, program: Program) -> None:
    stream = onnx_stream(lowered)
    for cuts in WAYS:
        assert_parity(stream, torch_stream(program), program.states, tokens(), cuts)


def builds_gate(lowered: Lowered, program: Program, folder: Path) -> None:
    directory = write_directory(program, lowered, folder / "out")
    check_session(SessionModel(lambda batch: Session.load(directory, batch=batch, threads=1)), fed(program, tokens()))


@pytest.mark.parametrize("form", ["modal", "packed"])
def test_right_graphs_pass(built: Callable, form: str, tmp_path: Path) -> None:
    right = built("per channel", form)
    gate(right.lowered, right.program)
    builds_gate(right.lowered, right.program, tmp_path)


def test_parity_of_graphs(wrong: tuple[Program, Lowered]) -> None:
    program, lowered = wrong
    with pytest.raises(AssertionError, match="differs by"):
        gate(lowered, program)


def test_the_builds_own_gate_for_graphs(wrong: tuple[Program, Lowered], tmp_path: Path) -> None:
    program, lowered = wrong
    with pytest.raises(ParityError, match=r"onnx: (logits|state) .* differs by"):
        builds_gate(lowered, program, tmp_path)
