"""The fused operators' functions, run by onnxruntime, against their definitions in double precision."""

from __future__ import annotations

from dataclasses import replace

import onnx
import onnx_ir as ir
import pytest
import torch
from operators import FORMS, Embedding, Linear, Mixer, Sample, error, run

from lhcompile.lower.functions import mixer_function

FLOAT, HALF, BRAIN = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
ROUNDED = {FLOAT: 2e-6, HALF: 2e-3, BRAIN: 1.5e-2}  # a few units of the signal's last place

MIXERS = {
    "complex": Mixer(),
    "real": Mixer(complex_poles=False),
    "odd": Mixer(order=5),
    "one state": Mixer(order=1, complex_poles=False),
    "no bias": Mixer(bias=False),
    "no taps": Mixer(taps=1),
    "packed": Mixer(packed=True, order=5),
    "packed real": Mixer(packed=True, complex_poles=False, order=3),
    "interleaved": Mixer(block=1, outer=2),
    "blocks": Mixer(block=8, outer=1),
    "half": Mixer(signal=HALF, conv_state=HALF),
    "half states": Mixer(signal=HALF, conv_state=HALF, recurrent_state=HALF, packed=True),
    "brain": Mixer(signal=BRAIN, conv_state=FLOAT, recurrent_state=BRAIN),
}


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("time", [None, 1, 2, 7])
def test_mixer(name: str, time: int | None) -> None:
    mixer = replace(MIXERS[name], time=time or 1, one_token=time is None)
    for given, wanted in zip(run(mixer.call()), mixer.expected(), strict=True):
        assert wanted.numel() == 0 or error(given, wanted) < max(ROUNDED[mixer.signal], ROUNDED[mixer.recurrent_state])


LINEARS = FORMS | {
    "float bias": Linear(signal=HALF, bias_type=FLOAT, residual=True),
}


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("one_token", [True, False])
@pytest.mark.parametrize("signal", [FLOAT, HALF, BRAIN])
def test_linear(name: str, one_token: bool, signal: ir.DataType) -> None:
    linear = replace(LINEARS[name], signal=signal, one_token=one_token, time=1 if one_token else 3)
    (given,), (wanted,) = run(linear.call()), linear.expected()
    assert given.dtype == linear.call().inputs[0].dtype
    assert error(given, wanted) < ROUNDED[signal]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("signal", [FLOAT, HALF, BRAIN])
def test_linear_of_four_bits(name: str, signal: ir.DataType) -> None:
    linear = replace(FORMS[name], signal=signal, width=64, name="LinearInt4")
    (given,), (wanted,) = run(linear.call()), linear.expected()
    assert given.dtype == linear.call().inputs[0].dtype
    assert error(given, wanted) < ROUNDED[signal]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("one_token", [True, False])
def test_the_fallback_of_four_bits_on_a_processor(name: str, one_token: bool) -> None:
    """Its product is onnxruntime's, which rounds signals to 8 bits: near the specification, and not the same."""
    linear = replace(FORMS[name], width=64, one_token=one_token, time=1 if one_token else 3, name="LinearInt4")
    (given,), (wanted,) = run(replace(linear, blocks=True).call()), linear.expected()
    assert ROUNDED[FLOAT] < error(given, wanted) < 1e-2


@pytest.mark.parametrize("embedding", [Embedding(), Embedding(signal=HALF, width=5), Embedding(int4=True, width=96)])
def test_embedding(embedding: Embedding) -> None:
    (given,) = run(embedding.call())
    assert torch.equal(given, embedding.expected())


@pytest.mark.parametrize("case", [Embedding(int4=True), Sample()])
def test_a_gpu_has_what_decode_begins_and_ends_with(case: Embedding | Sample) -> None:
    """onnxruntime has none of these for CUDA, and captures no graph that numbers leave the device in."""
    names = {node.op_type for node in case.call().function}
    assert not names & {"ArgMax", "BitShift", "BitwiseAnd"}


@pytest.mark.parametrize("step", [0.0, 0.5])
@pytest.mark.parametrize("signal", [FLOAT, HALF])
def test_sample(step: float, signal: ir.DataType) -> None:
    sample = Sample(step=step, signal=signal)
    (given,), (wanted,) = run(sample.call()), sample.expected()
    torch.testing.assert_close(given, wanted)


def test_a_uniform_number_at_the_edge_of_a_token_takes_the_next() -> None:
    logits = torch.tensor([[[0.0, 0.0, -200.0]]]).repeat(3, 1, 1)
    call = replace(
        Sample().call(),
        inputs=(
            logits,
            torch.tensor([0.49999997, 0.5, 0.99999994]),
            torch.ones(3),
            torch.zeros(3, dtype=torch.int64),
            torch.ones(3),
        ),
    )
    assert run(call)[0].tolist() == [[0], [1], [1]]


def test_models_with_functions_are_valid() -> None:
    cases = Mixer(packed=True, time=2), Linear(norm="rms"), Linear(width=64, name="LinearInt4"), Sample()
    for case in (*cases, Embedding(), Embedding(int4=True)):
        onnx.checker.check_model(onnx.load_model_from_string(case.call().model()), full_check=True)


def test_three_parts() -> None:
    with pytest.raises(ValueError, match="outer is 3, expected one of the three parts"):
        mixer_function(taps=3, order=2, block=4, outer=3, complex_poles=False)
