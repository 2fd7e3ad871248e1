"""Graphs that do not keep the contract of the built directory are refused, and a check changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx.checker
import pytest
from streams import serialized

from lhcompile.artifacts import Lowered, Signal
from lhcompile.errors import ParityError
from lhcompile.verify.graphs import check_graphs


@pytest.fixture(scope="module")
def lowered(built: Callable) -> Lowered:
    return built("per channel", "exact").lowered


def test_a_check_changes_nothing(lowered: Lowered) -> None:
    graphs = (lowered.step, lowered.prefill)
    before = [serialized(graph) for graph in graphs]
    assert check_graphs(lowered, Signal()).step_nodes == len(list(lowered.step.graph))
    assert [serialized(graph) for graph in graphs] == before


def _with_step(lowered: Lowered) -> Lowered:
    """The same with a step graph that a test may change."""
    return dataclasses.replace(lowered, step=lowered.step.clone())


def test_an_operator_without_an_attribute_it_needs_is_found(lowered: Lowered) -> None:
    changed = _with_step(lowered)
    node = next(node for node in changed.step.graph if node.op_type == "Concat")
    del node.attributes["axis"]
    with pytest.raises(onnx.checker.ValidationError, match="Required attribute 'axis' is missing"):
        check_graphs(changed, Signal())


def test_another_domain_is_found(lowered: Lowered) -> None:
    changed = _with_step(lowered)
    next(iter(changed.step.graph)).domain = "com.example"
    with pytest.raises(ParityError, match=r"step: operators of \['com.example'\]"):
        check_graphs(changed, Signal())


def test_inputs_in_another_order_are_found(lowered: Lowered) -> None:
    changed = _with_step(lowered)
    inputs = changed.step.graph.inputs
    inputs.append(inputs.pop(1))
    with pytest.raises(ParityError, match="step: inputs are not in the contract's order"):
        check_graphs(changed, Signal())
