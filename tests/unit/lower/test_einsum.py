"""Einsum as matrix products, against torch."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lhcompile.errors import LowerError
from lhcompile.lower.einsum import einsum

EQUATIONS = {
    "outer product": ("bhit,bhjt->bhijt", [(1, 2, 3, 1), (1, 2, 4, 1)]),
    "sum over one": ("bhit,bhijt->bhjt", [(1, 2, 3, 1), (1, 2, 3, 4, 1)]),
    "no arrow": ("kj,ik", [(3, 4), (2, 3)]),
    "sum over two, batch among them": ("bij,bkj->ki", [(2, 3, 4), (2, 5, 4)]),
    "axes of one alone summed": ("ij,kl->lj", [(2, 3), (4, 5)]),
    "scalar": ("i,i->", [(3,), (3,)]),
    "three": ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)]),
    "one": ("ijk->ki", [(2, 3, 4)]),
    "spaces, shared and kept": ("b c d, c -> d b c", [(2, 3, 4), (3,)]),
}


class All(nn.Module):
    """Every equation on tensors of its own."""

    def forward(self, tensors: list[list[Tensor]]) -> list[Tensor]:
        return [torch.einsum(equation, *each) for (equation, _), each in zip(EQUATIONS.values(), tensors, strict=True)]


@pytest.mark.filterwarnings("ignore")  # the exporter's remarks
def test_as_torch() -> None:
    torch.manual_seed(0)
    tensors = [[torch.randn(shape) for shape in shapes] for _, shapes in EQUATIONS.values()]
    table = {torch.ops.aten.einsum.default: lambda equation, operands, path=None: einsum(equation, operands)}
    exported = torch.export.export(All(), (tensors,))
    program = torch.onnx.export(exported, dynamo=True, custom_translation_table=table, verbose=False, opset_version=20)
    assert program is not None
    operators = {node.op_type for node in program.model.graph.all_nodes()}
    assert "MatMul" in operators
    assert "Einsum" not in operators
    model = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    flat = [tensor.numpy() for each in tensors for tensor in each]
    names = [value.name for value in session.get_inputs()]
    found = session.run(None, dict(zip(names, flat, strict=True)))
    for name, mine, theirs in zip(EQUATIONS, found, All()(tensors), strict=True):
        np.testing.assert_allclose(np.asarray(mine), theirs.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("equation", ["...i,...i->...", "ii->i", "ij,jj->i"])
def test_what_has_no_form_is_named(equation: str) -> None:
    with pytest.raises(LowerError, match="has an ellipsis or a label twice in one term: no form as MatMul"):
        einsum(equation, [])


def test_a_repeated_axis_has_no_form() -> None:
    with pytest.raises(LowerError, match="an einsum repeats an axis of size one"):
        einsum("i,i->i", [SimpleNamespace(shape=(1,)), SimpleNamespace(shape=(3,))])
