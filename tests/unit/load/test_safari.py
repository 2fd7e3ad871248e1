"""The reference modules against the Hyena formulas evaluated directly, term by term, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lhcompile.load.safari import HyenaLM

Array = NDArray[np.float64]
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
]


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def activated(x: Array, name: str) -> Array:
    if name == "gelu":
        erf = torch.erf(torch.from_numpy(x / np.sqrt(2))).numpy()
        return 0.5 * x * (1 + erf)
    return x / (1 + np.exp(-x)) if name == "silu" else x


class Direct:
    """Evaluates one sequence of tokens with the weights of a model, O(L²) and without FFT."""

    def __init__(self, model: HyenaLM, **options: Any) -> None:
        self.w = {key: value.double().numpy() for key, value in model.state_dict().items()}
        self.options = {"order": 2, "modulate": True, "shift": 0.0, "normalized": False, "use_bias": True}
        self.options |= {"activation": "id", "layer_norm_epsilon": 1e-5, "filter_layout": "full"} | options

    def linear(self, x: Array, key: str) -> Array:
        return x @ self.w[f"{key}.weight"].T + self.w.get(f"{key}.bias", 0.0)

    def norm(self, x: Array, key: str) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + self.options["layer_norm_epsilon"])
        return centred / scale * self.w[f"{key}.weight"] + self.w[f"{key}.bias"]

    def filters(self, key: str, length: int) -> Array:
        """[length, channels]"""
        x = self.w[f"{key}.pos_emb.z"][0, :length]
        i = 0
        while f"{key}.implicit_filter.{i + 1}.freq" in self.w:
            x = self.linear(x, f"{key}.implicit_filter.{i}")
            x = np.sin(self.w[f"{key}.implicit_filter.{i + 1}.freq"][0] * x)
            i += 2
        h = self.linear(x, f"{key}.implicit_filter.{i}")
        if self.options["modulate"]:
            rate = np.abs(self.w[f"{key}.modulation.deltas"][0, 0])
            h = h * (np.exp(-self.w[f"{key}.pos_emb.t"][0, :length] * rate) + self.options["shift"])
        return h / np.abs(h).sum(-1, keepdims=True) if self.options["normalized"] else h

    def mixer(self, x: Array, key: str) -> Array:
        length, d = x.shape
        order = self.options["order"]
        u = self.linear(x, f"{key}.in_proj")
        weight = self.w[f"{key}.short_filter.weight"][:, 0]
        short = np.tile(self.w[f"{key}.short_filter.bias"], (length, 1))
        for t in range(length):
            for lag in range(min(t + 1, weight.shape[1])):
                short[t] += weight[:, -1 - lag] * u[t - lag]
        parts = [short[:, i * d : (i + 1) * d] for i in range(order + 1)]
        gates, v = parts[:-1], parts[-1]
        h, bias = self.filters(f"{key}.filter_fn", length), self.w[f"{key}.filter_fn.bias"]
        for o in range(order - 1):
            full = self.options["filter_layout"] == "full"
            channel = [c * (order - 1) + o if full else o * d + c for c in range(d)]
            v = v * gates[order - 1 - o]
            heard = np.zeros_like(v)
            for t in range(length):
                for lag in range(t + 1):
                    heard[t] += h[lag, channel] * v[t - lag]
            v = heard + bias[channel] * v if self.options["use_bias"] else heard
        return self.linear(activated(v * gates[0], self.options["activation"]), f"{key}.out_proj")

    def __call__(self, ids: list[int]) -> Array:
        """[seq] → [seq, vocab]"""
        x = self.w["backbone.embeddings.word_embeddings.weight"][ids]
        layers = {key.split(".")[2] for key in self.w if key.startswith("backbone.layers.")}
        for i in sorted(layers, key=int):
            key = f"backbone.layers.{i}"
            x = x + self.mixer(self.norm(x, f"{key}.norm1"), f"{key}.mixer")
            hidden = gelu_tanh(self.linear(self.norm(x, f"{key}.norm2"), f"{key}.mlp.fc1"))
            x = x + self.linear(hidden, f"{key}.mlp.fc2")
        return self.linear(self.norm(x, "backbone.ln_f"), "lm_head")


def difference(model: HyenaLM, direct: Direct, length: int = 12) -> float:
    ids = torch.randint(16, (3, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids).numpy()
    return max(float(np.abs(logits[i] - direct(row.tolist())).max()) for i, row in enumerate(ids))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_equals_the_formulas(tiny: Make, options: dict[str, Any]) -> None:
    model = tiny(**options).double()
    assert difference(model, Direct(model, **options)) < 1e-10  # float64 FFT against sums


def test_equals_the_formulas_when_shorter_than_l_max(tiny: Make) -> None:
    model = tiny(order=3).double()
    assert difference(model, Direct(model, order=3), length=5) < 1e-10


# Each is a reading of the format that is wrong; none may pass for the right one.
MUTANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "order layout": ({"order": 3}, {"filter_layout": "standalone"}),
    "missing bias": ({}, {"use_bias": False}),
    "modulation": ({}, {"modulate": False}),
    "shift": ({}, {"shift": 0.05}),
    "normalized": ({}, {"normalized": True}),
    "activation": ({}, {"activation": "gelu"}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_option_moves_the_logits(tiny: Make, name: str) -> None:
    options, wrong = MUTANTS[name]
    model = tiny(**options).double()
    assert difference(model, Direct(model, **{**options, **wrong})) > 1e-4


def test_exact_gelu_moves_the_logits(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny().double()
    direct, gelu = Direct(model), F.gelu
    monkeypatch.setattr(F, "gelu", lambda x, approximate: gelu(x))
    assert difference(model, direct) > 1e-5


@pytest.mark.parametrize("rows", [(0, 1), (0, 2), (1, 2)])
def test_a_swapped_split_moves_the_logits(tiny: Make, rows: tuple[int, int]) -> None:
    model = tiny().double()
    direct = Direct(model)
    order = [0, 1, 2]
    order[rows[0]], order[rows[1]] = order[rows[1]], order[rows[0]]
    for layer in model.backbone.layers:
        for tensor in (*layer.mixer.in_proj.parameters(), *layer.mixer.short_filter.parameters()):
            tensor.data = torch.cat([tensor.data.chunk(3)[i] for i in order])
    # x1 and v are multiplied, so exchanging them is no mutant
    assert (difference(model, direct) < 1e-10) == (rows == (1, 2))


def test_a_flipped_short_filter_moves_the_logits(tiny: Make) -> None:
    model = tiny().double()
    direct = Direct(model)
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
