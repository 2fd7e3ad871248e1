"""What the verbs show on the screen: a line per stage, rows of figures, tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = [
    "Screen",
    "costs",
    "err",
    "escaped",
    "figures",
    "in_units",
    "out",
    "print_distilled",
    "print_inspection",
    "print_manifest",
    "print_rows",
    "sizes",
]

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
FEW = 16
"""Filters that `distill` prints one by one."""


def escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


class Screen:
    """A line per finished stage with its time, a spinner and the latest remark for the running one."""

    def __enter__(self) -> Any:
        self._status = err.status("starting")
        self._status.start()
        from lhcompile.pipeline import Progress

        self._progress = Progress(self._on_stage, self._on_remark)
        self._current: str | None = None
        return self._progress

    def __exit__(self, kind: object, *_: object) -> None:
        self._status.stop()
        if kind is None:
            self._finished()

    def _on_stage(self, name: str) -> None:
        self._finished()
        self._current = name
        self._status.update(name)

    def _on_remark(self, text: str) -> None:
        self._status.update(f"{self._current}: {escaped(text)}")

    def _finished(self) -> None:
        if self._current is not None:
            seconds = self._progress.timings.get(self._current, 0.0)
            err.print(f"[green]✓[/] {self._current:<10} {seconds:6.1f} s", highlight=False)


def costs(report: Any) -> list[tuple[str, str]]:
    """What each step that rounds numbers cost, and which weights got more bits."""
    rows = []
    if report.poles_coded is not None:
        change = f"{in_units(report.poles_coded.before)} → {in_units(report.poles_coded.after)} as codes"
        rows.append(("poles", f"{report.pole_bits} bits: {change}; graphs hold their values"))
    if report.rounding is not None:
        rows.append(("weights", ", ".join(f"{count} in {name}" for name, count in report.rounding.counts.items())))
    if report.fixed_signals is not None:
        fixed, every = report.fixed_signals
        rows.append(("signals", f"{fixed} of {every} rounded by fixed scales, the others by what each token holds"))
    for each in report.passes:
        if each.loss_before is None:
            cost = f"error {each.error_before:.2e} → {each.error_after:.2e}"
        else:
            share = "" if each.rise is None else f"  ({each.rise:+.3%})"  # there is none where the loss was 0
            cost = f"loss {each.loss_before:.5f} → {each.loss_after:.5f}{share}"
        rows.append((f"cost, {each.after}", cost))
    return rows


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Name and text, one a line; long lines are the terminal's to wrap, so that paths can be copied."""
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        out.print(f"{name:<{width}}  {text}", soft_wrap=True, markup=False)


def print_inspection(found: Any) -> None:
    channels = f"{found.features} → {found.channels} channels"
    signal = channels if found.features is not None else f"vocabulary {found.vocab_size}"
    sizes = f"{found.parameters:,} parameters, {signal}, context {found.context_length}"
    exact = f"{in_units(sum(x.exact_bytes for x in found.layers))} of state per sequence if built --exact"
    notes = [("note", note) for note in found.notes]
    print_rows([("model", f"{found.family}, {sizes}"), ("memory", exact), *notes])
    table = _table("module", "kind", "filters", "channels", "taps", "state")
    for x in found.layers:
        numbers = [str(n) for n in (x.filters, x.channels, x.taps)]
        table.add_row(x.module, x.kind.removesuffix(" convolution"), *numbers, in_units(x.exact_bytes))
    out.print(table)


def print_distilled(found: Any, *remarks: tuple[str, str]) -> None:
    print_rows([*found.rows, *remarks])
    if found.filters <= FEW:
        table = _table("filter", "order", "error", "bound", "error / bound", "radius")
        for index, x in enumerate(found.each):
            table.add_row(str(index), *x.cells)
        out.print(table)


def print_manifest(found: Any) -> None:
    model, graphs = found.model, {name: entry.bytes for name, entry in found.files.items()}
    targets = ", ".join([found.target, *(found.variants or {})])
    rows = [
        ("model", f"{model.family}, {model.parameters:,} parameters, context {model.context_length}"),
        ("target", f"{targets}, built by lhcompile {found.lhcompile_version}"),
        *([("weights", found.quantize)] if found.quantize not in (None, "none") else []),
        ("states", str(len(found.states))),
        ("files", f"{sizes(graphs)}; checksums match"),
    ]
    if hasattr(found.fidelity, "loss_compiled"):
        loss = f"{found.fidelity.loss_compiled:.5f} nats per token, of the source {found.fidelity.loss_reference:.5f}"
        rows.insert(2, ("loss", f"{loss}, {found.fidelity.tokens} held-out tokens"))
    elif hasattr(found.fidelity, "relative_error"):
        error = f"{found.fidelity.relative_error:.2e} of the outputs' size"
        rows.insert(2, ("error", f"{error}, {found.fidelity.positions} held-out positions"))
    print_rows(rows)
    if found.distillation:
        table = _table("module", "method", "filters", "mean order", "tap error")
        for x in found.distillation:
            table.add_row(x.module, x.method, str(x.filters), f"{x.order_mean:.2f}", f"{x.tap_error:.3g}")
        out.print(table)


def _table(first: str, second: str, *numbers: str) -> Table:
    """A table whose first two columns are text; long module paths are folded, not cut."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    table.add_column(first, overflow="fold")
    table.add_column(second)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def sizes(files: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {in_units(size)}" for name, size in files.items())


def figures(stages: Sequence[Any], kind: str, source: str) -> list[tuple[str, str]]:
    """Rows that compare the last stage with the first, on tokens or positions of this kind."""
    first, last = stages[0], stages[-1]
    if last.relative_error is not None:
        error = f"{last.relative_error:.2e} of the outputs' size, worst |Δ| {last.max_difference:.3g}"
        return [("error", f"{error}, {last.tokens} {kind}positions")]
    return [
        (f"loss, {source}", f"{first.loss:.5f} nats per token, {first.tokens} {kind}tokens"),
        ("loss, compiled", f"{last.loss:.5f}{_rise(first, last)}"),
        ("agreement", _agreement(last)),
    ]


def _rise(first: Any, last: Any) -> str:
    """By how much the loss is above the reference's, relative to it."""
    return f"  ({round((last.loss - first.loss) / first.loss, 5) + 0.0:+.3%})" if first.loss else ""  # + 0.0: never -0


def _agreement(stage: Any) -> str:
    agreement = f"KL {stage.kl_mean:.2e} nats, top-1 {stage.top1_agreement:.2%}"
    return f"{agreement}, worst |Δlogit| {stage.max_difference:.3g}"


def in_units(count: int) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.4g} GB"
