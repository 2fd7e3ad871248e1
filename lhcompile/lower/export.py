"""From a streamed program to one ONNX model."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from onnxscript.optimizer._constant_folding import FoldConstantsPass
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from lhcompile.artifacts import Program
from lhcompile.errors import LowerError
from lhcompile.lower.portable import OPSET, Lowering
from lhcompile.sizes import Size, emit_size

__all__ = ["export_onnx"]

aten = torch.ops.aten
_VIEWS = {aten.reshape.default, aten.view.default, aten._unsafe_view.default}
_RESHAPES = {*_VIEWS, aten.expand.default}


def export_onnx(
    program: Program, lowering: type[Lowering], one_token: bool, batch: int | None = None, time: int | None = None
) -> ir.Model:
    """One graph of `program`: for a single token, or for `time` of them; for `batch` rows; any number where None."""
    time = 1 if one_token else time
    exported, arguments = _retrace(program, time, batch)
    weights = {
        spec.arg.name: _weight(exported, spec.target)
        for spec in exported.graph_signature.input_specs
        if spec.target is not None
    }
    try:
        with _quiet():
            onnx_program = torch.onnx.export(
                exported,
                arguments,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=lowering(weights).table(),
                input_names=[program.signal.input, *(state.name for state in program.states)],
                output_names=[program.signal.output, *(state.output for state in program.states)],
                optimize=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise LowerError(_reason(error)) from error
    assert onnx_program is not None
    return _finish(onnx_program.model, one_token)


def _retrace(
    program: Program, time: int | None, batch: int | None
) -> tuple[ExportedProgram, tuple[torch.Tensor, ...]]:
    """Export the program with batch and seq dynamic, unless they are given."""
    ids = program.signal.constant(batch or 2, time or 7)
    arguments = (ids, *program.start(batch or 2))
    rows: dict[int, Any] = {} if batch else {0: Dim("batch", min=1)}
    dynamic = tuple(dict(rows) for _ in program.states)
    ids_dynamic = rows if time else rows | {1: Dim("seq", min=1)}
    module = _simplified(program.graph, time)
    try:
        with torch.no_grad(), _quiet():
            exported = torch.export.export(module, arguments, dynamic_shapes=(ids_dynamic, *dynamic), strict=False)
    except Exception as error:  # torch.export raises many kinds; its first line says what
        detail = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LowerError(f"torch.export cannot trace the streamed program: {detail}") from error
    return exported, arguments


def _simplified(module: GraphModule, time: int | None) -> GraphModule:
    """Reshapes in a row become one, and write a single dynamic size as -1, so that no shape is read for it."""
    module = copy.copy(module)
    module.graph = copy.deepcopy(module.graph)
    graph = module.graph
    ids = next(iter(graph.nodes))
    for node in list(graph.nodes):
        if node.target in _RESHAPES:
            while node.target in _VIEWS and node.args[0].target in _VIEWS:
                node.args = (node.args[0].args[0], *node.args[1:])
            sizes: list[Any] = [_known(size, time) for size in node.meta["sizes"]]
            if sizes.count(-1) > 1:  # several are dynamic: each is written out
                with graph.inserting_before(node):
                    axes = [graph.call_function(aten.sym_size.int, (ids, axis)) for axis in (0, 1)]
                    sizes = [emit_size(graph, size, *axes) for size in node.meta["sizes"]]
            node.args = (node.args[0], sizes, *node.args[2:])
    graph.eliminate_dead_code()
    module.recompile()
    return module


def _known(size: Size, time: int | None) -> int:
    """The size as a number, -1 where it is dynamic."""
    dynamic = size.has_batch or (size.has_time and time is None)
    return -1 if dynamic else size.scale * (time or 0) + size.offset


def _reason(error: torch.onnx.OnnxExporterError) -> str:
    """The operator the exporter stumbled on, in one line; the exporter's own words where it names none."""
    found = re.search(r"target=torch\.ops\.([\w.]+)", str(error)) or re.search(r"op='([\w.]+)'", str(error))
    return f"{found.group(1)} has no ONNX form" if found else f"no ONNX form: {str(error).splitlines()[0]}"


def _weight(exported: ExportedProgram, name: str) -> torch.Tensor:
    value = exported.state_dict[name] if name in exported.state_dict else exported.constants[name]
    assert isinstance(value, torch.Tensor)
    return value


def _finish(model: ir.Model, one_token: bool) -> ir.Model:
    """Names for the dynamic axes, constants as initializers, nothing of the place the graph was made in."""
    _name_axes(model.graph)
    for clean in (
        FoldConstantsPass(
            shape_inference=False, input_size_limit=0, output_size_limit=2**62, should_fold=_rearranges_weight
        ),
        common.LiftConstantsToInitializersPass(lift_all_constants=False),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        clean(model)
    model.producer_name, model.producer_version = "lhcompile", None
    model.metadata_props.clear()
    for value in _values(model.graph):
        value.metadata_props.clear()
    for value in set(getattr(model.graph.inputs, "_ref_counter", ())) - set(_values(model.graph)):
        value.const_value = None  # rules of the exporter keep the graph, whose inputs weights once were
    model.graph.name = "step" if one_token else "prefill"
    return model


def _name_axes(graph: ir.Graph) -> None:
    """The exporter's symbols for the sizes of the input become "batch" and "seq" in every shape."""
    ids = graph.inputs[0].shape
    assert ids is not None
    axes = zip(ids, ("batch", "seq"), strict=False)  # features have a third axis, of fixed size
    names = {str(dim): name for dim, name in axes if isinstance(dim, ir.SymbolicDim)}

    def renamed(dim: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(dim, int) or dim.value is None:
            return dim if isinstance(dim, int) else None
        return re.sub(r"\w+", lambda word: names.get(word.group(), word.group()), dim.value)

    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape([renamed(dim) for dim in value.shape])


def _values(graph: ir.Graph) -> list[ir.Value]:
    """Every value of a graph and of the graphs inside its nodes."""
    made = [output for node in graph.all_nodes() for output in node.outputs]
    return list(dict.fromkeys([*graph.inputs, *graph.outputs, *graph.initializers.values(), *made]))


def _rearranges_weight(node: ir.Node) -> bool:
    """Layouts of weights are settled now, also those of a weight that two operators read."""
    return node.op_type in ("Transpose", "Reshape", "Slice", "Squeeze", "Unsqueeze", "Split", "Concat")


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's remarks about packages it can do without, and about its own internals, are not the user's."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"copyreg|torch\..*")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        log.setLevel(level)
