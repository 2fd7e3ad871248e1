"""Tokens a second of a compiled model on a GPU, against what else could generate with a model of its size.

    python -m bench.decode_cuda --shapes 1.3B --out docs/bench     writes decode_cuda.json, .md and .svg
    python -m bench.decode_cuda --device cpu --tiny                small, to see that it works

Ours is a directory that `lhcompile build --target cuda` made of a checkpoint with random weights, run by lhruntime with
the library of fused operators (`make ops`): the loop that users have, in which the host sees the tokens of sixteen
steps at a time. The others are written in torch, of the same size, with random weights in half precision, and share all
but the mixer:

transformer   attention over a static cache that is full to the context, the fastest of SDPA's backends
hyena         long convolutions that were not distilled: all inputs of the past are kept and read at every step
loop          the distilled model's recurrence in torch; `loop, eager` is the same without a CUDA graph

A step of all but the last is one CUDA graph, greedy choice of the token included. A prompt of 512 and 256 tokens after
it mean a context of 640 on average; ours and the loop do not depend on it. For one sequence the peers' parts beside the
mixer are compiled by torch.compile too, and the faster form counts. Batches double until memory is full, the last is
the largest that fits, or until doubling a large one gains less than a hundredth; every system counts at its best.
Sequences begin with tokens drawn at random, for rows that are all alike draw less power, and a GPU at its limit of
power then runs at a higher clock. Figures are medians over groups of steps.

The floor of a step is the time for its bytes (weights, states read and written) at the rate of memory, or for its
operations with the states' bytes after them, whichever is more. The rate of memory is the better of copying and
reading, measured in the same run; that of operations is 750 TFLOP/s, and beside it the measured one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from bench.decode_model import SHAPES, Shape, build, checkpoint, first_tokens, tiny
from bench.decode_timing import Rates, captured, clear, is_full, measure_rates, seconds, used
from bench.decode_torch import Attention, Convolution, Decoder, Mixer, Recurrence, Weights
from bench.graphs import initializer_bytes
from bench.machine import describe

CONTEXTS = (640, 2048, 8192)
BATCHES = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8448, 16896)
"""The last are multiples of the 132 multiprocessors of an H100 or H200: their products end with a full round."""
RESERVE = 3 << 30
"""Bytes of the device's memory that a full batch leaves to libraries and graphs."""
LARGE, GAIN = 512, 1.01
"""A sweep ends where doubling a batch of so many or more raises the rate by less than this factor."""
EAGER = 2048
"""The largest batch of the eager loop: beyond it is that of the CUDA graph."""
AHEAD = 16
"""Steps of lhruntime's device loop between two looks of the host at the tokens."""
SPEED = {"fp8": 2.0}
"""Of products in a precision, against half precision."""
Row = dict[str, Any]
Save = Callable[[], None]


def sweep(measure: Callable[[int], Row], batches: list[int], save: Callable[[list[Row]], None]) -> list[Row]:
    """Measures batch after batch until memory is full or the rate no longer rises; rows are saved as they come."""
    rows: list[Row] = []
    for batch in batches:
        started = time.perf_counter()
        row = _unless_full(measure, batch)
        clear()
        if row is None and batch == batches[-1] and rows:  # meant to be the largest that fits: a little less may
            batch = max(rows[-1]["batch"] + 1, batch * 7 // 64 * 8)
            row = _unless_full(measure, batch)
            clear()
        if row is None:
            print(f"    batch {batch}: memory is full", flush=True)
            break
        row |= {"batch": batch, "tokens_per_second": batch / row["seconds"]}
        best = max((one["tokens_per_second"] for one in rows), default=0.0)
        rows.append(row)
        save(rows)
        spent = time.perf_counter() - started
        rate, ratio = row["tokens_per_second"], row["seconds"] / row["floor_seconds"]
        print(
            f"    batch {batch}: {1e3 * row['seconds']:.3f} ms, {rate:,.0f} tokens/s, {ratio:.2f} × floor "
            f"({spent:.1f} s)", flush=True,
        )  # fmt: skip
        if batch >= LARGE and rate < GAIN * best:
            break
    return rows


def _unless_full(measure: Callable[[int], Row], batch: int) -> Row | None:
    """None where memory does not suffice; what was allocated hangs on the error and goes with it."""
    try:
        return measure(batch)
    except Exception as error:
        if is_full(error):
            return None
        raise


def fitting(batches: tuple[int, ...], each: int) -> list[int]:
    """The batches that fit into free memory, at `each` bytes a sequence, and the largest multiple of 8 that does."""
    most = max(1, (used()[1] - RESERVE) // each) if torch.cuda.is_available() else max(batches)
    full = most // 8 * 8
    found = [batch for batch in batches if batch <= most]
    return found + [full] * (max(found, default=0) < full < max(batches))


class Bench:
    """One shape: the systems, one after the other."""

    def __init__(self, shape: Shape, rates: Rates, device: torch.device, options: argparse.Namespace) -> None:
        self.shape, self.rates, self.device, self.options = shape, rates, device, options
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.batches = (1, 2) if options.tiny else tuple(options.batches)
        self.contexts = (16, 32) if options.tiny else tuple(options.contexts)
        self.compile = device.type == "cuda" and not options.no_compile

    def floors(self, batch: int, weights: int, traffic: int, more: int, speed: float = 1.0) -> Row:
        operations = 2 * self.shape.parameters * batch + more
        floors = [self.rates.floor(weights, traffic, operations, speed, measured) for measured in (False, True)]
        return {"floor_seconds": floors[0], "floor_measured_seconds": floors[1]}

    def peer(self, make: Callable[..., Mixer], weights: Weights, context: int, batch: int, eager: bool = False) -> Row:
        """A step of a decoder in torch."""
        mixer = make(weights, batch, context)
        row: Row = {"state_bytes": mixer.cache_bytes, "used_bytes": used()[0], **mixer.settle()}
        forms = [False, True] if self.compile and batch == 1 and not eager else [False]
        times = {}
        for compiled in forms:
            try:
                step = Decoder(weights, mixer, batch, compiled).step
                with torch.no_grad():
                    run = captured(step) if self.device.type == "cuda" and not eager else step
                    times["compiled" if compiled else "plain"] = seconds(run)
            except Exception as error:
                if not compiled or is_full(error):
                    raise
                row["compile_error"] = str(error)[:300]  # the plain form counts, and the row says why
                print(f"    torch.compile: {str(error)[:200]}", flush=True)
        fastest = min(times, key=times.__getitem__)
        row |= {"form": fastest, "forms": times, "seconds": times[fastest]}
        return row | self.floors(batch, weights.bytes, mixer.traffic, mixer.operations)

    def peers(
        self, save: Callable[[str, str, list[Row]], None], noted: Callable[[str], AbstractContextManager[None]]
    ) -> None:
        """All of those asked for; `noted` is around each."""
        weights = Weights(self.shape, self.device, self.dtype)
        row = self.shape.layers * self.shape.width * weights.embedding.element_size()
        logits = 3 * self.shape.vocabulary * weights.embedding.element_size()
        if "hyena" in self.options.systems and self.device.type == "cuda":
            with noted("the convolution's kernels"):
                check_kernels(self.device)
        makers: list[tuple[str, Callable[..., Mixer], int]] = [("transformer", Attention, 2), ("hyena", Convolution, 1)]
        if "loop" in self.options.systems:
            for name in ("loop", "loop, eager"):
                batches = [batch for batch in self.batches if name == "loop" or batch <= EAGER]
                with noted(name):
                    self._peer_sweep(name, self._recurrence, weights, 0, batches, save)
        for context in self.contexts:
            for name, make, each in makers:
                if name in self.options.systems:
                    batches = fitting(self.batches, each * context * row + logits)
                    with noted(f"{name}, context {context}"):
                        self._peer_sweep(name, make, weights, context, batches, save)

    def _peer_sweep(
        self, name: str, make: Callable[..., Mixer], weights: Weights, context: int, batches: list[int],
        save: Callable[[str, str, list[Row]], None],
    ) -> None:  # fmt: skip
        print(f"  {name}" + f", context {context}" * bool(context), flush=True)
        sweep(
            lambda batch: self.peer(make, weights, context, batch, eager=name.endswith("eager")),
            batches,
            lambda rows: save(name, str(context) if context else "any", rows),
        )
        clear()

    def _recurrence(self, weights: Weights, batch: int, context: int) -> Recurrence:
        return Recurrence(weights, batch, context, self.options.order)

    def ours(self, directory: Path, precision: str, save: Callable[[str, str, list[Row]], None]) -> None:
        """A built directory in lhruntime's device loop, AHEAD steps at a time, after which the host sees the tokens."""
        from lhruntime.loops import DeviceLoop
        from lhruntime.model import load_model
        from lhruntime.sampling import Sampler

        if self.device.type == "cuda":
            onnxruntime.preload_dlls()  # the CUDA libraries that torch came with
        providers = ["CUDAExecutionProvider"] * (self.device.type == "cuda") + ["CPUExecutionProvider"]
        operators = None if self.options.no_operators else self.options.operators
        model = load_model(
            directory, target=None, batch=1, providers=providers, threads=None, verify=False, operators=operators,
            choose=True, cuda_graph=not self.options.no_graph,
        )  # fmt: skip
        graph = model.manifest.graphs[model.manifest.target].decode
        assert graph is not None
        (read, _), speed = initializer_bytes(directory / graph.file), SPEED.get(precision.partition(":")[0], 1.0)
        print(f"  ours {precision}", flush=True)

        def measure(batch: int) -> Row:
            loop = DeviceLoop(model, batch, AHEAD)
            for row, token in enumerate(first_tokens(batch, self.shape.vocabulary)):
                loop.place(row, int(token), Sampler(0.0))
            uniform = np.zeros((AHEAD, batch), np.float32)
            for _ in range(4):  # every place runs, is captured and replayed before it is timed
                loop.advance(uniform)
            found = loop.describe() | {"operators": operators is not None, "used_bytes": used()[0]}
            found["state_bytes"] = loop.slots.bytes
            found["seconds"] = seconds(partial(loop.advance, uniform), groups=5) / AHEAD
            return found | self.floors(batch, read, loop.slots.traffic, 0, speed)

        sweep(measure, list(self.batches), lambda rows: save(f"ours {precision}", "any", rows))


def check_kernels(device: torch.device) -> None:
    """Raises RuntimeError where the convolution's kernels differ from torch in float32 by more than rounding."""
    from bench.decode_kernels import convolve

    shape = Shape("check", 1, 192, 1, vocabulary=8)
    weights = Weights(shape, device, torch.float16)
    worst = 0.0
    for batch, context in ((3, 100), (33, 70), (2, 4096)):
        mixer = Convolution(weights, batch, context)
        mixer.before.normal_()
        before, past = mixer.before[0].clone(), mixer.past[0].clone()
        projected = torch.randn(batch, 3 * shape.width, device=device, dtype=torch.float16)
        window = torch.cat([before, projected[:, None]], 1).float()
        gate, x, v = ((window * mixer.weight[0]).sum(1) + mixer.bias[0]).chunk(3, 1)
        past[:, -1] = x * v
        y = (past.float() * mixer.taps[0].float()).sum(1) + mixer.modal.direct[0] * past[:, -1]
        expected = gate * y
        tables = mixer.weight[0], mixer.bias[0], mixer.past[0], mixer.taps[0], mixer.modal.direct[0]
        found = convolve(projected, mixer.before[0], *tables)
        worst = max(worst, float((found - expected).norm() / expected.norm()))
        if worst > 5e-3 or not torch.equal(mixer.before[0], window[:, 1:].half()):
            raise RuntimeError(f"the convolution's kernels are wrong: {worst:.1e} at batch {batch}, context {context}")
    print(f"  the convolution's kernels differ from torch by {worst:.1e}", flush=True)


def shape_figures(shape: Shape, options: argparse.Namespace, save: Callable[[Row], None]) -> bool:
    """Everything of one shape; `save` is told after every point. Whether something failed."""
    device = torch.device(options.device)
    small = tiny(shape, options.tiny)
    started = time.perf_counter()
    found: Row = {"shape": vars(small) | {"parameters": small.parameters}, "builds": {}, "systems": {}}
    directories = {}
    if "ours" in options.systems:
        context = 64 if options.tiny else options.trained
        checkpoint(small, options.work / small.name, context)
        make = partial(
            build, small, options.work, target="cuda", order=options.order, context=context,
            more=tuple(options.build.split()),
        )  # fmt: skip
        with ThreadPoolExecutor(options.builds) as pool:
            building = {each: pool.submit(make, precision=each) for each in options.precisions}
        for precision, result in building.items():
            with _noted(found, f"the build in {precision}"):
                directories[precision], found["builds"][precision] = result.result()
                print(f"{shape.name}, {precision}: {found['builds'][precision]['seconds']:.0f} s", flush=True)
    if options.build_only:
        return bool(found.get("errors"))
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    rates = measure_rates(device, dtype, small.width, options.tiny)
    found["rates"] = vars(rates)
    print(f"{shape.name}: {found['rates']}", flush=True)
    bench = Bench(small, rates, device, options)

    def keep(name: str, context: str, rows: list[Row]) -> None:
        found["systems"].setdefault(name, {})[context] = rows
        found["seconds"] = time.perf_counter() - started
        save(found)

    bench.peers(keep, lambda name: _noted(found, name))  # first: they are to have all of the memory
    clear()
    found["left_bytes"] = used()[0]
    print(f"  {found['left_bytes'] / 1e9:.2f} GB are in use before ours", flush=True)
    for precision, directory in directories.items():
        with _noted(found, f"ours {precision}"):
            bench.ours(directory, precision, keep)
        clear()
    save(found)
    return bool(found.get("errors"))


@contextmanager
def _noted(found: Row, name: str) -> Iterator[None]:
    """What a system fails with is kept in the result, and the next one goes on."""
    try:
        yield
    except Exception:
        found.setdefault("errors", {})[name] = traceback.format_exc()[-3000:]
        traceback.print_exc()


def device_name() -> Iterator[tuple[str, Any]]:
    """What `describe` leaves out: the GPU and what drives it."""
    yield "torch_cuda", torch.version.cuda
    if torch.cuda.is_available():
        yield "gpu", torch.cuda.get_device_name()
        yield "gpu_bytes", torch.cuda.get_device_properties(0).total_memory


def _command(shape: str) -> str:
    """What measured a shape, without names of places."""
    words = iter(sys.argv[1:])
    kept = []
    for word in words:
        if word in ("--out", "--work", "--operators"):
            next(words, None)
        else:
            kept.append(word)
    return " ".join(["python -m bench.decode_cuda", *kept, *["--shapes", shape] * ("--shapes" not in kept)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["1.3B"])
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--systems", nargs="+", choices=("ours", "transformer", "hyena", "loop"), default=None)
    parser.add_argument("--precisions", nargs="+", default=["fp16"], help="of builds: fp16, fp8:float16 (states)")
    parser.add_argument("--builds", type=int, default=1, help="builds at a time")
    parser.add_argument("--order", type=int, default=4, help="real states of a filter")
    parser.add_argument("--trained", type=int, default=2048, help="length of the checkpoint's filters")
    parser.add_argument("--build", default="", help="more options of lhcompile build, in quotes after an equals sign")
    parser.add_argument("--build-only", action="store_true", help="builds the directories and ends")
    parser.add_argument("--work", type=Path, default=Path("build/decode"), help="folder of the builds, which are kept")
    parser.add_argument("--operators", type=Path, default=Path("build/ops/liblhcompile_ops.so"))
    parser.add_argument("--no-operators", action="store_true", help="ours without the library")
    parser.add_argument("--no-graph", action="store_true", help="ours without CUDA graphs")
    parser.add_argument("--no-compile", action="store_true", help="the peers without torch.compile at batch 1")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a very small model, two batches and contexts")
    parser.add_argument("--out", type=Path, help="folder for decode_cuda.json, .md and .svg; other shapes are kept")
    parser.add_argument("--render", action="store_true", help="tables and picture of what is in --out, no more")
    options = parser.parse_args()
    options.systems = options.systems or ["ours", "transformer", "hyena", "loop"]
    path = None if options.out is None else options.out / "decode_cuda.json"
    result: Row = json.loads(path.read_text()) if path is not None and path.is_file() else {}
    machine: Row = describe() | dict(device_name())
    machine["versions"]["onnxruntime"] = onnxruntime.__version__  # its distribution has another name where it has a GPU
    failed = False
    for name in [] if options.render else options.shapes:
        command = _command(name)

        def save(found: Row, name: str = name, command: str = command) -> None:
            result[name] = {"command": command, "machine": machine, **found}
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(result, indent=1) + "\n")

        failed = shape_figures(SHAPES[name], options, save) or failed
    if options.out is not None and result:
        from bench.decode_report import write  # last, so that figures are kept where there is no matplotlib

        write(result, options.out, __doc__ or "")
        print((options.out / "decode_cuda.md").read_text())
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
