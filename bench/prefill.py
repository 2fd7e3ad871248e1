"""How prompts are read: the length of chunks, the tokens of a fixed call, and the FFT as a competitor.

    python -m bench.prefill --out docs/bench          writes prefill.json and the tables made from it
    python -m bench.prefill --parts costs accuracy    some of the tables only
    python -m bench.prefill --quick                   small, to see that it works

Chunks: one modal operator as the lowering writes it, in onnxruntime, and models of two Hyena layers of random weights.
Fixed calls: the web graphs of such a model; what a prompt has beyond them goes token by token. FFT: outputs by one
convolution of the whole prompt, the state behind it in four ways (arXiv 2310.18780, on pre-filling), in torch, from a
zero state and with spectra made beforehand. The companion form filters the prompt by one over the denominator of all
poles; outputs and modal states are combinations of the latest d results. One thread, batch 1, all candidates in turns;
times are medians (least). Memory is the growth of the peak in the first call of a process of its own. Errors are of
float32 against the closed form in double precision, largest difference over largest value.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from bench.machine import describe, write
from bench.prefill_fft import COMPETITORS, accuracy, costs, print_peak
from bench.prefill_graphs import feeds, in_turns, model, operator, poles_of, prefill_of, quantized, session
from lhcompile.artifacts import Program
from lhcompile.lower import web
from lhcompile.lower.export import export_onnx

CHUNKS, CALLS = (8, 16, 32, 64, 128, 256), (8, 16, 32, 64, 128, 256)
LENGTHS, PROMPTS = (128, 1024, 4096), (20, 100, 500, 1000)
SHAPES = ((256, 4), (768, 2), (768, 4), (768, 8), (768, 16))  # channels, order
CELLS = (("portable", "none"), ("portable", "int8"), ("cpu", "int8"))
Row = dict[str, Any]


def each_chunk(program: Program, graphs: Mapping[int, ir.Model], length: int, repeats: int) -> Row:
    """Microseconds a token by chunk."""
    sessions, given = {chunk: session(graph) for chunk, graph in graphs.items()}, feeds(program, length)
    runs = {chunk: partial(opened.run, None, given) for chunk, opened in sessions.items()}
    found = in_turns(runs, repeats)
    return {name: [1e6 * seconds / length for seconds in some] for name, some in found.items()}


def chunk_rows(quick: bool) -> Iterator[Row]:
    repeats = 2 if quick else 9
    for channels, order in ((16, 4),) if quick else SHAPES:
        program = operator(poles_of(channels, order, 0.99, 3.0))
        graphs = {chunk: prefill_of(program, chunk) for chunk in CHUNKS}
        for length in LENGTHS[: 1 if quick else None]:
            what = f"operator, {channels} channels, order {order}"
            yield {"what": what, "length": length, "us": each_chunk(program, graphs, length, repeats)}
    for width in (16,) if quick else (256, 768):
        program = model(width)
        plain = {chunk: prefill_of(program, chunk) for chunk in CHUNKS}
        for target, precision in CELLS:
            graphs = {chunk: quantized(program, graph, target, precision) for chunk, graph in plain.items()}
            for length in LENGTHS[: 1 if quick else 2]:
                precision_said = "float32" if precision == "none" else precision
                what = f"two layers of width {width}, {target} {precision_said}"
                yield {"what": what, "length": length, "us": each_chunk(program, graphs, length, repeats)}


def call_rows(quick: bool) -> Iterator[Row]:
    """Prompts through web graphs: calls of a fixed number of tokens, and steps for what is left."""
    for width in (16,) if quick else (256, 768):
        program = model(width)
        step = export_onnx(program, web.Step, one_token=True, batch=1)
        graphs = {
            size: export_onnx(program, web.Prefill.of(size), one_token=False, batch=1, time=size) for size in CALLS
        }
        runs = {size: (session(graph), feeds(program, size)) for size, graph in {1: step, **graphs}.items()}
        calls = {size: partial(opened.run, None, given) for size, (opened, given) in runs.items()}
        found = in_turns(calls, 3 if quick else 15)
        ms = {name: 1e3 * seconds for name, (seconds, _) in found.items()}
        prompts = {
            prompt: {size: prompt // size * ms[str(size)] + prompt % size * ms["1"] for size in CALLS}
            for prompt in PROMPTS
        }
        yield {"what": f"two layers of width {width}", "ms": ms, "prompts": prompts}


# ---- tables ----------------------------------------------------------------------------------------------------------


def said(pair: list[float]) -> str:
    return f"{pair[0]:.3g} ({pair[1]:.3g})"


def tables(result: Row) -> Iterator[str]:
    yield f"## Chunks\n\nMicroseconds a token.\n\n| | tokens | {' | '.join(map(str, CHUNKS))} |"
    yield "|---" * (2 + len(CHUNKS)) + "|"
    for row in result.get("chunks", []):
        yield f"| {row['what']} | {row['length']} | {' | '.join(said(row['us'][str(c)]) for c in CHUNKS)} |"
    yield f"\n## Fixed calls\n\nMilliseconds a call, and a prompt.\n\n| | | step | {' | '.join(map(str, CALLS))} |"
    yield "|---" * (3 + len(CALLS)) + "|"
    for row in result.get("calls", []):
        yield f"| {row['what']} | a call | {row['ms']['1']:.2f} | " + " | ".join(
            f"{row['ms'][str(size)]:.2f}" for size in CALLS
        ) + " |"
        for prompt, some in row["prompts"].items():
            yield f"| | {prompt} tokens | {int(prompt) * row['ms']['1']:.1f} | " + " | ".join(
                f"{some[size]:.1f}" for size in some
            ) + " |"
    heads = " | ".join(COMPETITORS)
    yield f"\n## FFT\n\n| channels | order | tokens | | {heads} |\n" + "|---" * (4 + len(COMPETITORS)) + "|"
    for row in result.get("costs", []):
        shape = f"| {row['channels']} | {row['order']} | {row['length']} |"
        yield f"{shape} ms | {' | '.join(said(row['ms'][name]) for name in COMPETITORS)} |"
        yield f"{shape} MB | " + " | ".join(f"{row['mb'][name]:.1f}" for name in COMPETITORS) + " |"
    yield f"\nErrors of outputs, and of states.\n\n| poles | order | radius | {heads} |"
    yield "|---" * (3 + len(COMPETITORS)) + "|"
    for row in result.get("accuracy", []):
        cells = " | ".join(f"{y:.0e}, {state:.0e}" for y, state in row["errors"].values())
        yield f"| {row['angles']} | {row['order']} | {row['radius']} | {cells} |"


PARTS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "chunks": chunk_rows, "calls": call_rows, "costs": costs, "accuracy": accuracy,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="one small shape of each")
    parser.add_argument("--out", type=Path, help="folder for prefill.json and .md; other parts there are kept")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        print_peak(*options.peak)
        return
    path = None if options.out is None else options.out / "prefill.json"
    result: Row = json.loads(path.read_text()) if path is not None and path.is_file() else {}
    result |= {"command": "python -m bench.prefill" + " --quick" * options.quick, "machine": describe()}
    for name in options.parts:
        rows = []
        for row in PARTS[name](options.quick):
            rows.append(row)
            print(json.dumps(row), flush=True)
        result[name] = json.loads(json.dumps(rows))
    machine = result["machine"]
    lines = ["# Prefill\n", *(__doc__ or "").strip().splitlines()[6:], "", *tables(result)]
    lines += ["", f"Made by `{result['command']}` on {machine['processor']}, {machine['cores']} cores.", ""]
    write(result, lines, path)


if __name__ == "__main__":
    main()
