"""Graphs with an attention_mask against those without: rows that run on, and rows that stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from lhcompile.artifacts import MASK, State
from lhcompile.verify import Fed, SessionModel, Tolerance, assert_close

__all__ = ["check_masked"]


def check_masked(
    step: Path, prefill: Path, plain: SessionModel, expected: Fed, states: tuple[State, ...], tolerance: Tolerance
) -> None:
    """Raise ParityError unless rows that are filled up behind their ends are as if they had been fed alone.

    step, prefill: graphs with the mask; plain: the model without; expected: what was fed to it, [rows, time]
    states: as all of them are kept
    """
    tokens, kept = expected.tokens, {state.name: state for state in states}
    names = list(kept)
    rows, time = tokens.shape
    lengths = [max(1, time - 3 * row) for row in range(rows)]
    alone = [plain.feed(tokens[row : row + 1, :length], [length]) for row, length in enumerate(lengths)]
    plain.close()  # before others take its memory
    graphs = [onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in (prefill, step)]
    mask = np.arange(time) < np.array(lengths)[:, None]
    zero = [state.zeros(rows).numpy() for state in states]

    def run(graph: Any, ids: np.ndarray[Any, Any], mask: np.ndarray[Any, Any], states: list[Any]) -> list[Any]:
        first = graph.get_inputs()[0].name
        return list(graph.run(None, {first: ids, MASK: mask.astype(np.int64), **dict(zip(names, states, strict=True))}))

    logits, *filled = run(graphs[0], tokens.numpy(), mask, zero)
    _, *unmasked = run(graphs[0], tokens.numpy(), np.ones_like(mask), zero)
    for row, (length, fed) in enumerate(zip(lengths, alone, strict=True)):
        said = torch.from_numpy(logits[row : row + 1, :length]).float()
        assert_close(said, fed.logits, tolerance, f"masked logits of a row of {length}")
        for name, state in zip(names, filled, strict=True):
            found, truth = (kept[name].meant(x) for x in (torch.from_numpy(state[row : row + 1]), fed.states[name]))
            assert_close(found, truth, tolerance, f"masked state {name} after {length}")
    for name, state in zip(names, unmasked, strict=True):
        found, truth = kept[name].meant(torch.from_numpy(state)), kept[name].meant(expected.states[name])
        assert_close(found, truth, tolerance, f"state {name} where the mask is all 1")
    stopped = np.zeros((rows, 1), np.int64)
    _, *same = run(graphs[1], tokens[:, :1].numpy(), stopped, filled)
    exact = Tolerance("masked", 0.0, "a stopped row's states are not touched")
    for name, old, new in zip(names, filled, same, strict=True):
        assert_close(torch.from_numpy(new), torch.from_numpy(old), exact, f"state {name} of stopped rows")
