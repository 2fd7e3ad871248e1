"""All fused operators but projections, and graphs of all, on a GPU against double precision, without onnxruntime.

Not run in CI, which has no GPU: `python -m pytest tests/gpu` on a machine that has one, after `make ops`.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import pytest
import torch
from launched import BRAIN, BUDGET, FLOAT, HALF, computed, placed
from operators import LOUD, Embedding, Linear, Mixer, Mlp, Sample, error, kept_error
from torch import Tensor

from bench.kernels import Kernels
from lhcompile.artifacts import LARGEST_HALF


def mixed(kernels: Kernels, mixer: Mixer, in_place: bool = False) -> list[Tensor]:
    return computed(*kernels.mixer(placed(mixer.call()), mixer.block, mixer.outer, in_place))


SHAPES = {
    "complex": Mixer(),
    "real": Mixer(complex_poles=False),
    "odd": Mixer(order=5, batch=3),
    "one state": Mixer(order=1, complex_poles=False),
    "sixteen": Mixer(order=16, channels=160, block=160),
    "many states": Mixer(order=300, channels=40, block=40),
    "no bias": Mixer(bias=False),
    "no taps": Mixer(taps=1),
    "seven taps": Mixer(taps=7, channels=72, block=72),
    "eight taps, many rows": Mixer(taps=8, channels=72, block=72, batch=40),
    "packed": Mixer(packed=True, order=5),
    "packed, many rows": Mixer(packed=True, order=8, channels=260, block=260, batch=70),
    "interleaved": Mixer(block=1, outer=2, channels=200),
    "blocks": Mixer(block=8, outer=1),
    "odd channels": Mixer(block=13, channels=13, batch=40),
    "many rows": Mixer(batch=300, channels=320, block=320, order=6),
    "many rows, blocks": Mixer(batch=70, channels=96, block=32, order=3, complex_poles=False),
}
KINDS = [(FLOAT, FLOAT, FLOAT), (HALF, HALF, FLOAT), (HALF, HALF, HALF), (BRAIN, BRAIN, BRAIN), (FLOAT, HALF, BRAIN)]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("tokens", [1, 2, 5, 67, 513])
def test_mixer(kernels: Kernels, name: str, kind: int, tokens: int) -> None:
    signal, conv, recurrent = KINDS[kind]
    mixer = replace(SHAPES[name], time=tokens, signal=signal, conv_state=conv, recurrent_state=recurrent)
    if mixer.batch * tokens > 5000:
        mixer = replace(mixer, time=5000 // mixer.batch)
    given, wanted = mixed(kernels, mixer), mixer.expected()
    exact = BUDGET[conv] if signal == FLOAT and conv != FLOAT else 0.0  # stored in a smaller type
    for ours, truth, budget in zip(given, wanted, [BUDGET[signal], exact, BUDGET[recurrent]], strict=True):
        assert truth.numel() == 0 or error(ours, truth) <= budget


@pytest.mark.parametrize("name", LOUD)
@pytest.mark.parametrize("signal", [FLOAT, HALF, BRAIN])
@pytest.mark.parametrize("tokens", [1, 3, 67])
def test_states_stop_at_the_largest_half(kernels: Kernels, name: str, signal: ir.DataType, tokens: int) -> None:
    mixer = replace(LOUD[name], time=tokens, signal=signal, conv_state=HALF, recurrent_state=HALF)
    for ours, truth in zip(mixed(kernels, mixer)[1:], mixer.expected()[1:], strict=True):
        assert (truth == LARGEST_HALF).any() & (truth == -LARGEST_HALF).any() & truth.isnan().any()
        assert kept_error(ours, truth) <= BUDGET[HALF]


@pytest.mark.parametrize("name", [name for name, mixer in SHAPES.items() if mixer.taps > 1])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[0] == kind[1]])
def test_a_step_is_a_mixer_whose_past_is_kept_by_others(
    kernels: Kernels, name: str, kind: tuple[ir.DataType, ...]
) -> None:
    signal, conv, recurrent = kind
    mixer = replace(SHAPES[name], signal=signal, conv_state=conv, recurrent_state=recurrent)
    call = replace(mixer, one_token=True, apart=True).call()
    y, _, state = mixed(kernels, mixer)
    given = computed(*kernels.step(placed(call), mixer.block, mixer.outer))
    assert torch.equal(given[0], y)
    assert torch.equal(given[1], state)


@pytest.mark.parametrize("name", ["complex", "many rows", "packed, many rows"])
def test_tokens_of_the_past_stop_at_the_largest_half(kernels: Kernels, name: str) -> None:
    """Of what the signal itself may be, infinite numbers included: as in the window of a mixer."""
    mixer = replace(SHAPES[name], signal=HALF, conv_state=HALF, recurrent_state=HALF, one_token=True)
    call = mixer.call()
    window = call.inputs[1]
    assert window is not None
    window[:, :, ::7], window[:, :, 1::7] = float("inf"), -float("inf")
    then = replace(mixer, apart=True).call()
    tokens = (token.contiguous() for token in window.split(1, dim=1))
    then = replace(then, inputs=(*then.inputs[:9], *tokens))
    stopped = replace(call, inputs=(call.inputs[0], window.clamp(-65504, 65504), *call.inputs[2:]))
    y, _, state = computed(*kernels.mixer(placed(stopped), mixer.block, mixer.outer))
    given = computed(*kernels.step(placed(then), mixer.block, mixer.outer))
    assert torch.equal(given[0], y)
    assert torch.equal(given[1], state)


def test_a_step_may_write_where_it_reads(kernels: Kernels) -> None:
    for name in ("complex", "many rows", "packed, many rows", "seven taps"):
        for ours, theirs in zip(mixed(kernels, SHAPES[name], True), mixed(kernels, SHAPES[name]), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["complex", "odd", "odd channels", "packed", "seven taps"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[0] == kind[1]])
@pytest.mark.parametrize("batch", [2113, 9001])
def test_rows_of_a_thread_follow_one_another(
    kernels: Kernels, name: str, kind: tuple[ir.DataType, ...], batch: int
) -> None:
    """Far more rows than run at once: up to five for a thread."""
    signal, conv, recurrent = kind
    mixer = replace(SHAPES[name], batch=batch, signal=signal, conv_state=conv, recurrent_state=recurrent)
    wanted, given = mixer.expected(), mixed(kernels, mixer)
    for ours, truth, budget in zip(given, wanted, [BUDGET[signal], 0.0, BUDGET[recurrent]], strict=True):
        assert error(ours, truth) <= budget
    for ours, theirs in zip(mixed(kernels, mixer, True), given, strict=True):
        assert torch.equal(ours, theirs)
    call = replace(mixer, one_token=True, apart=True).call()
    y, state = computed(*kernels.step(placed(call), mixer.block, mixer.outer))
    assert torch.equal(y, given[0])
    assert torch.equal(state, given[2])


@pytest.mark.parametrize(
    "embedding",
    [
        *(Embedding(700, 2, width=each, signal=kind) for each in (8, 96, 2056, 2057) for kind in (FLOAT, HALF, BRAIN)),
        *(Embedding(700, 2, width=width, int4=True) for width in (32, 96, 8224)),
        Embedding(batch=1, time=1, width=2048, signal=HALF),
    ],
)
def test_embedding(kernels: Kernels, embedding: Embedding) -> None:
    """And zeros for a token that is not in the table."""
    call, wanted = embedding.call(), embedding.expected()
    (given,) = computed(*kernels.embedding(placed(call)))
    assert torch.equal(given, wanted)
    tokens = call.inputs[1]
    assert tokens is not None
    for row, token in ((0, embedding.entries), (-1, -embedding.entries - 1)):
        tokens[row, 0], wanted[row, 0] = token, 0
        (given,) = computed(*kernels.embedding(placed(call)))
        assert torch.equal(given, wanted)


@pytest.mark.parametrize("signal", [FLOAT, HALF, BRAIN])
@pytest.mark.parametrize("batch", [1, 20, 32, 33])
@pytest.mark.parametrize(
    "sample",
    [Sample(), Sample(step=0.5), Sample(vocab=8195, step=0.25), Sample(vocab=50304, step=0.25), Sample(vocab=1)],
)
def test_sample(kernels: Kernels, sample: Sample, batch: int, signal: ir.DataType) -> None:
    sample = replace(sample, batch=batch, signal=signal)
    (given,) = computed(*kernels.sample(tuple(x for x in placed(sample.call()) if x is not None)))
    torch.testing.assert_close(given, sample.expected()[0])


@pytest.mark.parametrize("signal", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [70000, 70001])
@pytest.mark.parametrize("times", [1, 7])
def test_of_the_most_likely_tokens_the_first_is_taken(
    kernels: Kernels, times: int, vocab: int, signal: torch.dtype
) -> None:
    """Wherever they lie: of few rows eight blocks share each and read 4096 logits or more at once, of many a block has
    one. NaN of either sign is above numbers."""
    rows = torch.full((7, 1, vocab), -3.0)
    for row, ids in ((0, (32767, 32768)), (1, (4096, 28672, 69999)), (2, (1, 69999))):
        rows[row, 0, list(ids)] = 2.0
    rows[4] = -torch.inf
    rows[5, 0, 40000] = torch.nan
    rows[6, 0, 60000], rows[6, 0, 60001] = -torch.nan, torch.inf
    rows[3, 0, 5:], rows[3, 0, 5] = 0.0, -0.0
    rows = rows.to(signal).repeat(times, 1, 1)
    count = len(rows)
    settings = (torch.zeros(count), torch.zeros(count), torch.zeros(count, dtype=torch.int64), torch.ones(count))
    (given,) = computed(*kernels.sample(tuple(x.cuda() for x in (rows, *settings))))
    assert given[:, 0].tolist() == times * [32767, 4096, 1, 5, 0, 40000, 60000]


def test_rows_do_not_depend_on_their_neighbours(kernels: Kernels) -> None:
    whole = mixed(kernels, SHAPES["many rows"])
    inputs = placed(SHAPES["many rows"].call())
    for row in (0, 7, 299):
        alone = tuple(x[row : row + 1].contiguous() if i < 3 and x is not None else x for i, x in enumerate(inputs))
        for ours, theirs in zip(computed(*kernels.mixer(alone, 320, 0)), whole, strict=True):
            assert error(ours, theirs[row : row + 1]) < 1e-6


@pytest.mark.parametrize("rows", [1, 12, 40])
def test_a_graph_of_few_rows_replays_what_was_run(kernels: Kernels, rows: int) -> None:
    """A layer and a choice in each form of weights, whose kernels overlap, over and over: always the same tokens."""
    first = Linear(batch=rows, time=1, width=256, out=768, norm="layer", signal=HALF)
    mixer = Mixer(batch=rows, channels=256, block=256, signal=HALF, conv_state=HALF)
    last = Linear(batch=rows, time=1, width=256, out=256, residual=True, signal=HALF, name="LinearInt4")
    mlp = Mlp(batch=rows, time=1, width=256, hidden=1024, out=256, norm="layer", signal=HALF)
    head = Linear(batch=rows, time=1, width=256, out=50304, bias=False, signal=HALF, name="LinearFp8")
    (x,), in_ = kernels.linear(placed(first.call()), "layer")
    (y, *_), mix = kernels.mixer((x, *placed(mixer.call())[1:]), 256, 0)
    (z,), out = kernels.linear((y, *placed(last.call())[1:]))
    (w,), hidden = kernels.mlp((z, *placed(mlp.call())[1:]), mlp.norm, mlp.activation, mlp.epsilon)
    (logits,), project = kernels.linear((w, *placed(head.call())[1:]))
    settings = (torch.zeros(rows), torch.zeros(rows), torch.zeros(rows, dtype=torch.int64), torch.ones(rows))
    (tokens,), choose = kernels.sample((logits, *(each.cuda() for each in settings)))
    calls, values = [in_, mix, out, hidden, project, choose], [x, y, z, w, logits]
    for call in calls:
        call()
        torch.cuda.synchronize()
    wanted, chosen = [value.clone() for value in values], [int((row == row.max()).nonzero()[0]) for row in logits[:, 0]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(20):
        for value in values:
            value.fill_(float("nan"))
        tokens.fill_(-1)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(given, value) for given, value in zip(values, wanted, strict=True))
        assert tokens[:, 0].tolist() == chosen


def test_a_graph_replays_what_was_run(kernels: Kernels) -> None:
    """Five operators in a row, captured after one run: as one after the other."""
    mixer = Mixer(batch=2, channels=256, block=256, signal=HALF, conv_state=HALF)
    first = Linear(batch=2, time=1, width=256, out=768, norm="layer", signal=HALF)
    last = Linear(batch=2, time=1, width=256, out=256, residual=True, signal=HALF)
    many = Linear(batch=70, time=1, width=256, out=256, norm="rms", activation="gelu", signal=HALF)
    (x,), call_one = kernels.linear(placed(first.call()), "layer")
    (y, *_), call_two = kernels.mixer((x, *placed(mixer.call())[1:]), 256, 0)
    (z,), call_three = kernels.linear((y, *placed(last.call())[1:]))
    (other,), call_four = kernels.linear(placed(many.call()), "rms", "gelu")
    calls = [call_one, call_two, call_three, call_four]
    for call in calls:
        call()
        torch.cuda.synchronize()
    wanted = [x.clone() for x in (x, y, z, other)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(20):
        for value in (x, y, z, other):
            value.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for given, value in zip((x, y, z, other), wanted, strict=True):
            assert torch.equal(given, value)
