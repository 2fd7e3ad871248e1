"""Stage: recognized program in, program whose long convolutions are modal systems out.

All filters of the model are reduced as one bank. Their error is weighted by the spectrum each one hears on the
calibration tokens: what a filter never hears costs nothing. The order is given, or each filter gets its own, so that
the loss on those tokens stays within the budget with as little state as can be.

    before                                      after
    y, s = lhc.long_conv(u, taps, None, R)      y, s = lhc.modal_ssm(u, …, kept, None, R)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lhcompile.artifacts import Distilled, DistilledLayer, Program, Trial, module_path
from lhcompile.config import DistillConfig
from lhcompile.distill.bank import Bank
from lhcompile.distill.convolutions import Convolutions, copied, taps_of
from lhcompile.distill.given import as_convolutions, with_given
from lhcompile.distill.heads import heads_at_price
from lhcompile.distill.heal import heal
from lhcompile.distill.judge import Judge
from lhcompile.distill.norm import tap_norm
from lhcompile.distill.reduction import factorize
from lhcompile.distill.result import Reduction
from lhcompile.distill.search import search
from lhcompile.errors import BudgetError
from lhcompile.measure import Model
from lhcompile.ops import per_channel
from lhcompile.ssm import ModalSSM

__all__ = ["distill"]

lhc = torch.ops.lhc
_PROBES = (0, 1, 2, 4)
"""Orders whose errors measure the sensitivities."""
_PACKED = 3 / 4
"""A layer's states are packed where they fill at most this part of the rectangle (docs/decisions/005)."""


def distill(
    program: Program,
    config: DistillConfig,
    tokens: Tensor | None,
    say: Callable[[str], None] = lambda _: None,
    sampled: bool = False,
    judging: Tensor | None = None,
) -> Distilled:
    """Replace every long convolution as `config` asks; modal systems of the model's own stay, or are reduced like them.

    tokens: int64 [sequences, time] that weigh the filters; None fits all frequencies alike, which needs an order.
    say: told what is going on, a phrase at a time.
    sampled: the tokens were drawn from the model itself, where the expected rise of the loss is the KL divergence,
            which is known far better from few tokens than a difference of losses.
    judging: sequences that the budget is held against, in the order of their text; those of `tokens` if not given.
    Of a continuous signal, float32 [sequences, time, features], the relative squared error of the outputs stands for
    the divergence, and there is no loss.

    Raises BudgetError, naming the best that was reached, when no order up to `config.max_order` keeps the loss;
    DistillError, naming the module, for a filter that grows.
    """
    if config.exact:
        nodes = [node for node in program.graph.graph.nodes if node.target == lhc.long_conv.default]
        return Distilled(program, with_given(program, (_kept(program.graph, node) for node in nodes)))
    if config.reduce:
        program = as_convolutions(program)
    convolutions = Convolutions(program)
    if not convolutions.nodes:
        return Distilled(program, with_given(program, ()))
    weights = None
    if tokens is not None:
        say("listening to the convolutions' inputs")
        weights = convolutions.heard(tokens)

    def bank_of(heads: Tensor | None) -> Bank:
        return Bank(convolutions.taps, weights, config.method, say, heads)

    trials: tuple[Trial, ...] = ()
    if config.order is not None:
        reduction = bank_of(None).reduce(config.order)
    else:
        assert tokens is not None
        judge = Judge(program, tokens if judging is None else judging, config.rise, sampled)
        reduction, trials = _within_budget(convolutions, bank_of, config, tokens, judge, say)
    healed = None
    if config.heal:
        assert tokens is not None
        norm = tap_norm(convolutions.taps, weights)
        reduction, healed = heal(convolutions, reduction, norm, tokens, config.heal, sampled, say)
    done, layers = _replaced(convolutions, reduction, uniform=config.uniform or config.order is not None)
    return Distilled(done, with_given(program, layers), trials, healed)


def _within_budget(
    convolutions: Convolutions,
    bank_of: Callable[[Tensor | None], Bank],
    config: DistillConfig,
    tokens: Tensor,
    judge: Judge,
    say: Callable[[str], None],
) -> tuple[Reduction, tuple[Trial, ...]]:
    """The smallest state whose loss stays within the budget; tokens weigh what a filter's error costs."""
    program, bank = convolutions.program, bank_of(None)
    probes = [bank.reduce(order, "hankel") for order in _PROBES]
    say("measuring how sensitive the model is to each filter")
    sensitivity = convolutions.sensitivity(tokens, probes)
    sharing = torch.cat([torch.full((c,), _channels(node) / c).double() for c, node in convolutions.layers])

    def model_of(reduction: Reduction) -> Model:
        return convolutions.with_taps(reduction.single().taps(convolutions.taps.shape[1]))

    def searched(bank: Bank, kept: float = 0.0) -> tuple[Reduction, float, float, tuple[Trial, ...]]:
        """The systems, their number of states with those of the heads, the price of one, and what was tried."""
        found, trials = search(bank, config, judge, sensitivity, sharing, model_of, say)
        return found.reduction(bank), found.states(sharing) + kept, found.price, trials

    best, price = None, judge.ruler.limit / float(sharing.sum())
    trials: tuple[Trial, ...] = ()
    try:
        best = searched(bank)
        _, _, price, trials = best
    except BudgetError:  # perhaps only poles that coincide would do, which float32 cannot hold
        if config.head == 1:
            raise
    if config.head > 1:
        say("looking for layers that an exact head makes smaller")
        every = torch.ones(len(convolutions.taps), dtype=torch.int64)
        layers = [(count, taps_of(program.graph, node).shape[1]) for count, node in convolutions.layers]
        banks = (lambda head: bank_of(head * every)), layers
        heads = heads_at_price(*banks, sensitivity, sharing, price, config.head)
        other = searched(bank_of(heads), float((sharing * (heads - 1)).sum()))
        trials += other[3]
        if best is None or other[1] < best[1]:
            best = other
    assert best is not None
    return best[0], trials


def _replaced(
    convolutions: Convolutions, reduction: Reduction, uniform: bool
) -> tuple[Program, tuple[DistilledLayer, ...]]:
    """The program with a modal system for each convolution, and what became of each."""
    program = convolutions.program
    module = copied(program.graph)
    layers = []
    copies = [node for node in module.graph.nodes if node.target == lhc.long_conv.default]
    filters = torch.arange(sum(convolutions.counts)).split(convolutions.counts)
    for index, (node, rows) in enumerate(zip(copies, filters, strict=True)):
        part = _trimmed(reduction[rows])
        real = part.system.real()
        kept = real.kept
        tables = {name: getattr(real, name).float() for name in ("own", "other", "readout", "direct")}
        if not uniform and len(kept) <= _PACKED * real.own.numel():
            tables["kept"] = kept
        weights: list[Node | None] = []
        with module.graph.inserting_before(node):
            for name, table in tables.items():
                module.register_buffer(f"{name}_{index}", table)
                weights.append(module.graph.get_attr(f"{name}_{index}"))
        weights += [None] * (5 - len(weights))
        layers.append(_layer(program.graph, convolutions.nodes[index], part))
        node.target = lhc.modal_ssm.default
        node.args = (node.args[0], *weights, None, node.args[3])
        if part.head.shape[1]:
            _headed(module, node, part.head, index)
    module.graph.eliminate_dead_code()
    for name in {str(node.args[1].target) for node in convolutions.nodes}:  # type: ignore[union-attr]
        delattr(module, name)
    module.recompile()
    return Program(module, program.context), tuple(layers)


def _headed(module: GraphModule, node: Node, head: Tensor, index: int) -> None:
    """Adds to the output of a modal system a short convolution with taps 1 … k − 1, head [filters, k − 1]."""
    u, inner = node.args[0], cast(int, node.args[-1])
    taps = torch.nn.functional.pad(head, (1, 0)).flip(-1).float()
    weight = per_channel(taps.T, _channels(node), inner).T.unsqueeze(1).contiguous()
    module.register_buffer(f"head_{index}", weight)
    (output,) = [user for user in node.users if user.args[1] == 0]
    with module.graph.inserting_after(output):
        table = module.graph.get_attr(f"head_{index}")
        with module.graph.inserting_after(table):
            short = module.graph.call_function(lhc.fir.default, (u, table, None, None, weight.shape[0]))
    with module.graph.inserting_after(short):
        said = module.graph.call_function(operator.getitem, (short, 0))
    with module.graph.inserting_after(said):
        total = module.graph.call_function(torch.ops.aten.add.Tensor, (output, said))
    short.meta, said.meta, total.meta = dict(node.meta), dict(output.meta), dict(output.meta)
    output.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


def _trimmed(part: Reduction) -> Reduction:
    """A reduction without the slots and head taps behind the last that any of its filters uses; one slot stays."""
    system, head = part.system, part.head
    width = max(2, 2 * _used((system.residues != 0).any(0).unflatten(0, (-1, 2)).any(1)))
    missing = (0, max(0, width - system.poles.shape[1]))
    poles, residues = (torch.nn.functional.pad(x[:, :width], missing) for x in (system.poles, system.residues))
    system = ModalSSM(poles, residues, system.direct)
    return replace(part, system=system, head=head[:, : _used((head != 0).any(0))])


def _used(columns: Tensor) -> int:
    """The number of columns up to the last that is true."""
    return int(columns.nonzero().max()) + 1 if bool(columns.any()) else 0


def _layer(module: GraphModule, node: Node, part: Reduction) -> DistilledLayer:
    taps = taps_of(module, node)
    norm = tap_norm(taps, None)
    orders = part.system.orders
    plain = factorize(taps, max(int(orders.max()), 1), head=part.head.shape[1] + 1)
    bound = torch.zeros_like(part.error)
    for order in orders.unique().tolist():
        bound = torch.where(orders == order, plain.bound(order), bound)
    return DistilledLayer(
        module=module_path(node),
        method=part.method,
        channels=_channels(node),
        taps=taps,
        system=part.system,
        orders=orders,
        head=part.head,
        error=norm.relative(norm.taps - part.taps(norm.length)),
        bound=bound,
        heard_error=part.error,
        hankel_singular_values=part.hankel_singular_values,
    )


def _kept(module: GraphModule, node: Node) -> DistilledLayer:
    return DistilledLayer(module_path(node), "exact", _channels(node), taps_of(module, node))


def _channels(node: Node) -> int:
    return int(node.args[0].meta["sizes"][2].offset)  # type: ignore[union-attr]
