"""The shapes that decoding is measured at, what sequences begin with, and directories that the command line builds."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["SHAPES", "TINY", "Shape", "build", "checkpoint", "first_tokens", "tiny"]


@dataclass(frozen=True)
class Shape:
    """A language model of equal blocks: mixer and MLP of four times the width, the embedding tied to the head.

    heads: of the Transformer's attention
    """

    name: str
    layers: int
    width: int
    heads: int
    vocabulary: int = 50304
    taps: int = 3

    @property
    def inner(self) -> int:
        """Channels inside the MLP."""
        return 4 * self.width

    @property
    def parameters(self) -> int:
        """Entries of the matrices; all of them are read for a token."""
        return 12 * self.layers * self.width**2 + self.vocabulary * self.width


SHAPES = {
    shape.name: shape
    for shape in (Shape("125M", 12, 768, 12), Shape("355M", 24, 1024, 16), Shape("1.3B", 24, 2048, 16))
}
TINY = Shape("tiny", 2, 64, 4, vocabulary=512)


def first_tokens(batch: int, vocabulary: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """What sequences begin with, drawn at random: rows that are alike take less power, and the clock runs higher."""
    return np.random.default_rng(0).integers(vocabulary, size=batch)


def checkpoint(shape: Shape, folder: Path, context: int, seed: int = 0) -> list[str]:
    """A Hyena checkpoint with random weights, written unless it is there; returns the arguments that name it."""
    model, config = folder / "model.pt", folder / "config.yaml"
    if not config.is_file():
        import torch
        import yaml

        from lhcompile.load.safari import HyenaConfig, HyenaLM

        folder.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {
            "d_model": shape.width, "n_layer": shape.layers, "d_inner": shape.inner, "vocab_size": shape.vocabulary,
            "l_max": context, "emb_dim": 33, "filter_order": 64, "w": 14.0, "short_filter_order": shape.taps,
        }  # fmt: skip
        torch.manual_seed(seed)
        torch.save(HyenaLM(HyenaConfig(**options)).state_dict(), model)
        config.write_text(yaml.safe_dump(options))
    return [str(model), "--config", str(config)]


def build(
    shape: Shape, folder: Path, *, target: str, precision: str, order: int, context: int, more: tuple[str, ...] = ()
) -> tuple[Path, dict[str, Any]]:
    """The directory of a shape and precision, built by the command line unless it is there, and how that went.

    precision: as `--quantize` names it, behind a colon the type of states if not their own: fp8:float16. A directory
    built by another command or by other sources is replaced.
    Raises RuntimeError with the build's last lines if it fails.
    """
    place = folder / shape.name
    model = checkpoint(shape, place, context)
    weights, _, states = precision.partition(":")
    out = place / f"{target}-{precision.replace(':', '-')}-{order}"
    arguments = [
        "build", *model, "-o", str(out), "--target", target, "--quantize", weights, "--order", str(order),
        *(["--state", states] if states else []), "--method", "hankel", "--sequences", "2", *more, "--force",
    ]  # fmt: skip
    shown = "lhcompile " + " ".join(arguments).replace(f"{place}/", "")
    record = out.with_suffix(".json")
    if record.is_file() and (out / "manifest.json").is_file():
        found: dict[str, Any] = json.loads(record.read_text())
        if (found["command"], found["sources"]) == (shown, _sources()):
            return out, found
    started = time.perf_counter()
    root = Path(__file__).parents[1]
    paths = [str(root), str(root / "runtimes/python"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    process = subprocess.run(
        [sys.executable, "-m", "lhcompile", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if process.returncode:
        raise RuntimeError(f"{shown}: exit code {process.returncode}\n{process.stdout[-4000:]}")
    manifest = json.loads((out / "manifest.json").read_text())
    seconds = time.perf_counter() - started
    found = {"command": shown, "sources": _sources(), "seconds": seconds, "stages": manifest["timings"]}
    record.write_text(json.dumps(found))
    return out, found


def _sources() -> str:
    """What tells one state of the compiler from another."""
    whole = hashlib.sha256()
    for file in sorted((Path(__file__).parents[1] / "lhcompile").rglob("*.py")):
        whole.update(file.read_bytes())
    return whole.hexdigest()[:16]


def tiny(shape: Shape, yes: bool) -> Shape:
    """The shape, or a very small one of its name."""
    return replace(TINY, name=f"{shape.name}-tiny") if yes else shape
