"""Targets and precisions side by side: size, loss, speed; of the example, and of a model of 125 million parameters.

    python -m bench.matrix --out docs/bench          writes matrix.json and the tables made from it
    python -m bench.matrix --models example          one model only
    python -m bench.matrix --quick                   small, to see that it works

Every cell is a directory of its own that the command line's pipeline built, with all its gates. The example is
measured on its held-out text, at order 4; the larger model (12 layers, width 768, vocabulary 50257, 1024 positions,
order 4) has random weights, so only its sizes and speeds mean anything. Steps and prefills are timed in turns, all
cells of a model within one run, two threads, batch 1, with a pause between two cells, for the threads of a session
wait awake a while after its last step and would take a core from the next; figures are medians. The floor of a step
is the time in which the weights that it reads come from memory, at the rate at which 400 MB are read in the same
turns, by a product with a vector or by a sum, whichever is faster; the embedding, of which a step reads one row, does
not count. The graphs for web and mcu run in onnxruntime on the same CPU like the others: web prefills 32 tokens a
call, mcu has no prefill and steps. Those for cuda have no times here, for on a CPU they run as the functions that
specify their operators; `bench.decode_cuda` has those of a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lhruntime import Session

from bench.graphs import initializer_bytes
from bench.machine import describe, write
from lhcompile.api import build
from lhcompile.load import load
from lhcompile.load.lm import LanguageModel
from lhcompile.load.safari import HyenaConfig, HyenaLM

EXAMPLE = Path(__file__).parents[1] / "examples/pysource"
PRECISIONS = ("none", "fp16", "bf16", "int8", "int4")
CUDA = "cuda"
CELLS: dict[str, dict[str, tuple[str, ...]]] = {
    "example": {
        "cpu": PRECISIONS, "portable": PRECISIONS, "web": ("none", "fp16", "int8", "int4"),
        "mcu": ("none", "fp16", "int8"), CUDA: ("none", "fp16", "bf16", "fp8", "int8", "int4"),
    },
    "125M": {"cpu": PRECISIONS, "portable": ("none", "int8", "int4")},
}  # fmt: skip
"""Targets and their precisions; without those that a browser or a microcontroller's compiler has no numbers for."""
THREADS, STEPS, PREFILLS, PROMPT = 2, 60, 7, 1024
PAUSE = 0.05
"""Seconds after which the threads of a session that is not used are asleep."""
LARGE = {
    "d_model": 768, "n_layer": 12, "d_inner": 3072, "vocab_size": 50257, "l_max": 1024, "emb_dim": 33,
    "filter_order": 64, "w": 14.0,
}  # fmt: skip
Row = dict[str, Any]


def example(_: Path, quick: bool) -> tuple[str, Row]:
    options: Row = {"config": EXAMPLE / "config.yaml", "calibration": EXAMPLE / "heldout.txt", "order": 4}
    return str(EXAMPLE / "model.pt"), options | ({"sequences": 2} if quick else {})


def large(folder: Path, quick: bool) -> tuple[str, Row]:
    """A model with random weights, of 125 million parameters: its checkpoint, configuration and tokens at random."""
    shape: Row = LARGE | ({"d_model": 64, "d_inner": 128, "n_layer": 2, "vocab_size": 300} if quick else {})
    torch.manual_seed(0)
    module: LanguageModel = HyenaLM(HyenaConfig(**shape))
    torch.save(module.state_dict(), folder / "model.pt")
    (folder / "config.yaml").write_text(yaml.safe_dump(shape))
    tokens = np.random.default_rng(0).integers(0, shape["vocab_size"], 8 * (shape["l_max"] + 1))
    np.save(folder / "tokens.npy", tokens)  # as good as any for such a model, and it need not write them itself
    options: Row = {"config": folder / "config.yaml", "calibration": folder / "tokens.npy"}
    options |= {"order": 4, "method": "hankel", "sequences": 2}
    return str(folder / "model.pt"), options


MODELS: dict[str, Callable[[Path, bool], tuple[str, Row]]] = {"example": example, "125M": large}


def figures(name: str, quick: bool) -> Row:
    """Builds every cell of one model and measures them in turns."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model, options = MODELS[name](folder, quick)
        rows = []
        every = [*PRECISIONS, "fp8"]
        for precision in every[:2] if quick else every:
            for target in (each for each, some in CELLS[name].items() if precision in some):
                out = folder / f"{precision}-{target}"
                started = time.perf_counter()
                report = build(model, target=[target], quantize=precision, output=out, **options)
                base = next(stage for stage in report.stages if stage.name == "onnx")
                last = report.stages[-1]
                rise = (last.loss - base.loss) / base.loss if base.loss and last.loss else None
                sizes = {path.name: path.stat().st_size for path in out.iterdir() if path.suffix in (".onnx", ".bin")}
                rows.append(
                    {
                        "target": target,
                        "precision": precision,
                        "bytes": sum(sizes.values()),
                        "step_bytes": sizes.get("weights.bin", 0) + sizes["step.onnx"],
                        "embedding_bytes": initializer_bytes(out / "step.onnx")[1],
                        "state_bytes": report.state_bytes,
                        "loss": last.loss,
                        "rise": rise,
                        "kl": last.kl_mean,
                        "seconds": time.perf_counter() - started,
                    }
                )
                print(name, *rows[-1].values(), flush=True)
                gc.collect()
        timed = [row for row in rows if row["target"] != CUDA]
        torch_rate, bandwidth = _time(timed, folder, load(model, config=options["config"]).module)
    for row in timed:
        row["floor_ms"] = 1e3 * (row["step_bytes"] - row["embedding_bytes"] + 2 * row["state_bytes"]) / bandwidth
    return {"cells": rows, "bandwidth": bandwidth, "torch_prefill": torch_rate}


def _time(rows: list[Row], folder: Path, module: torch.nn.Module) -> tuple[float, float]:
    """Fills in milliseconds of a step and tokens a second of a prefill; returns those of the module itself, and the
    bytes a second at which memory is read."""
    sessions = [
        Session.load(folder / f"{row['precision']}-{row['target']}", threads=THREADS, verify=False) for row in rows
    ]
    vocabulary = sessions[0].manifest.vocab_size
    prompt = np.random.default_rng(0).integers(0, vocabulary, (1, PROMPT))
    steps: list[list[float]] = [[] for _ in rows]
    much, vector = torch.ones(10_000, 10_000), torch.ones(10_000)
    reads: dict[str, Callable[[], object]] = {"product": lambda: torch.mv(much, vector), "sum": much.sum}
    reading: dict[str, list[float]] = {name: [] for name in reads}
    for index in range(STEPS):
        time.sleep(PAUSE)
        for name, read in reads.items():
            reading[name].append(_seconds(read))
        for session, times in zip(sessions, steps, strict=True):
            time.sleep(PAUSE)
            session.step(prompt[:, index])  # brings the weights back into what caches hold
            times += [_seconds(partial(session.step, prompt[:, index])) for _ in range(2)]
    fills: list[list[float]] = [[] for _ in rows]
    theirs = []
    ids = torch.from_numpy(prompt)
    for _ in range(PREFILLS):
        for session, times in zip(sessions, fills, strict=True):
            session.reset()
            time.sleep(PAUSE)
            times.append(_seconds(partial(session.prefill, prompt, chunk=PROMPT)))
        time.sleep(PAUSE)
        with torch.no_grad():
            theirs.append(_seconds(partial(module, ids)))
    for row, step, fill in zip(rows, steps, fills, strict=True):
        row["step_ms"] = 1e3 * float(np.median(step))
        row["prefill"] = PROMPT / float(np.median(fill))
    bandwidth = much.nbytes / min(float(np.median(times)) for times in reading.values())
    return PROMPT / float(np.median(theirs)), bandwidth


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def table(name: str, found: Row) -> Iterator[str]:
    """One model's cells as Markdown."""
    cells = found["cells"]
    plain = {cell["target"]: cell for cell in cells if cell["precision"] == "none"}
    yield f"## {name}\n"
    yield (
        f"Memory is read at {found['bandwidth'] / 1e9:.1f} GB/s; the source, in torch with its FFT convolutions, takes "
        f"{found['torch_prefill']:,.0f} tokens a second.\n"
    )
    heads = "target | precision | MB | of float32 | state KB | loss | KL | step ms | faster | step / floor | prefill/s"
    yield f"| {heads} | of torch's |"
    yield "|---" * 12 + "|"
    for cell in cells:
        same = plain[cell["target"]]
        precision = "float32" if cell["precision"] == "none" else cell["precision"]
        rise = "–" if cell["rise"] is None or name != "example" else f"{cell['rise']:+.3%}"
        kl = f"{cell['kl']:.1e}" if name == "example" else "–"
        times = "– | – | – | – | –"
        if "step_ms" in cell:
            times = (
                f"{cell['step_ms']:.2f} | {same['step_ms'] / cell['step_ms']:.1f} × "
                f"| {cell['step_ms'] / cell['floor_ms']:.2f} | {cell['prefill']:,.0f} "
                f"| {cell['prefill'] / found['torch_prefill']:.2f}"
            )
        yield (
            f"| {cell['target']} | {precision} | {cell['bytes'] / 1e6:.1f} | {cell['bytes'] / same['bytes']:.2f} "
            f"| {cell['state_bytes'] / 1e3:.1f} | {rise} | {kl} | {times} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--quick", action="store_true", help="two precisions, small models")
    parser.add_argument("--out", type=Path, help="folder for matrix.json and .md; other models there are kept")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    path = None if options.out is None else options.out / "matrix.json"
    result: Row = json.loads(path.read_text()) if path is not None and path.is_file() else {}
    for name in options.models:
        command = f"python -m bench.matrix --models {name}" + " --quick" * options.quick
        result[name] = {"command": command, "machine": describe(), **figures(name, options.quick)}
    lines = ["# Targets and precisions\n", *(__doc__ or "").strip().splitlines()[6:], ""]
    for name, found in result.items():
        machine = found["machine"]
        made = f"Made by `{found['command']}` on {machine['processor']}, {machine['cores']} cores."
        lines += [*table(name, found), "", made, ""]
    write(result, lines, path)


if __name__ == "__main__":
    main()
