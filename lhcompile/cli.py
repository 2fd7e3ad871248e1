"""The command line. Each verb imports what it needs; options of `build` are made from the config classes."""

from __future__ import annotations

import inspect as python_inspect
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lhcompile.errors import LhcompileError

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compile trained long-convolution models into stateful ONNX graphs that run token by token.",
)
out = Console()
err = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Checkpoint file, package.module:factory, or torch.export archive (.pt2).")]
Directory = Annotated[Path, typer.Argument(help="A built directory.")]


def main() -> None:
    """Entry point: a user's mistake is one line and an exit code, 2 for input and 3 for a gate not met."""
    from lhruntime import LhruntimeError

    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        app()
    except LhcompileError as error:
        _fail(str(error), error.exit_code)
    except LhruntimeError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", 130)


def _fail(message: str, code: int) -> None:
    err.print(f"[bold red]error:[/] {_escaped(' '.join(message.split()))}", soft_wrap=True, highlight=False)
    raise SystemExit(code)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


# ---- options made from configs -------------------------------------------------------------------------------------


def with_options(*configs: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb one option for every field of the named sections of BuildConfig; it gets them as **options."""

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        from lhcompile.config import BuildConfig

        own = [p for p in python_inspect.signature(verb, eval_str=True).parameters.values() if p.kind != p.VAR_KEYWORD]
        made = [
            _option(name, field)
            for section, config in BuildConfig.sections().items()
            if section in configs
            for name, field in config.model_fields.items()
        ]

        def command(**values: Any) -> None:
            verb(**values)

        command.__name__, command.__doc__ = verb.__name__, verb.__doc__
        command.__signature__ = python_inspect.Signature([*own, *made])  # type: ignore[attr-defined]
        return command

    return decorate


def _option(name: str, field: Any) -> python_inspect.Parameter:
    flags = [f"--{name.replace('_', '-')}"] + (["-o"] if name == "output" else [])
    option = typer.Option(*flags, help=field.description)
    return python_inspect.Parameter(
        name,
        python_inspect.Parameter.KEYWORD_ONLY,
        default=... if field.is_required() else field.default,
        annotation=Annotated[field.annotation, option],
    )


# ---- verbs ---------------------------------------------------------------------------------------------------------


@app.command()
@with_options("load", "calibration", "distill", "lower", "package")
def build(model: Model, **options: Any) -> None:
    """Compile MODEL into a directory that onnxruntime runs token by token."""
    from lhcompile import api

    command = shlex.join(["lhcompile", *sys.argv[1:]])
    with _Screen() as progress:
        report = api.build(model, progress, command, **options)
    first, last = report.stages[0], report.stages[-1]
    table = Table.grid(padding=(0, 2))
    table.add_row("loss, reference", f"{first.loss:.5f} nats per token, {first.tokens} held-out tokens")
    table.add_row("loss, compiled", f"{last.loss:.5f}  ({report.loss_rise:+.3%})")
    table.add_row("agreement", _agreement(last))
    if report.order_mean is not None:
        table.add_row("order", f"mean {report.order_mean:.2f}, largest {max(x.order_max for x in report.layers)}")
    table.add_row("state", f"{_bytes(report.state_bytes)} per sequence")
    if report.graph is not None:
        table.add_row("step graph", f"{report.graph.step_nodes} nodes, {report.graph.nodes_per_layer:.1f} per layer")
    table.add_row("files", ", ".join(f"{name} {_bytes(size)}" for name, size in report.files.items()))
    table.add_row("written to", f"{options['output']}  (report: {options['output'] / 'report.html'})")
    out.print(table)


@app.command()
@with_options("load")
def inspect(model: Annotated[str, typer.Argument(help="A built directory or a model.")], **options: Any) -> None:
    """Say what a built directory holds, or what MODEL is and what each layer will become."""
    from lhcompile import api

    with err.status("reading"):
        found = api.inspect(model, **options)
    if not isinstance(found, api.Inspection):
        out.print_json(found.to_json())
        return
    sizes = f"{found.parameters:,} parameters, vocabulary {found.vocab_size}, context {found.context_length}"
    out.print(f"{found.family}: {sizes}")
    table = Table("module", "kind", "filters", "channels", "taps", "exact state")
    for layer in found.layers:
        table.add_row(
            layer.module,
            layer.kind,
            str(layer.filters),
            str(layer.channels),
            str(layer.taps),
            _bytes(layer.exact_bytes),
        )
    out.print(table)
    for note in found.notes:
        out.print(f"note: {note}")


@app.command()
@with_options("load")
def verify(
    directory: Directory,
    against: Annotated[str | None, typer.Option(help="The model it was built from, to compare with.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text to compare on (its second half).")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json for the text.")] = None,
    sequences: Annotated[int, typer.Option(min=2, help="Sequences to compare on.")] = 16,
    **options: Any,
) -> None:
    """Check a built directory: files, every way of cutting a sequence, and its source with --against."""
    from lhcompile import api

    with err.status("verifying"):
        result = api.verify_directory(directory, against, calibration, tokenizer, sequences, **options)
    out.print(f"files: {result.files} checksums match")
    out.print(f"cuts: {result.cuts} ways of feeding a sequence agree, outputs and states")
    for stage in result.stages:
        out.print(f"{stage.name}: loss {stage.loss:.5f}, {_agreement(stage)}, {stage.tokens} tokens")


@app.command()
def generate(
    directory: Directory,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "import ",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=0, help="Tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Only the k most likely tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the most likely tokens that hold this much probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
) -> None:
    """Continue PROMPT, streaming text as it is generated."""
    from lhcompile import api

    print(prompt, end="", flush=True)
    for piece in api.generate(directory, prompt, max_new_tokens, temperature, top_k, top_p, seed):
        print(piece, end="", flush=True)
    print()


@app.command()
def bench(
    directory: Directory,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Tokens to time.")] = 200,
    prefill_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prefill.")] = 1024,
    threads: Annotated[int | None, typer.Option(min=1, help="onnxruntime threads.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure step latency, tokens per second, prefill rate and state size."""
    from dataclasses import asdict

    from lhcompile import api

    with err.status("measuring"):
        result = api.bench(directory, batch, steps, prefill_tokens, threads)
    if json:
        out.print_json(data=asdict(result))
        return
    table = Table.grid(padding=(0, 2))
    table.add_row("step", f"{result.step_ms:.3f} ms median, {result.step_ms_p90:.3f} ms 90th percentile")
    table.add_row("decode", f"{result.tokens_per_second:,.0f} tokens/s at batch {batch}")
    table.add_row("prefill", f"{result.prefill_tokens_per_second:,.0f} tokens/s ({prefill_tokens} tokens at once)")
    table.add_row("state", f"{_bytes(result.state_bytes)} per sequence")
    table.add_row("files", ", ".join(f"{name} {_bytes(size)}" for name, size in result.file_bytes.items()))
    out.print(table)


# ---- what the screen shows -----------------------------------------------------------------------------------------


class _Screen:
    """A line per finished stage with its time, a spinner and the latest remark for the running one."""

    def __enter__(self) -> Any:
        from lhcompile.pipeline import Progress

        self._status = err.status("starting")
        self._progress = Progress(self._on_stage, self._on_remark)
        self._status.start()
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
        self._status.update(f"{self._current}: {_escaped(text)}")

    def _finished(self) -> None:
        if self._current is not None:
            seconds = self._progress.timings.get(self._current, 0.0)
            err.print(f"[green]✓[/] {self._current:<10} {seconds:6.1f} s", highlight=False)


def _agreement(stage: Any) -> str:
    agreement = f"KL {stage.kl_mean:.2e} nats, top-1 {stage.top1_agreement:.2%}"
    return f"{agreement}, worst |Δlogit| {stage.max_logit_difference:.3g}"


def _bytes(count: int) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.4g} GB"
