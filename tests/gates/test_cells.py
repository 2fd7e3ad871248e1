"""Every cell of target × precision has a gate, and it catches every mutant: one number, one axis, one cast wrong.

A cell is tried as a build tries it: its graphs in a directory, through the runtime, against what they are to mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest
import torch
from lhruntime import Session
from models import TINY_MODELS, VOCAB, WIDTH, of_width, program_of, with_modal
from numpy.typing import NDArray
from streams import write_directory

from lhcompile.artifacts import Lowered, Program, State
from lhcompile.config import QuantizeConfig
from lhcompile.errors import ParityError
from lhcompile.lower import complete, lower
from lhcompile.quantize import Plan, keep_states, kept_in, plan_weights, quantize, quantize_poles, state_ranges
from lhcompile.quantize.weights import LINEAR, SpellGemm, matrices
from lhcompile.streamify import streamify
from lhcompile.verify import SessionModel, check_session, check_streamed, fed, quantized_tolerance
from lhcompile.verify.products import check_products
from lhcompile.verify.states import RoundedBetween, check_kept

Array = NDArray[Any]
Key = tuple[Any, ...]
Change = Callable[[Lowered], Lowered]
TARGETS = ("portable", "cpu", "cuda", "web", "mcu")
PRECISIONS = ("fp16", "bf16", "int8", "int4", "int8 static")
CELLS = [*((target, precision) for target in TARGETS for precision in PRECISIONS)]
CELLS += [("cuda", "fp8 wide"), ("cuda", "int4 wide")]
MIXED = [*((target, "int4 mixed") for target in ("portable", "cpu", "cuda")), ("cuda", "int4 wide mixed")]
WIDE = 64
"""Channels of the cells that are called so, in whole blocks and sixteens: LinearInt4 and LinearFp8 take them."""
BYTES = ("cpu", "int8", "prefill")
"""The graph whose products are made of bytes; it reads the tensors of the step graph, which multiplies none."""
SKIPPED = {(target, "int8 static"): "refused: fixed scales are for cpu and portable" for target in TARGETS[2:]}
STATES = [(target, dtype) for target in TARGETS for dtype in ("float16", "int8") if (target, dtype) != ("web", "int8")]
TIME = 40


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, TIME), generator=torch.Generator().manual_seed(0))


@cache
def program(width: int = WIDTH) -> Program:
    with of_width(width):
        return streamify(with_modal(program_of(*TINY_MODELS["per channel"])))


@cache
def lowered(target: str, width: int = WIDTH) -> Lowered:
    return lower(program(width), target)  # type: ignore[arg-type]


def width_of(precision: str) -> int:
    return WIDE if "wide" in precision else WIDTH


def written(graphs: Lowered, folder: Path) -> Path:
    """A built directory of the graphs, of one row where they are for one."""
    graphs = complete(both(graphs, ir.Model.clone))
    states = Program(program().graph, program().context, graphs.states)
    return write_directory(states, graphs, folder)


def opened(directory: Path, target: str, kind: Callable[..., SessionModel] = SessionModel) -> SessionModel:
    return kind(lambda batch: Session.load(directory, batch=batch, threads=1), rows=lowered(target).batch)


def caught(name: str, gate: Callable[..., None], *arguments: Any) -> None:
    """A gate raises ParityError for this mutant."""
    try:
        gate(*arguments)
    except ParityError:
        return
    pytest.fail(f"{name} was not caught")


# ---- weights -------------------------------------------------------------------------------------------------------


@cache
def quantized(target: str, precision: str) -> tuple[Lowered, Lowered]:
    """As stored, and what it means."""
    name, *kinds = precision.split()
    static, source = "static" in kinds, lowered(target, width_of(precision))
    config = QuantizeConfig(quantize=name, activations="static" if static else "dynamic")  # type: ignore[arg-type]
    plan = plan_weights(source, config, None, tokens(), False) if static else Plan()
    if "mixed" in kinds:
        plan = Plan({first_matrix(source.prefill): "fp16"})
    result = quantize(source, config, plan)
    return result.lowered, result.rounded


def first_matrix(model: ir.Model) -> Key:
    """What a plan calls the first of a graph's matrices."""
    model = model.clone()
    common.InlinePass(lambda function: function.name == LINEAR)(model)
    SpellGemm()(model)
    rows = next(matrices(model.graph)).rows()
    return (False, hashlib.sha256(np.ascontiguousarray(rows).data).digest(), *rows.shape)


def weights_gate(target: str, precision: str, graphs: Lowered, folder: Path) -> None:
    mine, meant = written(graphs, folder / "mine"), written(quantized(target, precision)[1], folder / "meant")
    one_row = lowered(target).batch
    for name in ("step", "prefill"):
        time = 1 if name == "step" or lowered(target).prefill is lowered(target).step else TIME
        files = mine / f"{name}.onnx", meant / f"{name}.onnx"
        tried = check_products(*files, graphs.states, tokens()[:one_row, :time])
        assert tried == ((target, precision, name) != BYTES)
    expected = opened(meant, target).feed(tokens(), [TIME])
    check_session(opened(mine, target), expected, quantized_tolerance(target, precision.split()[0]))


def weights_of(model: ir.Model) -> Iterator[tuple[str, ir.Value]]:
    """What is stored of quantized weights, by role: the part of the name behind the weight's."""
    for name, value in model.graph.initializers.items():
        role = str(name).rpartition(".")[2]
        if role in ROLES:
            yield role, value


def one_number(array: Array) -> Array:
    """One number becomes half as large again, or one code of 8 bits far another."""
    array = array.copy()
    at = np.unravel_index(np.abs(array.astype(np.float64)).argmax(), array.shape)
    array[at] = array[at] // 4 if array.dtype.kind in "iu" else array[at] * 1.5
    return array


def one_nibble(array: Array) -> Array:
    """The lower half of one byte, the first of a row."""
    array = array.copy()
    array.reshape(len(array), -1)[len(array) // 2, 0] ^= 0x07
    return array


def one_code(array: Array) -> Array:
    """The largest number of 8 bits becomes the one below, 416 for 448; above is none."""
    array = array.copy()
    array.view(np.uint8).reshape(-1)[np.abs(array.astype(np.float64)).argmax()] -= 1
    return array


def moved_zero(array: Array) -> Array:
    """Every code one higher."""
    return array + np.array(1, array.dtype)


def moved_nibbles(array: Array) -> Array:
    """Every code of 4 bits one higher, in both halves of a byte."""
    return (((array & 15) + 1) & 15) | ((((array >> 4) + 1) & 15) << 4)


def other_axis(array: Array) -> Array:
    """The same numbers read along the other axis."""
    return np.ascontiguousarray(array.swapaxes(0, -1)).reshape(array.shape)


ROLES: dict[str, tuple[Callable[[Array], Array], ...]] = {
    "fp16": (one_number, other_axis),
    "bf16": (one_number, other_axis),
    "fp8": (one_code, other_axis),
    "fp8_scales": (one_number,),
    "int8": (one_number, moved_zero, other_axis),
    "entries": (one_number, moved_zero, other_axis),
    "blocks8": (one_number, moved_zero, other_axis),
    "int4": (one_nibble, moved_nibbles),
    "bytes": (one_nibble, moved_nibbles, other_axis),
    "blocks4": (one_nibble, moved_nibbles, other_axis),
    "codes4": (one_nibble, moved_nibbles, other_axis),
    "half_scales": (one_number, other_axis),
    "scales": (one_number,),
    "entry_scales": (one_number,),
    "byte_scales": (one_number,),
    "block_scales": (one_number,),
}


def changed(tensor: Any, change: Callable[[Array], Array]) -> ir.TensorProtocol:
    if tensor.dtype == ir.DataType.INT4:
        packed = np.frombuffer(tensor.tobytes(), np.uint8)
        return ir.PackedTensor(change(packed), ir.DataType.INT4, shape=tensor.shape.numpy())
    return ir.tensor(np.ascontiguousarray(change(tensor.numpy())))


def mutants_of_weights(graphs: Lowered) -> Iterator[tuple[str, Lowered]]:
    """One of each kind: the last weight that has the role, changed in both graphs alike.

    The last matrix is the head. Those before it hear normed signals, whose sum is zero: there a code of one more
    everywhere changes nothing.
    """
    for role, value in dict(weights_of(graphs.step)).items():
        for change in ROLES[role]:
            yield f"{value.name}: {change.__name__}", with_tensor(graphs, str(value.name), change)


def with_tensor(graphs: Lowered, name: str, change: Callable[[Array], Array]) -> Lowered:
    """The graphs with another tensor where they hold one of this name."""

    def edited(model: ir.Model) -> ir.Model:
        model = model.clone()
        value = model.graph.initializers.get(name)
        if value is not None:
            value.const_value = changed(value.const_value, change)
        return model

    return both(graphs, edited)


def both(graphs: Lowered, edit: Callable[[ir.Model], ir.Model]) -> Lowered:
    step = edit(graphs.step)
    prefill = step if graphs.prefill is graphs.step else edit(graphs.prefill)
    return Lowered(step, prefill, graphs.target, graphs.states, graphs.batch, graphs.precision)


@pytest.mark.parametrize(("target", "precision"), CELLS + MIXED)
def test_weights(target: str, precision: str, tmp_path: Path) -> None:
    if (target, precision) in SKIPPED:
        pytest.skip(SKIPPED[target, precision])
    right, _ = quantized(target, precision)
    weights_gate(target, precision, right, tmp_path / "right")
    tried = 0
    for name, wrong in mutants_of_weights(right):
        caught(name, weights_gate, target, precision, wrong, tmp_path / name)
        tried += 1
    assert tried >= (2 if precision in ("fp16", "bf16") else 4)
    roles = {role for role, _ in weights_of(right.step)}
    assert ("fp16" in roles) == (precision in ("fp16", "fp8 wide") or "mixed" in precision)
    assert ("codes4" in roles) == ("int4 wide" in precision)
    assert ("fp8" in roles) == (precision == "fp8 wide")


@pytest.mark.parametrize("target", ["portable", "cpu"])
def test_fixed_scales_of_signals(target: str, tmp_path: Path) -> None:
    """A scale that is far too small, and a zero that lies elsewhere."""
    right, _ = quantized(target, "int8 static")
    quantizing = [node for node in right.prefill.graph if node.op_type == "QuantizeLinear"]
    assert len(quantizing) > 4
    _, scale, zero = (value.name for value in quantizing[0].inputs)
    changes = ((scale, lambda x: x / 4), (zero, lambda x: x ^ np.uint8(96)))
    for index, (name, change) in enumerate(changes):
        wrong = with_tensor(right, str(name), change)
        caught(str(name), weights_gate, target, "int8 static", wrong, tmp_path / str(index))


# ---- float32, poles -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_poles(target: str, tmp_path: Path) -> None:
    """One pole of one filter decays one per cent faster in the step graph, in both of its rows."""
    expected = fed(program(), tokens())
    check_session(opened(written(lowered(target), tmp_path / "right"), target), expected)
    own = next(node for node in program().graph.graph.nodes if "modal_ssm" in str(node.target)).args[1].target
    table = getattr(program().graph, str(own)).numpy()

    def edited(model: ir.Model) -> ir.Model:
        model, found = model.clone(), 0
        for value in model.graph.initializers.values():
            array = value.const_value.numpy()  # type: ignore[union-attr]
            if array.size == table.size and np.array_equal(array.ravel(), table.ravel()):
                wrong = array.copy().reshape(table.shape)
                wrong[[1, 1 + len(table) // 2], 0] *= np.float32(0.99)
                value.const_value = ir.tensor(wrong.reshape(array.shape))
                found += 1
        assert found or model.graph.name != "step"
        return model

    with pytest.raises(ParityError, match=r"onnx: (logits|state) .* differs by"):
        check_session(opened(written(both(lowered(target), edited), tmp_path / "wrong"), target), expected)


@pytest.mark.parametrize("bits", [8, 16])
def test_poles_in_codes(bits: int) -> None:
    """The streamed program is held against that of the rounded poles: one that kept a pole is noticed."""
    source = with_modal(program_of(*TINY_MODELS["per channel"]))
    rounded, _ = quantize_poles(source, bits)
    check_streamed(streamify(rounded), rounded, tokens())
    if bits == 8:
        with pytest.raises(ParityError, match=r"streamed: logits .* differs by"):
            check_streamed(streamify(source), rounded, tokens())


# ---- states --------------------------------------------------------------------------------------------------------


@cache
def kept(target: str, dtype: str) -> Lowered:
    ranges = state_ranges(program(), tokens()) if dtype == "int8" else None
    return keep_states(lowered(target), kept_in(program().states, dtype, ranges))  # type: ignore[arg-type]


def states_gate(target: str, states: tuple[State, ...], graphs: Lowered, folder: Path) -> None:
    plain = written(lowered(target), folder / "plain")
    rounded = opened(plain, target, partial(RoundedBetween, states=states))
    check_kept(opened(written(graphs, folder / "kept"), target), rounded, states, tokens())


def read_coarsely(model: ir.Model) -> ir.Model:
    """A state is read through a number of 8 bits."""
    model = model.clone()
    state = next(value for value in model.graph.inputs if (value.name or "").endswith("recurrent_state"))
    narrow = ir.node("Cast", [state], {"to": ir.DataType.BFLOAT16.value})
    wide = ir.node("Cast", [narrow.outputs[0]], {"to": state.dtype.value})  # type: ignore[union-attr]
    wide.outputs[0].shape, wide.outputs[0].type = state.shape, state.type
    ir.convenience.replace_all_uses_with(state, wide.outputs[0])
    narrow.replace_input_with(0, state)
    model.graph.insert_before(next(iter(model.graph)), [narrow, wide])
    for each in (narrow, wide):
        each.outputs[0].name = f"coarse.{each.attributes['to'].value}"
    return model


def states_exchanged(model: ir.Model) -> ir.Model:
    """Two states of one shape are read in each other's place."""
    model = model.clone()
    pairs = combinations(model.graph.inputs[1:], 2)
    pair = next((a, b) for a, b in pairs if (a.shape, a.dtype) == (b.shape, b.dtype))
    reads = [list(value.uses()) for value in pair]
    for uses, other in zip(reads, reversed(pair), strict=True):
        for node, place in uses:
            node.replace_input_with(place, other)
    return model


def not_left(model: ir.Model) -> ir.Model:
    """What is left behind is what was read."""
    model = model.clone()
    state, old = (
        next(value for value in values if (value.name or "").endswith("recurrent_state"))
        for values in (model.graph.inputs, model.graph.outputs)
    )
    same = ir.node("Identity", [state])
    model.graph.append(same)
    index = list(model.graph.outputs).index(old)
    name, old.name = old.name, "unread"
    same.outputs[0].name, same.outputs[0].type, same.outputs[0].shape = name, old.type, old.shape
    model.graph.outputs[index] = same.outputs[0]
    return model


@pytest.mark.parametrize(("target", "dtype"), STATES)
def test_states(target: str, dtype: str, tmp_path: Path) -> None:
    right = kept(target, dtype)
    states_gate(target, right.states, right, tmp_path / "right")
    scales = [str(name) for name in right.step.graph.initializers if str(name).endswith((".scales", ".inverse"))]
    assert bool(scales) == (dtype == "int8")
    changes: dict[str, Change] = {
        edit.__name__: partial(both, edit=edit) for edit in (read_coarsely, states_exchanged, not_left)
    }
    if dtype == "int8":
        for name in (next(x for x in scales if "recurrent" in x and end in x) for end in (".scales", ".inverse")):
            changes[name] = partial(with_tensor, name=name, change=one_number)
        del changes["read_coarsely"]  # codes of 8 bits are read through 8 bits
    for name, change in changes.items():
        caught(name, states_gate, target, right.states, change(right), tmp_path / name)
