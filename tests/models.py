"""Tiny models that the tests of all stages share: one skeleton, and a time-mixing operator to put into it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from lhcompile.artifacts import LoadedModel, Program
from lhcompile.capture import capture
from lhcompile.load.modal import complex_modes
from lhcompile.recognize import recognize
from lhcompile.ssm import ModalSSM

__all__ = [
    "CONTEXT",
    "HEADS",
    "ORDERS",
    "TINY_MODELS",
    "VOCAB",
    "WIDTH",
    "GivenModal",
    "HeadsBetween",
    "HeadsInnermost",
    "HeadsOutermost",
    "Hyena",
    "LearnedPositions",
    "Mixed",
    "Mixer",
    "RotaryAttention",
    "convolve",
    "of_orders",
    "of_width",
    "operators",
    "program_of",
    "random_modal",
    "tiny",
    "with_modal",
    "with_taps",
]

ATTENTION = "lhc.attention.default"
VOCAB, WIDTH, HEADS, CONTEXT = 20, 8, 2, 32
ORDERS = (5, 2, 0, 1, 6, 3, 4)
"""Orders of a layer's filters where they differ: pairs and real poles, one alone in its slot, one filter of none."""


class Mixer(nn.Module):
    """A time-mixing operator, [batch, time, 3 · WIDTH] → [batch, time, WIDTH]; subclasses write `forward`.

    taps: [WIDTH, CONTEXT]; head_taps: [HEADS, CONTEXT]; direct: [WIDTH]; short: causal once it is cut
    """

    def __init__(self) -> None:
        super().__init__()
        decay = torch.exp(-torch.arange(CONTEXT) / 8)
        self.taps = nn.Parameter(torch.randn(WIDTH, CONTEXT) * decay)
        self.head_taps = nn.Parameter(torch.randn(HEADS, CONTEXT) * decay)
        self.direct = nn.Parameter(torch.randn(WIDTH))
        self.short = nn.Conv1d(3 * WIDTH, 3 * WIDTH, 3, groups=3 * WIDTH, padding=2)


class Block(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.in_proj = nn.Linear(WIDTH, 3 * WIDTH)
        self.mixer = mixer
        self.out_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out_proj(self.mixer(self.in_proj(self.norm(x))))


class TinyLM(nn.Module):
    """input_ids [batch, time] → logits [batch, time, VOCAB], one block per mixer."""

    def __init__(self, mixers: list[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block(mixer) for mixer in mixers)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def tiny(*mixers: type[nn.Module], context: int | None = CONTEXT) -> LoadedModel:
    """A model of one block per mixer class, the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = TinyLM([mixer() for mixer in mixers]).eval().requires_grad_(False)
    count = sum(weight.numel() for weight in module.parameters())
    return LoadedModel(module, "module", context, count, "tests")


@contextmanager
def of_width(width: int) -> Iterator[None]:
    """Tiny models that are made and captured inside have so many channels."""
    global WIDTH  # mixers read it as they are made and as they run
    before, WIDTH = WIDTH, width
    try:
        yield
    finally:
        WIDTH = before


def program_of(*mixers: type[nn.Module]) -> Program:
    """The recognized program of a tiny model."""
    return recognize(capture(tiny(*mixers)))


def operators(program: Program) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape of its weight) of every convolution, in order."""
    found = []
    for node in program.graph.graph.nodes:
        if str(node.target).startswith("lhc.") and str(node.target) not in ("lhc.position.default", ATTENTION):
            weight = getattr(program.graph, node.args[1].target)
            found.append((str(node.target).split(".")[1], tuple(weight.shape)))
    return found


def convolve(u: Tensor, taps: Tensor) -> Tensor:
    """The usual spelling of a long convolution; u [..., time], taps [..., at least time]."""
    time = u.shape[-1]
    spectrum = torch.fft.rfft(u, n=2 * time) * torch.fft.rfft(taps[..., :time], n=2 * time)
    return torch.fft.irfft(spectrum, n=2 * time)[..., :time]


# ---- operators ---------------------------------------------------------------------------------------------------


class Hyena(Mixer):
    """One filter per channel, gates before and after, the direct term beside."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.short(x.transpose(1, 2))[..., : x.shape[1]]
        gate, key, value = z.split(WIDTH, dim=1)
        u = key * value
        return (gate * (convolve(u, self.taps) + u * self.direct[:, None])).transpose(1, 2)


def with_taps(count: int) -> type[Hyena]:
    """A Hyena whose short convolution has so many."""

    class OfTaps(Hyena):
        def __init__(self) -> None:
            super().__init__()
            self.short = nn.Conv1d(3 * WIDTH, 3 * WIDTH, count, groups=3 * WIDTH, padding=count - 1)

    return OfTaps


class HeadsInnermost(Mixer):
    """Outer products of keys and values, [batch, d1, d2, heads, time]; a head's channels share one filter."""

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        z = self.short(x.transpose(1, 2))[..., :time]
        q, k, v = (part.reshape(batch, HEADS, -1, time).transpose(1, 2) for part in z.split(WIDTH, dim=1))
        kv = k[:, :, None] * v[:, None]
        y = convolve(kv, self.head_taps) + kv * self.direct[:HEADS, None]
        return (q[:, :, None] * y).sum(1).transpose(1, 2).reshape(batch, WIDTH, time).transpose(1, 2)


class HeadsOutermost(Mixer):
    """The same with the head as the first of the channel axes, [batch, heads, d1, d2, time]."""

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        z = self.short(x.transpose(1, 2))[..., :time]
        q, k, v = (part.reshape(batch, HEADS, -1, time) for part in z.split(WIDTH, dim=1))
        kv = torch.einsum("bhit,bhjt->bhijt", k, v)
        y = convolve(kv, self.head_taps[:, None, None])
        return torch.einsum("bhit,bhijt->bhjt", q, y).reshape(batch, WIDTH, time).transpose(1, 2)


class HeadsBetween(Mixer):
    """The same with the head between them, [batch, d1, heads, d2, time]."""

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        z = self.short(x.transpose(1, 2))[..., :time]
        q, k, v = (part.reshape(batch, HEADS, -1, time) for part in z.split(WIDTH, dim=1))
        kv = torch.einsum("bhit,bhjt->bihjt", k, v)
        y = convolve(kv, self.head_taps[:, None])
        return torch.einsum("bhit,bihjt->bhjt", q, y).reshape(batch, WIDTH, time).transpose(1, 2)


class Mixed(Mixer):
    """Short convolutions of every kind (dense, grouped, spread, a shift), beside a filter that all channels share."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv1d(WIDTH, WIDTH, 4, padding=3)
        self.grouped = nn.Conv1d(WIDTH, WIDTH, 2, groups=2, padding=1)
        self.dilated = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, dilation=5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[1]
        a, b, c = x.transpose(1, 2).split(WIDTH, dim=1)
        a = F.silu(self.dense(a))[..., :time] + self.grouped(a)[..., :time]
        b = self.dilated(F.pad(b, (10, 0)))
        c = convolve(c, self.head_taps[0]) * torch.sigmoid(F.pad(c, (1, -1)))
        return (a * b + c).transpose(1, 2)


class LearnedPositions(Mixer):
    """A trained row for every position."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :WIDTH] + self.taps.T[: x.shape[1]]


class RotaryAttention(Mixer):
    """Causal attention whose queries and keys turn with the position; two query heads share the keys of one."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, _ = x.split([WIDTH, WIDTH // 2, WIDTH // 2, WIDTH], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, 2)).transpose(1, 2) for part in (q, k, v))
        angle = torch.arange(x.shape[1])[:, None] * 0.7
        q, k = (turned(part, angle.cos(), angle.sin()) for part in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., time, 2 · pairs] with each pair, halves apart, turned by its angle; cos, sin: [time, pairs]"""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class GivenModal(Mixer):
    """A filter that is stored as poles and residues."""

    def __init__(self) -> None:
        super().__init__()
        modulus, angle = torch.rand(2, WIDTH, 3)
        self.poles = nn.Parameter(torch.view_as_real(torch.polar(0.5 + 0.4 * modulus, 3 * angle)))
        self.residues = nn.Parameter(torch.randn(WIDTH, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        gate, key, value = x.chunk(3, dim=-1)
        poles, residues = (torch.view_as_complex(part) for part in (self.poles, self.residues))
        return gate * complex_modes(key * value, poles, residues, self.direct)


# ---- modal programs ----------------------------------------------------------------------------------------------


def random_modal(filters: int, slots: int, generator: torch.Generator, largest: float = 0.97) -> ModalSSM:
    """Stable systems of `slots` slots each: the first of two real poles, the others conjugate pairs."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    modulus, angle = 0.3 + (largest - 0.3) * draw(filters, slots), math.pi * draw(filters, slots)
    pole = torch.polar(modulus, angle)
    residue = torch.complex(draw(filters, slots) - 0.5, draw(filters, slots) - 0.5)
    poles, residues = torch.stack([pole, pole.conj()], -1), torch.stack([residue, residue.conj()], -1)
    poles[:, 0] = (largest * (2 * draw(filters, 2) - 1)).to(poles.dtype)
    residues[:, 0] = (draw(filters, 2) - 0.5).to(residues.dtype)
    return ModalSSM(poles.flatten(1), residues.flatten(1), draw(filters) - 0.5)


def of_orders(system: ModalSSM, orders: Sequence[int]) -> ModalSSM:
    """Filter f keeps the first orders[f] of its poles; the last of an odd number becomes real."""
    poles, residues = system.poles.clone(), system.residues.clone()
    for f, order in enumerate(orders):
        for table in (poles, residues):
            table[f, order:] = 0
            if order % 2:
                table.imag[f, order - 1] = 0
    return ModalSSM(poles, residues, system.direct)


def with_modal(program: Program, slots: int = 3, largest: float = 0.97, orders: Sequence[int] | None = None) -> Program:
    """A recognized program with a random stable system in place of every long convolution; changes `program`.

    largest: the modulus that no pole exceeds
    orders: taken in turn by the filters of a layer, whose states are packed; None for rectangular states
    """
    module = program.graph
    generator = torch.Generator().manual_seed(1)
    for node in list(module.graph.nodes):
        if node.target != torch.ops.lhc.long_conv.default:
            continue
        u, taps, state, inner = node.args
        filters = getattr(module, taps.target).shape[0]
        system = random_modal(filters, slots, generator, largest)
        system = system if orders is None else of_orders(system, (list(orders) * filters)[:filters])
        weights: list[Node | None] = []
        for name in ("own", "other", "readout", "direct", "kept"):
            table = getattr(system.real(), name)
            module.register_buffer(f"{node.name}_{name}", table if name == "kept" else table.float())
            with module.graph.inserting_before(node):
                weights.append(module.graph.get_attr(f"{node.name}_{name}"))
        if orders is None:
            weights[-1] = None
        node.target = torch.ops.lhc.modal_ssm.default
        node.args = (u, *weights, state, inner)
    module.graph.eliminate_dead_code()
    module.recompile()
    return program


TINY_MODELS = {
    "per channel": (Hyena, Mixed),
    "shared": (HeadsInnermost, HeadsOutermost, HeadsBetween),
    "hybrid": (LearnedPositions, Hyena, RotaryAttention, GivenModal, RotaryAttention),
}
"""Models that the fixture `built` makes."""
