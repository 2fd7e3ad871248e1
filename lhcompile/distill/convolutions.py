"""The long convolutions of a program as one bank of filters: what they are, what they hear, what the model feels.

*Heard.* The power spectrum of a convolution's input weighs the fit of its filters (`distill.norm`).

*Felt.* A deviation Δh of one filter's taps moves the log likelihood of a sequence y drawn from the model by v·Δh,
v = ∂ log p(y)/∂h, and the KL divergence of the changed model from the true one is, to second order in Δh,

    KL = ½ E_y (v·Δh)²      (the Fisher metric of the taps: the mean of v is zero)

exactly, whatever the sequence does in time. Measured on a few deviations per filter, it gives the filter's
*sensitivity*, KL per token for an error as large as the filter itself, and the costs of filters add up: their v are
hardly correlated.

The values f of a continuous signal are taken for the mean of a Gaussian of deviation σ in every channel. With
σ² = mean‖f‖²/2 over positions, the KL divergence per position ½‖Δf‖²/σ² is the relative squared error of the outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.func import functional_call
from torch.fx import GraphModule, Interpreter, Node

from lhcompile.artifacts import Program, module_path
from lhcompile.distill.reduction import Reduction, checked
from lhcompile.errors import DistillError

__all__ = ["Convolutions", "copied", "taps_of"]

lhc = torch.ops.lhc
DRAWS = 32
"""Sequences drawn for the sensitivities, at least: the mean of as many squares is known to a quarter."""


class Convolutions:
    """The long convolutions of a recognized program.

    nodes: of the program's graph; taps: float64 [filters of all layers, length]; counts: filters of each layer
    Raises DistillError, naming the module, for taps that no stable system can stand for.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes: list[Node] = [n for n in program.graph.graph.nodes if n.target == lhc.long_conv.default]
        taps = [_checked(program.graph, node) for node in self.nodes]
        length = max((x.shape[1] for x in taps), default=0)
        padded = [torch.nn.functional.pad(x, (0, length - x.shape[1])) for x in taps]
        self.taps = torch.cat(padded) if padded else torch.zeros(0, 0, dtype=torch.float64)
        self.counts = [x.shape[0] for x in taps]

    @property
    def layers(self) -> list[tuple[int, Node]]:
        """Number of filters and node of each convolution."""
        return list(zip(self.counts, self.nodes, strict=True))

    @torch.no_grad()
    def heard(self, tokens: Tensor) -> Tensor:
        """Power spectrum of each filter's input on tokens [sequences, time], [filters, length + 1]."""
        ear = _Ear(self.program.graph, self.nodes, self.taps.shape[1])
        for rows in tokens.split(4):
            ear.run(rows)
        return torch.cat([torch.as_tensor(ear.power[node]) for node in self.nodes])

    def sensitivity(self, tokens: Tensor, reductions: Sequence[Reduction], seed: int = 0) -> Tensor:
        """KL per token (or relative squared error of the outputs) that a relative squared error of 1 costs, [filters].

        tokens: [sequences, time, …], what is drawn from the model follows them position by position
        reductions: deviations to measure with, of the same filters, in the norm that `error` is meant in
        """
        deviations = torch.stack([reduction.taps(self.taps.shape[1]) - self.taps for reduction in reductions])
        squares = torch.stack([reduction.error.square() for reduction in reductions])
        scale = squares.sum(1, keepdim=True).clamp_min(1e-300)  # large errors of low orders do not outweigh the others
        generator = torch.Generator().manual_seed(seed)
        felt = torch.zeros_like(squares)
        draws = -(-DRAWS // tokens.shape[0])
        deviation = self._deviation(tokens) if tokens.is_floating_point() else None
        for row in tokens.split(1):
            for slopes in self._slopes(row, draws, generator, deviation):
                felt += torch.einsum("fl,dfl->df", slopes, deviations).square()
        cost = felt / (2 * tokens.shape[:2].numel() * draws)
        return (cost / scale).sum(0) / (squares / scale).sum(0).clamp_min(1e-300)

    @torch.no_grad()
    def _deviation(self, features: Tensor) -> float:
        """σ of the Gaussians around the values of features [sequences, time, features]."""
        squares = sum(float(self.program(rows).double().square().sum()) for rows in features.split(4))
        return max(squares / (2 * features.shape[:2].numel()), 1e-300) ** 0.5

    def _slopes(
        self, row: Tensor, draws: int, generator: torch.Generator, deviation: float | None
    ) -> list[Tensor]:
        """∂ log p(y)/∂h for sequences y drawn at every position of a row [1, time, …], [filters, length] each."""
        with torch.enable_grad():
            taps = self.taps.clone().requires_grad_()
            outputs = self.outputs(taps, row)[0]
            found: list[Tensor] = []
            for likelihood in _likelihoods(outputs, draws, generator, deviation):
                found += torch.autograd.grad(likelihood, taps, retain_graph=True)
        return found

    def outputs(self, taps: Tensor, rows: Tensor) -> Tensor:
        """Logits, or values, of rows [batch, time, …] with other taps [filters, length], whose gradient flows."""
        layers = zip(self.nodes, taps.split(self.counts), strict=True)
        module = self.program.graph
        own = {_name(node): fitted[:, : taps_of(module, node).shape[1]].float() for node, fitted in layers}
        return functional_call(module, own, (rows,))

    def with_taps(self, taps: Tensor) -> Program:
        """The program with other taps [filters, length]: what a distilled model computes on a whole sequence."""
        module = copied(self.program.graph)
        for node, fitted in zip(self.nodes, taps.split(self.counts), strict=True):
            setattr(module, _name(node), fitted[:, : taps_of(self.program.graph, node).shape[1]].float())
        return Program(module, self.program.context)


def _likelihoods(
    outputs: Tensor, draws: int, generator: torch.Generator, deviation: float | None
) -> Iterator[Tensor]:
    """log p(y), up to a constant, of sequences y drawn position by position by outputs [time, vocab or channels].

    deviation: None for logits; σ of Gaussians around values, where y = f + σε has ∂ log p(y) = ε·∂f/σ
    """
    if deviation is not None:
        for _ in range(draws):
            yield (torch.randn(outputs.shape, generator=generator) * outputs).sum() / deviation
        return
    chances = outputs.log_softmax(-1)
    for y in torch.multinomial(chances.detach().exp(), draws, replacement=True, generator=generator).T:
        yield chances.gather(-1, y.unsqueeze(-1)).sum()


class _Ear(Interpreter):
    """Runs a program and adds up the power spectrum of what each long convolution is given."""

    def __init__(self, module: GraphModule, nodes: Sequence[Node], length: int) -> None:
        super().__init__(module)
        self.power: dict[Node, Tensor | float] = dict.fromkeys(nodes, 0.0)
        self.length = length

    def run_node(self, n: Node) -> object:
        if n in self.power:
            u, taps, _, inner = cast(tuple[Tensor, Tensor, None, int], self.fetch_args_kwargs_from_env(n)[0])
            bins = self.length + 1
            spectrum = torch.fft.rfft(u, n=2 * max(self.length, u.shape[1]), dim=1).abs().square()
            spectrum = torch.nn.functional.interpolate(spectrum.mT, size=bins, mode="linear", align_corners=True).mT
            grouped = spectrum.unflatten(2, (-1, taps.shape[0], inner))
            self.power[n] = self.power[n] + grouped.double().mean(dim=(0, 2, 4)).T
        return super().run_node(n)


def taps_of(module: GraphModule, node: Node) -> Tensor:
    """The taps of a long convolution, [filters, length]."""
    return cast(Tensor, getattr(module, _name(node))).detach()


def copied(module: GraphModule) -> GraphModule:
    """A module of its own that shares every buffer until one is replaced."""
    twin = copy.copy(module)
    twin.__dict__["_buffers"] = dict(module._buffers)
    twin.graph = copy.deepcopy(module.graph)
    return twin


def _name(node: Node) -> str:
    return str(node.args[1].target)  # type: ignore[union-attr]


def _checked(module: GraphModule, node: Node) -> Tensor:
    try:
        return checked(taps_of(module, node))
    except DistillError as error:
        raise DistillError(f"{module_path(node)}: {error}; --exact keeps taps as they are") from None
