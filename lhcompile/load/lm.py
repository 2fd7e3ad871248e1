"""The language model around the mixers of safari, H3 and their kin, as modules of the same names.

    r ← embeddings;   for each layer: r ← r + mixer(norm1(r)),  r ← r + mlp(norm2(r));   logits = lm_head(ln_f(r))

A layer's mixer is the family's own or causal attention. There is no position table unless `max_position_embeddings`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lhcompile.load.transformer import Rotary, rotate

__all__ = ["Attention", "AttentionConfig", "LMConfig", "LanguageModel"]


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """num_heads: of queries, keys and values alike

    rotary_emb_dim: how many channels of each head turn with the position, the first ones; 0 for none
    rotary_emb_base: channel pair i turns by base^(−2i / rotary_emb_dim) a token
    """

    num_heads: int
    rotary_emb_dim: int = 0
    rotary_emb_base: float = 10000.0


@dataclass(frozen=True, kw_only=True)
class LMConfig:
    """Options of the model, under the names of safari and H3.

    vocab_size: rows of the embedding, padding included
    attn_layer_idx: layers whose mixer is attention, all with the options `attention`
    max_position_embeddings: rows of the position table, 0 for none
    """

    d_model: int
    n_layer: int
    d_inner: int
    vocab_size: int
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    attn_layer_idx: tuple[int, ...] = ()
    max_position_embeddings: int = 0
    attention: AttentionConfig = AttentionConfig(num_heads=1)


class Attention(nn.Module):
    """Causal attention, [batch, seq, d_model] → [batch, seq, d_model]; rows of Wqkv are (q|k|v, head, channel).

    context: the longest sequence, for the rotary tables
    """

    def __init__(self, d_model: int, config: AttentionConfig, context: int) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.Wqkv = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        self.turning = config.rotary_emb_dim
        if self.turning:
            self.rotary = Rotary(context, self.turning, config.rotary_emb_base, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.Wqkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if self.turning:
            q, k = self._turned(q), self._turned(k)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def _turned(self, x: Tensor) -> Tensor:
        """Queries or keys [batch, seq, heads, channels], turned by their positions."""
        turned = rotate(x[..., : self.turning], *self.rotary(x.shape[1]))
        return turned if self.turning == x.shape[-1] else torch.cat([turned, x[..., self.turning :]], dim=-1)


class Mlp(nn.Module):
    """[..., d_model] → [..., d_model], with the tanh form of GELU."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, config.d_inner)
        self.fc2 = nn.Linear(config.d_inner, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """add → norm1 → mixer → add → norm2 → mlp; takes and returns (hidden, residual)."""

    def __init__(self, config: LMConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm1 = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.mlp = Mlp(config)
        self.norm2 = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else hidden + residual
        residual = self.mixer(self.norm1(residual)) + residual
        return self.mlp(self.norm2(residual)), residual


class Embeddings(nn.Module):
    """[batch, seq] → [batch, seq, d_model]"""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = config.max_position_embeddings
        if self.positions:
            self.position_embeddings = nn.Embedding(self.positions, config.d_model)

    def forward(self, input_ids: Tensor) -> Tensor:
        words = self.word_embeddings(input_ids)
        return words + self.position_embeddings.weight[: input_ids.shape[1]] if self.positions else words


class Backbone(nn.Module):
    """[batch, seq] → [batch, seq, d_model]"""

    def __init__(self, config: LMConfig, mixers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList([Block(config, mixer) for mixer in mixers])
        self.ln_f = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden, residual = self.embeddings(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return self.ln_f(hidden if residual is None else hidden + residual)


class LanguageModel(nn.Module):
    """input_ids int64 [batch, seq] → logits [batch, seq, vocab_size].

    mixer: makes the mixer of a layer that is no attention
    context: the longest sequence, where rotary positions need to know
    """

    def __init__(self, config: LMConfig, mixer: Callable[[], nn.Module], context: int) -> None:
        super().__init__()
        mixers = [
            Attention(config.d_model, config.attention, context) if i in config.attn_layer_idx else mixer()
            for i in range(config.n_layer)
        ]
        self.backbone = Backbone(config, mixers)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.word_embeddings.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.backbone(input_ids))
