"""The reference modules against the Hyena formulas evaluated directly, term by term, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lm_reference import HyenaReference

from lhcompile.load.safari import HyenaLM

Make = Callable[..., HyenaLM]

VARIANTS: list[dict[str, Any]] = [
    {},
    {"order": 3},
    {"order": 4, "filter_layout": "standalone"},
    {"modulate": False},
    {"shift": 0.05, "num_inner_mlps": 1},
    {"normalized": True},
    {"use_bias": False},
    {"short_filter_order": 5, "num_inner_mlps": 0},
    {"activation": "gelu", "layer_norm_epsilon": 1e-2},
    {"activation": "silu", "tie_word_embeddings": False},
    {"order": 3, "outer_mixing": True},
    {"order": 3, "post_order_ffn": True},
    {"max_position_embeddings": 12},
    {"activation": "sqrelu"},
    {"activation": "laplace"},
    {"linear_mixer": True},
    {"w_mod": 0.3},
]


def difference(model: HyenaLM, direct: HyenaReference, length: int = 12) -> float:
    ids = torch.randint(16, (3, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids).numpy()
    return max(float(np.abs(logits[i] - direct(row.tolist())).max()) for i, row in enumerate(ids))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_equals_the_formulas(tiny: Make, options: dict[str, Any]) -> None:
    model = tiny(**options).double()
    assert difference(model, HyenaReference(model.state_dict(), **options)) < 1e-10  # float64 FFT against sums


def test_equals_the_formulas_when_shorter_than_l_max(tiny: Make) -> None:
    model = tiny(order=3).double()
    assert difference(model, HyenaReference(model.state_dict(), order=3), length=5) < 1e-10


def test_filters_are_as_exact_as_their_weights(tiny: Make) -> None:
    """Sines of large arguments, of which float32 would leave three digits."""
    part = tiny(w=30.0, l_max=12).backbone.layers[0].mixer.filter_fn
    taps = part.filter(12).detach()
    assert taps.dtype == torch.float32
    wanted = part.double().filter(12).detach()
    assert float((taps - wanted).abs().max()) < 1e-7 * float(wanted.abs().max())


# Each is a reading of the format that is wrong; none may pass for the right one.
MUTANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "order layout": ({"order": 3}, {"filter_layout": "standalone"}),
    "missing bias": ({}, {"use_bias": False}),
    "modulation": ({}, {"modulate": False}),
    "shift": ({}, {"shift": 0.05}),
    "normalized": ({}, {"normalized": True}),
    "activation": ({}, {"activation": "gelu"}),
    "outer mixing": ({}, {"outer_mixing": True}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_option_moves_the_logits(tiny: Make, name: str) -> None:
    options, wrong = MUTANTS[name]
    model = tiny(**options).double()
    assert difference(model, HyenaReference(model.state_dict(), **{**options, **wrong})) > 1e-4


def test_exact_gelu_moves_the_logits(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny().double()
    direct, gelu = HyenaReference(model.state_dict()), F.gelu
    monkeypatch.setattr(F, "gelu", lambda x, approximate: gelu(x))
    assert difference(model, direct) > 1e-5


@pytest.mark.parametrize("rows", [(0, 1), (0, 2), (1, 2)])
def test_a_swapped_split_moves_the_logits(tiny: Make, rows: tuple[int, int]) -> None:
    model = tiny().double()
    direct = HyenaReference(model.state_dict())
    order = [0, 1, 2]
    order[rows[0]], order[rows[1]] = order[rows[1]], order[rows[0]]
    for layer in model.backbone.layers:
        for tensor in (*layer.mixer.in_proj.parameters(), *layer.mixer.short_filter.parameters()):
            tensor.data = torch.cat([tensor.data.chunk(3)[i] for i in order])
    # x1 and v are multiplied, so exchanging them is no mutant
    assert (difference(model, direct) < 1e-10) == (rows == (1, 2))


def test_a_flipped_short_filter_moves_the_logits(tiny: Make) -> None:
    model = tiny().double()
    direct = HyenaReference(model.state_dict())
    for layer in model.backbone.layers:
        layer.mixer.short_filter.weight.data = layer.mixer.short_filter.weight.data.flip(-1)
    assert difference(model, direct) > 1e-4


def test_longer_than_l_max_is_refused(tiny: Make) -> None:
    with pytest.raises(RuntimeError, match="the sequence is longer than l_max 12"):
        tiny()(torch.zeros(1, 13, dtype=torch.long))


@pytest.mark.parametrize("options", [{}, {"order": 3}], ids=str)
def test_exports_at_static_and_dynamic_sizes(tiny: Make, options: dict[str, Any]) -> None:
    model = tiny(**options)
    ids = torch.randint(16, (2, 7))
    static = torch.export.export(model, (ids,)).module()
    torch.testing.assert_close(static(ids), model(ids))
    dims = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=12)},)
    dynamic = torch.export.export(model, (ids,), dynamic_shapes=dims)
    names = {str(node.target) for node in dynamic.graph.nodes}
    assert {"aten.fft_rfft.default", "aten.fft_irfft.default", "aten.conv1d.default", "aten.linear.default"} <= names
    assert {"aten.layer_norm.default", "aten.gelu.default"} <= names
    for shape in [(1, 1), (3, 12)]:
        other = torch.randint(16, shape)
        torch.testing.assert_close(dynamic.module()(other), model(other))


def test_position_tables_follow_the_published_form(tiny: Make) -> None:
    from lhcompile.load.safari import PositionalEmbedding

    z, t = PositionalEmbedding(emb_dim=5, l_max=8)(8)
    lag = np.arange(8)
    angle = 2 * np.pi * lag[:, None] / 8 * np.array([1e-4, 1.0])
    np.testing.assert_allclose(t[0, :, 0], lag / 7, rtol=1e-6)
    wanted = np.concatenate([lag[:, None] / 7, np.cos(angle), -np.sin(angle)], -1)
    np.testing.assert_allclose(z[0].detach(), wanted, atol=1e-6)
