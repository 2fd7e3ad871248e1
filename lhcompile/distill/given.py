"""Modal systems that a model brings: exact as they are, or taps to be reduced like any others.

    before                                         after `as_convolutions`
    y, s = lhc.modal_ssm(u, …, None, None, R)      y, s = lhc.long_conv(u, taps, None, R)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lhcompile.artifacts import DistilledLayer, Program, module_path
from lhcompile.distill.convolutions import copied
from lhcompile.ops import modal_taps
from lhcompile.ssm import RealModal

__all__ = ["GIVEN", "as_convolutions", "with_given"]

lhc = torch.ops.lhc
GIVEN = "modal"
"""The method of a layer that nothing was fitted in."""
AT_ONCE = 2**22
"""Powers of poles held at a time, in numbers."""


def as_convolutions(program: Program) -> Program:
    """The program with the taps of its modal systems, up to the context, in place of those that are not packed."""
    module = copied(program.graph)
    for index, node in enumerate(_systems(module)):
        if node.args[5] is not None:
            continue
        u, inner = node.args[0], node.args[7]
        module.register_buffer(f"given_{index}", _taps(_real(module, node), program.context))
        with module.graph.inserting_before(node):
            taps = module.graph.get_attr(f"given_{index}")
        taps.meta["sizes"] = None
        node.target, node.args = lhc.long_conv.default, (u, taps, None, inner)
    module.graph.eliminate_dead_code()
    module.recompile()
    return Program(module, program.context)


def with_given(program: Program, convolutions: Iterable[DistilledLayer]) -> tuple[DistilledLayer, ...]:
    """What became of each convolution of a program, and its own modal systems among them, in the program's order."""
    fitted = iter(convolutions)
    layers = []
    for node in program.graph.graph.nodes:
        if node.target == lhc.long_conv.default:
            layers.append(next(fitted))
        elif node.target == lhc.modal_ssm.default:
            layers.append(_layer(program.graph, node))
    return tuple(layers)


def _layer(module: GraphModule, node: Node) -> DistilledLayer:
    system = _real(module, node).modal()
    return DistilledLayer(
        module=module_path(node),
        method=GIVEN,
        channels=int(node.args[0].meta["sizes"][2].offset),  # type: ignore[union-attr]
        taps=torch.zeros(system.filters, 0),
        system=system,
        orders=system.orders,
        error=torch.zeros(system.filters),
    )


def _systems(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if node.target == lhc.modal_ssm.default]


def _real(module: GraphModule, node: Node) -> RealModal:
    return RealModal(*(cast(Tensor, getattr(module, str(table.target))) for table in node.args[1:5]))  # type: ignore[union-attr]


def _taps(real: RealModal, length: int) -> Tensor:
    """float32 [filters, length], a few filters at a time."""
    few = max(1, AT_ONCE // (length * len(real.own)))
    tables = (real.own, real.other, real.readout, real.direct)
    parts = zip(*(table.split(few, -1) for table in tables), strict=True)
    return torch.cat([modal_taps(RealModal(*part), length).float() for part in parts])
