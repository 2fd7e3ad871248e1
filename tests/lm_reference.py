"""Language models of safari, H3 and kin, evaluated from their equations in float64: explicit sums and recurrences.

Nothing here is shared with the package; weights are a state dict with the package's own (plain) keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Array", "H3Reference", "HyenaReference", "LongConvReference", "MultiHyenaReference", "convolved", "gap"]

Array = NDArray[Any]


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu(x: Array) -> Array:
    erf = torch.erf(torch.from_numpy(x / np.sqrt(2))).numpy()
    return 0.5 * x * (1 + erf)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


ACTIVATED = {"id": lambda x: x, "gelu": gelu, "silu": lambda x: x * sigmoid(x), "tanh": np.tanh}
ACTIVATED["sqrelu"] = lambda x: np.maximum(x, 0) ** 2
ACTIVATED["laplace"] = lambda x: 0.5 * (1 + torch.erf(torch.from_numpy((x - 0.707107) / 0.282095 / np.sqrt(2))).numpy())


def convolved(h: Array, u: Array) -> Array:
    """Σ_j h_j u_{t−j}, lag by lag; h [lags, ...], u [time, ...] of one shape but for the first axis"""
    y = np.zeros(np.broadcast_shapes(h[:1].shape, u.shape))
    for lag in range(min(len(h), len(u))):
        y[lag:] += h[lag] * u[: len(u) - lag]
    return y


class Reference:
    """reference(ids [time]) → logits [time, vocab]; subclasses write `mixer`."""

    def __init__(self, weights: Mapping[str, Tensor], **options: Any) -> None:
        self.w = {key: value.double().numpy() for key, value in weights.items()}
        self.options = {"layer_norm_epsilon": 1e-5} | options

    def linear(self, x: Array, key: str) -> Array:
        return x @ self.w[f"{key}.weight"].T + self.w.get(f"{key}.bias", 0.0)

    def norm(self, x: Array, key: str) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + self.options["layer_norm_epsilon"])
        return centred / scale * self.w[f"{key}.weight"] + self.w[f"{key}.bias"]

    def mixer(self, x: Array, key: str) -> Array:
        raise NotImplementedError

    def attention(self, x: Array, key: str) -> Array:
        """Each query over the keys up to its own, head by head."""
        heads, turning = self.options["num_heads"], self.options.get("rotary_emb_dim", 0)
        length, d = x.shape
        width = d // heads
        qkv = self.linear(x, f"{key}.Wqkv")
        y = np.zeros_like(x)
        for head in range(heads):
            at = [part * d + head * width for part in range(3)]
            q, k, v = (qkv[:, start : start + width].copy() for start in at)
            for i in range(turning // 2):
                angle = np.arange(length) * 10000.0 ** (-2 * i / turning)
                for part in (q, k):
                    a, b = part[:, i].copy(), part[:, i + turning // 2].copy()
                    part[:, i] = a * np.cos(angle) - b * np.sin(angle)
                    part[:, i + turning // 2] = a * np.sin(angle) + b * np.cos(angle)
            for t in range(length):
                score = np.exp(k[: t + 1] @ q[t] / np.sqrt(width))
                y[t, head * width : (head + 1) * width] = score @ v[: t + 1] / score.sum()
        return self.linear(y, f"{key}.out_proj")

    def __call__(self, ids: list[int]) -> Array:
        x = self.w["backbone.embeddings.word_embeddings.weight"][ids]
        if "backbone.embeddings.position_embeddings.weight" in self.w:
            x = x + self.w["backbone.embeddings.position_embeddings.weight"][: len(ids)]
        layers = {int(key.split(".")[2]) for key in self.w if key.startswith("backbone.layers.")}
        for i in sorted(layers):
            key = f"backbone.layers.{i}"
            mixer = self.attention if f"{key}.mixer.Wqkv.weight" in self.w else self.mixer
            x = x + mixer(self.norm(x, f"{key}.norm1"), f"{key}.mixer")
            hidden = gelu_tanh(self.linear(self.norm(x, f"{key}.norm2"), f"{key}.mlp.fc1"))
            x = x + self.linear(hidden, f"{key}.mlp.fc2")
        return self.linear(self.norm(x, "backbone.ln_f"), "lm_head")


class HyenaReference(Reference):
    def __init__(self, weights: Mapping[str, Tensor], **options: Any) -> None:
        given = {"order": 2, "modulate": True, "shift": 0.0, "normalized": False, "use_bias": True, "activation": "id"}
        super().__init__(weights, **given | {"filter_layout": "full", "outer_mixing": False} | options)

    def filters(self, key: str, length: int) -> Array:
        """[length, channels]"""
        x = self.w[f"{key}.pos_emb.z"][0, :length]
        i = 0
        while f"{key}.implicit_filter.{i + 1}.freq" in self.w:
            x = self.linear(x, f"{key}.implicit_filter.{i}")
            x = np.sin(self.options.get("w_mod", 1.0) * self.w[f"{key}.implicit_filter.{i + 1}.freq"][0] * x)
            i += 2
        h = self.linear(x, f"{key}.implicit_filter.{i}")
        if self.options["modulate"]:
            rate = np.abs(self.w[f"{key}.modulation.deltas"][0, 0])
            h = h * (np.exp(-self.w[f"{key}.pos_emb.t"][0, :length] * rate) + self.options["shift"])
        return h / np.abs(h).sum(-1, keepdims=True) if self.options["normalized"] else h

    def short(self, u: Array, key: str) -> Array:
        """The last tap of the file is the current token's."""
        return convolved(self.w[f"{key}.short_filter.weight"][:, 0].T[::-1], u) + self.w[f"{key}.short_filter.bias"]

    def mixer(self, x: Array, key: str) -> Array:
        length, d = x.shape
        order = self.options["order"]
        short = self.short(self.linear(x, f"{key}.in_proj"), key)
        parts = [short[:, i * d : (i + 1) * d] for i in range(order + 1)]
        gates, v = parts[:-1], parts[-1]
        h, bias = self.filters(f"{key}.filter_fn", length), self.w[f"{key}.filter_fn.bias"]
        for o in range(order - 1):
            full = self.options["filter_layout"] == "full"
            channel = [c * (order - 1) + o if full else o * d + c for c in range(d)]
            gate = gates[order - 1 - o]
            v = v * (gate.sum(-1, keepdims=True) if self.options["outer_mixing"] else gate)
            heard = convolved(h[:, channel], v)
            v = heard + bias[channel] * v if self.options["use_bias"] else heard
            if f"{key}.ord_proj_w" in self.w:
                v = v * self.w[f"{key}.ord_proj_w"][o, 0, 0]
        return self.linear(ACTIVATED[self.options["activation"]](v * gates[0]), f"{key}.out_proj")


class MultiHyenaReference(HyenaReference):
    """Options beside Hyena's: heads, head_layout "heads" or "parts", skip, norm_eps."""

    def mixer(self, x: Array, key: str) -> Array:
        (length, d), heads = x.shape, self.options["heads"]
        n = d // heads
        short = self.short(self.linear(x, f"{key}.in_proj"), key)
        h, y = self.filters(f"{key}.filter_fn", length), np.zeros_like(x)
        for m in range(heads):
            by_head = self.options.get("head_layout", "heads") == "heads"
            at = [3 * m * n + part * n if by_head else part * d + m * n for part in range(3)]
            q, k, v = (short[:, start : start + n] for start in at)
            for j in range(n):
                for i in range(n):
                    z = k[:, i] * v[:, j]
                    heard = convolved(h[:, m], z)
                    if f"{key}.filter_fn.bias" in self.w:
                        heard = heard + self.w[f"{key}.filter_fn.bias"][m] * z
                    y[:, m * n + j] += q[:, i] * heard
        if f"{key}.norm.weight" in self.w:
            rms = np.sqrt((y**2).mean(-1, keepdims=True) + self.options.get("norm_eps", 1e-6))
            y = y / rms * self.w[f"{key}.norm.weight"]
        return self.linear(y, f"{key}.out_proj") + self.options.get("skip", 0.0) * x


class H3Reference(Reference):
    """Both state-space models as recurrences over the file's own parameters."""

    def shifted(self, k: Array, key: str) -> Array:
        """s_t = shift(s_{t−1}) + B k_t, y_t = C · s_t: what entered n steps ago stands at n and after"""
        b, c = self.w[f"{key}.ssm_k_kernel.kernel.B"], self.w[f"{key}.ssm_k_kernel.kernel.C"][0]
        state, y = np.zeros_like(b), np.zeros_like(k)
        for t in range(len(k)):
            state = np.concatenate([np.zeros_like(state[:, :1]), state[:, :-1]], 1) + b * k[t][:, None]
            y[t] = (c * state).sum(-1)
        return y

    def diagonal(self, u: Array, head: int, key: str) -> Array:
        """x_t = p x_{t−1} + dt B / (1 − dt A/2) u_t, y_t = 2 Re C x_t (bilinear), of one signal [time]"""
        kernel = f"{key}.kernel.kernel."
        row = head % len(self.w[kernel + "A_imag"])
        a = -np.exp(self.w[kernel + "inv_A_real"][row]) + 1j * self.w[kernel + "A_imag"][row]
        b, c = self.w[kernel + "B"][row], self.w[kernel + "C"][0, head]
        b, c, dt = b[:, 0] + 1j * b[:, 1], c[:, 0] + 1j * c[:, 1], np.exp(self.w[kernel + "log_dt"][head])
        if self.options.get("disc", "bilinear") == "bilinear":
            pole, drive = (1 + dt * a / 2) / (1 - dt * a / 2), b * dt / (1 - dt * a / 2)
        else:
            pole, drive = np.exp(dt * a), b * (np.exp(dt * a) - 1) / a
        state, y = np.zeros_like(a), np.zeros_like(u)
        for t in range(len(u)):
            state = pole * state + drive * u[t]
            y[t] = 2 * (c * state).sum().real
        return y + self.w[f"{key}.D"][head] * u

    def mixer(self, x: Array, key: str) -> Array:
        q, k, v = (self.linear(x, f"{key}.{name}_proj") for name in "qkv")
        k = self.shifted(k, key) + self.w[f"{key}.ssm_k_D"] * k
        heads = len(self.w[f"{key}.D"])
        width = x.shape[1] // heads
        y = np.zeros_like(x)
        for head in range(heads):
            for j in range(width):
                for i in range(width):
                    z = k[:, head * width + i] * v[:, head * width + j]
                    # the published module lays its output out with the head fastest
                    y[:, j * heads + head] += q[:, head * width + i] * self.diagonal(z, head, key)
        return self.linear(y, f"{key}.output_linear")


class LongConvReference(Reference):
    """In the language model, or (called with `sequence`) in the sequence model."""

    def taps(self, key: str) -> Array:
        """[channels, d_model, l_max]"""
        k = self.w[f"{key}.kernel.kernel"]
        if window := self.options.get("window", 0):
            reach = window // 2
            padded = np.pad(k, ((0, 0), (0, 0), (reach, reach)))
            k = sum(padded[..., i : i + k.shape[-1]] for i in range(window)) / window
        lam = self.options.get("lam", 0.1)
        return np.where(np.abs(k) > lam, k - lam * np.sign(k), 0.0)

    def mixer(self, x: Array, key: str) -> Array:
        taps, direct = self.taps(key), self.w[f"{key}.D"]
        y = np.concatenate([convolved(h.T, x) + d * x for h, d in zip(taps, direct, strict=True)], -1)
        y = ACTIVATED[self.options.get("activation", "gelu")](y)
        if f"{key}.output_linear.0.weight" not in self.w:
            return y
        y = self.linear(y, f"{key}.output_linear.0")
        if self.options.get("postact", "glu") == "glu":
            a, b = np.split(y, 2, -1)
            return a * sigmoid(b)
        return ACTIVATED[self.options["postact"]](y)

    def normed(self, x: Array, key: str) -> Array:
        """safari's three norms, by their keys"""
        if f"{key}.running_mean" in self.w:
            scale = self.w[f"{key}.weight"] / np.sqrt(self.w[f"{key}.running_var"] + 1e-5)
            return (x - self.w[f"{key}.running_mean"]) * scale + self.w[f"{key}.bias"]
        if f"{key}.m" in self.w:
            mean, std = x.mean(-1, keepdims=True), x.std(-1, keepdims=True)
            return self.w[f"{key}.s"] / std * (x - mean + self.w[f"{key}.m"])
        return self.norm(x, key)

    def sequence(self, inputs: Array, prenorm: bool) -> Array:
        """Token ids [time] or features [time, d_input] → [time, d_output]"""
        embedding = self.w["encoder.0.weight"]
        x = embedding[inputs] if inputs.ndim == 1 else self.linear(inputs, "encoder.0")
        layers = {int(key.split(".")[2]) for key in self.w if key.startswith("model.layers.")}
        for i in sorted(layers):
            norm, layer = f"model.layers.{i}.norm.norm", f"model.layers.{i}.layer"
            x = x + self.mixer(self.normed(x, norm), layer) if prenorm else self.normed(x + self.mixer(x, layer), norm)
        x = self.normed(x, "model.norm.norm") if prenorm else x
        return self.linear(x, "decoder.0.output_transform")


def gap(module: torch.nn.Module, reference: Any, length: int, vocab: int = 16, rows: int = 2) -> float:
    """max |Δlogit| over random sequences, in units of the reference's own spread."""
    ids = torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = module(ids).double().numpy()
    wanted = np.stack([reference(row.tolist()) for row in ids])
    return float(np.abs(found - wanted).max() / wanted.std())
