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
from lhcompile.sizes import Size

__all__ = ["export_onnx"]

aten = torch.ops.aten
_RESHAPES = {aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.expand.default}


def export_onnx(program: Program, lowering: type[Lowering], one_token: bool) -> ir.Model:
    """One graph of `program`: for a single token, or for any number of them."""
    exported, arguments = _retrace(program, one_token)
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
                input_names=["input_ids", *(state.name for state in program.states)],
                output_names=["logits", *(state.output for state in program.states)],
                optimize=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise LowerError(_reason(error)) from error
    assert onnx_program is not None
    return _finish(onnx_program.model, one_token)


def _retrace(program: Program, one_token: bool) -> tuple[ExportedProgram, tuple[torch.Tensor, ...]]:
    """Export the program with batch (and seq, unless it is one) dynamic."""
    batch = Dim("batch", min=1)
    time = 1 if one_token else 7
    ids = torch.zeros(2, time, dtype=torch.int64)
    arguments = (ids, *(torch.zeros(2, *state.shape) for state in program.states))
    dynamic = tuple({0: batch} for _ in program.states)
    ids_dynamic: dict[int, Any] = {0: batch} if one_token else {0: batch, 1: Dim("seq", min=1)}
    module = _simplified(program.graph, one_token)
    with torch.no_grad(), _quiet():
        exported = torch.export.export(module, arguments, dynamic_shapes=(ids_dynamic, *dynamic), strict=False)
    return exported, arguments


def _simplified(module: GraphModule, one_token: bool) -> GraphModule:
    """Reshapes with one dynamic size write it as -1, so that no shape is read at run time for it."""
    module = copy.copy(module)
    module.graph = copy.deepcopy(module.graph)
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in _RESHAPES:
            sizes = [_known(size, one_token) for size in node.meta["sizes"]]
            if sizes.count(-1) <= 1:
                node.args = (node.args[0], sizes, *node.args[2:])
    module.recompile()
    return module


def _known(size: Size, one_token: bool) -> int:
    """The size as a number, -1 where it is dynamic."""
    dynamic = size.has_batch or (size.has_time and not one_token)
    return -1 if dynamic else size.scale + size.offset


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
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        dims: list[Any] = list(value.shape)
        dims[0] = "batch"
        if value.name in ("input_ids", "logits"):
            dims[1] = 1 if one_token else "seq"
        value.shape = ir.Shape(dims)
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
    model.graph.name = "step" if one_token else "prefill"
    return model


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
