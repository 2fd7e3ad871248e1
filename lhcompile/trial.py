"""The graphs of a build tried in directories, through the runtime that users drive them with: gates, then figures.

Graphs in float32 are held against the torch program; those with quantized weights against the weights' rounded values,
in float32, and with products in float32 too where kernels can be told so; those with shorter states against the same
with longer ones, rounded between calls from outside. Figures are all against the source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from lhruntime import Session

from lhcompile import verify
from lhcompile.artifacts import State
from lhcompile.package import Manifest, Source, package
from lhcompile.package.genai import PROVIDERS
from lhcompile.package.manifest import Graphs
from lhcompile.verify.decode import check_decode
from lhcompile.verify.masked import check_masked
from lhcompile.verify.model import Report, StageFidelity
from lhcompile.verify.products import check_products
from lhcompile.verify.states import RoundedBetween, Stepped, check_added, check_drift, check_kept

__all__ = ["Compiled", "Contents", "measure", "providers"]

CODED = {"DequantizeLinear", "MatMulInteger", "MatMulNBits"}
"""They lead to kernels that multiply codes as they are, which a session packs for them as it opens. Without that some
make numbers of the codes and round no signals."""


@dataclass(frozen=True)
class Contents:
    """A directory to be: its files, and its manifest without figures.

    genai: the files that onnxruntime-genai alone reads; notes: what to know of them
    """

    name: str
    files: dict[str, Source]
    manifest: Manifest
    genai: frozenset[str]
    notes: tuple[str, ...]

    def graphs(self, target: str) -> Graphs:
        """Those of one target."""
        variants = dict(self.manifest.variants or {})
        return variants.get(target, self.manifest.graphs)  # type: ignore[call-overload]


@dataclass(frozen=True)
class Compiled:
    """What is left of a model when its torch programs are gone: a build holds the weights of one at a time.

    targets: rows that their graphs are for, None for any number
    onnx: graphs in float32; rounded: the same with the values of quantized weights; quantized: as they are stored
    kept: the same with states in fewer bits
    states: of the graphs in float32, and as the product keeps them
    fixed: products of quantized graphs round signals by fixed scales, a step of its own
    report: without figures of the graphs
    expected, reference: what the graphs are compared with, in every cut and on held-out sequences
    drift: sequences that are fed token by token
    """

    targets: dict[str, int | None]
    onnx: Contents
    rounded: Contents | None
    quantized: Contents | None
    kept: Contents | None
    states: tuple[tuple[State, ...], tuple[State, ...]]
    fixed: bool
    report: Report
    expected: verify.Fed
    reference: verify.Reference
    drift: torch.Tensor

    @property
    def product(self) -> Contents:
        return self.kept or self.quantized or self.onnx

    @property
    def first(self) -> str:
        return next(iter(self.targets))


def providers(target: str) -> list[str | tuple[str, dict[str, Any]]] | None:
    """What tries a target's graphs; None: a CPU."""
    if target == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]
    return None


def measure(compiled: Compiled, place: Path, say: Callable[[str], None]) -> list[StageFidelity]:
    """The figures of every stage; graphs are tried in a directory, through the runtime that users drive them with.

    Those of the graphs come last, target by target, and that of the first target at the very end. Quantized graphs are
    held against those of the weights' rounded values, graphs with shorter states against those with longer ones that
    are rounded in between; their figures are against the source.
    """
    stages = list(compiled.report.stages)
    for target in reversed(compiled.targets):
        trial = _Trial(compiled, place, target, say)
        stages += trial.onnx()
        if compiled.quantized is not None:
            stages += trial.quantized()
        if compiled.kept is not None:
            stages += trial.kept()
    verify.check_finite(stages)
    return stages


@dataclass(frozen=True)
class _Trial:
    """The graphs of one target in their directories, one open at a time, and the gates they pass."""

    compiled: Compiled
    place: Path
    target: str
    say: Callable[[str], None]

    def onnx(self) -> list[StageFidelity]:
        self.say(f"feeding the graphs for {self.target} in every cut")
        model, expected = self._model(self.compiled.onnx), self.compiled.expected
        verify.check_session(model, expected)
        if self.compiled.product is self.compiled.onnx:
            self._check_masked(model, expected)
            self._check_decode(model)
        return self._figures("onnx", model)

    def quantized(self) -> list[StageFidelity]:
        compiled, precision = self.compiled, self.compiled.report.quantize
        assert compiled.quantized is not None
        assert compiled.rounded is not None
        rounded, tokens = self._model(compiled.rounded), compiled.expected.tokens
        expected = rounded.feed(tokens, [tokens.shape[1]])
        stages = self._figures(f"{precision} weights", rounded) if compiled.fixed else []
        del rounded  # its memory is for the next
        self.say(f"feeding the graphs in {precision} for {self.target} in every cut")
        self._check_products(compiled.quantized, compiled.rounded)
        model = self._model(compiled.quantized)
        verify.check_session(model, expected, self._tolerance)
        if compiled.product is compiled.quantized:
            self._check_masked(model, expected)
            self._check_decode(model)
        return stages + self._figures(precision, model)

    def kept(self) -> list[StageFidelity]:
        compiled, (_, states) = self.compiled, self.compiled.states
        assert compiled.kept is not None
        tokens, dtype = compiled.expected.tokens, compiled.report.state
        kept = "the past of signals in float16" if dtype == "float32" else f"states in {dtype}"
        self.say(f"feeding the graphs with {kept} for {self.target} in every cut")
        before, rows = compiled.quantized or compiled.onnx, compiled.targets[self.target]
        load = self._load(before)
        model = Stepped(self._load(compiled.kept), rows)
        check_kept(model, RoundedBetween(load, states, rows), states, tokens)
        self._check_masked(model, model.feed(tokens, [tokens.shape[1]]))
        self._check_decode(model)
        if self.target != compiled.first or dtype == "float32":  # then no number was rounded
            return []
        self.say("feeding held-out positions one by one")
        self._check_drift(model, verify.SessionModel(load, rows))
        return self._figures(f"{dtype} states", model)

    def _check_drift(self, model: verify.SessionModel, plain: verify.SessionModel) -> None:
        """Signals of 4 or 8 bits, as graphs for cuda have them, turn every difference, however small, into steps of
        their own. States are then judged in graphs whose signals are not rounded; the product keeps to what its signals
        may do, and is no further from those graphs than its signals alone take it and its states may."""
        compiled, tolerance = self.compiled, verify.state_tolerance(self.compiled.report.state)
        if self.target != "cuda" or compiled.report.quantize not in ("fp8", "bf16"):
            check_drift(model, plain, tolerance, compiled.drift)
            return
        found, signals = check_drift(model, plain, self._tolerance, compiled.drift)
        model.close()
        assert compiled.rounded is not None
        load, rows = self._load(compiled.rounded), compiled.targets[self.target]
        between, whole = RoundedBetween(load, compiled.states[1], rows), verify.SessionModel(load, rows)
        _, truth = check_drift(between, whole, tolerance, compiled.drift)
        check_added(found, signals, truth, tolerance)

    @property
    def _tolerance(self) -> verify.Tolerance:
        return verify.quantized_tolerance(self.target, self.compiled.report.quantize)

    def _figures(self, name: str, model: verify.SessionModel) -> list[StageFidelity]:
        self.say("measuring on the held-out positions")
        behind = "" if self.target == self.compiled.first else f", {self.target}"
        return verify.fidelity(self.compiled.reference, {f"{name}{behind}": model})[1:]

    def _check_products(self, quantized: Contents, rounded: Contents) -> None:
        few = self.compiled.expected.tokens[: self.compiled.targets[self.target]]
        graphs = quantized.graphs(self.target)
        for graph, time in ((graphs.step, 1), (graphs.prefill, 1 if graphs.step == graphs.prefill else few.shape[1])):
            mine, meant = (self.place / contents.name / graph.file for contents in (quantized, rounded))
            if not check_products(mine, meant, self.compiled.states[0], few[:, :time]):
                self.say(f"codes of {graph.file} are not tried by themselves, only to {self._tolerance.relative:g}")

    def _check_masked(self, plain: verify.SessionModel, expected: verify.Fed) -> None:
        contents = self.compiled.product
        graphs = contents.manifest.masked
        if graphs is None or self.target != next(target for target in self.compiled.targets if target in PROVIDERS):
            return
        folder = self.place / contents.name
        files = folder / graphs.step.file, folder / graphs.prefill.file
        check_masked(*files, plain, expected, self.compiled.states[1], self._tolerance)

    def _check_decode(self, plain: verify.SessionModel) -> None:
        contents, rows = self.compiled.product, self.compiled.targets[self.target]
        graphs = contents.graphs(self.target)
        if graphs.decode is not None:
            step, decode = (self.place / contents.name / graph.file for graph in (graphs.step, graphs.decode))
            tokens = self.compiled.expected.tokens[:rows]
            check_decode(step, decode, graphs.apart, plain, tokens, self._tolerance)

    def _model(self, contents: Contents) -> verify.SessionModel:
        return verify.SessionModel(self._load(contents), self.compiled.targets[self.target])

    def _load(self, contents: Contents) -> Callable[[int], Session]:
        directory = self.place / f"{contents.name}, tried"
        if not directory.exists():
            package(directory, contents.files, contents.manifest, force=False)
        graphs = contents.graphs(self.target)
        coded = any(_is_coded(directory / graph.file) for graph in (graphs.step, graphs.prefill))
        return partial(_open, directory, self.target, not coded)


def _is_coded(path: Path) -> bool:
    model = onnx.load(path, load_external_data=False)
    return any(node.op_type in CODED for part in (model.graph, *model.functions) for node in part.node)


def _open(directory: Path, target: str, shared: bool, batch: int) -> Session:
    """shared: no kernel packs a copy of weights."""
    chosen = providers(target)
    shared = shared and chosen is None
    return Session.load(
        directory, target=target, batch=batch, providers=chosen, verify=False, share_weights=shared
    )
