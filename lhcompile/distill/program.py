"""Stage: recognized program in, program whose long convolutions are modal systems out.

All filters of the model are reduced as one bank. Their error is weighted by the spectrum each one hears on the
calibration tokens: what a filter never hears costs nothing. The order is given, or the smallest whose loss on those
tokens stays within the budget.

    before                                      after
    y, s = lhc.long_conv(u, taps, None, R)      y, s = lhc.modal_ssm(u, …, None, R)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from lhcompile.artifacts import Distilled, DistilledLayer, Program, Trial, module_path
from lhcompile.config import DistillConfig
from lhcompile.distill.norm import tap_norm
from lhcompile.distill.reduction import Reduction, checked, factorize
from lhcompile.distill.search import Bank, search
from lhcompile.errors import DistillError
from lhcompile.measure import compare, loss

__all__ = ["distill"]

lhc = torch.ops.lhc


def distill(
    program: Program,
    config: DistillConfig,
    tokens: Tensor | None,
    say: Callable[[str], None] = lambda _: None,
    sampled: bool = False,
) -> Distilled:
    """Replace every long convolution as `config` asks.

    tokens: int64 [sequences, time] that weigh the filters and judge the budget; None fits all frequencies alike,
            which needs an order. say: told what is going on, a phrase at a time.
    sampled: the tokens were drawn from the model itself, where the expected rise of the loss is the KL divergence,
            which is known far better from few tokens than a difference of losses.

    Raises BudgetError, naming the best that was reached, when no order up to `config.max_order` keeps the loss;
    DistillError, naming the module, for a filter that grows.
    """
    nodes = [node for node in program.graph.graph.nodes if node.target == lhc.long_conv.default]
    if config.exact or not nodes:
        return Distilled(program, tuple(_kept(program.graph, node) for node in nodes))
    taps, counts = _bank(program.graph, nodes)
    weights = None
    if tokens is not None:
        say("listening to the convolutions' inputs")
        weights = _heard(program.graph, nodes, tokens, taps.shape[1])
    bank = Bank(taps, weights, say)
    trials: tuple[Trial, ...] = ()
    if config.order is not None:
        reduction = bank.reduce(config.order, config.method)
    else:
        assert tokens is not None

        reference = loss(program, tokens)

        def loss_of(reduction: Reduction) -> float:
            model = _with_taps(program, nodes, counts, reduction)
            if sampled:
                return reference + compare(program, {"distilled": model}, tokens)["distilled"].kl_mean
            return loss(model, tokens)

        reduction, trials = search(bank, config, reference, loss_of, say)
    return _replaced(program, nodes, counts, reduction, trials)


def _bank(module: GraphModule, nodes: Sequence[Node]) -> tuple[Tensor, list[int]]:
    """All taps as [filters of all layers, length], and the filters of each layer.

    Raises DistillError, naming the module, for taps that no stable system can stand for.
    """
    taps = [_checked_taps(module, node) for node in nodes]
    length = max(x.shape[1] for x in taps)
    bank = torch.cat([torch.nn.functional.pad(x, (0, length - x.shape[1])) for x in taps])
    return bank, [x.shape[0] for x in taps]


def _checked_taps(module: GraphModule, node: Node) -> Tensor:
    try:
        return checked(_taps(module, node))
    except DistillError as error:
        raise DistillError(f"{module_path(node)}: {error}; --exact keeps taps as they are") from None


def _taps(module: GraphModule, node: Node) -> Tensor:
    return getattr(module, str(node.args[1].target)).detach()  # type: ignore[union-attr]


class _Ear(Interpreter):
    """Runs a program and adds up the power spectrum of what each long convolution is given."""

    def __init__(self, module: GraphModule, nodes: Sequence[Node], length: int) -> None:
        super().__init__(module)
        self.power: dict[Node, Tensor | float] = dict.fromkeys(nodes, 0.0)
        self.length = length

    def run_node(self, n: Node) -> object:
        if n in self.power:
            u, taps, _, inner = cast(tuple[Tensor, Tensor, None, int], self.fetch_args_kwargs_from_env(n)[0])
            spectrum = torch.fft.rfft(u, n=2 * self.length, dim=1).abs().square()  # [batch, bins, channels]
            grouped = spectrum.unflatten(2, (-1, taps.shape[0], inner))
            self.power[n] = self.power[n] + grouped.double().mean(dim=(0, 2, 4)).T
        return super().run_node(n)


@torch.no_grad()
def _heard(module: GraphModule, nodes: Sequence[Node], tokens: Tensor, length: int) -> Tensor:
    """Power spectrum of each filter's input on the tokens, [filters of all layers, length + 1]."""
    ear = _Ear(module, nodes, length)
    for rows in tokens.split(4):
        ear.run(rows)
    return torch.cat([torch.as_tensor(ear.power[node]) for node in nodes])


def _with_taps(program: Program, nodes: Sequence[Node], counts: list[int], reduction: Reduction) -> Program:
    """The program with its taps replaced by those of the systems: what the distilled model computes on a whole
    sequence, without states."""
    module = _copy(program.graph)
    taps = reduction.system.taps(max(_taps(program.graph, node).shape[1] for node in nodes))
    for node, fitted in zip(nodes, taps.split(counts), strict=True):
        setattr(module, str(node.args[1].target), fitted.float())  # type: ignore[union-attr]
    return Program(module, program.context)


def _replaced(
    program: Program, nodes: Sequence[Node], counts: list[int], reduction: Reduction, trials: tuple[Trial, ...]
) -> Distilled:
    """The program with a modal system for each convolution."""
    module = _copy(program.graph)
    layers = []
    copies = [node for node in module.graph.nodes if node.target == lhc.long_conv.default]
    filters = torch.arange(sum(counts)).split(counts)
    for index, (node, rows) in enumerate(zip(copies, filters, strict=True)):
        part = reduction[rows]
        real = part.system.real()
        weights = []
        with module.graph.inserting_before(node):
            for name in ("own", "other", "readout", "direct"):
                module.register_buffer(f"{name}_{index}", getattr(real, name).float())
                weights.append(module.graph.get_attr(f"{name}_{index}"))
        layers.append(_layer(program.graph, nodes[index], part))
        node.target = lhc.modal_ssm.default
        node.args = (node.args[0], *weights, None, node.args[3])
    module.graph.eliminate_dead_code()
    for name in {str(node.args[1].target) for node in nodes}:  # type: ignore[union-attr]
        delattr(module, name)
    module.recompile()
    return Distilled(Program(module, program.context), tuple(layers), trials)


def _layer(module: GraphModule, node: Node, part: Reduction) -> DistilledLayer:
    taps = _taps(module, node)
    norm = tap_norm(taps, None)
    orders = part.system.orders
    return DistilledLayer(
        module=module_path(node),
        method=part.method,
        channels=_channels(node),
        taps=taps,
        system=part.system,
        orders=orders,
        error=norm.relative(norm.taps - part.system.taps(norm.length)),
        bound=factorize(taps, int(orders.max())).bound(int(orders.max())),
        heard_error=part.error,
        hankel_singular_values=part.hankel_singular_values,
    )


def _kept(module: GraphModule, node: Node) -> DistilledLayer:
    return DistilledLayer(module_path(node), "exact", _channels(node), _taps(module, node))


def _channels(node: Node) -> int:
    return int(node.args[0].meta["sizes"][2].offset)  # type: ignore[union-attr]


def _copy(module: GraphModule) -> GraphModule:
    """A module of its own that shares every buffer until one is replaced."""
    twin = copy.copy(module)
    twin.__dict__["_buffers"] = dict(module._buffers)
    twin.graph = copy.deepcopy(module.graph)
    return twin
