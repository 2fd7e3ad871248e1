"""The exact gate of products passes what another order of sums makes of large logits, and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import pytest
import torch
from models import VOCAB, WIDTH, Hyena, of_width, tiny, with_modal
from streams import write_directory
from torch import nn

from lhcompile.artifacts import Lowered, Program
from lhcompile.capture import capture
from lhcompile.config import QuantizeConfig
from lhcompile.errors import ParityError
from lhcompile.lower import complete, lower
from lhcompile.quantize import quantize
from lhcompile.recognize import recognize
from lhcompile.streamify import streamify
from lhcompile.verify import assert_close, products
from lhcompile.verify.budgets import Tolerance, codes_tolerance
from lhcompile.verify.products import check_products

INNER, IDS, LOUD = 16, 32768, 7
"""Channels, which LinearFp8 takes; ids that the model may say, and the one whose logit is some hundred times the root
mean square of all."""


@pytest.fixture(scope="module")
def loud() -> Program:
    """A trained model with a tied head is so by itself: it says what it heard, Σ x² beside sums Σ xy of any sign."""
    with of_width(INNER):
        loaded = tiny(Hyena)
        head = nn.Linear(INNER, IDS)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            head.weight.copy_(torch.randn(IDS, INNER, generator=generator))
            head.weight[LOUD] *= 1000
        loaded.module.head = head.requires_grad_(False)
        return streamify(with_modal(recognize(capture(loaded))))


def gate(program: Program, mine: Lowered, meant: Lowered, folder: Path) -> None:
    tokens = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    one, other = (
        write_directory(Program(program.graph, program.context, graphs.states), complete(graphs), folder / name)
        for name, graphs in (("mine", mine), ("meant", meant))
    )
    assert check_products(one / "prefill.onnx", other / "prefill.onnx", program.states, tokens)


@pytest.mark.parametrize("precision", ["fp16", "fp8", "int4"])
def test_large_logits(loud: Program, precision: str, tmp_path: Path) -> None:
    """float8 is scaled after its product, its rounded weights before: the largest logits part by 2⁻²² of themselves."""
    result = quantize(lower(loud, "cuda"), QuantizeConfig(quantize=precision))  # type: ignore[arg-type]
    gate(loud, result.lowered, result.rounded, tmp_path)


@pytest.mark.parametrize("row", [LOUD, LOUD + 1])
def test_one_code_beside_large_logits(loud: Program, row: int, tmp_path: Path) -> None:
    """The largest float8 code of a row of the head is the one below: of the row that is large, and of a small one."""
    result = quantize(lower(loud, "cuda"), QuantizeConfig(quantize="fp8"))
    prefill = result.lowered.prefill
    (codes,) = (value for value in prefill.graph.initializers.values() if list(value.shape or ()) == [IDS, INNER])
    assert codes.const_value is not None
    wrong = codes.const_value.numpy().copy()
    wrong.view(np.uint8)[row, np.abs(wrong[row].astype(np.float32)).argmax()] -= 1
    codes.const_value = ir.tensor(wrong)
    with pytest.raises(ParityError, match=r"codes: logits of the first call differs by \d.* whichever is larger"):
        gate(loud, result.lowered, result.rounded, tmp_path)


def cancelled(program: Program) -> Program:
    """A pole near 0 is one tap: the residue that gives it size is taken off the direct term again."""
    graph = copy.deepcopy(program.graph)
    tables = dict(graph.named_buffers())
    own, other, readout, direct = (
        next(table for name, table in tables.items() if name.endswith(f"_{kind}"))
        for kind in ("own", "other", "readout", "direct")
    )
    own[-1], other[-1], readout[-1] = 1e-3, 0.0, 3e4
    other[len(own) // 2 - 1] = 0.0
    direct -= 3e4
    return Program(graph, program.context, program.states)


def test_residues_that_cancel(loud: Program, tmp_path: Path) -> None:
    """In float32 they leave 2⁻²⁴ of themselves in what is heard, hundreds of times what the gate allows. Of fp8, whose
    scales come after its products: graphs of fp16 and int4 this small agree to the bit."""
    result = quantize(lower(cancelled(loud), "cuda"), QuantizeConfig(quantize="fp8"))
    gate(loud, result.lowered, result.rounded, tmp_path)


def numbers() -> torch.Tensor:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    values[LOUD] = 50.0
    return values


@pytest.mark.parametrize(
    ("place", "share", "passes"), [(LOUD, 1.9e-5, True), (LOUD, 2.2e-5, False), (0, 2.2e-5, False), (0, 1.9e-5, True)]
)
def test_bound_of_each_number(place: int, share: float, passes: bool) -> None:
    """Of the large number the share is of itself, of any other of the root mean square, however large that one is."""
    reference, size = numbers(), float(numbers().square().mean().sqrt())
    value = reference.double()
    value[place] += share * max(size, abs(float(reference[place])))
    if passes:
        assert_close(value, reference, codes_tolerance(WIDTH), "numbers")
    else:
        with pytest.raises(ParityError, match="codes: numbers differs by"):
            assert_close(value, reference, codes_tolerance(WIDTH), "numbers")


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
@pytest.mark.parametrize("both", [False, True])
def test_what_is_not_finite(number: float, both: bool) -> None:
    """An infinite reference allows nothing, though its root mean square is infinite."""
    reference = numbers()
    reference[3] = number
    with pytest.raises(ParityError, match="codes: numbers differs by"):
        assert_close(reference if both else numbers(), reference, codes_tolerance(WIDTH), "numbers")


def test_terms(loud: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate counts the products that follow one another: both projections of the block and the head."""
    found: list[int] = []

    def counted(terms: int) -> Tolerance:
        found.append(terms)
        return codes_tolerance(terms)

    monkeypatch.setattr(products, "codes_tolerance", counted)
    result = quantize(lower(loud, "cuda"), QuantizeConfig(quantize="fp16"))
    gate(loud, result.lowered, result.rounded, tmp_path)
    assert found == [3 * INNER]


@pytest.mark.parametrize(
    ("kind", "shape", "attributes", "terms"),
    [
        ("MatMul", (24, 5), {}, 24),
        ("MatMul", (24,), {}, 24),
        ("Gemm", (24, 5), {}, 24),
        ("Gemm", (24, 5), {"transB": 1}, 5),
        ("Linear", (24, 5), {}, 5),
    ],
)
def test_terms_of_a_product(kind: str, shape: tuple[int, ...], attributes: dict[str, int], terms: int) -> None:
    weight = onnx.numpy_helper.from_array(np.zeros(shape, np.float32), "w")
    node = onnx.helper.make_node(kind, ["x", "w"], ["y"], **attributes)
    assert products._terms(onnx.helper.make_graph([node], "one", [], [], [weight])) == terms


def test_bound_of_large_models() -> None:
    """It grows with the root of the terms where that is more than small models are allowed, and never falls below."""
    small, large, larger = (codes_tolerance(terms).relative for terms in (100_000, 400_000, 1_600_000))
    assert small == 2e-5
    assert large == pytest.approx(632.5 * 2.0**-24, rel=1e-3)
    assert larger == pytest.approx(2 * large)
