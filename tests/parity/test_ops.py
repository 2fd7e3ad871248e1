"""The kernels of runtimes/ops against the functions that specify them, and against double precision.

`make ops` builds the library. LHCOMPILE_OPS names another one; without any, the tests fail in CI and are skipped
elsewhere.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from operators import FORMS, LOUD, ON_GPU, Call, Embedding, Linear, Mixer, Mlp, Sample, error, kept_error, run

from lhcompile.artifacts import LARGEST_HALF
from lhcompile.lower.projections import Activation

FLOAT, HALF, BRAIN = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
BUILT = Path(__file__).parents[2] / "build" / "ops" / "liblhcompile_ops.so"

# float32: sums in another order. float16, bfloat16: half a unit of the last place of what is stored, once for what
# enters a product and once for what comes out, measured in l2.
BUDGET = {FLOAT: 1e-5, HALF: 5e-4, BRAIN: 4e-3}


@pytest.fixture(scope="module")
def library() -> Path:
    path = Path(os.environ.get("LHCOMPILE_OPS", BUILT))
    if not path.exists():
        message = f"the operators are NOT TESTED: {path} is not built (make ops)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path


MIXERS = {
    "complex": Mixer(),
    "real": Mixer(complex_poles=False),
    "odd": Mixer(order=5, batch=3),
    "odd real": Mixer(order=3, complex_poles=False),
    "one state": Mixer(order=1, complex_poles=False),
    "sixteen": Mixer(order=16, channels=160, block=160),
    "no bias": Mixer(bias=False),
    "no taps": Mixer(taps=1),
    "two taps": Mixer(taps=2, outer=1),
    "seven taps": Mixer(taps=7, channels=72, block=72),
    "eight taps": Mixer(taps=8, channels=40, block=40),
    "packed": Mixer(packed=True, order=5),
    "packed real": Mixer(packed=True, complex_poles=False, order=3, channels=130, block=130),
    "interleaved": Mixer(block=1, outer=2),
    "interleaved, many channels": Mixer(block=1, outer=2, channels=200),
    "blocks": Mixer(block=8, outer=1),
    "large blocks": Mixer(block=32, channels=96, outer=1),
    "odd channels": Mixer(block=13, channels=13, batch=5),
    "one channel": Mixer(block=1, channels=1),
    "half": Mixer(signal=HALF, conv_state=HALF),
    "half states": Mixer(signal=HALF, conv_state=HALF, recurrent_state=HALF),
    "half states, packed": Mixer(signal=HALF, conv_state=HALF, recurrent_state=HALF, packed=True),
    "half, conv in float": Mixer(signal=HALF, conv_state=FLOAT, recurrent_state=FLOAT),
    "brain": Mixer(signal=BRAIN, conv_state=BRAIN, recurrent_state=FLOAT),
    "brain states": Mixer(signal=BRAIN, conv_state=BRAIN, recurrent_state=BRAIN, block=8),
    "half states of float": Mixer(recurrent_state=HALF),
}
TIMES = [1, 2, 3, 31, 65, 257]


def kinds(mixer: Mixer) -> list[float]:
    """The budgets of the outputs: mixed, conv_state (copied, so exact), recurrent_state."""
    return [BUDGET[mixer.signal], *([] if mixer.apart else [0.0]), BUDGET[mixer.recurrent_state]]


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("tokens", [None, *TIMES])
def test_mixer(library: Path, name: str, tokens: int | None) -> None:
    assert_mixer(library, replace(MIXERS[name], time=tokens or 1, one_token=tokens is None))


STEPS = {name: mixer for name, mixer in MIXERS.items() if mixer.taps > 1 and mixer.conv_state == mixer.signal}


@pytest.mark.parametrize("name", STEPS)
def test_step(library: Path, name: str) -> None:
    assert_mixer(library, replace(STEPS[name], one_token=True, apart=True))


@pytest.mark.parametrize("library_or_function", [True, False])
def test_a_step_is_a_mixer_whose_past_is_kept_by_others(library: Path, library_or_function: bool) -> None:
    taken = library if library_or_function else None
    for mixer in (Mixer(one_token=True), Mixer(one_token=True, taps=7), Mixer(one_token=True, packed=True, order=5)):
        (y, _, state), given = run(mixer.call(), taken), run(replace(mixer, apart=True).call(), taken)
        assert torch.equal(given[0], y)
        assert torch.equal(given[1], state)


@pytest.mark.parametrize("packed", [True, False])
def test_tokens_of_the_past_stop_at_the_largest_half(library: Path, packed: bool) -> None:
    """Of what the signal itself may be, infinite numbers included: as in the window of a mixer."""
    mixer = Mixer(signal=HALF, conv_state=HALF, recurrent_state=HALF, packed=packed, one_token=True)
    call = mixer.call()
    window = call.inputs[1]
    assert window is not None
    numbers = torch.tensor([float("inf"), -float("inf"), float("nan"), 65504, -65504], dtype=torch.float16)
    window[:, :, :5], window[:, :, 26:31] = numbers, numbers
    apart = replace(mixer, apart=True).call()
    apart = replace(apart, inputs=(*apart.inputs[:9], *(token.contiguous() for token in window.split(1, dim=1))))
    stopped = window.float().clamp(-LARGEST_HALF, LARGEST_HALF).half()
    whole = replace(call, inputs=(call.inputs[0], stopped, *call.inputs[2:]))
    for taken in (library, None):
        (y, _, state), (given, after) = run(whole, taken), run(apart, taken)
        assert torch.equal(given.nan_to_num(7), y.nan_to_num(7))
        assert torch.equal(after.nan_to_num(7), state.nan_to_num(7))
        assert not after.isinf().any()
        assert given.isnan().any()


def assert_mixer(library: Path, mixer: Mixer) -> None:
    """A kernel against double precision, and against its function."""
    call = mixer.call()
    given, wanted, function = run(call, library), mixer.expected(), run(call)
    for ours, truth, theirs, budget in zip(given, wanted, function, kinds(mixer), strict=True):
        if truth.numel():
            assert ours.dtype == theirs.dtype
            assert error(ours, truth) <= budget
            assert error(ours, theirs) <= 2 * budget


@pytest.mark.parametrize("name", LOUD)
@pytest.mark.parametrize("tokens", [None, 1, 3, 65])
@pytest.mark.parametrize("signal", [FLOAT, HALF, BRAIN])
def test_states_stop_at_the_largest_half(library: Path, name: str, tokens: int | None, signal: ir.DataType) -> None:
    mixer = replace(LOUD[name], time=tokens or 1, one_token=tokens is None)
    mixer = replace(mixer, signal=signal, conv_state=HALF, recurrent_state=HALF)
    call, (_, *wanted) = mixer.call(), mixer.expected()
    for given in (run(call, library), run(call)):
        for ours, truth in zip(given[1:], wanted, strict=True):
            assert (truth == LARGEST_HALF).any() & (truth == -LARGEST_HALF).any() & truth.isnan().any()
            assert torch.equal(ours.abs() == LARGEST_HALF, truth.half().abs() == LARGEST_HALF)
            assert kept_error(ours, truth) <= BUDGET[HALF]


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations_of_any_number(library: Path, activation: Activation) -> None:
    numbers = [0.0, -0.0, 1e-30, -1e-30, 5.7, -5.7, -9.9, -10.1, 20, -20, 1e5, -1e5, 3e38, -3e38]
    numbers += [float("inf"), float("nan")]
    call = Linear(batch=1, time=1, width=16, out=16, bias=False, activation=activation).call()
    weight = torch.zeros(16, 16)
    weight[3, 5] = 1
    for number in numbers:
        x = torch.zeros(1, 1, 16)
        x[0, 0, 5] = number
        (y,) = run(replace(call, inputs=(x, weight, *call.inputs[2:])), library)
        tanh = "tanh" if activation == "gelu_tanh" else "none"
        truth = torch.nn.functional.gelu(torch.tensor(number, dtype=torch.double), approximate=tanh).float()
        torch.testing.assert_close(y[0, 0, 3], truth, rtol=1e-5, atol=1e-12, equal_nan=True)


LARGER = {
    "many rows": Linear(batch=7, time=9, width=256, out=200, norm="rms", activation="gelu", residual=True),
    "large": Linear(batch=1, time=5, width=1024, out=520, norm="layer", norm_bias=True, residual=True),
}
LINEARS = FORMS | LARGER | {
    "activation and residual": Linear(activation="gelu_tanh", residual=True, bias=False),
    "odd sizes": Linear(width=37, out=13, norm="layer", residual=True),
}


def assert_linear(library: Path, linear: Linear) -> None:
    """A kernel against double precision, and against its function."""
    call = linear.call()
    (given,), (wanted,), (function,) = run(call, library), linear.expected(), run(call)
    assert given.dtype == function.dtype
    assert error(given, wanted) <= BUDGET[linear.signal]
    assert error(given, function) <= 2 * BUDGET[linear.signal]


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("one_token", [True, False])
@pytest.mark.parametrize(("signal", "bias_type"), [(FLOAT, None), (HALF, None), (HALF, FLOAT), (BRAIN, None)])
def test_linear(
    library: Path, name: str, one_token: bool, signal: ir.DataType, bias_type: ir.DataType | None
) -> None:
    linear = replace(LINEARS[name], signal=signal, bias_type=bias_type, one_token=one_token)
    assert_linear(library, replace(linear, time=1) if one_token else linear)


@pytest.mark.parametrize("name", ["plain", "layer", "rms", "everything", "many rows"])
@pytest.mark.parametrize(("signal", "bias_type"), [(FLOAT, None), (HALF, None), (HALF, FLOAT), (BRAIN, None)])
def test_linear_in_eight_bits(library: Path, name: str, signal: ir.DataType, bias_type: ir.DataType | None) -> None:
    """Numbers of x at the edge between two codes may take the other one: a thousandth of them, 6 % apart."""
    linear = replace(LINEARS[name], width=256, out=48, signal=signal, bias_type=bias_type, name="LinearFp8")
    call = linear.call()
    (given,), (wanted,), (function,) = run(call, library), linear.expected(), run(call)
    assert error(given, wanted) <= BUDGET[signal] + 2e-3
    assert error(given, function) <= 2 * BUDGET[signal] + 2e-3


MLPS = {
    "layer": Mlp(),
    "rms, no biases": Mlp(norm="rms", activation="gelu", up_bias=False, down_bias=False),
    "rms with bias": Mlp(norm="rms", norm_bias=True, width=48, hidden=208, residual=False),
    "no norm": Mlp(norm="none", activation="none", batch=5, down_bias=False),
    "everything": Mlp(norm_bias=True, activation="gelu", width=256, hidden=1024, out=256, batch=3),
}
HELD = 2e-3
"""What a number at the edge between two codes may change, between the products of an MLP and before them."""


@pytest.mark.parametrize("name", MLPS)
@pytest.mark.parametrize("one_token", [True, False])
@pytest.mark.parametrize(("signal", "bias_type"), [(FLOAT, None), (HALF, None), (HALF, FLOAT), (BRAIN, None)])
def test_mlp_in_eight_bits(
    library: Path, name: str, one_token: bool, signal: ir.DataType, bias_type: ir.DataType | None
) -> None:
    mlp = replace(MLPS[name], one_token=one_token, signal=signal, bias_type=bias_type)
    mlp = replace(mlp, time=1) if one_token else mlp
    (given,), (wanted,), (function,) = run(mlp.call(), library), mlp.expected(), run(mlp.call())
    assert given.dtype == function.dtype
    assert error(given, wanted) <= BUDGET[signal] + HELD
    assert error(function, wanted) <= BUDGET[signal] + HELD


def test_an_mlp_of_zeros(library: Path) -> None:
    call = Mlp(norm="none", up_bias=False, residual=False).call()
    x, bias = call.inputs[0], call.inputs[4]
    assert x is not None
    assert bias is not None
    call = replace(call, inputs=(torch.zeros_like(x), *call.inputs[1:]))
    for (y,) in (run(call), run(call, library)):
        assert torch.equal(y, bias.expand_as(y))


FOURS = {name: replace(linear, width=64) for name, linear in FORMS.items()} | LARGER | {
    "one block": Linear(width=32, out=1),
    "odd sizes": Linear(width=96, out=67, norm="layer", residual=True),
}


@pytest.mark.parametrize("name", FOURS)
@pytest.mark.parametrize("one_token", [True, False])
@pytest.mark.parametrize(("signal", "bias_type"), [(FLOAT, None), (HALF, None), (HALF, FLOAT), (BRAIN, None)])
def test_linear_of_four_bits(
    library: Path, name: str, one_token: bool, signal: ir.DataType, bias_type: ir.DataType | None
) -> None:
    linear = replace(FOURS[name], signal=signal, bias_type=bias_type, one_token=one_token, name="LinearInt4")
    assert_linear(library, replace(linear, time=1) if one_token else linear)


BYTES = {
    "no norm": Linear(width=128, out=70, bias=False),
    "a part of a piece": Linear(width=160, out=33, residual=True),
    "many rows": Linear(batch=9, time=4, width=96, out=40, activation="gelu"),
} | {name: linear for name, linear in FOURS.items() if linear.norm != "none"}


@pytest.mark.skipif(ON_GPU, reason="a GPU multiplies signals of 16 bits")
@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("one_token", [True, False])
def test_linear_of_four_bits_and_signals_of_eight(library: Path, name: str, one_token: bool) -> None:
    """Behind a norm a number may fall to either side of the middle between two codes."""
    linear = replace(BYTES[name], one_token=one_token, name="LinearInt4", bytes=True)
    linear = replace(linear, time=1) if one_token else linear
    call, either = linear.call(), 0.0 if linear.norm == "none" else 2e-3
    (given,), (wanted,), (function,) = run(call, library), linear.expected(), run(call)
    assert error(given, wanted) <= BUDGET[FLOAT] + either
    assert error(given, function) <= 2 * BUDGET[FLOAT] + either
    (exact,) = run(replace(linear, bytes=False).call(), library)
    assert 1e-3 < error(given, exact) < 2e-2


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_a_signal_of_eight_bits_that_is_not_finite(library: Path, number: float) -> None:
    """Its row is NaN, and no other."""
    call = Linear(width=96, out=5, bias=False, name="LinearInt4", bytes=True).call()
    x = call.inputs[0]
    assert x is not None
    x[1, 2, 40] = number
    for y in (run(call, library)[0], run(call)[0]):
        assert y[1, 2].isnan().all()
        assert torch.isfinite(y[0]).all() & torch.isfinite(y[1, :2]).all()


@pytest.mark.parametrize(
    "embedding",
    [
        *(Embedding(width=width, signal=signal) for width in (64, 5) for signal in (FLOAT, HALF, BRAIN)),
        *(Embedding(batch, time, width=96, int4=True) for batch, time in ((5, 3), (1, 1))),
        Embedding(batch=1, time=1, entries=1, width=1),
    ],
)
def test_embedding(library: Path, embedding: Embedding) -> None:
    (given,), (function,) = run(embedding.call(), library), run(embedding.call())
    assert torch.equal(given, embedding.expected())
    assert torch.equal(given, function)


@pytest.mark.skipif(ON_GPU, reason="a GPU writes zeros")
@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize("token", [50, -51])
def test_a_token_that_is_not_in_the_table(library: Path, token: int, int4: bool) -> None:
    call = Embedding(int4=int4).call()
    tokens = call.inputs[1]
    assert tokens is not None
    tokens[1, 2] = token
    assert f"token {token} of a table of 50" in message(call, library)


@pytest.mark.parametrize("sample", [Sample(), Sample(step=0.5), Sample(vocab=5000, step=0.25), Sample(vocab=1)])
@pytest.mark.parametrize("signal", [FLOAT, HALF, BRAIN])
def test_sample(library: Path, sample: Sample, signal: ir.DataType) -> None:
    sample = replace(sample, signal=signal)
    (given,), (function,) = run(sample.call(), library), run(sample.call())
    torch.testing.assert_close(given, sample.expected()[0])
    torch.testing.assert_close(given, function)


def test_rows_do_not_depend_on_their_neighbours(library: Path) -> None:
    """To the last bit: a row alone, and the same row among others."""
    cases = [
        (Mixer(batch=5, time=3, order=6, channels=72, block=72).call(), (0, 1, 2)),
        (Linear(batch=5, width=96, norm="layer", activation="gelu", residual=True).call(), (0, 3)),
        (Linear(batch=5, width=96, norm="layer", residual=True, name="LinearInt4").call(), (0, 3)),
        (Linear(batch=25, width=96, time=1, out=67, activation="gelu_tanh").call(), (0, 3)),
        (Linear(batch=25, width=160, time=1, out=67, name="LinearInt4").call(), (0, 3)),
        (Linear(batch=25, width=160, time=1, out=67, name="LinearInt4", bytes=True).call(), (0, 3)),
        (Sample(batch=5, step=0.5).call(), (0, 1, 2, 3, 4)),
    ]
    for call, rowwise in cases:
        together = run(call, library)
        for row in range(5):
            inputs = tuple(
                x[row : row + 1] if place in rowwise and x is not None else x for place, x in enumerate(call.inputs)
            )
            for whole, alone in zip(together, run(replace(call, inputs=inputs), library), strict=True):
                assert torch.equal(whole[row : row + 1], alone)


def test_threads_change_nothing(library: Path) -> None:
    for call in (
        Mixer(batch=6, time=4, channels=320, block=320, packed=True).call(),
        Linear(batch=3, width=128, out=700, norm="rms").call(),
        Linear(batch=3, width=128, out=700, norm="rms", name="LinearInt4").call(),
        Linear(batch=3, width=128, out=700, norm="rms", name="LinearInt4", bytes=True).call(),
        Sample().call(),
    ):
        for one, two in zip(run(call, library, threads=1), run(call, library, threads=2), strict=True):
            assert torch.equal(one, two)


def test_cuts_change_nothing(library: Path) -> None:
    """A sequence whole, and in cuts with the states carried."""
    mixer = Mixer(time=70, order=5, channels=40, block=40)
    call = mixer.call()
    whole = run(call, library)
    projected, states, pieces = call.inputs[0], list(call.inputs[1:3]), []
    assert projected is not None
    for piece in projected.split([1, 5, 40, 1, 23], dim=1):
        y, *states = run(replace(call, inputs=(piece, *states, *call.inputs[3:])), library)
        pieces.append(y)
    for given, wanted in zip([torch.cat(pieces, 1), *states], whole, strict=True):
        assert error(given, wanted) < 1e-6


def test_every_input_is_heard(library: Path) -> None:
    """A table changed in one place changes the outputs: the comparisons above can fail."""
    four = replace(FOURS["everything"], name="LinearInt4")
    mixer = Mixer(packed=True, order=5)
    step = replace(mixer, one_token=True, apart=True)
    linear = LINEARS["everything"]
    for case, places in ((mixer, range(9)), (step, [*range(8), 9, 10]), (linear, range(6)), (four, range(7))):
        call = case.call()
        before = run(call, library)
        for place in places:
            value = call.inputs[place]
            assert value is not None
            changed = value.clone()
            changed.view(-1)[-1] += 1
            inputs = (*call.inputs[:place], changed, *call.inputs[place + 1 :])
            after = run(replace(call, inputs=inputs), library)
            assert max(error(x, y) for x, y in zip(after, before, strict=True)) > 10 * BUDGET[FLOAT], place


Case = Mixer | Linear | Sample | Embedding
ONE_EACH: list[Case] = [
    *(Mixer(), Mixer(one_token=True, apart=True), Linear(), Linear(width=64, name="LinearInt4"), Sample()),
    *(Embedding(), Embedding(int4=True)),
]


@pytest.mark.parametrize("case", ONE_EACH)
def test_the_kernel_is_taken_and_not_the_function(library: Path, tmp_path: Path, case: Case) -> None:
    def kinds_with(path: Path | None) -> set[str]:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        if path is not None:
            options.register_custom_ops_library(str(path))
        onnxruntime.InferenceSession(case.call().model(), options, providers=["CPUExecutionProvider"])
        return {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}

    name = case.call().function.name
    assert kinds_with(library) == {name}
    assert name not in kinds_with(None)


def message(call: Call, library: Path) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # onnxruntime has a class of exceptions for every code
        run(call, library)
    return str(caught.value)


def test_wrong_shapes_are_refused(library: Path) -> None:
    call = Mixer().call()
    state = torch.zeros(2, 5, 24)
    text = message(replace(call, inputs=(*call.inputs[:2], state, *call.inputs[3:])), library)
    assert "recurrent_state is [2, 5, 24], expected [2, 4, 24]" in text
    call = Linear().call()
    text = message(replace(call, inputs=(torch.zeros(2, 3, 41), *call.inputs[1:])), library)
    assert "weight is [24, 40] for x of width 41" in text
    call = Linear(width=64, name="LinearInt4").call()
    for place, wrong, wanted in (
        (0, torch.zeros(2, 3, 32), "weight is [24, 2, 16] for x of width 32"),
        (0, torch.zeros(2, 3, 65), "weight is [24, 2, 16] for x of width 65"),
        (1, torch.zeros(24, 2, 8, dtype=torch.uint8), "weight is [24, 2, 8] for x of width 64"),
        (6, torch.zeros(24, 1, dtype=torch.float16), "weight_scale is [24, 1], expected [24, 2]"),
    ):
        inputs = (*call.inputs[:place], wrong, *call.inputs[place + 1 :])
        assert wanted in message(replace(call, inputs=inputs), library)
    call = Embedding(int4=True).call()
    for place, wrong, wanted in (
        (0, torch.zeros(50, 2, 8, dtype=torch.uint8), "the table of an Embedding is [50, 2, 8]"),
        (2, torch.zeros(50, 1, dtype=torch.float16), "scale is [50, 1], expected [50, 2]"),
    ):
        inputs = (*call.inputs[:place], wrong, *call.inputs[place + 1 :])
        assert wanted in message(replace(call, inputs=inputs), library)


def test_empty_batches(library: Path) -> None:
    embeddings = Embedding(batch=0), Embedding(batch=0, int4=True)
    for case in (Mixer(batch=0, one_token=True), Linear(batch=0), Sample(batch=0), *embeddings):
        if isinstance(case, Sample):
            call = Sample().call()
            call = replace(call, inputs=tuple(x[:0] for x in call.inputs if x is not None))
        else:
            call = case.call()
        assert [len(value) for value in run(call, library)] == [0] * len(call.function.outputs)


def test_a_step_is_not_slower_than_its_function(library: Path) -> None:
    """One token of a wide mixer: the function takes a dozen operators."""
    call = Mixer(batch=1, channels=768, block=768, order=4, one_token=True).call()

    def fastest(path: Path | None) -> float:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        if path is not None:
            options.register_custom_ops_library(str(path))
        session = onnxruntime.InferenceSession(call.model(), options, providers=["CPUExecutionProvider"])
        feeds, names, times = call.feeds(), [value.name for value in session.get_outputs()], []
        for _ in range(300):
            started = time.perf_counter()
            session.run_with_ort_values(names, feeds)
            times.append(time.perf_counter() - started)
        return min(times)

    assert fastest(library) < fastest(None)
