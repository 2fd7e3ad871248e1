"""Fused operators: the same model in torch, in onnxruntime through their functions, and through kernels."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from lhruntime.bfloat16 import array_of, value_of
from lhruntime.sampling import Sampler
from models import ORDERS, TINY_MODELS, VOCAB, WIDTH, Hyena, Mixer, of_width, program_of, with_modal, with_taps
from streams import assert_parity, serialized, torch_stream
from torch import Tensor

from lhcompile.artifacts import Lowered, Past, Program
from lhcompile.config import QuantizeConfig, Target
from lhcompile.lower import apart_in_another_type, complete, lower
from lhcompile.lower.decode import _MOST, _look_up, decoding
from lhcompile.lower.fuse import KINDS, fuse
from lhcompile.quantize import Plan, keep_states, kept_in, plan_weights, quantize
from lhcompile.quantize.blocks import BLOCK
from lhcompile.streamify import streamify

Run = Callable[[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]
FORMS = [(name, form) for name in TINY_MODELS for form in ("exact", "modal", "packed")]
LOWERED = [("per channel", "modal"), ("per channel", "packed"), ("hybrid", "packed")]
CUTS: tuple[Sequence[int], ...] = ((), [1] * 9, [7, 1, 12])
LIBRARY = Path(os.environ.get("LHCOMPILE_OPS", Path(__file__).parents[3] / "build/ops/liblhcompile_ops.so"))


@cache
def streamed(name: str, form: str, width: int = WIDTH) -> Program:
    with of_width(width):
        program = program_of(*TINY_MODELS[name])
    if form != "exact":
        program = with_modal(program, orders=ORDERS if form == "packed" else None)
    return streamify(program)


@cache
def for_cuda(name: str, form: str, width: int = WIDTH) -> Lowered:
    return lower(streamed(name, form, width), "cuda")


@cache
def one_layer(width: int = WIDTH) -> tuple[Program, Lowered]:
    """A Hyena of one layer and states of one order; not to be changed."""
    with of_width(width):
        program = streamify(with_modal(program_of(Hyena)))
    return program, lower(program, "cuda")


def quantized(lowered: Lowered, precision: str) -> Lowered:
    """As stored, before functions are chosen."""
    return quantize(lowered, QuantizeConfig(quantize=precision)).lowered  # type: ignore[arg-type]


def tokens(program: Program, time: int = 20) -> Tensor:
    return program.signal.random(3, time, 10, seed=1)


def named(program: Program) -> Counter[str]:
    nodes = program.graph.graph.nodes
    return Counter(str(node.target).split(".")[1] for node in nodes if str(node.target).startswith("lhc."))


def stream(lowered: Lowered, operators: Path | None = None) -> Run:
    """Both graphs in onnxruntime, with the library or through the functions."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if operators is not None:
        options.register_custom_ops_library(str(operators))
    step, prefill = (
        onnxruntime.InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"])
        for model in (lowered.step, lowered.prefill)
    )

    def run(ids: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        session = step if ids.shape[1] == 1 else prefill
        names = [value.name for value in session.get_inputs()]
        results = session.run(None, dict(zip(names, [x.numpy() for x in (ids, *states)], strict=True)))
        logits, *after = (torch.from_numpy(result) for result in results)
        return logits, after

    return run


def difference(one: Lowered, other: Lowered, program: Program) -> float:
    """Largest root mean square of the difference of logits or final states, of that of the other's."""
    ids, worst = tokens(program), 0.0
    for cuts in ([20], [1] * 20, [7, 1, 12]):
        found, expected = ([list(graphs.states), *fed(graphs, ids, cuts)] for graphs in (one, other))
        for (mine, theirs) in zip(found[1:], expected[1:], strict=True):
            scale = float(theirs.double().square().mean().sqrt())
            worst = max(worst, float((mine.double() - theirs.double()).square().mean().sqrt()) / max(scale, 1e-9))
    return worst


def fed(graphs: Lowered, ids: Tensor, cuts: Sequence[int]) -> list[Tensor]:
    run, states, logits = stream(graphs), [state.zeros(len(ids)) for state in graphs.states], []
    for piece in ids.split(list(cuts), dim=1):
        part, states = run(piece, states)
        logits.append(part)
    return [torch.cat(logits, 1), *states]


# ---- the program ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_fused_program_is_the_program(name: str, form: str) -> None:
    program = streamed(name, form)
    fused = fuse(program, KINDS)
    for cuts in CUTS:
        assert_parity(torch_stream(fused), torch_stream(program), program.states, tokens(program), cuts)
    assert named(fused)["linear"] == sum(
        node.target == torch.ops.aten.linear.default for node in program.graph.graph.nodes
    )
    assert named(program)["linear"] == 0


@pytest.mark.parametrize(("form", "mixers"), [("exact", 0), ("modal", 1), ("packed", 1)])
def test_what_becomes_a_mixer(form: str, mixers: int) -> None:
    """The Hyena, but neither filters that keep their taps nor outer products and other short convolutions."""
    found = named(fuse(streamed("per channel", form), KINDS))
    assert found["hyena_mixer"] == mixers
    assert found["fir"] == 5 - mixers
    assert "hyena_mixer" not in named(fuse(streamed("shared", form), KINDS))


class Pointwise(Mixer):
    """x [batch, time, 3 · WIDTH] → like its first part"""

    inner = staticmethod(lambda x: x)

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.up, self.down = torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def rms(self, x: Tensor, inside: bool) -> Tensor:
        mean = x.square().mean(-1, keepdim=True)
        return self.scale * (x / ((mean + 1e-5).sqrt() if inside else mean.sqrt() + 1e-5))


class Inside(Pointwise):
    def forward(self, x: Tensor) -> Tensor:
        x = x[..., :WIDTH].contiguous()
        return x + self.down(F.gelu(self.up(self.rms(x, True))))


class Outside(Pointwise):
    def forward(self, x: Tensor) -> Tensor:
        x = x[..., :WIDTH].contiguous()
        return x + self.down(F.gelu(self.up(self.rms(x, False)), approximate="tanh"))


class HeardTwice(Pointwise):
    """A norm that is heard beside its projection, and an activation that a product hears too."""

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., :WIDTH].contiguous()
        normed = self.rms(x, True)
        up = self.up(normed)
        return normed + self.down(F.gelu(up) * up)


@pytest.mark.parametrize(
    ("mixer", "norm", "activation", "residual"),
    [
        (Inside, "rms", "gelu", True),
        (Outside, "none", "gelu_tanh", True),
        (HeardTwice, "none", "none", True),
    ],
)
def test_neighbours_of_a_projection(mixer: type[Mixer], norm: str, activation: str, residual: bool) -> None:
    program = streamify(program_of(mixer))
    fused = fuse(program, KINDS)
    assert_parity(torch_stream(fused), torch_stream(program), program.states, tokens(program))
    linears = [node for node in fused.graph.graph.nodes if node.target == torch.ops.lhc.linear.default]
    first, up, down, last, head = linears
    assert [first.args[6], head.args[6]] == ["layer", "none"]
    assert (up.args[6], up.args[8]) == (norm, activation)
    assert (down.args[3] is not None) == residual
    assert last.args[3] is not None


# ---- the graphs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "form"), LOWERED)
def test_functions_stand_for_kernels(name: str, form: str) -> None:
    program, lowered = streamed(name, form), for_cuda(name, form)
    for cuts in CUTS:
        assert_parity(stream(lowered), torch_stream(program), program.states, tokens(program), cuts)


@pytest.mark.parametrize(("name", "form"), LOWERED[1:])
@pytest.mark.parametrize("precision", ["none", "fp16", "int4"])
def test_kernels_are_the_functions(name: str, form: str, precision: str) -> None:
    if not LIBRARY.exists():
        message = f"the operators are NOT TESTED: {LIBRARY} is not built (make ops)"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    width = BLOCK if precision == "int4" else WIDTH
    program, lowered = streamed(name, form, width), complete(quantized(for_cuda(name, form, width), precision))
    mine, theirs = stream(lowered, LIBRARY), stream(lowered)
    logits, states = mine(tokens(program), [state.zeros(3) for state in program.states])
    expected, after = theirs(tokens(program), [state.zeros(3) for state in program.states])
    share = 1e-5 if precision == "none" else 2e-3  # a sum in another order may be rounded to the other neighbour
    for found, truth in zip([logits, *states], [expected, *after], strict=True):
        assert float((found - truth).abs().max()) <= share * float(truth.abs().max())


def test_a_hyena_layer_is_three_nodes() -> None:
    program, lowered = one_layer()
    assert [node.op_type for node in lowered.step.graph] == ["Gather", "Linear", "HyenaMixer", "Linear", "Linear"]
    assert [node.op_type for node in lowered.prefill.graph] == [node.op_type for node in lowered.step.graph]
    assert all(node.op_identifier() in lowered.step.functions for node in lowered.step.graph if node.domain)
    on_cpu = lower(program, "cpu")
    assert [node.op_type for node in on_cpu.step.graph] == [node.op_type for node in lowered.step.graph]
    assert {node.op_type for node in on_cpu.prefill.graph if node.domain} == {"Linear"}
    assert lower(program, "portable").step.functions == {}


def with_attribute(model: ir.Model) -> None:
    (mixer,) = [node for node in model.graph if node.op_type == "HyenaMixer"]
    mixer.attributes["outer"] = ir.AttrInt64("outer", 2)


def without_residual(model: ir.Model) -> None:
    node = next(node for node in model.graph if node.op_type == "Linear" and len(node.inputs) > 3 and node.inputs[3])
    node.replace_input_with(3, None)


def other_places(model: ir.Model) -> None:
    (mixer,) = [node for node in model.graph if node.op_type == "HyenaMixer"]
    index = mixer.inputs[9]
    assert index is not None
    assert index.const_value is not None
    index.const_value = ir.tensor(np.roll(index.const_value.numpy(), 1, 1))


@pytest.mark.parametrize("mutate", [with_attribute, without_residual, other_places])
def test_wrong_nodes_are_caught(mutate: Callable[[ir.Model], None]) -> None:
    program = streamify(with_modal(program_of(Hyena), orders=ORDERS))
    lowered = lower(program, "cuda")
    for model in (lowered.step, lowered.prefill):
        mutate(model)
    with pytest.raises(AssertionError):
        assert_parity(stream(complete(lowered)), torch_stream(program), program.states, tokens(program))


# ---- precisions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "share"), [("fp16", 2e-3), ("bf16", 2e-2), ("fp8", 0.1), ("int4", 2e-3)])
@pytest.mark.parametrize(("name", "form"), LOWERED[1:])
def test_precisions_of_signals(name: str, form: str, precision: str, share: float) -> None:
    """Half of the gate's tolerance or less; int8 spells its projections out."""
    width = BLOCK if precision == "int4" else WIDTH
    result = quantize(for_cuda(name, form, width), QuantizeConfig(quantize=precision))  # type: ignore[arg-type]
    assert 0 < difference(complete(result.lowered), complete(result.rounded), streamed(name, form, width)) <= share


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_nothing_between_fused_operators_is_float32(precision: str) -> None:
    halves = complete(quantized(one_layer()[1], precision))
    for model in (halves.step, halves.prefill):
        *others, last = model.graph
        assert [node.op_type for node in others] == ["Gather", "Linear", "HyenaMixer", "Linear", "Linear"]
        assert last.op_type == "Cast"
        kinds = {node.outputs[0].dtype for node in others}
        assert kinds == {ir.DataType.FLOAT16 if precision == "fp16" else ir.DataType.BFLOAT16}
        assert {value.dtype for value in (*model.graph.inputs[1:], *model.graph.outputs)} == {ir.DataType.FLOAT}


def test_projections_of_whole_blocks_read_four_bits() -> None:
    graphs = complete(quantized(one_layer(BLOCK)[1], "int4"))
    for model in (graphs.step, graphs.prefill):
        *found, last = model.graph
        linear = "LinearInt4"
        assert [node.op_type for node in found] == ["EmbeddingInt4", linear, "HyenaMixer", linear, linear]
        assert {node.outputs[0].dtype for node in found} == {ir.DataType.FLOAT16}
        assert last.op_type == "Cast"
        head = found[-1]
        shapes = [(value.dtype, tuple(value.shape or ())) for value in (head.inputs[1], head.inputs[6]) if value]
        assert shapes == [(ir.DataType.UINT8, (VOCAB, 1, 16)), (ir.DataType.FLOAT16, (VOCAB, 1))]


def test_projections_in_eight_bits_have_sizes_of_sixteens() -> None:
    """cuBLASLt takes no others; the head of this vocabulary is one."""
    graphs = complete(quantized(one_layer(BLOCK)[1], "fp8"))
    for model in (graphs.step, graphs.prefill):
        found = [node for node in model.graph if node.op_type in ("Linear", "LinearFp8")]
        sizes = [tuple(node.inputs[1].shape or ()) for node in found if node.inputs[1] is not None]
        assert [all(size % 16 == 0 for size in each) for each in sizes] == [n.op_type == "LinearFp8" for n in found]
        assert {node.op_type for node in found} == {"Linear", "LinearFp8"}


@pytest.mark.parametrize(("other", "kinds"), [("fp16", ["Linear"]), ("int8", ["MatMulNBits"])])
def test_projections_that_get_more_bits(other: str, kinds: list[str]) -> None:
    """Beside LinearInt4: fp16 in a fused one, int8 spelled out."""
    program, lowered = one_layer(BLOCK)
    head = next(node for node in reversed(lowered.prefill.graph) if node.op_type == "Linear").inputs[1]
    assert head is not None
    assert head.const_value is not None
    rows = np.ascontiguousarray(head.const_value.numpy())
    plan = Plan({(False, hashlib.sha256(rows.data).digest(), *rows.shape): other})
    result = quantize(lowered, QuantizeConfig(quantize="int4"), plan)
    for model in (result.lowered.step, result.lowered.prefill):
        found = [node.op_type for node in model.graph if node.op_type.startswith(("Linear", "MatMul", "Hyena"))]
        assert found == ["LinearInt4", "HyenaMixer", "LinearInt4", *kinds]
    share = difference(complete(result.lowered), complete(result.rounded), program)
    assert 0 < share <= (2e-3 if other == "fp16" else 2e-2)


@pytest.mark.parametrize(("budget", "fewest"), [(1.0, 3), (1e-7, 0)])
def test_a_budget_chooses_among_forms_of_projections(budget: float, fewest: int) -> None:
    """Weights are tried in the fused graph; those that stay in int4 are read by LinearInt4, those of fp16 by Linear."""
    program, lowered = one_layer(BLOCK)
    config = QuantizeConfig(quantize="int4")
    plan = plan_weights(lowered, config, budget, tokens(program), False)
    matrices = Counter(precision for key, precision in plan.precisions.items() if not key[0])
    assert matrices.total() == 3
    assert (matrices["int4"] == 3) if fewest else (matrices["int4"] < 3)
    result = quantize(lowered, config, plan)
    for model in (result.lowered.step, result.lowered.prefill):
        found = Counter(node.op_type for node in model.graph)
        readers = {"int4": found["LinearInt4"], "int8": found["MatMulNBits"], "fp16": found["Linear"] + found["MatMul"]}
        assert +Counter(readers) == matrices
    assert difference(complete(result.lowered), complete(result.rounded), program) <= 2e-2


def test_a_tied_head_and_its_embedding_are_one() -> None:
    """Entries of 4 bits are stored as the head is."""
    _, lowered = one_layer(BLOCK)
    graphs = [model.clone() for model in (lowered.step, lowered.prefill)]
    for model in graphs:
        table = next(node for node in model.graph if node.op_type == "Gather").inputs[0]
        head = next(node for node in reversed(model.graph) if node.op_type == "Linear")
        head.replace_input_with(1, table)
    tied = quantized(replace(lowered, step=graphs[0], prefill=graphs[1]), "int4")
    for model in (tied.step, tied.prefill):
        head = next(node for node in reversed(model.graph) if node.op_type == "LinearInt4")
        (embedding,) = [node for node in model.graph if node.op_type == "EmbeddingInt4"]
        assert (head.inputs[1], head.inputs[6]) == (embedding.inputs[0], embedding.inputs[2])


def test_tokens_of_four_bits_may_be_short_integers() -> None:
    """EmbeddingInt4 takes int64, Gather int32 too."""
    program, lowered = one_layer(BLOCK)
    graphs = [model.clone() for model in (lowered.step, lowered.prefill)]
    for model in graphs:
        gather = next(node for node in model.graph if node.op_type == "Gather")
        short = ir.node("Cast", [gather.inputs[1]], {"to": ir.DataType.INT32.value})
        short.outputs[0].shape, short.outputs[0].type = gather.inputs[1].shape, ir.TensorType(ir.DataType.INT32)
        model.graph.insert_before(gather, short)
        gather.replace_input_with(1, short.outputs[0])
    found = quantized(replace(lowered, step=graphs[0], prefill=graphs[1]), "int4")
    expected = quantized(lowered, "int4")
    for model in (found.step, found.prefill):
        (embedding,) = [node for node in model.graph if node.op_type == "EmbeddingInt4"]
        assert embedding.inputs[1].producer().attributes.get_int("to") == ir.DataType.INT64
    assert difference(complete(found), complete(expected), program) == 0


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_integers_keep_the_mixer(precision: str) -> None:
    found = Counter(node.op_type for node in complete(quantized(one_layer()[1], precision)).step.graph)
    assert (found["HyenaMixer"], found["MatMulNBits"], found["Linear"]) == (1, 3, 0)


def kept_in_half(lowered: Lowered, program: Program) -> Lowered:
    return complete(keep_states(lowered, kept_in(program.states, "float16", None)))


@pytest.mark.parametrize("precision", ["none", "fp16"])
def test_the_mixer_keeps_states_of_half_precision_itself(precision: str) -> None:
    program, lowered = one_layer()
    half = lowered if precision == "none" else quantized(lowered, precision)
    graphs = kept_in_half(half, program)
    for model, plain in ((graphs.step, half.step), (graphs.prefill, half.prefill)):
        assert [node.op_type for node in model.graph] == [node.op_type for node in plain.graph]  # no Cast, no Clip
        mixer = next(node for node in model.graph if node.op_type == "HyenaMixer")
        assert list(mixer.inputs[1:3]) == list(model.graph.inputs[1:])
        assert list(mixer.outputs[1:]) == list(model.graph.outputs[1:])
        assert {value.dtype for value in (*mixer.inputs[1:3], *mixer.outputs[1:])} == {ir.DataType.FLOAT16}  # type: ignore[union-attr]
    assert difference(graphs, complete(half), program) <= 2e-3


def test_states_that_others_read_are_cast() -> None:
    """One that something besides the mixer reads, and one whose successor is read."""
    program, lowered = one_layer()
    for place in (1, 2):
        model = lowered.step.clone()
        read = model.graph.inputs[1] if place == 1 else model.graph.outputs[1]
        other = ir.node("ReduceMax", [read], {"keepdims": 0})
        other.outputs[0].name, other.outputs[0].type = "largest", ir.TensorType(ir.DataType.FLOAT)
        model.graph.append(other)
        model.graph.outputs.append(other.outputs[0])
        step = kept_in_half(replace(lowered, step=model), program).step
        found = Counter(node.op_type for node in step.graph)
        assert (found["Cast"], found["Clip"]) == (2, 1)
        mixer = next(node for node in step.graph if node.op_type == "HyenaMixer")
        assert [value.dtype for value in mixer.inputs[1:3]] == [ir.DataType.FLOAT, ir.DataType.FLOAT16]  # type: ignore[union-attr]
        onnxruntime.InferenceSession(serialized(step), providers=["CPUExecutionProvider"])


# ---- the next token ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["none", "fp16", "bf16"])
def test_decode_is_the_step_and_a_choice(precision: str) -> None:
    """The tokens are those that lhruntime's sampler takes from the step's logits with the same uniform numbers."""
    program, source = one_layer()
    lowered = complete(quantized(source, precision), decode=True)
    assert lowered.decode is not None
    first_of = [next(iter(model.graph)).op_type for model in (lowered.step, lowered.decode)]
    assert first_of == ["Gather", "Embedding"]
    step, decode = (onnxruntime.InferenceSession(serialized(model)) for model in (lowered.step, lowered.decode))
    settings = ["uniform", "temperature", "top_k", "top_p"]
    names = [value.name for value in step.get_inputs()]
    first, window, state = names
    tokens_of = [f"{window}.past_2", f"{window}.past_1"]
    apart = precision != "fp16"  # a past in float32 is not what float16 signals are
    dtype = "bfloat16" if precision == "bf16" else None
    assert lowered.past == ({window: Past(tokens_of, "present.0.conv_state.newest", dtype)} if apart else {})
    carried = [*tokens_of, state] if apart else [window, state]
    assert [value.name for value in decode.get_inputs()] == [first, *carried, *settings]
    types = {value.name: value.type for value in decode.get_inputs()}
    assert all(types[name] == f"tensor({dtype or 'float'})" for name in tokens_of if apart)
    draw = np.random.default_rng(0)
    ids, states = draw.integers(0, 10, (4, 1)), [state.zeros(4).numpy() for state in program.states]
    chosen = {
        "temperature": np.array([0, 1, 0.7, 1.3], np.float32),
        "top_k": np.array([0, 0, 5, 0]),
        "top_p": np.array([1, 1, 1, 0.8], np.float32),
    }
    for _ in range(12):
        feeds = dict(zip(names, (ids, *states), strict=True))
        uniform = draw.random(4, np.float32)
        logits, *expected = step.run(None, feeds)
        inputs = [ids, *(np.split(states[0], 2, axis=1) if apart else states[:1]), states[1]]
        before, feeds = states[0], dict(zip([first, *carried], inputs, strict=True))
        feeds = feeds | chosen | {"uniform": uniform}
        given = {name: value_of(array, types[name]) for name, array in feeds.items()}
        tokens_, *states = map(array_of, decode.run_with_ort_values(None, given))
        if apart:
            states[0] = np.concatenate([before[:, 1:], states[0]], axis=1)
        assert all((mine == theirs).all() for mine, theirs in zip(states, expected, strict=True))
        for row, token in enumerate(tokens_[:, 0]):
            temperature, top_k, top_p = (values[row] for values in chosen.values())
            sampler = Sampler(float(temperature), int(top_k), float(top_p))
            edges = np.cumsum(sampler.probabilities(logits[row])[0])
            assert token == np.searchsorted(edges, uniform[row] * edges[-1], side="right")
        ids = tokens_


def test_what_decode_looks_up() -> None:
    """Rows of a table in floating point by the graph's own tokens, and nothing else that is gathered."""
    arrays = {
        "table": np.zeros((VOCAB, WIDTH), np.float32),
        "codes": np.zeros((VOCAB, WIDTH), np.int8),
        "row": np.zeros(VOCAB, np.float32),
        "others": np.zeros((1, 1), np.int64),
    }
    given = {name: ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in arrays.items()}
    for name, value in given.items():
        value.shape = ir.Shape(arrays[name].shape)
        value.type = ir.TensorType(ir.DataType.from_numpy(arrays[name].dtype))
    ids = ir.Value(name="ids", shape=ir.Shape(["batch", 1]), type=ir.TensorType(ir.DataType.INT64))
    table, codes, row, others = given.values()
    gathers = [(table, ids, 0), (table, others, 0), (codes, ids, 0), (row, ids, 0), (table, ids, 1), (table, ids, -2)]
    nodes = [ir.node("Gather", [what, where], {"axis": axis}) for what, where, axis in gathers]
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([ids], outputs, nodes=nodes, initializers=list(given.values()), opset_imports={"": 20})
    _look_up(graph)
    assert [node.op_type for node in graph] == ["Embedding", *5 * ["Gather"]]
    assert list(next(iter(graph)).inputs) == [table, ids]
    assert [value.producer() for value in graph.outputs] == list(graph)


@pytest.mark.parametrize(("precision", "first"), [("fp8", "Embedding"), ("int4", "EmbeddingInt4"), ("int8", "Gather")])
def test_tables_in_few_bits(precision: str, first: str) -> None:
    decode = complete(quantized(one_layer(BLOCK)[1], precision), decode=True).decode
    assert decode is not None
    assert next(iter(decode.graph)).op_type == first


def test_a_past_stays_one_state_where_prefill_fills_it_with_other_numbers() -> None:
    """A window in float32 holds more than tokens of bfloat16 if the signal of prefill is float32."""
    _, source = one_layer()
    narrow = quantized(source, "bf16")
    assert decoding(narrow.step, narrow.prefill)[1]
    decode, past = decoding(narrow.step, source.prefill)
    assert not past
    assert [node.op_type for node in decode.graph if "Hyena" in node.op_type] == ["HyenaMixer"]


def test_states_that_decode_has_in_another_type() -> None:
    """Not those in the signal's own, of other targets, or of more tokens than the kernels take."""
    _, source = one_layer()
    assert len(apart_in_another_type(quantized(source, "bf16"))) == 1
    assert not apart_in_another_type(quantized(source, "fp16")) | apart_in_another_type(source)
    for target, mixer in (("cpu", Hyena), ("cuda", with_taps(9))):
        program = streamify(with_modal(program_of(mixer)))
        assert not apart_in_another_type(quantized(lower(program, target), "bf16"))  # type: ignore[arg-type]


@pytest.mark.parametrize(("target", "fast"), [("cpu", True), ("cuda", False)])
def test_codes_of_four_bits_are_multiplied_as_they_are_on_a_processor(target: Target, fast: bool) -> None:
    """Without the library too: there the function is what runs."""
    with of_width(32):
        lowered = lower(streamify(with_modal(program_of(Hyena))), target)
    done = complete(quantized(lowered, "int4"))
    found = [function for graph in (done.step, done.prefill) for function in graph.functions.values()]
    found = [function for function in found if function.name == "LinearInt4"]
    assert len(found) >= 4
    for function in found:
        blocks = [node for node in function if node.op_type == "MatMulNBits"]
        assert [node.attributes["accuracy_level"].as_int() for node in blocks] == [4] * fast
        assert function.attributes["accuracy_level"].as_int() == 4 * fast


def test_the_kernels_take_as_many_tokens_of_a_past() -> None:
    source = (Path(__file__).parents[3] / "runtimes/ops/src/args.h").read_text()
    assert f"kMostPast = {_MOST};" in source


def test_no_decode_graph_for_others() -> None:
    program, lowered = one_layer()
    assert complete(lower(program, "cpu"), decode=True).decode is None
    assert complete(lowered).decode is None
