"""The gate of decode graphs passes theirs and catches those that choose by, or keep, something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from lhruntime import Session
from models import TINY_MODELS, VOCAB, program_of, with_modal, with_taps
from streams import serialized, write_directory

from lhcompile.artifacts import Lowered, Program
from lhcompile.errors import ParityError
from lhcompile.lower import complete, lower
from lhcompile.streamify import streamify
from lhcompile.verify import ONNX, SessionModel
from lhcompile.verify.decode import check_decode


@pytest.fixture(scope="module", params=["three taps", "eight"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Lowered, Path]:
    mixers = TINY_MODELS["per channel"] if request.param == "three taps" else [with_taps(8)]
    program = streamify(with_modal(program_of(*mixers)))
    lowered = complete(lower(program, "cuda"), decode=True)
    return program, lowered, write_directory(program, lowered, tmp_path_factory.mktemp("decode") / "out")


def gate(built: tuple[Program, Lowered, Path], decode: ir.Model, place: Path) -> None:
    directory, file = built[2], place / "decode.onnx"
    file.write_bytes(serialized(decode))
    tokens = torch.randint(0, VOCAB, (3, 16), generator=torch.Generator().manual_seed(0))
    model = SessionModel(lambda batch: Session.load(directory, batch=batch, threads=1))
    past = {name: each.inputs for name, each in built[1].past.items()}
    check_decode(directory / "step.onnx", file, past, model, tokens, ONNX)


def decode_of(built: tuple[Program, Lowered, Path]) -> ir.Model:
    assert built[1].decode is not None
    return built[1].decode.clone()


def sample_of(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.op_type == "Sample")


def the_least_likely(model: ir.Model) -> None:
    sample = sample_of(model)
    negated = ir.node("Neg", [sample.inputs[0]])
    model.graph.insert_before(sample, negated)
    sample.replace_input_with(0, negated.outputs[0])


def no_logits(model: ir.Model) -> None:
    sample = sample_of(model)
    zero = ir.node("Sub", [sample.inputs[0], sample.inputs[0]])
    model.graph.insert_before(sample, zero)
    sample.replace_input_with(0, zero.outputs[0])


def kept_as_it_was(model: ir.Model) -> None:
    after = model.graph.outputs[2]
    before = next(value for value in model.graph.inputs if value.name == "past_key_values.0.recurrent_state")
    assert after.name == "present.0.recurrent_state"
    same = ir.node("Identity", [before])
    name, after.name = after.name, "unread"
    same.outputs[0].name, same.outputs[0].shape, same.outputs[0].type = name, after.shape, after.type
    model.graph.append(same)
    model.graph.outputs[2] = same.outputs[0]


def older_tokens_in_another_order(model: ir.Model) -> None:
    step = next(node for node in model.graph if node.op_type == "HyenaStep")
    oldest, next_to_it = step.inputs[9:11]
    step.replace_input_with(9, next_to_it)
    step.replace_input_with(10, oldest)


def the_oldest_token_forgotten(model: ir.Model) -> None:
    step = next(node for node in model.graph if node.op_type == "HyenaStep")
    step.replace_input_with(9, step.inputs[10])


def another_token_kept(model: ir.Model) -> None:
    old, (newest,) = model.graph.outputs[1], [value for value in model.graph.inputs if value.name.endswith("past_1")]
    same = ir.node("Identity", [newest])
    name, old.name = old.name, "unread"
    same.outputs[0].name, same.outputs[0].shape, same.outputs[0].type = name, old.shape, old.type
    model.graph.append(same)
    model.graph.outputs[1] = same.outputs[0]


def of_another_token(model: ir.Model) -> None:
    ids = model.graph.inputs[0]
    uses = list(ids.uses())
    one = ir.node("Constant", [], {"value": ir.tensor([[1]], dtype=ir.DataType.INT64)})
    other = ir.node("BitwiseXor", [ids, one.outputs[0]])
    for node, index in uses:
        node.replace_input_with(index, other.outputs[0])
    first = next(iter(model.graph))
    model.graph.insert_before(first, [one, other])


def test_a_decode_graph_passes(built: tuple[Program, Lowered, Path], tmp_path: Path) -> None:
    gate(built, decode_of(built), tmp_path)


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (the_least_likely, "decode: call 1 chose"),
        (no_logits, "decode: call 1 chose"),
        (kept_as_it_was, "decode: state .* after call 1"),
        (older_tokens_in_another_order, "decode"),
        (the_oldest_token_forgotten, "decode"),
        (another_token_kept, "decode: state past_key_values.0.conv_state after call 1"),
        (of_another_token, "decode"),
    ],
)
def test_another_choice_or_state_is_caught(
    built: tuple[Program, Lowered, Path], tmp_path: Path, mutate: Callable[[ir.Model], None], message: str
) -> None:
    model = decode_of(built)
    mutate(model)
    with pytest.raises(ParityError, match=message):
        gate(built, model, tmp_path)
