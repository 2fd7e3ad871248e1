"""An input projection and the step of its outputs as one operator of the decode graph."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from models import Hyena, program_of, with_modal
from streams import serialized

from lhcompile.artifacts import Lowered
from lhcompile.config import QuantizeConfig
from lhcompile.lower import complete, lower
from lhcompile.quantize import half_pasts, keep_states, kept_in, quantize
from lhcompile.streamify import streamify


@pytest.fixture(scope="module")
def lowered() -> Lowered:
    """A Hyena of one layer in fp16, whose past is in float16 too."""
    program = streamify(with_modal(program_of(Hyena)))
    graphs = quantize(lower(program, "cuda"), QuantizeConfig(quantize="fp16")).lowered
    return keep_states(graphs, kept_in(program.states, "float32", None, half_pasts(graphs)))


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_both_are_one_and_compute_what_the_step_does(lowered: Lowered) -> None:
    done = complete(lowered, decode=True)
    assert done.decode is not None
    assert kinds(done.decode) == ["Gather", "LinearHyenaStep", "Linear", "Linear", "Sample"]
    assert {name for _, name, _ in done.decode.functions} == {"LinearHyenaStep", "Linear", "Sample"}
    step, decode = (onnxruntime.InferenceSession(serialized(model)) for model in (done.step, done.decode))
    names = [value.name for value in step.get_inputs()]
    (apart,) = done.past.values()
    draw = np.random.default_rng(0)
    states = [np.zeros((3, *state.shape[1:]), state.dtype) for state in map(_sized, step.get_inputs()[1:])]
    greedy = {"uniform": "f4", "temperature": "f4", "top_k": "i8"}
    settings = {name: np.zeros(3, kind) for name, kind in greedy.items()} | {"top_p": np.ones(3, "f4")}
    for _ in range(5):
        ids = draw.integers(0, 10, (3, 1))
        logits, *after = step.run(None, dict(zip(names, (ids, *states), strict=True)))
        past = dict(zip(apart.inputs, np.split(states[0], 2, axis=1), strict=True))
        tokens, newest, state = decode.run(None, {names[0]: ids, **past, names[2]: states[1], **settings})
        np.testing.assert_array_equal(tokens, logits.argmax(-1))
        np.testing.assert_array_equal(np.concatenate([states[0][:, 1:], newest], axis=1), after[0])
        np.testing.assert_array_equal(state, after[1])
        states = after


class _sized:
    """Shape and dtype of an input."""

    def __init__(self, value: onnxruntime.NodeArg) -> None:
        self.shape = tuple(value.shape)
        self.dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[value.type]


def test_a_projection_that_others_read_stays_alone(lowered: Lowered) -> None:
    step = lowered.step.clone()
    mixer = next(node for node in step.graph if node.op_type == "HyenaMixer")
    also = ir.node("Identity", [mixer.inputs[0]])
    (value,) = also.outputs
    assert mixer.inputs[0] is not None
    value.name, value.type, value.shape = "also", mixer.inputs[0].type, mixer.inputs[0].shape
    step.graph.insert_after(mixer, also)
    step.graph.outputs.append(value)
    done = complete(replace(lowered, step=step), decode=True)
    assert done.decode is not None
    assert kinds(done.decode) == ["Gather", "Linear", "HyenaStep", "Identity", "Linear", "Linear", "Sample"]
