"""Stage: the sequences that decide how far filters are reduced, and those that judge the result.

Tokens from a file, or sampled from the model itself; features from a file, or white noise. Half of the sequences
calibrate, the other half are held out for the figures in the report.
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
"""Sequences in each half, unless the model is so large that they would be more than `WORK`."""
WORK = 4 * 10**11
"""Tokens times parameters of one pass over half of the tokens, by default: seconds on two cores."""
SAMPLED_SEQUENCES, SAMPLED_LENGTH = 16, 512
"""Most that is sampled for each half: one step of the model for every position."""


def calibrate(
    config: CalibrationConfig, program: Program, parameters: int, streamed: Callable[[], Program]
) -> Sequences:
    """Calibration and held-out sequences, int64 [sequences, time] or float32 [sequences, time, features] each.

    program:    the recognized program, for its context, its signal and its number of tokens; time ≤ the context
    parameters: of the model, to keep the work of a large one within minutes
    streamed:   gives a streamed program to sample tokens from; called only when there is no file

    Raises ConfigError when the file cannot be read, is too short, or holds what the model does not take.
    """
    length = min(LENGTH, program.context)
    count = config.sequences or max(2, min(SEQUENCES, WORK // (parameters * length)))
    if program.signal.features is not None:
        return _features(config, program, program.signal.features, length, count)
    limit = token_limit(program)
    if config.calibration is None:
        count = config.sequences or min(count, SAMPLED_SEQUENCES)
        rows = _sample(streamed(), 2 * count, min(length, SAMPLED_LENGTH), limit, config.seed)
        return Sequences(rows[:count], rows[count:], "sampled from the model", sampled=True)
    stream = _read(config.calibration, config.tokenizer, limit, program.reads_bytes)
    length = min(length, len(stream) // 2)
    if length < 8:
        raise ConfigError(f"{config.calibration} holds {len(stream)} tokens; calibration needs at least 16")
    half = len(stream) // 2
    return Sequences(
        _windows(stream[:half], length, count),
        _windows(stream[half:], length, count),
        str(config.calibration),
    )


def _features(config: CalibrationConfig, program: Program, features: int, length: int, count: int) -> Sequences:
    """Sequences of a continuous signal, float32 [sequences, time ≤ length, features] in each half."""
    if config.tokenizer is not None:
        raise ConfigError("the model takes features, not text: --tokenizer has no meaning for it")
    if config.calibration is None:
        rows = program.signal.random(2 * count, length, tokens=0, seed=config.seed)
        return Sequences(rows[:count], rows[count:], f"white noise of size 1, seed {config.seed}")
    halves = read_features(config.calibration, features)
    length = min(length, halves[0].shape[1])
    if length < 8:
        raise ConfigError(f"{config.calibration} gives sequences of {length} positions; calibration needs at least 8")
    calibration, heldout = (_pieces(half, length, count) for half in halves)
    return Sequences(calibration, heldout, str(config.calibration))


def _pieces(sequences: Tensor, length: int, count: int) -> Tensor:
    """At most `count` pieces of sequences [sequences, time, features], spread evenly, [pieces, length, features]."""
    whole = sequences.shape[1] // length * length
    pieces = sequences[:, :whole].unflatten(1, (-1, length)).flatten(0, 1)
    return pieces[_spread(len(pieces), count)]


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


def _windows(stream: Tensor, length: int, count: int) -> Tensor:
    """At most `count` windows of `length` tokens, spread evenly, [windows, length]."""
    available = len(stream) // length
    return stream[: available * length].reshape(available, length)[_spread(available, count)]


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
