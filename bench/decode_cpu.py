"""Tokens a second of a compiled model on two cores, against Transformers of its size.

    make ops
    python -m bench.decode_cpu --operators build/ops/liblhcompile_ops.so --out docs/bench
                                                     writes decode_cpu.json, .md and .svg
    python -m bench.decode_cpu --tiny --rounds 2     small, to see that it works

Needs the extra `bench`; llama.cpp is compiled for the processor as it is installed, by a C++ compiler and CMake.

Ours is a directory that `lhcompile build --target cpu` made of a checkpoint with random weights, run by lhruntime: as
it is, and with the library that `make ops` builds (`+ library`). The Transformers have as many layers
and channels and random weights too: in llama.cpp (architecture gpt2, weights in F32, F16 or Q4_0, cache in float16), in
onnxruntime (fused operators, cache in place, float32 or blocks of 32 weights of 4 bits) and in torch (float32, static
cache); `torch hyena` is the model undistilled, all inputs of its convolutions kept.

One sequence, greedy. A step is timed with the cache full to the context: prompt and tokens before it count. Every
system is a process of its own with two threads; they take turns within one run, some steps each, of which the first
does not count. Figures are medians; memory is the process's resident memory after its steps.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bench.decode_cpu_report import LIBRARY
from bench.decode_cpu_report import write as report
from bench.decode_model import SHAPES, TINY, Shape, build
from bench.machine import copy_bandwidth, describe

CONTEXTS = (128, 1024, 4096)
THREADS, GROUP, PAUSE = 2, 8, 0.05
"""Threads of a system; steps of a turn; seconds between turns, in which threads of the last one fall asleep."""
Row = dict[str, Any]


class System(Protocol):
    """cache_bytes: of what is kept of the past"""

    cache_bytes: int

    def step(self) -> None:
        """One token."""

    def rewind(self) -> None:
        """Back to where a turn begins."""


class Ours:
    """A built directory in a session of lhruntime."""

    def __init__(self, directory: Path, operators: Path | None) -> None:
        from lhruntime import Session

        self._session = Session.load(directory, threads=THREADS, operators=operators)
        self._token = np.ones(1, np.int64)
        self.cache_bytes = sum(state.nbytes for state in self._session.states().values())

    def step(self) -> None:
        self._token = self._session.step(self._token).argmax(-1)

    def rewind(self) -> None:
        pass


class Torch:
    """A decoder of bench.decode_torch: attention, or convolutions with all their past."""

    def __init__(self, shape: Shape, context: int, kind: str) -> None:
        import torch

        from bench.decode_torch import Attention, Convolution, Decoder, Weights

        torch.set_num_threads(THREADS)
        torch.set_grad_enabled(False)
        weights = Weights(shape, torch.device("cpu"), torch.float32)
        mixer = {"transformer": Attention, "hyena": Convolution}[kind](weights, 1, context)
        mixer.settle()
        self._decoder = Decoder(weights, mixer, 1)
        self.cache_bytes = mixer.cache_bytes

    def step(self) -> None:
        self._decoder.step()

    def rewind(self) -> None:
        pass


def _llama(path: Path, context: int) -> System:
    from bench.decode_llama import Llama

    return Llama(path, context, THREADS, GROUP)


def _onnx(path: Path, context: int) -> System:
    from bench.decode_onnx import Graph

    return Graph(path, context, THREADS)


Make = Callable[[], System]


def makers(shape: Shape, context: int, files: dict[str, Path], operators: Path | None) -> dict[str, Make]:
    """How each system is opened, by name."""
    found: dict[str, Make] = {}
    for name, path in files.items():
        if name.startswith("ours"):
            found[name] = partial(Ours, path, None)
            if operators is not None:
                found[name + LIBRARY] = partial(Ours, path, operators)
        else:
            found[name] = partial(_llama if name.startswith("llama") else _onnx, path, context)
    return found | {
        "torch float32": partial(Torch, shape, context, "transformer"),
        "torch hyena float32": partial(Torch, shape, context, "hyena"),
    }


OURS = {"ours float32": "none", "ours int4": "int4"}
ONNX = {"onnxruntime float32": 32, "onnxruntime int4": 4}
LLAMA = {"llama.cpp F32": "f32", "llama.cpp F16": "f16", "llama.cpp Q4_0": "q4_0"}


def prepare(
    shape: Shape, work: Path, order: int, only: tuple[str, ...] = ("",)
) -> tuple[dict[str, Path], dict[str, Any]]:
    """The files of systems that have some, written unless they are there, and how ours were built.

    only: of systems whose names begin so
    """
    files, builds, place = {}, {}, work / shape.name
    place.mkdir(parents=True, exist_ok=True)
    for name in filter(lambda name: name.startswith(only), OURS):
        trained = 64 if shape == TINY else 2048
        files[name], builds[name] = build(
            shape, work, target="cpu", precision=OURS[name], order=order, context=trained
        )
        print(f"{name}: built in {builds[name]['seconds']:.0f} s", flush=True)
    for name in filter(lambda name: name.startswith(only), (*ONNX, *LLAMA)):
        files[name] = place / (f"transformer-{ONNX[name]}.onnx" if name in ONNX else f"transformer-{LLAMA[name]}.gguf")
        if not files[name].is_file():
            print(f"{name}: writing", flush=True)
            _write(name, shape, files[name])
    return files, builds


def _write(name: str, shape: Shape, path: Path) -> None:
    if name in ONNX:
        from bench import decode_onnx

        decode_onnx.write(shape, path, ONNX[name])
    else:
        from bench import decode_llama

        decode_llama.write(shape, path, LLAMA[name], max(CONTEXTS))


def work(make: Make, pipe: Connection) -> None:
    """A process: opens its system, says how much it keeps, then runs a turn whenever it is asked."""
    before = _resident()
    started = time.perf_counter()
    system = make()
    pipe.send({"cache_bytes": system.cache_bytes, "idle_bytes": before, "open_seconds": time.perf_counter() - started})
    while pipe.recv():
        times = []
        for _ in range(GROUP):
            started = time.perf_counter()
            system.step()
            times.append(time.perf_counter() - started)
        system.rewind()
        pipe.send({"times": times, "resident_bytes": _resident()})


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(systems: dict[str, Make], rounds: int) -> dict[str, Row]:
    """All systems in turns."""
    spawn = multiprocessing.get_context("spawn")
    open_: dict[str, tuple[Any, Connection]] = {}
    rows: dict[str, Row] = {}
    try:
        for name, make in systems.items():
            mine, theirs = spawn.Pipe()
            process = spawn.Process(target=work, args=(make, theirs), daemon=True)
            process.start()
            theirs.close()
            open_[name] = process, mine
            rows[name] = mine.recv() | {"times": []}
            print(f"    {name}: open after {rows[name]['open_seconds']:.1f} s", flush=True)
        for _ in range(rounds):
            for name, (_, pipe) in open_.items():
                pipe.send(True)
                turn = pipe.recv()
                rows[name]["times"] += turn["times"][1:]
                rows[name]["resident_bytes"] = turn["resident_bytes"]
                time.sleep(PAUSE)
    finally:
        for _, pipe in open_.values():
            with suppress(OSError):  # it has ended by itself, with an error
                pipe.send(False)
        for process, _ in open_.values():
            process.join(10)
            if process.is_alive():
                process.terminate()
    for row in rows.values():
        times = np.array(row.pop("times"))
        row["seconds"] = float(np.median(times))
        row["quartiles"] = [float(part) for part in np.quantile(times, (0.25, 0.75))]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="125M")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--rounds", type=int, default=12, help="turns of every system")
    parser.add_argument("--order", type=int, default=4, help="real states of a filter")
    parser.add_argument("--operators", type=Path, help="library of fused operators, for a second row of ours")
    parser.add_argument("--only", nargs="+", help="systems whose names begin so")
    parser.add_argument("--work", type=Path, default=Path("build/decode"), help="folder of all models, which are kept")
    parser.add_argument("--tiny", action="store_true", help="a very small model")
    parser.add_argument("--out", type=Path, help="folder for decode_cpu.json, .md and .svg")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(THREADS)  # of all systems' processes
    shape = TINY if options.tiny else SHAPES[options.shape]
    only = tuple(options.only or [""])
    files, builds = prepare(shape, options.work, options.order, only)
    result: Row = {
        "command": " ".join(["python -m bench.decode_cpu", *sys.argv[1:]]),
        "machine": describe(("llama_cpp_python",)),
        "shape": vars(shape) | {"parameters": shape.parameters},
        "rounds": options.rounds,
        "bandwidth": copy_bandwidth(),
        "builds": builds,
        "files": {name: _size(path) for name, path in files.items()},
        "contexts": {},
    }
    for context in options.contexts:
        print(f"context {context}", flush=True)
        found = makers(shape, context, files, options.operators)
        rows = measure({name: make for name, make in found.items() if name.startswith(only)}, options.rounds)
        for name, row in rows.items():
            print(f"    {name}: {1 / row['seconds']:.1f} tokens/s, {row['resident_bytes'] / 1e6:.0f} MB", flush=True)
        result["contexts"][str(context)] = rows
        if options.out is not None:
            report(result, options.out, __doc__ or "")


def _size(path: Path) -> int:
    """Bytes of a model: of a directory's graph of one step with its weights, of a file with what lies beside it."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir() if file.suffix == ".bin" or file.name == "step.onnx")
    beside = path.with_suffix(".bin")
    return path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)


if __name__ == "__main__":
    main()
