"""What the graphs hold and what they do not: the contract of the built directory, checked by machine."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from models import ORDERS, VOCAB, WIDTH, Hyena, Mixer, convolve, program_of, tiny, with_modal
from onnx import GraphProto, ModelProto
from streams import assert_parity, onnx_stream, serialized, torch_stream

from lhcompile.artifacts import Program
from lhcompile.capture import capture
from lhcompile.errors import LowerError
from lhcompile.lower import lower
from lhcompile.lower.export import export_onnx
from lhcompile.lower.portable import Step
from lhcompile.recognize import recognize
from lhcompile.streamify import streamify

CASES = [(name, form) for name in ("per channel", "shared") for form in ("exact", "modal", "packed")]
MOVES = {"Slice", "Squeeze", "Unsqueeze", "Transpose", "Reshape", "Identity", "Cast", "Split"}
"""Operators that only move data: on a weight they are work left undone at build time."""
FORBIDDEN_IN_STEP = {"Scan", "Loop", "If", "Shape", "Size", "Range", "Sin", "Cos", "ConstantOfShape", "NonZero", "Pad"}
NODES_PER_LAYER = {"modal": 23, "packed": 27}
"""A Hyena layer's step: norm 1, projections 4, short convolution 5, split 1, gates 2, residual 1; a modal system of one
order 9, one of mixed orders 13."""


@pytest.fixture(scope="module", params=CASES, ids=lambda case: ", ".join(case))
def case(request: pytest.FixtureRequest, built: Callable) -> tuple[Program, ModelProto, ModelProto]:
    """(streamed program, step, prefill)"""
    model = built(*request.param)
    step, prefill = (onnx.load_from_string(serialized(part)) for part in (model.lowered.step, model.lowered.prefill))
    return model.program, step, prefill


def dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_standard_operators_of_an_old_enough_opset(case: tuple[Program, ModelProto, ModelProto]) -> None:
    for model in case[1:]:
        assert [(opset.domain, 17 <= opset.version <= 21) for opset in model.opset_import] == [("", True)]
        assert {node.domain for node in model.graph.node} == {""}
        assert len(model.functions) == 0
        onnx.checker.check_model(model, full_check=True)


def test_names_order_and_shapes_are_the_contracts(case: tuple[Program, ModelProto, ModelProto]) -> None:
    program, step, prefill = case
    for model, seq in ((step, 1), (prefill, "seq")):
        inputs, outputs = model.graph.input, model.graph.output
        assert [value.name for value in inputs] == ["input_ids", *(state.name for state in program.states)]
        assert [value.name for value in outputs] == ["logits", *(state.output for state in program.states)]
        assert dims(inputs[0]) == ["batch", seq]
        assert dims(outputs[0]) == ["batch", seq, program.vocabulary]
        for state, before, after in zip(program.states, inputs[1:], outputs[1:], strict=True):
            assert dims(before) == dims(after) == ["batch", *state.shape]
        types = [value.type.tensor_type.elem_type for value in (*inputs, *outputs)]
        assert types == [onnx.TensorProto.INT64] + [onnx.TensorProto.FLOAT] * (len(types) - 1)
        assert model.graph.name == ("step" if seq == 1 else "prefill")


def test_only_batch_and_seq_are_dynamic(case: tuple[Program, ModelProto, ModelProto]) -> None:
    """In the inputs and outputs, and in every shape on the way that the file declares."""
    for model, allowed in ((case[1], {"batch"}), (case[2], {"batch", "seq"})):
        graph = model.graph
        values = (value for part in (graph.input, graph.output, graph.value_info) for value in part)
        words = {word for value in values for dim in dims(value) for word in re.findall(r"[a-z_]\w*", str(dim))}
        assert words <= allowed


def test_a_step_holds_no_loops_and_computes_no_shapes(case: tuple[Program, ModelProto, ModelProto]) -> None:
    assert not {node.op_type for node in case[1].graph.node} & FORBIDDEN_IN_STEP


def initializers(graph: GraphProto) -> set[str]:
    return {tensor.name for tensor in graph.initializer}


def test_weights_are_folded(case: tuple[Program, ModelProto, ModelProto]) -> None:
    for model in case[1:]:
        constants = initializers(model.graph)
        for node in model.graph.node:
            assert not (node.op_type in MOVES and node.input[0] in constants), node.name


def test_nothing_is_computed_from_weights_alone(case: tuple[Program, ModelProto, ModelProto]) -> None:
    """But for the Toeplitz matrix of a chunk where it is large: it is gathered from its taps when the graph loads."""
    for model, allowed in ((case[1], set()), (case[2], {"Gather", "Concat", "Reshape"})):
        known, made = initializers(model.graph), set()
        for node in model.graph.node:
            if set(node.input) <= known:
                known |= set(node.output)
                made.add(node.op_type)
        assert made <= allowed


def test_nothing_is_unused(case: tuple[Program, ModelProto, ModelProto]) -> None:
    for model in case[1:]:
        graph = model.graph
        inside = [each.g for node in graph.node for each in node.attribute if each.type == onnx.AttributeProto.GRAPH]
        nodes = [node for part in (graph, *inside) for node in part.node]
        read = {name for node in nodes for name in node.input}
        read |= {value.name for part in (graph, *inside) for value in part.output}
        assert initializers(graph) <= read
        assert all(value.name in read for value in graph.input)
        for node in nodes:
            assert set(node.output) & read, node.name


def test_equal_weights_are_stored_once(case: tuple[Program, ModelProto, ModelProto]) -> None:
    for model in case[1:]:
        stored = Counter((tuple(t.dims), t.data_type, t.raw_data) for t in model.graph.initializer if t.raw_data)
        assert max(stored.values()) == 1


def test_nothing_tells_where_the_graph_was_made(case: tuple[Program, ModelProto, ModelProto]) -> None:
    for model in case[1:]:
        data = model.SerializeToString()
        for trace in (b"/work", b"/home", b"/root", b"/tmp", b"site-packages", b".py", b'File "', b"pkg.torch"):
            assert trace not in data, trace
        assert model.producer_name == "lhcompile"
        assert len(model.metadata_props) == 0
        for node in model.graph.node:
            assert not node.doc_string
            assert len(node.metadata_props) == 0


def test_the_same_program_gives_the_same_file(built: Callable) -> None:
    model = built("shared", "modal")
    assert serialized(export_onnx(model.program, Step, one_token=True)) == serialized(model.lowered.step)


LOAD = """
import sys, onnxruntime
for path in sys.argv[1:]:
    onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
"""


def test_onnxruntime_loads_every_graph_without_a_warning(built: Callable, tmp_path: Path) -> None:
    paths = []
    for i, which in enumerate(CASES):
        for name in ("step", "prefill"):
            paths.append(tmp_path / f"{i}.{name}.onnx")
            paths[-1].write_bytes(serialized(getattr(built(*which).lowered, name)))
    loaded = subprocess.run([sys.executable, "-c", LOAD, *paths], capture_output=True, text=True, check=False)
    assert (loaded.returncode, loaded.stdout, loaded.stderr) == (0, "", "")


@pytest.mark.parametrize("form", NODES_PER_LAYER)
def test_nodes_per_layer(form: str) -> None:
    """Two layers less one layer is one layer; its nodes are counted by hand in NODES_PER_LAYER."""

    def step(layers: int) -> Counter[str]:
        streamed = streamify(with_modal(program_of(*[Hyena] * layers), orders=ORDERS if form == "packed" else None))
        return Counter(node.op_type for node in export_onnx(streamed, Step, one_token=True).graph)

    two, one = step(2), step(1)
    assert (two - one).total() <= NODES_PER_LAYER[form]
    assert not {"Transpose", "Reshape", "Unsqueeze", "Squeeze"} & set(two)


@pytest.mark.parametrize("orders", [None, [1]], ids=["rectangular", "packed"])
def test_real_poles_need_no_swap(orders: list[int] | None) -> None:
    """`with_modal` gives systems of one slot two real poles, of two slots a pair as well."""

    def step(slots: int, orders: list[int] | None) -> Counter[str]:
        streamed = streamify(with_modal(program_of(Hyena), slots, orders=orders))
        return Counter(node.op_type for node in export_onnx(streamed, Step, one_token=True).graph)

    real, pairs = step(1, orders), step(2, orders and [4])
    assert real + Counter(["Mul", "Add"]) + Counter(["Add", "GatherElements"] if orders else ["Gather"]) == pairs


def test_the_other_target() -> None:
    lowered = lower(streamify(with_modal(program_of(Hyena))), "cpu")
    assert lowered.target == "cpu"
    assert [state.kind for state in lowered.states] == ["fir", "modal"]


class Bessel(Mixer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x[..., :WIDTH])


def test_an_operator_without_an_onnx_form_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    streamed = streamify(recognize(capture(tiny(Bessel))))
    with pytest.raises(LowerError, match=r"^prims\.bessel_j0\.default has no ONNX form$"):
        lower(streamed, "portable")
    assert capfd.readouterr().err == ""


class ReshapedBothWays(Mixer):
    """Reshapes with a size left open, and of batch and time together."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, _ = x.shape
        y = x.reshape(batch, time, 3, -1).sum(2)
        return y.view(-1, time, 2, 4).flatten(2) + y.reshape(batch * time, -1).view(batch, -1, WIDTH)


class DoublePrecision(Mixer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = convolve(x[..., :WIDTH].transpose(1, 2).double(), self.taps.double())
        return (y * 2 + self.direct.double()[:, None]).float().transpose(1, 2)


class WithoutMemory(Mixer):
    """Filters of one tap and of none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = x[..., :WIDTH].transpose(1, 2)
        return (convolve(u, self.taps[:, :1]) + convolve(u, 0 * self.taps) + u.abs()).transpose(1, 2)


def test_unusual_layers() -> None:
    streamed = streamify(program_of(ReshapedBothWays, DoublePrecision, WithoutMemory))
    assert [state.kind for state in streamed.states] == ["long_conv"]
    lowered = lower(streamed, "portable")
    assert not {node.op_type for node in lowered.step.graph} & FORBIDDEN_IN_STEP
    tokens = torch.randint(0, VOCAB, (3, 50), generator=torch.Generator().manual_seed(0))
    for cuts in ([], [1] * 50, [7, 1, 40]):
        assert_parity(onnx_stream(lowered), torch_stream(streamed), streamed.states, tokens, cuts)
