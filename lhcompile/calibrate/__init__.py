"""Stage: the sequences that decide how far filters are reduced, and those that judge the result.

Tokens from a file, or sampled from the model itself; features from a file, or white noise. One half of a file
calibrates, the other is held out for the figures in the report. Of the first half some sequences weigh filters, and
several times as many others are what a budget is held against: a loss is known to 0.01 % from 10⁵ tokens, a spectrum
from far fewer.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lhcompile.artifacts import Program, Sequences
from lhcompile.calibrate.features import read_features
from lhcompile.config import CalibrationConfig
from lhcompile.errors import ConfigError
from lhcompile.parallel import threads_for

__all__ = ["SAMPLED_LENGTH", "calibrate", "check_readable", "token_limit"]

LENGTH = 1024
"""Longest sequence used: longer contexts are calibrated on their first positions."""
SEQUENCES = 32
"""Sequences that weigh filters, and at least so many held out, unless the model is so large that they would be more
than `WORK`."""
HELD, JUDGING = 1 << 15, 1 << 17
"""Tokens that figures are made of, and most that a budget is held against."""
WORK = 4 * 10**11
"""Tokens times parameters of one pass over the tokens of any kind, by default: seconds on two cores."""
SAMPLED_SEQUENCES, SAMPLED_LENGTH = 16, 512
"""Most that is sampled of each kind: one step of the model for every position."""


def calibrate(
    config: CalibrationConfig, program: Program, parameters: int, streamed: Callable[[], Program], judged: bool = True
) -> Sequences:
    """Calibration, judging and held-out sequences, int64 [sequences, time] or float32 [sequences, time, features] each.

    Where the first half of a file is short, the same sequences calibrate and judge.

    program:    the recognized program, for its context, its signal and its number of tokens; time ≤ the context
    parameters: of the model, to keep the work of a large one within minutes
    streamed:   gives a streamed program to sample tokens from; called only when there is no file
    judged:     whether there is a budget to hold; if not, none are sampled for that, and those that calibrate judge

    Raises ConfigError when the file cannot be read, is too short, or holds what the model does not take.
    """
    length = min(LENGTH, program.context)
    able = max(2, WORK // (max(1, parameters) * length))
    count = config.sequences or min(SEQUENCES, able)
    judging = 4 * config.sequences if config.sequences else min(JUDGING // length, able)
    counts = count, judging, config.sequences or min(max(SEQUENCES, HELD // length), able)
    if program.signal.features is not None:
        return _features(config, program, program.signal.features, length, counts)
    limit = token_limit(program)
    if config.calibration is None:
        count = config.sequences or min(count, SAMPLED_SEQUENCES)
        rows = _sample(streamed(), (3 if judged else 2) * count, min(length, SAMPLED_LENGTH), limit, config.seed)
        return _drawn(rows if judged else torch.cat([rows[:count], rows]), "sampled from the model", sampled=True)
    stream = _read(config.calibration, config.tokenizer, limit, program.reads_bytes)
    length = min(length, len(stream) // 2)
    if length < 8:
        raise ConfigError(f"{config.calibration} holds {len(stream)} tokens; calibration needs at least 16")
    half = len(stream) // 2
    first, second = (_pieces(part[None], length) for part in (stream[:half], stream[half:]))
    return _divided(first, second, counts, str(config.calibration))


def _divided(first: Tensor, second: Tensor, counts: tuple[int, int, int], source: str) -> Sequences:
    """At most so many sequences that weigh filters and that judge, of the first half, and of the second.

    first, second: all pieces of each half in their order, [pieces, time, …]; those that are taken are spread evenly
    """
    count, judging, held = counts
    weighing = _spread(len(first), count)
    others = torch.ones(len(first), dtype=torch.bool).index_fill(0, weighing, value=False).nonzero().squeeze(1)
    if len(others) < len(weighing):
        others = torch.arange(len(first))
    judges = others[_spread(len(others), judging)]
    return Sequences(first[weighing], first[judges], second[_spread(len(second), held)], source)


def _drawn(rows: Tensor, source: str, sampled: bool = False) -> Sequences:
    """Rows that are drawn alike, a third for each purpose."""
    calibration, judging, heldout = rows.chunk(3)
    return Sequences(calibration, judging, heldout, source, sampled)


def _features(
    config: CalibrationConfig, program: Program, features: int, length: int, counts: tuple[int, int, int]
) -> Sequences:
    """Sequences of a continuous signal, float32 [sequences, time ≤ length, features] each."""
    if config.tokenizer is not None:
        raise ConfigError("the model takes features, not text: --tokenizer has no meaning for it")
    if config.calibration is None:
        count = counts[0]
        rows = program.signal.random(3 * count, length, tokens=0, seed=config.seed)
        return _drawn(rows, f"white noise of size 1, seed {config.seed}")
    halves = read_features(config.calibration, features)
    length = min(length, halves[0].shape[1])
    if length < 8:
        raise ConfigError(f"{config.calibration} gives sequences of {length} positions; calibration needs at least 8")
    first, second = (_pieces(half, length) for half in halves)
    return _divided(first, second, counts, str(config.calibration))


def _pieces(sequences: Tensor, length: int) -> Tensor:
    """Whole pieces of sequences [sequences, time, …], one after the other, [pieces, length, …]."""
    whole = sequences.shape[1] // length * length
    return sequences[:, :whole].unflatten(1, (-1, length)).flatten(0, 1)


def token_limit(program: Program) -> int:
    """How many token ids the model takes: rows of the table its input indexes, or else its outputs."""
    nodes = list(program.graph.graph.nodes)
    ids = next(node for node in nodes if node.op == "placeholder")
    for node in nodes:
        if node.target == torch.ops.aten.embedding.default and node.args[1] is ids:
            return int(attrgetter(str(node.args[0].target))(program.graph).shape[0])
    return program.vocabulary


def _read(path: Path, tokenizer: Path | None, limit: int, bytes_: bool) -> Tensor:
    """The token ids of a file, [tokens]."""
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            if array.dtype.kind not in "iu":
                raise ConfigError(f"{path} holds {array.dtype}; token ids are integers")
            ids = torch.from_numpy(array.astype(np.int64).reshape(-1))
        elif tokenizer is not None:
            ids = _tokenized(path, tokenizer)
        elif bytes_:
            ids = torch.from_numpy(np.frombuffer(path.read_bytes(), np.uint8).astype(np.int64))
        else:
            raise ConfigError(
                f"the model has {limit} tokens, so text needs --tokenizer tokenizer.json, or give token ids as .npy"
            )
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"cannot read calibration tokens from {path}: {_reason(error)}") from None
    foreign = ids[(ids < 0) | (ids >= limit)]
    if len(foreign):
        raise ConfigError(f"{path} holds token id {int(foreign[0])}; the model has {limit} tokens")
    return ids


def check_readable(config: CalibrationConfig) -> None:
    """Raises ConfigError if a file that calibration needs is not there; call it before a long build."""
    for path in (config.calibration, config.tokenizer):
        try:
            if path is not None:
                path.open("rb").close()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return str(error.strerror if isinstance(error, OSError) and error.strerror else error)


def _tokenized(path: Path, tokenizer: Path) -> Tensor:
    from tokenizers import Tokenizer

    try:
        encoder = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"cannot read the tokenizer {tokenizer}: {error}") from None
    return torch.tensor(encoder.encode(path.read_text(), add_special_tokens=False).ids, dtype=torch.int64)


def _spread(available: int, count: int) -> Tensor:
    """At most `count` of the indices below `available`, spread evenly."""
    return torch.linspace(0, available - 1, min(count, available)).round().long()


@torch.no_grad()
def _sample(program: Program, rows: int, length: int, limit: int, seed: int) -> Tensor:
    """Sequences drawn token by token at temperature 1 from a random first token, [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, limit, (rows, 1), generator=generator)
    states = program.start(rows)
    sequence = [tokens]
    with threads_for(program.graph):
        for _ in range(length - 1):
            logits, *states = program.graph(tokens, *states)
            chances = logits[:, -1, :limit].double().softmax(-1)
            tokens = torch.multinomial(chances, 1, generator=generator)
            sequence.append(tokens)
    return torch.cat(sequence, dim=1)
