"""Any torch module, made by a factory the user names as `package.module:factory`."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lhcompile.artifacts import LoadedModel, Signal
from lhcompile.errors import ConfigError, LhcompileError
from lhcompile.load.checkpoint import fill, read_checkpoint, without_prefix
from lhcompile.load.configuration import read_mapping, resolved

__all__ = ["LogitsOnly", "load_module", "logits_of"]

LENGTH_NAMES = (
    "l_max", "max_seq_len", "seq_len", "context_length", "max_length", "block_size", "n_positions",
)  # fmt: skip


class LogitsOnly(nn.Module):
    """Wraps a module so that forward returns the logits and nothing else.

    inner: the user's module. Module paths below this one begin with "inner."; the user's own paths are
        what follows it.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        logits = logits_of(self.inner(inputs))
        if logits is None:
            raise ConfigError(f"{type(self.inner).__name__}.forward returns no tensor")
        return logits


def logits_of(output: Any) -> Tensor | None:
    """The tensor named logits in what a model returned, else the first tensor, else None."""
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    parts: Iterator[Any]
    if isinstance(output, Mapping):
        parts = iter(output.values())
    elif isinstance(output, tuple | list):
        parts = iter(output)
    elif dataclasses.is_dataclass(output):
        parts = (getattr(output, field.name) for field in dataclasses.fields(output))
    else:
        return None
    return next((found for part in parts if (found := logits_of(part)) is not None), None)


def load_module(
    spec: str, checkpoint: Path | None, config: Path | None, context: int | None, signal: Signal
) -> LoadedModel:
    """Calls the factory with the configuration's options as keyword arguments and fills what it returns.

    The result maps what `signal` says to logits or values; the user's module is its `inner`.
    Raises ConfigError when the factory cannot be imported or fails, CheckpointError for the file's faults.
    """
    options: dict[str, Any] = {}
    if config is not None:
        mapping = read_mapping(config)
        options, unknown = resolved(mapping, mapping)
        if unknown:
            raise ConfigError(f"{config}: the option {unknown[0]} has an interpolation that cannot be resolved")
    inner = _made(spec, options)
    notes: tuple[str, ...] = ("no checkpoint was given: the weights are the factory's own",)
    if checkpoint is not None:
        found = without_prefix(read_checkpoint(checkpoint, given=True), inner.state_dict().keys())
        fill(inner, found, f"a state dict of {type(inner).__name__}")
        notes = found.notes
    inner = inner.cpu().float()
    length = context if context is not None else _context_length(inner)
    return LoadedModel(
        module=LogitsOnly(inner).eval().requires_grad_(False),
        family="module",
        context_length=length,
        parameters=sum(parameter.numel() for parameter in inner.parameters()),
        source=spec,
        config=options,
        notes=notes,
        signal=signal,
    )


def _made(spec: str, options: Mapping[str, Any]) -> nn.Module:
    module_name, _, factory_name = spec.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(f"{spec}: importing {module_name} failed: {_line(error)}") from error
    for name in factory_name.split("."):
        if not hasattr(found, name):
            raise ConfigError(f"{spec}: {module_name} has no {factory_name!r}")
        found = getattr(found, name)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise ConfigError(f"{spec}: is a {type(found).__name__}, not a factory of a torch.nn.Module")
    try:
        made = found(**options)
    except LhcompileError:
        raise
    except Exception as error:
        raise ConfigError(f"{spec}: calling {factory_name} failed: {_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{spec}: returned a {type(made).__name__}, not a torch.nn.Module")
    return made


def _context_length(module: nn.Module) -> int | None:
    """The smallest length that the module, a submodule or its config states."""
    found: list[int] = []
    for part in module.modules():
        for owner in (part, getattr(part, "config", None)):
            for name in LENGTH_NAMES:
                value = owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)
                if isinstance(value, int) and not isinstance(value, bool | torch.SymInt) and value > 0:
                    found.append(value)
    return min(found, default=None)


def _line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
