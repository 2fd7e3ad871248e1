"""torch.export archives (.pt2), loaded without trusting them."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.export import ExportedProgram

from lhcompile.artifacts import LoadedModel, Signal
from lhcompile.errors import CheckpointError, ConfigError
from lhcompile.extremes import extremes
from lhcompile.load.archive_check import refuse_unsafe
from lhcompile.load.module import LogitsOnly

__all__ = ["load_archive"]

EXPECTED = "input_ids int64 [batch, seq], or features float32 [batch, seq, features]"
HOW = 'torch.export.export(model, (ids,), dynamic_shapes=({0: Dim("batch"), 1: Dim("seq", max=…)},))'


def load_archive(path: Path, context: int | None) -> LoadedModel:
    """The program of a .pt2 file as a module: what its one input says, token ids to logits or features to values.

    Raises CheckpointError when the file is missing, damaged, could run code, or is not such a program;
    ConfigError when `context` exceeds what the program allows.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: the archive does not exist")
    data = path.read_bytes()
    refuse_unsafe(data, path)
    program = _program(data, path)
    signal, longest = _input(program, path)
    if context is not None and longest is not None and context > longest:
        raise ConfigError(f"context {context} is beyond {path}'s own limit of {longest}")
    for name, tensor in program.state_dict.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise CheckpointError(f"{path}: {name!r} is {tensor.dtype}; export the model in float32")
        if not bool(extremes(tensor).isfinite().all()):
            raise CheckpointError(f"{path}: {name!r} holds NaN or infinite values")
    module: torch.nn.Module = program.module(check_guards=False)
    out_spec = program.call_spec.out_spec
    if out_spec is not None and not out_spec.is_leaf():
        module = LogitsOnly(module)
    module.training = False  # such modules have no eval(); they are exported in one mode
    return LoadedModel(
        module=module.requires_grad_(False),
        family="export",
        context_length=context if context is not None else longest,
        parameters=sum({p.data_ptr(): p.numel() for p in program.parameters()}.values()),
        source=str(path),
        notes=("the program's own guards are not checked",),
        signal=signal,
    )


def _program(data: bytes, path: Path) -> ExportedProgram:
    try:
        with _weights_only(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(io.BytesIO(data))
    except Exception as error:  # torch's own code raises anything here
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise CheckpointError(f"{path}: this torch cannot load the archive ({line})") from None


@contextmanager
def _weights_only() -> Iterator[None]:
    """Makes every torch.load inside restricted, whatever it asks for, and keeps torch's log quiet."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    quiet = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(quiet)
        os.environ.pop(names[0])
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _input(program: ExportedProgram, path: Path) -> tuple[Signal, int | None]:
    """What the program's one input takes, and the largest allowed seq, None without a limit."""
    names = program.graph_signature.user_inputs
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(names) != 1 or len(values) != 1 or not isinstance(values[0], torch.Tensor):
        raise CheckpointError(f"{path}: takes {len(names)} inputs, expected one: {EXPECTED}")
    (given,) = values
    if (given.dtype, given.ndim) not in ((torch.int64, 2), (torch.float32, 3)):
        raise CheckpointError(f"{path}: takes {given.dtype} of {given.ndim} dimensions, expected {EXPECTED}")
    dynamic = [isinstance(size, torch.SymInt) for size in given.shape]
    if dynamic != [True, True, False][: given.ndim]:
        shape = "[" + ", ".join(str(size) for size in given.shape) + "]"
        raise CheckpointError(f"{path}: was exported for the shape {shape}; make batch and seq dynamic: {HOW}")
    signal = Signal(int(given.shape[2])) if given.ndim == 3 else Signal()
    bounds = program.range_constraints.get(given.shape[1].node.expr)
    upper = None if bounds is None else bounds.upper
    return signal, int(upper) if upper is not None and getattr(upper, "is_Integer", False) else None
