"""Checkpoints of the stacked S4 model with weights that nothing hides behind, and its equations in float64.

The reference shares nothing with `lhcompile.load`: it runs the recurrences position by position, with the matrices as
they are published, and undoes a prepared C by the series C = Σ_j C̃ dA^{jL}.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["D_INPUT", "D_MODEL", "D_OUTPUT", "KINDS", "checkpoint", "hippo_checkpoint", "reference"]

D_INPUT, D_MODEL, D_OUTPUT, HALF = 3, 6, 4, 4
PREPARED = 24
KINDS: dict[str, dict[str, Any]] = {
    "s4d": {"layer": "s4d"},
    "diag": {"layer": "diag", "n_ssm": 3, "channels": 2},
    "diag-bilinear": {"layer": "diag", "n_ssm": 2, "disc": "bilinear"},
    "diag-prenorm": {"layer": "diag", "n_ssm": 1, "prenorm": True, "steps": HALF},
    "dplr": {"layer": "dplr", "n_ssm": 2, "prepared": PREPARED},
    "dplr-steps": {"layer": "dplr", "n_ssm": 2, "steps": HALF, "prepared": PREPARED},
    "dplr-plain": {"layer": "dplr", "n_ssm": 3, "channels": 2, "rank": 2},
}
"""name → arguments of `checkpoint` and `reference`; each layer's own default is not named"""


def checkpoint(
    layer: str,
    n_ssm: int = 1,
    channels: int = 1,
    rank: int = 1,
    steps: int = 1,
    prepared: int = 0,
    layers: int = 2,
    **_: Any,
) -> dict[str, Tensor]:
    """A state dict, float32. steps: dt's of one channel; prepared: l_kernel"""
    draw = torch.Generator().manual_seed(7)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=draw)

    def linear(out: int, into: int) -> dict[str, Tensor]:
        return {"weight": normal(out, into, scale=1 / into**0.5), "bias": normal(out, scale=0.3)}

    found = _under("encoder.", linear(D_MODEL, D_INPUT)) | _under("decoder.", linear(D_OUTPUT, D_MODEL))
    for i in range(layers):
        found |= _under(f"norms.{i}.", {"weight": 1 + normal(D_MODEL, scale=0.3), "bias": normal(D_MODEL, scale=0.3)})
        out = linear(2 * D_MODEL, channels * D_MODEL)
        systems = D_MODEL if layer == "s4d" else n_ssm
        real, imag = normal(systems, HALF, scale=0.5) - 0.7, 3 * torch.rand(systems, HALF, generator=draw) + 0.1
        gain, step = normal(channels, D_MODEL, HALF, 2, scale=1.5), normal(D_MODEL, steps, scale=0.6) - 2
        if layer == "s4d":
            out["weight"] = out["weight"].unsqueeze(-1)
            kernel = {"C": gain[0], "log_dt": step[:, 0], "log_A_real": real, "A_imag": imag}
            found |= _under(f"s4_layers.{i}.", {"D": normal(D_MODEL)} | _under("kernel.", kernel))
        else:
            kernel = {"inv_dt": step, "A_real": real, "A_imag": imag, "C": gain, "B": normal(1, n_ssm, HALF, 2)}
            if layer == "dplr":
                kernel |= {"P": normal(rank, n_ssm, HALF, 2, scale=0.5), "l_kernel": torch.tensor(prepared)}
                kernel["C"] = _prepared(kernel) if prepared else gain
            found |= _under(f"s4_layers.{i}.layer.", {"D": normal(channels, D_MODEL)} | _under("kernel.", kernel))
        found |= _under(f"s4_layers.{i}.output_linear.0.", out)
    return found


def hippo_checkpoint(half: int = 8) -> dict[str, Tensor]:
    """DPLR at its published start: λ, P and B of HiPPO-LegS, whose eigenvectors are all but parallel."""
    found = checkpoint("dplr", n_ssm=1)
    n = torch.arange(2 * half, dtype=torch.float64)
    p, b = (n + 0.5).sqrt(), (2 * n + 1).sqrt()
    skew = torch.outer(p, p)
    skew = torch.triu(skew, 1) - torch.tril(skew, -1)
    imag, vectors = torch.linalg.eigh(-1j * skew)
    imag, vectors = imag[half:], vectors[:, half:]
    low, gain = (vectors.mH @ x.to(vectors.dtype) for x in (p, b))
    draw = torch.Generator().manual_seed(3)
    for i in range(2):
        kernel = f"s4_layers.{i}.layer.kernel."
        found |= {
            kernel + "A_real": torch.full((1, half), math.log(0.5)),
            kernel + "A_imag": -imag[None].float(),
            kernel + "P": torch.view_as_real(low)[None, None].float(),
            kernel + "B": torch.view_as_real(gain)[None, None].float(),
            kernel + "C": torch.randn(1, D_MODEL, half, 2, generator=draw),
        }
    return found


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


# ---- the equations -------------------------------------------------------------------------------------------------


def reference(
    tensors: dict[str, Tensor], inputs: Tensor, layer: str, prenorm: bool = False, disc: str = "zoh", **_: Any
) -> Tensor:
    """features [batch, time, D_INPUT] → values [batch, time, D_OUTPUT], float64"""
    weights = {key: value.double() for key, value in tensors.items()}
    x = inputs.double() @ weights["encoder.weight"].T + weights["encoder.bias"]
    for i in range(sum(key.startswith("norms.") for key in tensors) // 2):
        own = {key.removeprefix(f"s4_layers.{i}."): value for key, value in weights.items()}
        gamma, beta = weights[f"norms.{i}.weight"], weights[f"norms.{i}.bias"]
        if prenorm:
            x = x + _mixed(own, _normed(x, gamma, beta), layer, disc)
        else:
            x = _normed(x + _mixed(own, x, layer, disc), gamma, beta)
    return x @ weights["decoder.weight"].T + weights["decoder.bias"]


def _normed(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gamma + beta


def _mixed(own: dict[str, Tensor], u: Tensor, layer: str, disc: str) -> Tensor:
    """[batch, time, D_MODEL] → the same"""
    if layer == "s4d":
        direct, kernel = own["D"][None], {key[7:]: value for key, value in own.items() if key.startswith("kernel.")}
    else:
        direct, kernel = own["layer.D"], {key[13:]: value for key, value in own.items() if "layer.kernel." in key[:13]}
    copies = []
    for c in range(len(direct)):
        channels = [_channel(kernel, u[..., h], layer, disc, c, h) for h in range(D_MODEL)]
        copies.append(torch.stack(channels, -1) + direct[c] * u)
    y = torch.cat(copies, -1)
    y = y * (1 + torch.erf(y / 2**0.5)) / 2
    wide = y @ own["output_linear.0.weight"].reshape(2 * D_MODEL, -1).T + own["output_linear.0.bias"]
    return wide[..., :D_MODEL] / (1 + torch.exp(-wide[..., D_MODEL:]))


def _channel(kernel: dict[str, Tensor], u: Tensor, layer: str, disc: str, c: int, h: int) -> Tensor:
    """One output of one channel, [batch, time] → the same, by its recurrence."""
    if layer == "s4d":
        rates = -torch.exp(kernel["log_A_real"][h]) + 1j * kernel["A_imag"][h]
        dt, b, gain = torch.exp(kernel["log_dt"][h]), torch.ones_like(rates), _pair(kernel["C"][h])
    else:
        system = h % len(kernel["A_real"])
        rates = -torch.exp(kernel["A_real"][system]) - 1j * kernel["A_imag"][system]
        dt, b = torch.exp(kernel["inv_dt"][h]), _pair(kernel["B"][0, system])
        gain = _pair(kernel["C"][c, h])
    if layer == "dplr":
        step, drive = _dplr(kernel, h)
        gain = _unprepared(torch.cat([gain, gain.conj()]), step, int(kernel["l_kernel"])) / 2
    elif disc == "zoh":
        step, drive = torch.diag(torch.exp(dt * rates)), (torch.exp(dt * rates) - 1) / rates * b
    else:
        back = 1 - dt * rates / 2
        step, drive = torch.diag((1 + dt * rates / 2) / back), dt * b / back
    state = torch.zeros(len(u), len(drive), dtype=torch.complex128)
    outputs = []
    for now in u.T:
        state = state @ step.T + now[:, None] * drive
        outputs.append(2 * (state @ gain).real)
    return torch.stack(outputs, -1)


def _dplr(kernel: dict[str, Tensor], h: int) -> tuple[Tensor, Tensor]:
    """dA and dB of one channel on all states, complex128 [2 · HALF, 2 · HALF] and [2 · HALF]."""
    system = h % len(kernel["A_real"])
    rates = -torch.exp(kernel["A_real"][system].double()) - 1j * kernel["A_imag"][system].double()
    low, b = _pair(kernel["P"].double()[:, system]), _pair(kernel["B"].double()[0, system])
    low, b = torch.cat([low, low.conj()], -1), torch.cat([b, b.conj()])
    a = torch.diag(torch.cat([rates, rates.conj()])) - low.T @ low.conj()
    dt, one = torch.exp(kernel["inv_dt"][h].double()).expand(len(rates)).repeat(2), torch.eye(len(b)).cdouble()
    half = dt[:, None] / 2 * a
    back = torch.linalg.inv(one - half)
    return back @ (one + half), back @ (dt * b)


def _prepared(kernel: dict[str, Tensor]) -> Tensor:
    """C (I − dA^L), the first half, as the original stores it."""
    stored = kernel["C"].clone()
    for h in range(D_MODEL):
        step, _ = _dplr(kernel, h)
        for c in range(len(stored)):
            gain = _pair(kernel["C"][c, h].double())
            gain = torch.cat([gain, gain.conj()])
            changed = gain - gain @ torch.linalg.matrix_power(step, int(kernel["l_kernel"]))
            stored[c, h] = torch.view_as_real(changed[: len(changed) // 2].contiguous())
    return stored


def _unprepared(gain: Tensor, step: Tensor, length: int) -> Tensor:
    if not length:
        return gain
    total, power = gain, torch.linalg.matrix_power(step, length)
    while float(gain.abs().max()) > 1e-18:
        gain = gain @ power
        total = total + gain
    return total


def _pair(x: Tensor) -> Tensor:
    return torch.complex(x[..., 0].double(), x[..., 1].double())
