"""Causal attention in its spellings becomes one operator; anything else that compares positions is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import CONTEXT, WIDTH, Mixer, tiny
from streams import assert_close, assert_same_model
from torch import Tensor
from torch.fx import Node

from lhcompile.artifacts import Program
from lhcompile.capture import capture
from lhcompile.errors import RecognizeError
from lhcompile.recognize import recognize

HEADS, GROUPS = 4, 2
Mix = Callable[[Tensor], Tensor]
SPELLINGS: dict[str, Mix] = {}
REFUSED: dict[str, tuple[str, str]] = {}


def spelling(mix: Mix) -> Mix:
    SPELLINGS[mix.__name__] = mix
    return mix


def refused(operator: str, reason: str) -> Callable[[Mix], Mix]:
    def decorate(mix: Mix) -> Mix:
        REFUSED[mix.__name__] = (operator, reason)
        return spelling(mix)

    return decorate


def mixer(mix: Mix) -> type[Mixer]:
    return type(mix.__name__, (Mixer,), {"forward": lambda self, x: mix(x)})


def apart(x: Tensor, heads: int) -> Tensor:
    """[batch, time, heads · width] → [batch, heads, time, width]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def together(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def full(x: Tensor) -> tuple[Tensor, ...]:
    """q, k and v of as many heads, [batch, HEADS, time, 2]"""
    return tuple(apart(part, HEADS) for part in x.chunk(3, dim=-1))


def grouped(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q of HEADS heads; k and v of GROUPS"""
    q, k, v, _ = x.split([WIDTH, WIDTH // 2, WIDTH // 2, WIDTH], dim=-1)
    return apart(q, HEADS), apart(k, GROUPS), apart(v, GROUPS)


def past(x: Tensor) -> Tensor:
    return torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).tril()


def hidden(x: Tensor, small: float = -math.inf) -> Tensor:
    return torch.full((x.shape[-2], x.shape[-2]), small).triu(1)


# ---- the fused operator --------------------------------------------------------------------------------------------


@spelling
def without_heads(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*x.chunk(3, dim=-1), is_causal=True)


@spelling
def causal(x: Tensor) -> Tensor:
    return together(F.scaled_dot_product_attention(*full(x), is_causal=True, scale=0.3))


@spelling
def boolean_mask(x: Tensor) -> Tensor:
    return together(F.scaled_dot_product_attention(*full(x), attn_mask=past(x)))


@spelling
def additive_mask(x: Tensor) -> Tensor:
    return together(F.scaled_dot_product_attention(*full(x), attn_mask=hidden(x)[None, None]))


@spelling
def groups(x: Tensor) -> Tensor:
    return together(F.scaled_dot_product_attention(*grouped(x), is_causal=True, enable_gqa=True))


@spelling
def one_head_of_keys(x: Tensor) -> Tensor:
    q, k, v = grouped(x)
    return together(F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], is_causal=True))


@spelling
def repeated_heads(x: Tensor) -> Tensor:
    q, k, v = grouped(x)
    k, v = (part.repeat_interleave(HEADS // GROUPS, dim=1) for part in (k, v))
    return together(F.scaled_dot_product_attention(q, k, v, is_causal=True))


# ---- written out ---------------------------------------------------------------------------------------------------


@spelling
def filled(x: Tensor) -> Tensor:
    q, k, v = x.chunk(3, dim=-1)
    return (q @ k.transpose(1, 2)).masked_fill(~past(x), -math.inf).softmax(-1) @ v


@spelling
def divided_and_added(x: Tensor) -> Tensor:
    q, k, v = full(x)
    scores = q @ k.mT / math.sqrt(2) + hidden(x)
    return together(F.softmax(scores, dim=-1, dtype=torch.float32) @ v)


@spelling
def subtracted(x: Tensor) -> Tensor:
    q, k, v = full(x)
    scores = 0.5 * (q @ k.mT) - 10000.0 * (~past(x)).float()
    return together(scores.softmax(-1) @ v)


@spelling
def by_einsum(x: Tensor) -> Tensor:
    q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in x.chunk(3, dim=-1))
    scores = torch.einsum("bthd,bshd->bhts", q, k * 0.5) + hidden(x, -10000.0)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2)


@spelling
def keys_first(x: Tensor) -> Tensor:
    """Scores [batch, heads, keys, queries], the softmax over the third axis."""
    q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in x.chunk(3, dim=-1))
    scores = torch.where(past(x).T, torch.einsum("bshd,bthd->bhst", k, q), -1e9)
    return torch.einsum("bhst,bshd->bthd", scores.softmax(2), v).flatten(2)


@spelling
def turned_over(x: Tensor) -> Tensor:
    q, k, v = full(x)
    return together((k @ q.mT).transpose(-1, -2).masked_fill(~past(x), -1e9).softmax(-1) @ v)


@spelling
def batch_and_heads_merged(x: Tensor) -> Tensor:
    batch, time, _ = x.shape
    q, k, v = (part.reshape(batch * HEADS, time, -1) for part in full(x))
    scores = torch.bmm(q, k.transpose(1, 2)).view(batch, HEADS, time, time) * 0.7
    scores = scores.masked_fill(~past(x), torch.finfo(torch.float32).min)
    y = torch.bmm(scores.softmax(-1).view(batch * HEADS, time, time), v)
    return together(y.view(batch, HEADS, time, -1))


@spelling
def groups_by_einsum(x: Tensor) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in grouped(x))
    q = q.unflatten(2, (GROUPS, -1))
    scores = torch.einsum("btgrd,bsgd->bgrts", q, k) + hidden(x)
    return torch.einsum("bgrts,bsgd->btgrd", scores.softmax(-1), v).flatten(2)


@spelling
def groups_by_broadcasting(x: Tensor) -> Tensor:
    q, k, v = grouped(x)
    scores = q.unflatten(1, (GROUPS, -1)) @ k[:, :, None].mT + hidden(x)
    return together((scores.softmax(-1) @ v[:, :, None]).flatten(1, 2))


@spelling
def groups_innermost(x: Tensor) -> Tensor:
    """Query head h reads the keys of head h % GROUPS."""
    q, k, v = grouped(x)
    scores = q.unflatten(1, (-1, GROUPS)) @ k[:, None].mT + hidden(x)
    return together((scores.softmax(-1) @ v[:, None]).flatten(1, 2))


UNDERSTOOD = list(SPELLINGS)
CACHED = {
    "groups": (HEADS, GROUPS),
    "groups_by_einsum": (HEADS, GROUPS),
    "groups_by_broadcasting": (HEADS, GROUPS),
    "groups_innermost": (HEADS, GROUPS),
    "one_head_of_keys": (HEADS, 1),
    "without_heads": (1, 1),
    "filled": (1, 1),
}
"""Heads of queries and of cached keys, where they are not HEADS both."""


def attention_of(program: Program) -> Node:
    (node,) = [node for node in program.graph.graph.nodes if node.target == torch.ops.lhc.attention.default]
    return node


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_spelling(name: str) -> None:
    loaded = tiny(mixer(SPELLINGS[name]))
    program = recognize(capture(loaded))
    q, k, v = (arg.meta["sizes"][2].offset for arg in attention_of(program).args[:3])
    assert (q, k) == CACHED.get(name, (HEADS, HEADS))
    assert v == k
    assert_same_model(program, loaded.module)


def test_the_operator() -> None:
    """
    before                                                after
    q @ kᵀ · a ─ masked_fill ─ softmax ─ matmul(·, v)     lhc.attention(q, k, v, None, None, None, a)
    """
    program = recognize(capture(tiny(mixer(batch_and_heads_merged))))
    code = program.graph.code
    assert re.search(r"lhc\.attention\.default\(\w+, \w+, \w+, None, None, None, 0\.7\)", code)
    assert not re.search(r"softmax|bmm|masked_fill|triu|tril", code)


# ---- what is refused -----------------------------------------------------------------------------------------------


@refused("masked_fill", "its mask hides earlier positions, like a window")
def window(x: Tensor) -> Tensor:
    q, k, v = full(x)
    near = past(x) & past(x).T.roll(3, 1).logical_or(torch.ones_like(past(x)).triu(-3))
    return together((q @ k.mT).masked_fill(~near, -math.inf).softmax(-1) @ v)


@refused("scaled_dot_product_attention", "its mask hides earlier positions, like a window")
def fused_window(x: Tensor) -> Tensor:
    mask = past(x) & torch.ones_like(past(x)).triu(-(CONTEXT - 2))
    return together(F.scaled_dot_product_attention(*full(x), attn_mask=mask))


@refused("add", "adds a bias to the scores that is not a causal mask")
def bias_by_distance(x: Tensor) -> Tensor:
    q, k, v = full(x)
    index = torch.arange(x.shape[1])
    bias = (index - index[:, None]) * torch.tensor([0.5, 0.25, 0.1, 0.0])[:, None, None]
    return together((q @ k.mT + bias.masked_fill(~past(x), -math.inf)).softmax(-1) @ v)


@refused("add", "looks ahead: its mask does not hide every later position")
def mask_one_off(x: Tensor) -> Tensor:
    q, k, v = full(x)
    return together((q @ k.mT + torch.full_like(hidden(x), -math.inf).triu(2)).softmax(-1) @ v)


@refused("masked_fill", "looks ahead: its mask does not hide every later position")
def mask_too_weak(x: Tensor) -> Tensor:
    q, k, v = full(x)
    return together((q @ k.mT).masked_fill(~past(x), -20.0).softmax(-1) @ v)


@refused("masked_fill", "its mask depends on the tokens: only a causal mask is understood")
def mask_from_data(x: Tensor) -> Tensor:
    q, k, v = full(x)
    return together((q @ k.mT).masked_fill(x[:, None, None, :, 0] > 0, -math.inf).softmax(-1) @ v)


@refused("softmax", "takes the softmax of attention over another axis than the positions looked back at")
def softmax_over_queries(x: Tensor) -> Tensor:
    q, k, v = full(x)
    return together((q @ k.mT).masked_fill(~past(x), -1e9).softmax(-2) @ v)


@refused("matmul", "weighs positions by scores without a softmax, which is not understood")
def without_softmax(x: Tensor) -> Tensor:
    q, k, v = full(x)
    return together((q @ k.mT + hidden(x, -1e9)) @ v)


@refused("mul", "multiplies scores of attention by something else than one number")
def scaled_by_position(x: Tensor) -> Tensor:
    q, k, v = full(x)
    return together((q @ k.mT * torch.arange(1.0, x.shape[1] + 1)).masked_fill(~past(x), -1e9).softmax(-1) @ v)


@refused("mul", "changes the weights of attention after the softmax")
def weights_changed(x: Tensor) -> Tensor:
    q, k, v = full(x)
    return together((q @ k.mT).masked_fill(~past(x), -1e9).softmax(-1) * 2 @ v)


@refused("tanh", "reads scores of attention in a way that is not understood")
def scores_squashed(x: Tensor) -> Tensor:
    q, k, v = full(x)
    return together((q @ k.mT).tanh().masked_fill(~past(x), -1e9).softmax(-1) @ v)


@refused("einsum", "compares positions in a way that is not attention: it is no sum over one axis of features")
def summed_over_heads(x: Tensor) -> Tensor:
    q, k, v = full(x)
    scores = torch.einsum("bhtd,bhsd->bts", q, k).masked_fill(~past(x), -1e9)
    return together(torch.einsum("bts,bhsd->bhtd", scores.softmax(-1), v))


@refused("matmul", "weighs its values in a way that is not attention")
def weights_turned_over(x: Tensor) -> Tensor:
    q, k, v = full(x)
    return together((q @ k.mT).masked_fill(~past(x), -1e9).softmax(-1).mT @ v)


@refused("matmul", "weighs its values in a way that is not attention")
def several_heads_of_values(x: Tensor) -> Tensor:
    """All heads look where one does, and hear their own."""
    q, k, v = full(x)
    return together((q[:, :1] @ k[:, :1].mT + hidden(x)).softmax(-1) @ v)


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(name: str) -> None:
    operator, reason = REFUSED[name]
    program = capture(tiny(mixer(SPELLINGS[name])))
    with pytest.raises(RecognizeError) as caught:
        recognize(program)
    pattern = rf"layers\.0\.mixer: {operator}: {reason}.* \(.+:\d+: .+\)"
    assert re.fullmatch(pattern, str(caught.value)), caught.value


def test_a_mask_that_ends_within_the_context_is_seen() -> None:
    """A window that is one position shorter than the context hides a single pair of positions."""
    program = capture(tiny(mixer(fused_window)))
    with pytest.raises(RecognizeError, match="like a window"):
        recognize(program)


def test_gradients_flow_through_attention() -> None:
    loaded = tiny(mixer(groups_by_einsum))
    program = recognize(capture(loaded))
    ids = torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(0))
    embedding = loaded.module.embed.weight
    slopes = []
    for model in (loaded.module, program.graph):
        weight = embedding.detach().clone().requires_grad_()
        name = next(n for n, x in [*model.named_parameters(), *model.named_buffers()] if torch.equal(x, embedding))
        y = torch.func.functional_call(model, {name: weight}, (ids,))
        slopes.append(torch.autograd.grad(y.square().sum(), weight)[0])
    assert_close(slopes[1], slopes[0], "the gradient")
