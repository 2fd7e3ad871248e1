"""Quantized graphs compute what their rounded weights mean; nothing else is quantized; wrong bytes are noticed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from streams import Stream, assert_parity, serialized
from torch import Tensor

from lhcompile.artifacts import Lowered
from lhcompile.config import QuantizeConfig
from lhcompile.errors import LowerError
from lhcompile.lower import write_graphs
from lhcompile.quantize import Part, Quantized, quantize
from lhcompile.quantize.int4 import int4_table
from lhcompile.quantize.weights import Use

from .toy import INSIDE, KEPT, QUANTIZED, VOCAB, WIDTH, inputs, run, session, toy

Array = NDArray[Any]
TARGETS = ("portable", "cpu", "cuda", "web", "mcu")
PRECISIONS = ("fp16", "bf16", "int8", "int4")
EXACT = 2e-6
"""Of the largest output. What is left is the order of float32 sums; without onnxruntime's fusions, and with float32
products asked of MatMulNBits, nothing else is rounded."""
PRODUCTS = {"fp16": 3e-3, "bf16": 2e-2, "int8": 3e-2, "int4": 3e-2}
"""Where signals are rounded too: to 11 and 8 bits of fp16 and bf16, to 8 bits in blocks, and in the prefill form of the
cpu to 8 bits a row, whose step is 1/127 of the row's largest number; through two products in a row."""


def quantized(target: str, precision: str) -> Quantized:
    return quantize(toy(target), QuantizeConfig(quantize=precision))  # type: ignore[arg-type]


def unrounded(model: ir.Model) -> ir.Model:
    """A copy whose MatMulNBits leaves the signal in float32."""
    model = model.clone()
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes.add(ir.AttrInt64("accuracy_level", 1))
    return model


def difference(mine: Iterable[Array], theirs: Iterable[Array]) -> float:
    """The largest of all outputs, each relative to its own largest number."""
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(mine, theirs, strict=True))


def error(one: ir.Model, other: ir.Model, lowered: Lowered, optimized: bool = False) -> float:
    time = 1 if one.graph.name == "step" else 9
    return difference(*(run(session(model, optimized), lowered, time) for model in (one, other)))


def evaluated(model: ir.Model, lowered: Lowered) -> list[Array]:
    """By the reference evaluator of the standard."""
    evaluator = ReferenceEvaluator(onnx.load_from_string(serialized(model)))
    names = [value.name for value in model.graph.outputs]
    feeds = inputs(lowered, 1 if model.graph.name == "step" else 9)
    return [np.asarray(output) for output in evaluator.run(names, feeds)]


def rounds_signals(target: str, precision: str, graph: str) -> bool:
    """Forms whose products are not in float32, as they are written."""
    halves = target == "cuda" and precision == "fp16"
    return halves or (target == "cpu" and precision == "int8" and graph == "prefill")


@pytest.mark.parametrize("graph", ["step", "prefill"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_quantized_means_rounded(target: str, precision: str, graph: str) -> None:
    result = quantized(target, precision)
    model, meant = (getattr(lowered, graph) for lowered in (result.lowered, result.rounded))
    onnx.checker.check_model(onnx.load_from_string(serialized(model)), full_check=target not in ("cpu", "cuda"))
    tolerance = PRODUCTS[precision] if rounds_signals(target, precision, graph) else EXACT
    assert error(unrounded(model), meant, result.lowered) <= tolerance
    assert error(model, meant, result.lowered, optimized=True) <= PRODUCTS[precision]
    source = getattr(toy(target), graph)
    assert error(meant, source, result.lowered) > 1e-5 or precision == "fp16"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("graph", ["step", "prefill"])
def test_portable_graphs_are_standard(graph: str, precision: str) -> None:
    result = quantized("portable", precision)
    model, meant = (getattr(lowered, graph) for lowered in (result.lowered, result.rounded))
    assert difference(evaluated(model, result.lowered), evaluated(meant, result.lowered)) <= EXACT


@pytest.mark.parametrize("precision", PRECISIONS)
def test_models_stream_as_their_rounded_weights_do(precision: str, built: Callable) -> None:
    """Every operator of real graphs, in any cuts, with float32 products."""
    lowered = built("hybrid", "modal").lowered
    result = quantize(lowered, QuantizeConfig(quantize=precision))  # type: ignore[arg-type]
    tokens = torch.randint(0, 20, (2, 24), generator=torch.Generator().manual_seed(0))
    mine, meant = stream(result.lowered), stream(result.rounded)
    for cuts in ([], [5, 1, 9, 1, 1], [1] * 24):
        assert_parity(mine, meant, lowered.states, tokens, cuts)
    with pytest.raises(AssertionError, match="differs by"):
        assert_parity(mine, stream(lowered), lowered.states, tokens)


def stream(lowered: Lowered) -> Stream:
    """Like `streams.onnx_stream`; where onnxruntime fuses, products stay in float32."""
    options = {"qdq_matmulnbits_accuracy_level": "1"}
    step, prefill = (session(model, **options) for model in (lowered.step, lowered.prefill))

    def fed(tokens: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        opened = step if tokens.shape[1] == 1 else prefill
        names = [value.name for value in opened.get_inputs()]
        arrays = [value.numpy() for value in (tokens, *states)]
        logits, *after = (torch.from_numpy(x) for x in opened.run(None, dict(zip(names, arrays, strict=True))))
        return logits, after

    return fed


@pytest.mark.parametrize("precision", PRECISIONS)
def test_models_keep_all_but_matrices_and_the_embedding(precision: str, built: Callable) -> None:
    """Positions, rotary tables, poles, residues, taps, norms: the same tensors as before."""
    lowered = built("hybrid", "modal").lowered
    result = quantize(lowered, QuantizeConfig(quantize=precision))  # type: ignore[arg-type]
    for graph in ("step", "prefill"):
        source, model = (getattr(each, graph).graph for each in (lowered, result.lowered))
        before, after = source.initializers, model.initializers
        gone = {key for key in before if key not in after}
        assert all(after[key].const_value is before[key].const_value for key in set(before) - gone)
        types = Counter(node.op_type for node in source if gone & {x.name for x in node.inputs if x is not None})
        assert types == {"MatMul": 11, "Gather": 1}  # five blocks of two, the head, the embedding
        outer = [output.name for node in model for output in node.outputs]
        inner = {output.name for node in model.all_nodes() if node.graph is not model for output in node.outputs}
        assert len(outer) == len(set(outer))
        assert not inner & set(outer)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_only_matrices_and_the_embedding_are_quantized(target: str, precision: str) -> None:
    source, result = toy(target), quantized(target, precision)
    for graph in ("step", "prefill"):
        before, after, meant = (
            getattr(lowered, graph).graph.initializers for lowered in (source, result.lowered, result.rounded)
        )
        for name in KEPT:
            for weights in (after, meant):
                assert weights[name].const_value.tobytes() == before[name].const_value.tobytes()
        assert not set(QUANTIZED) & set(after)
        floats = [name for name, value in after.items() if value.const_value.dtype == ir.DataType.FLOAT]
        large = {name for name in floats if after[name].const_value.size >= WIDTH * INSIDE // 8}
        assert {name for name in large if "scales" not in name} <= {*KEPT, "embedding.nibbles"}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_both_graphs_hold_the_same_bytes(target: str, precision: str, tmp_path: Path) -> None:
    result = quantized(target, precision)
    step, prefill = (
        {name: value.const_value.tobytes() for name, value in model.graph.initializers.items() if "." in name}
        for model in (result.lowered.step, result.lowered.prefill)
    )
    stored, other = (
        {content for name, content in weights.items() if name.split(".")[0] in QUANTIZED} for weights in (step, prefill)
    )
    assert len(stored) >= len(QUANTIZED)
    assert stored == other
    graphs = {"step.onnx": result.lowered.step, "prefill.onnx": result.lowered.prefill}
    write_graphs(graphs, tmp_path, shared=True)
    for name, one in (("step.onnx", result.rounded.step), ("prefill.onnx", result.rounded.prefill)):
        loaded = ir.load(tmp_path / name)
        if not (target == "cuda" and precision == "bf16"):
            assert error(loaded_inline(loaded), one, result.lowered, optimized=True) <= PRODUCTS[precision]


def loaded_inline(model: ir.Model) -> ir.Model:
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            proto = onnx.TensorProto(data_type=tensor.dtype.value, dims=tensor.shape.numpy(), raw_data=tensor.tobytes())
            value.const_value = ir.TensorProtoTensor(proto)
    return model


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_came_in_stays_usable(precision: str) -> None:
    source = toy("portable")
    before = serialized(source.step), serialized(source.prefill)
    result = quantize(source, QuantizeConfig(quantize=precision))  # type: ignore[arg-type]
    assert (serialized(source.step), serialized(source.prefill)) == before
    assert result.rounded.step.opset_imports[""] == 20
    assert result.lowered.step.opset_imports[""] == 21


def test_nothing_to_do() -> None:
    source = toy("cpu")
    assert quantize(source, QuantizeConfig()) == Quantized(source, source, ())


def test_one_graph_that_is_both_stays_one() -> None:
    source = toy("mcu")
    source = Lowered(source.step, source.step, "mcu", source.states, 1)
    result = quantize(source, QuantizeConfig(quantize="int8"))
    assert result.lowered.prefill is result.lowered.step
    assert result.rounded.prefill is result.rounded.step


def test_parts_say_how_much_smaller() -> None:
    before = 4 * (WIDTH * INSIDE + INSIDE * VOCAB), 4 * VOCAB * WIDTH
    parts = quantized("portable", "int8").parts
    after = WIDTH * INSIDE + INSIDE * VOCAB + 4 * (INSIDE + VOCAB), VOCAB * WIDTH + 4 * VOCAB
    assert parts == (Part("matrices", 2, before[0], after[0]), Part("embedding", 1, before[1], after[1]))
    for part, size in zip(quantized("portable", "fp16").parts, before, strict=True):
        assert (part.before, part.after) == (size, size // 2)
    for target in ("portable", "cpu"):
        for part, size in zip(quantized(target, "int4").parts, before, strict=True):
            assert 0.15 <= part.after / size <= 0.25


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("twice", [False, True], ids=["each once", "one of them twice"])
def test_onnxruntime_fuses_the_standard_form(precision: str, twice: bool, tmp_path: Path, built: Callable) -> None:
    """It has a kernel for DequantizeLinear and MatMul, without which the standard form is slower than float32."""
    lowered = toy("portable") if twice else built("hybrid", "modal").lowered
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    model = serialized(quantize(lowered, QuantizeConfig(quantize=precision)).lowered.step)  # type: ignore[arg-type]
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    types = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert types.count("MatMulNBits") == (3 if twice else 11)  # five blocks of two, and the head
    assert "DequantizeLinear" not in types


def test_tokens_do_not_depend_on_what_else_is_in_the_call() -> None:
    """Signals are rounded row by row: a loud row beside a quiet one changes nothing."""
    result = quantized("cpu", "int8")
    opened = session(result.lowered.prefill)
    feeds = {
        "input_ids": np.array([[3], [3]]),
        "past.position": np.ones((2, 1), np.int64),
        "past.fir": np.concatenate([np.zeros((1, 1, WIDTH)), np.full((1, 1, WIDTH), 1e4)]).astype(np.float32),
    }
    together = opened.run(["logits"], feeds)[0]
    alone = opened.run(["logits"], {name: value[:1] for name, value in feeds.items()})[0]
    assert np.allclose(together[:1], alone, rtol=EXACT, atol=EXACT)


def test_products_of_bytes_cannot_overflow() -> None:
    """Two of them are added in 16 bits on CPUs that have no better: a code of a signal is at most 255."""
    weights = quantized("cpu", "int8").lowered.prefill.graph.initializers
    for name in ("projection", "head"):
        codes = weights[f"{name}.int8"].const_value.numpy().astype(int)
        assert -(2**15) <= 2 * 255 * codes.min() < 2 * 255 * codes.max() < 2**15
        assert max(abs(codes.min()), codes.max()) >= 63


def test_a_weight_that_16_bits_cannot_hold() -> None:
    source = toy("portable")
    head = source.prefill.graph.initializers["head"]
    head.const_value = ir.tensor(head.const_value.numpy() * np.float32(1e6), name="head")
    with pytest.raises(LowerError, match=r"^head: fp16 cannot hold its largest weight \d.*e\+05; bf16 can$"):
        quantize(source, QuantizeConfig(quantize="fp16"))
    quantize(source, QuantizeConfig(quantize="bf16"))


def test_a_weight_that_scales_of_16_bits_cannot_hold() -> None:
    """In an embedding of whole blocks, as `cuda` stores it."""
    ids = ir.Value(name="ids")
    for size, fits in ((5.7e4, True), (5.8e4, False)):
        array = np.zeros((VOCAB, 64), np.float32)
        array[3, 5] = -size
        entries = ir.Value(name="embedding", const_value=ir.tensor(array), shape=ir.Shape(array.shape))
        use = Use(ir.node("Gather", [entries, ids]), 0)
        if fits:
            stored = int4_table(halves=True).store(use)
            assert np.isfinite(stored.values().astype(np.float16)).all()
            assert abs(stored.values()[3, 5] / -size - 1) < 1e-3
        else:
            with pytest.raises(LowerError, match=r"^embedding: int4 cannot hold its largest weight 5.8e\+04"):
                int4_table(halves=True).store(use)


def test_gemm_is_a_product_too() -> None:
    """Before: Gemm(x, W, b, transB=1). After: MatMul and Add, quantized."""
    random = np.random.default_rng(0)
    shapes = {"weight": (7, 40), "bias": (7,)}
    weights = [
        ir.Value(name=name, const_value=ir.tensor(random.standard_normal(shape).astype(np.float32), name=name))
        for name, shape in shapes.items()
    ]
    kind = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", type=kind, shape=ir.Shape(["batch", 40]))
    gemm = ir.node("Gemm", [x, *weights], {"transB": 1})
    y = gemm.outputs[0]
    y.name, y.type, y.shape = "y", kind, ir.Shape(["batch", 7])
    graph = ir.Graph([x], [y], nodes=[gemm], initializers=weights, opset_imports={"": 20}, name="step")
    model = ir.Model(graph, ir_version=10)
    result = quantize(Lowered(model, model, "portable", ()), QuantizeConfig(quantize="int4"))
    assert [node.op_type for node in result.lowered.step.graph] == ["DequantizeLinear", "MatMul", "Add"]
    values = random.standard_normal((3, 40)).astype(np.float32)
    mine, meant = (
        session(each.step, optimized=False).run(None, {"x": values})[0] for each in (result.lowered, result.rounded)
    )
    assert difference([mine], [meant]) <= EXACT


# ---- mutants -------------------------------------------------------------------------------------------------------

Change = Callable[[Array], Array]


def louder(array: Array) -> Array:
    return array * np.float32(1.25)


def next_block(array: Array) -> Array:
    """Scales of the neighbouring block, output or entry."""
    axis = next(i for i, size in enumerate(array.shape) if size > 1)
    return np.roll(array, 1, axis)


def swapped(array: Array) -> Array:
    """The halves of every byte."""
    return ((array & 15) << 4) | (array >> 4)


def moved_zero(array: Array) -> Array:
    """Every code one higher."""
    return array + np.array(1, array.dtype)


def other_axis(array: Array) -> Array:
    """The same bytes read along the other axis."""
    return np.ascontiguousarray(array.swapaxes(0, 1)).reshape(array.shape)


MUTANTS = [
    ("portable", "int4", "scales", louder),
    ("portable", "int4", "scales", next_block),
    ("portable", "int4", "scales", other_axis),
    ("portable", "int4", "int4", swapped),
    ("portable", "int4", "bytes", swapped),
    ("portable", "int4", "bytes", moved_zero),
    ("portable", "int8", "scales", next_block),
    ("portable", "int8", "int8", moved_zero),
    ("portable", "int8", "int8", other_axis),
    ("portable", "fp16", "fp16", louder),
    ("cpu", "int4", "block_scales", louder),
    ("cpu", "int4", "block_scales", other_axis),
    ("cpu", "int4", "blocks4", swapped),
    ("cpu", "int4", "blocks4", moved_zero),
    ("cpu", "int8", "scales", louder),
    ("cpu", "int8", "int8", other_axis),
    ("cuda", "int8", "blocks8", moved_zero),
    ("cuda", "int8", "block_scales", next_block),
]


@pytest.mark.parametrize(("target", "precision", "role", "change"), MUTANTS)
def test_mutants_are_caught(target: str, precision: str, role: str, change: Change) -> None:
    """In each graph, for each weight that has such a tensor, by the comparison above."""
    result = quantized(target, precision)
    tried = 0
    for graph in ("step", "prefill"):
        model, meant = (getattr(lowered, graph) for lowered in (result.lowered, result.rounded))
        tolerance = PRODUCTS[precision] if rounds_signals(target, precision, graph) else EXACT
        for name in [name for name in model.graph.initializers if name.split(".")[1:] == [role]]:
            mutant = unrounded(model)
            value = mutant.graph.initializers[name]
            value.const_value = changed(value.const_value, change)
            assert error(mutant, meant, result.lowered) > 2 * tolerance, f"{graph}: {name}"
            tried += 1
    assert tried >= 2


def changed(tensor: Any, change: Change) -> ir.TensorProtocol:
    if tensor.dtype != ir.DataType.INT4:
        return ir.tensor(np.ascontiguousarray(change(tensor.numpy())).astype(tensor.numpy().dtype))
    packed = np.frombuffer(tensor.tobytes(), np.uint8)
    return ir.PackedTensor(change(packed), ir.DataType.INT4, shape=tensor.shape.numpy())
