"""The kernels of projections on a GPU against double precision, called without onnxruntime.

Not run in CI, which has no GPU: `python -m pytest tests/gpu` on a machine that has one, after `make ops`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import onnx_ir as ir
import pytest
import torch
from launched import BRAIN, BUDGET, FLOAT, HALF, computed, placed, projected, there
from operators import Linear, Mlp, error

from bench.kernels import Kernels
from lhcompile.lower.projections import Projection

LINEARS = {
    "plain": Linear(),
    "layer": Linear(norm="layer", norm_bias=True),
    "rms": Linear(norm="rms", activation="gelu_tanh", bias=False),
    "rms with bias": Linear(norm="rms", norm_bias=True, residual=True),
    "everything": Linear(norm="layer", norm_bias=True, activation="gelu", residual=True),
    "gelu": Linear(activation="gelu"),
    "gelu_tanh": Linear(activation="gelu_tanh"),
    "odd sizes": Linear(width=37, out=13, norm="layer", residual=True),
    "wide": Linear(width=8192, out=300, residual=True),
    "wider": Linear(width=5000, out=301, norm="rms", residual=True),
    "large": Linear(width=2048, out=1030, norm="layer", norm_bias=True, activation="gelu"),
    "many tiles": Linear(width=272, out=6150, norm="layer", residual=True),
    "tiles by clusters": Linear(width=1032, out=6148, norm="layer", activation="gelu_tanh", residual=True),
    "clusters of four": Linear(width=2048, out=2048, residual=True),
    "clusters of eight": Linear(width=8192, out=304, residual=True),
    "many tiles a cluster": Linear(width=512, out=12804, bias=False),
    "vocabulary": Linear(width=48, out=50257, bias=False),
}


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 8, 12, 20, 64, 200])
@pytest.mark.parametrize("kind", [(FLOAT, None), (HALF, None), (HALF, FLOAT), (BRAIN, None)])
def test_linear(kernels: Kernels, name: str, rows: int, kind: tuple[ir.DataType, ir.DataType | None]) -> None:
    signal, bias_type = kind
    linear = replace(LINEARS[name], batch=rows, time=1, signal=signal, bias_type=bias_type)
    # where cuBLASLt gives the product to another kernel, it is rounded once more on the way
    assert error(projected(kernels, linear), linear.expected()[0]) <= (1.5 if rows > 4 else 1) * BUDGET[signal]


MANY = {
    "layer": Linear(norm="layer", norm_bias=True),
    "rms": Linear(norm="rms", activation="gelu_tanh", bias=False),
    "everything": Linear(width=264, norm="layer", norm_bias=True, activation="gelu", residual=True),
    "odd sizes": Linear(width=37, out=13, norm="layer", residual=True),
    "half": Linear(width=1024, out=40, norm="layer", norm_bias=True),
    "more than half": Linear(width=1032, out=40, norm="rms", norm_bias=True),
    "whole": Linear(width=2048, out=40, norm="layer", norm_bias=True),
    "wider": Linear(width=5000, out=40, norm="rms"),
}


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("signal", [FLOAT, HALF, BRAIN])
def test_linear_of_many_rows(kernels: Kernels, name: str, signal: ir.DataType) -> None:
    """A warp normalizes three or four of them, one after the other, where they are not too wide or odd."""
    linear = replace(MANY[name], batch=6500, time=1, signal=signal)
    assert error(projected(kernels, linear), linear.expected()[0]) <= 1.5 * BUDGET[signal]


EIGHTS = {
    "plain": Linear(width=64, out=48),
    "layer": Linear(width=512, out=96, norm="layer", norm_bias=True, activation="gelu"),
    "rms": Linear(width=2048, out=304, norm="rms", activation="gelu_tanh", bias=False),
    "residual": Linear(width=8192, out=304, residual=True),
    "many tiles": Linear(width=272, out=6144, norm="layer", residual=True),
    "part of a piece": Linear(width=4112, out=304, norm="layer", residual=True),
    "vocabulary": Linear(width=48, out=50304, bias=False),
}


@pytest.mark.parametrize("name", EIGHTS)
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 8, 12, 20, 64, 200])
@pytest.mark.parametrize("kind", [(FLOAT, None), (HALF, None), (HALF, FLOAT), (BRAIN, None)])
def test_linear_in_eight_bits(
    kernels: Kernels, name: str, rows: int, kind: tuple[ir.DataType, ir.DataType | None]
) -> None:
    """The same codes of x enter the product, but for those at the edge between two: a thousandth of them, 6 % apart."""
    signal, bias_type = kind
    linear = replace(EIGHTS[name], batch=rows, time=1, signal=signal, bias_type=bias_type, name="LinearFp8")
    assert error(projected(kernels, linear), linear.expected()[0]) <= 1.5 * BUDGET[signal] + 2e-3


@pytest.mark.parametrize("name", EIGHTS)
@pytest.mark.parametrize("rows", [2, 3, 8, 12])
@pytest.mark.parametrize("projection", ["Linear", "LinearFp8"])
@pytest.mark.parametrize("signal", [HALF, BRAIN])
def test_few_rows_on_other_gpus(
    kernels: Kernels, name: str, rows: int, projection: Projection, signal: ir.DataType
) -> None:
    linear = replace(EIGHTS[name], batch=rows, time=1, signal=signal, name=projection)
    with kernels.withheld():
        given = projected(kernels, linear)
    assert error(given, linear.expected()[0]) <= 1.5 * BUDGET[signal] + (2e-3 if projection == "LinearFp8" else 0)


@pytest.mark.parametrize("name", ["plain", "layer", "rms", "many tiles", "part of a piece"])
@pytest.mark.parametrize("signal", [FLOAT, HALF, BRAIN])
def test_many_rows_in_eight_bits(kernels: Kernels, name: str, signal: ir.DataType) -> None:
    linear = replace(EIGHTS[name], batch=6500, time=1, signal=signal, name="LinearFp8")
    assert error(projected(kernels, linear), linear.expected()[0]) <= 1.5 * BUDGET[signal] + 2e-3


MLPS = {
    "plain": Mlp(norm="none", activation="none", up_bias=False, down_bias=False, residual=False),
    "layer": Mlp(width=512, hidden=2048, out=512, norm_bias=True),
    "rms": Mlp(width=2048, hidden=304, out=2048, norm="rms", activation="gelu"),
    "large": Mlp(width=1024, hidden=4096, out=1024),
    "odd tiles": Mlp(width=272, hidden=784, out=80, norm="layer", residual=False),
    "part of a piece": Mlp(width=2064, hidden=4112, out=304),
}


@pytest.mark.parametrize("name", MLPS)
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 8, 9, 20, 64, 200, 700])
@pytest.mark.parametrize("kind", [(FLOAT, None), (HALF, None), (HALF, FLOAT), (BRAIN, None)])
@pytest.mark.parametrize("withheld", [False, True])
def test_mlp_in_eight_bits(
    kernels: Kernels, name: str, rows: int, kind: tuple[ir.DataType, ir.DataType | None], withheld: bool
) -> None:
    """Numbers at the edge between two codes fall to either side, and GELU of the tensor cores' product has 11 bits."""
    signal, bias_type = kind
    mlp = replace(MLPS[name], batch=rows, time=1, signal=signal, bias_type=bias_type)
    with kernels.withheld(withheld):
        given = computed(*kernels.mlp(placed(mlp.call()), mlp.norm, mlp.activation, mlp.epsilon))[0]
    assert error(given, mlp.expected()[0]) <= 1.5 * BUDGET[signal] + 8e-3


@pytest.mark.parametrize("width", [1024, 1040])
def test_an_mlp_of_many_tiles(kernels: Kernels, width: int) -> None:
    """Every block has several, and pieces of the last inputs are not whole."""
    mlp = Mlp(batch=2500, time=1, width=width, hidden=4096, out=64, signal=HALF)
    given = computed(*kernels.mlp(placed(mlp.call()), mlp.norm, mlp.activation))[0]
    assert error(given, mlp.expected()[0]) <= 1.5 * BUDGET[HALF] + 8e-3


def test_rows_of_an_mlp_do_not_depend_on_their_neighbours(kernels: Kernels) -> None:
    """Among as many others, to the last bit."""
    mlp = replace(MLPS["large"], batch=300, time=1, signal=HALF)
    inputs = list(placed(mlp.call()))
    (y,) = computed(*kernels.mlp(tuple(inputs), mlp.norm, mlp.activation))
    for place in (0, 5):
        others = inputs[place]
        assert others is not None
        inputs[place] = others.roll(130, 0).contiguous()
    (rolled,) = computed(*kernels.mlp(tuple(inputs), mlp.norm, mlp.activation))
    assert torch.equal(rolled, y.roll(130, 0))


FOURS = {
    "plain": Linear(width=64, out=48),
    "one block": Linear(width=32, out=13, bias=False),
    "layer": Linear(width=512, out=96, norm="layer", norm_bias=True, activation="gelu"),
    "rms": Linear(width=2048, out=301, norm="rms", activation="gelu_tanh", bias=False),
    "odd blocks": Linear(width=2080, out=300, norm="layer", residual=True),
    "residual": Linear(width=8192, out=304, residual=True),
    "part of a piece": Linear(width=2304, out=301, norm="rms"),
    "many tiles": Linear(width=768, out=6150, norm="layer", residual=True),
    "clusters of two": Linear(width=2048, out=6144, norm="layer", norm_bias=True),
    "clusters of four": Linear(width=2048, out=2048, residual=True),
    "activated": Linear(width=8192, out=2048, activation="gelu_tanh", residual=True),
    "many tiles a cluster": Linear(width=512, out=12804, residual=True),
    "many pieces a cluster": Linear(width=2048, out=12800),
    "vocabulary": Linear(width=256, out=50257, bias=False),
}


@pytest.mark.parametrize("name", FOURS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 8, 12, 20, 33, 64, 96, 97])
@pytest.mark.parametrize("kind", [(FLOAT, None), (HALF, None), (HALF, FLOAT), (BRAIN, None)])
def test_linear_of_four_bits(
    kernels: Kernels, name: str, rows: int, kind: tuple[ir.DataType, ir.DataType | None]
) -> None:
    signal, bias_type = kind
    linear = replace(FOURS[name], batch=rows, time=1, signal=signal, bias_type=bias_type, name="LinearInt4")
    assert error(projected(kernels, linear), linear.expected()[0]) <= (1.5 if rows > 4 else 1) * BUDGET[signal]


@pytest.mark.parametrize("rows", [1, 2, 12, 40])
@pytest.mark.parametrize("name", ["Linear", "LinearFp8", "LinearInt4"])
def test_what_is_no_number_stays_in_its_row(kernels: Kernels, name: Projection, rows: int) -> None:
    """A row of the weight spoils one output, and a row of x its own row: pairs are multiplied together."""
    out = 301 if rows < 9 else 304
    linear = Linear(batch=rows, time=1, width=512, out=out, signal=HALF, name=name)
    inputs = list(placed(linear.call()))
    place = 6 if name == "LinearInt4" else 1  # its codes are always numbers, its scales need not be
    for spoilt in (0, 7, 299, out - 1):
        matrix = there(inputs[place]).clone()
        if name == "LinearFp8":
            matrix.view(torch.uint8)[spoilt] = 0x7F
        else:
            matrix[spoilt] = torch.nan
        (y,) = computed(*kernels.linear((*inputs[:place], matrix, *inputs[place + 1 :])))
        assert torch.isnan(y).nonzero()[:, -1].tolist() == rows * [spoilt]
    x = there(inputs[0]).clone()
    x[-1, 0, 3] = torch.nan
    (y,) = computed(*kernels.linear((x, *inputs[1:])))
    assert torch.isnan(y).flatten(1).all(1).tolist() == [False] * (rows - 1) + [True]
    assert torch.isfinite(y[: rows - 1]).all()


@pytest.mark.parametrize("name", ["plain", "layer", "residual", "part of a piece", "vocabulary"])
@pytest.mark.parametrize("rows", [3, 8, 12])
def test_few_rows_of_four_bits_on_other_gpus(kernels: Kernels, name: str, rows: int) -> None:
    linear = replace(FOURS[name], batch=rows, time=1, signal=HALF, name="LinearInt4")
    with kernels.withheld():
        given = projected(kernels, linear)
    assert error(given, linear.expected()[0]) <= 1.5 * BUDGET[HALF]


@pytest.mark.parametrize(
    ("name", "rows"), [*product(["Linear", "LinearFp8", "LinearInt4"], [3, 12, 20]), ("LinearInt4", 96)]
)
def test_some_tens_of_rows_have_a_kernel(kernels: Kernels, name: Projection, rows: int) -> None:
    """Of compute capability 9.0: other kernels add in another order, so some sums are rounded to other numbers."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    linear = Linear(batch=rows, time=1, width=2048, out=6144, signal=HALF, name=name)
    given = projected(kernels, linear)
    with kernels.withheld():
        other = projected(kernels, linear)
    assert not torch.equal(given, other)
    assert error(given, other.double()) <= 1.5 * BUDGET[HALF] + (2e-3 if name == "LinearFp8" else 0)
