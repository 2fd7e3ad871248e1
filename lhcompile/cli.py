"""The command line. Each verb imports what it needs; options of `build` are made from the config classes."""

from __future__ import annotations

import inspect as python_inspect
import io
import shlex
import signal
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_origin

import typer

from lhcompile.errors import ConfigError, LhcompileError
from lhcompile.screen import (
    Screen,
    costs,
    err,
    escaped,
    figures,
    in_units,
    out,
    print_distilled,
    print_inspection,
    print_manifest,
    print_rows,
    sizes,
)

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compile trained long-convolution models into stateful ONNX graphs that run token by token.",
)
UsageError: Any = typer.BadParameter.__base__  # click's own, or that of the copy of click inside typer
INTERRUPTED = 130

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Checkpoint file, package.module:factory, or torch.export archive (.pt2)."),
]
Directory = Annotated[Path, typer.Argument(metavar="DIRECTORY", help="A built directory.")]


def main() -> None:
    """Entry point: a user's mistake is one line and an exit code, 2 for input and 3 for a gate not met."""
    from lhruntime import LhruntimeError

    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="lhcompile", standalone_mode=False)
    except LhcompileError as error:
        _fail(str(error), error.exit_code)
    except LhruntimeError as error:
        _fail(str(error), 2)
    except UsageError as error:
        _fail(_usage(error), 2)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        writes = sys.argv[1:2] in (["build"], ["distill"])
        _fail("interrupted" + ("; nothing was written" if writes else ""), INTERRUPTED)


def _usage(error: Any) -> str:
    """What is wrong with the command line, and where to read what is right."""
    message = str(error.format_message()).replace("Value error, ", "").removesuffix(".")
    return f"{message}; see {error.ctx.command_path if error.ctx else 'lhcompile'} --help"


def _fail(message: str, code: int) -> NoReturn:
    err.show_cursor()
    err.print(f"[bold red]error:[/] {escaped(' '.join(message.split()))}", soft_wrap=True)
    raise SystemExit(code)


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
    annotation = field.annotation
    if get_origin(annotation) is list:  # typer takes choices that repeat as an enumeration only
        choices = get_args(get_args(annotation)[0])
        annotation = list[StrEnum(name, list(zip(choices, choices, strict=True)))]  # type: ignore[misc]
    option = typer.Option(*flags, help=field.description)
    return python_inspect.Parameter(
        name,
        python_inspect.Parameter.KEYWORD_ONLY,
        default=... if field.is_required() else field.default,
        annotation=Annotated[annotation, option],
    )


# ---- verbs ---------------------------------------------------------------------------------------------------------


@app.command()
@with_options("load", "calibration", "distill", "streamify", "lower", "quantize", "package")
def build(model: Model, **options: Any) -> None:
    """Compile MODEL into a directory that onnxruntime runs token by token."""
    command = shlex.join(["lhcompile", *sys.argv[1:]])
    with Screen() as progress:
        from lhcompile import api

        report = api.build(model, progress, command, **options)
    rows = figures(report.stages, "held-out ", "reference")
    if report.model.features is not None:
        rows.append(("calibration", str(report.calibration)))
    if report.order_mean is not None:
        rows.append(("order", f"mean {report.order_mean:.2f}, largest {max(x.order_max for x in report.layers)}"))
    if report.healing is not None:
        kept = "kept" if report.healing.kept else "not kept"
        rows.append(
            ("healing", f"{report.healing.before:.5f} → {report.healing.after:.5f} on tokens kept aside: {kept}")
        )
    rows.append(("state", f"{in_units(report.state_bytes)} per sequence"))
    if report.graph is not None and report.graph.nodes_per_layer is not None:
        rows.append(("step graph", f"{report.graph.step_nodes} nodes, {report.graph.nodes_per_layer:.1f} per layer"))
    for weights in report.weights:
        rows.append((weights.name, f"{report.quantize}: {in_units(weights.before)} → {in_units(weights.after)}"))
    rows += costs(report)
    rows.append(("files", sizes(report.files)))
    rows.append(("written to", f"{options['output']}  (report: {options['output'] / 'report.html'})"))
    print_rows(rows)
    for note in report.notes:
        err.print(f"[yellow]note:[/] {escaped(note)}", soft_wrap=True)
    rounding = report.rounding
    if rounding is not None and (rounding.measured or 0.0) > rounding.requested:
        err.print(
            f"[yellow]warning:[/] on held-out tokens rounding the weights costs {rounding.measured:.3%}, more than the "
            f"{100 * rounding.requested:.3g}% that calibration kept",
            soft_wrap=True,
        )
    budget = report.budget
    if budget is not None and budget.measured is not None and budget.measured > budget.requested:
        tokens = report.model.features is None
        seen = "on held-out tokens the loss rises by" if tokens else "on held-out signals the outputs are off by"
        err.print(
            f"[yellow]warning:[/] {seen} {budget.measured:.3%}, more than the budget of {100 * budget.requested:.3g}% "
            f"that calibration kept; more calibration {'text' if tokens else 'signals'} or a smaller --budget helps",
            soft_wrap=True,
        )


@app.command()
@with_options("load")
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A built directory or a model.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON; of a built directory, its manifest.")] = False,
    **options: Any,
) -> None:
    """Say what a built directory holds, or what MODEL is and which of its operators have memory."""
    from dataclasses import asdict

    with err.status("reading"):
        from lhcompile import api

        found = api.inspect(model, **options)
    if isinstance(found, api.Inspection):
        out.print_json(data=asdict(found)) if json else print_inspection(found)
    else:
        out.print_json(found.to_json()) if json else print_manifest(found)


@app.command()
@with_options("load")
def verify(
    directory: Directory,
    against: Annotated[str | None, typer.Option(help="The model it was built from, to compare with.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Text or signals to compare on (the second half).")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json for the text.")] = None,
    sequences: Annotated[int, typer.Option(min=2, help="Sequences to compare on.")] = 16,
    **options: Any,
) -> None:
    """Check a built directory: files, every way of cutting a sequence, and its source with --against."""
    with err.status("loading") as status:
        from lhcompile import api

        result = api.verify_directory(
            directory, against, calibration, tokenizer, sequences, lambda text: status.update(escaped(text)), **options
        )
    rows = [
        ("files", f"{result.files} checksums match"),
        ("cuts", f"{result.cuts} ways of feeding a sequence agree, outputs and states"),
    ]
    if result.stages:
        rows += figures(result.stages, "random " if calibration is None else "", "source")
    print_rows(rows)


@app.command()
def distill(
    taps: Annotated[
        Path, typer.Argument(metavar="TAPS.npy", help="Taps, filters × length, h_0 first; one axis is one filter.")
    ],
    order: Annotated[int | None, typer.Option(help="The same order for every filter.")] = None,
    tol: Annotated[float | None, typer.Option(help="Error each filter may have; each gets the order it needs.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Power spectra of what filters hear, .npy, filters × bins, frequency 0 to π.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="varpro, hankel, balanced, modal, aaa, gradient or gradient-h2.")
    ] = "varpro",
    head: Annotated[int, typer.Option(help="So many first taps are kept exactly, beside the system.")] = 1,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write the systems to, .npz.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file of systems.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Reduce filters on their own, the rows of TAPS.npy, to poles and residues. Give --order or --tol."""
    from dataclasses import asdict

    if order is not None and tol is not None:
        raise ConfigError("--order and --tol exclude each other")
    if order is None and tol is None:
        raise ConfigError("give --order N for every filter, or --tol X, the error each may have")
    with err.status("reading"):
        from lhcompile.distill import files, filters
        from lhcompile.distill.summary import summarize

        if output is not None:
            files.check_writable(output, force)
        array, spectra = files.read_array(taps), None if weights is None else files.read_array(weights)
        bank = filters.as_bank(array, "taps")
    with err.status(f"distilling {bank.shape[0]} filters"):
        reduction = filters.distill_filters(bank, order, tol, spectra, method, head)
        if output is not None:
            files.write_systems(output, reduction, force=force)
    found = summarize(reduction, bank.shape[1], weights is not None)
    if json:
        out.print_json(data=asdict(found))
        return
    note = [("note", f"shape {list(array.shape)} is taken as {found.filters} filters")] if array.ndim > 2 else []
    print_distilled(found, *note, *([] if output is None else [("written to", str(output))]))


@app.command()
def generate(
    directory: Directory,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "import ",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Only the k most likely tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the most likely tokens that hold this much probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    target: Annotated[str | None, typer.Option(help="Whose graphs run, of those built; the first without it.")] = None,
) -> None:
    """Continue PROMPT, streaming text as it is generated."""
    with err.status("loading"):
        from lhcompile import running

        pieces = running.generate(directory, prompt, max_new_tokens, temperature, top_k, top_p, seed, target)
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


@app.command()
def bench(
    directory: Directory,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Tokens to time.")] = 200,
    prefill_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prefill.")] = 1024,
    threads: Annotated[int | None, typer.Option(min=1, help="onnxruntime threads.")] = None,
    target: Annotated[str | None, typer.Option(help="Whose graphs run, of those built; the first without it.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure step latency, tokens per second, prefill rate and state size."""
    from dataclasses import asdict

    with err.status("measuring"):
        from lhcompile import running

        result = running.bench(directory, batch, steps, prefill_tokens, threads, target)
    if json:
        out.print_json(data=asdict(result))
        return
    print_rows(
        [
            ("step", f"{result.step_ms:.3f} ms median, {result.step_ms_p90:.3f} ms 90th percentile"),
            ("decode", f"{result.tokens_per_second:,.0f} tokens/s at batch {batch}"),
            ("prefill", f"{result.prefill_tokens_per_second:,.0f} tokens/s ({result.prefill_tokens} tokens at once)"),
            ("state", f"{in_units(result.state_bytes)} per sequence"),
            ("files", sizes(result.file_bytes)),
        ]
    )
