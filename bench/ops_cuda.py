"""The fused GPU kernels by themselves: time against the memory floor and the arithmetic floor, in CUDA graphs.

    python -m bench.ops_cuda -o docs/bench/ops_cuda.json

Every graph holds the operator on so many sets of inputs that they do not fit in the cache.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench import machine
from bench.kernels import Kernels

Call = Callable[[], object]
HALF = torch.float16
CACHE = 120 << 20  # bytes that surely do not stay in the cache
WIDTH, HIDDEN, LAYERS, VOCABULARY = 2048, 8192, 24, 50304  # of a model of 1.3 billion parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--only", nargs="*", default=_PARTS)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096])
    options = parser.parse_args()
    bench = _Bench(Kernels(), options.batches)
    result: dict[str, Any] = {"machine": machine.describe(), "device": torch.cuda.get_device_name()}
    result |= {"copy_bytes_per_second": bench.bandwidth, "product_flops": bench.flops}
    print(f"{result['device']}: copy {bench.bandwidth / 1e12:.2f} TB/s, products {bench.flops / 1e12:.0f} TFLOP/s")
    for name in options.only:
        result[name] = getattr(bench, name)()
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


class _Bench:
    def __init__(self, kernels: Kernels, batches: list[int]) -> None:
        self.kernels, self.batches = kernels, batches
        self.bandwidth, self.flops = _copy_bandwidth(), _product_flops()

    def row(self, seconds: float, moved: float, work: float = 0.0, **what: Any) -> dict[str, Any]:
        floor = max(moved / self.bandwidth, work / self.flops)
        row = what | {"us": 1e6 * seconds, "floor_us": 1e6 * floor, "of_floor": floor / seconds}
        print(*(f"{value:.4g}" if isinstance(value, float) else value for value in row.values()))
        return row

    def steps(self) -> list[dict[str, Any]]:
        """HyenaMixer, one token, and HyenaStep."""
        rows = []
        for batch in (1, 64, 256, 1024, 4096, 8448):
            rows.append(self._mixer("step, past apart", batch, 1, 4, torch.float16, apart=True))
        for order in (4, 16):
            for state in (torch.float16, torch.float32):
                for batch in (1, 8, 64, 256, 1024, 4096):
                    rows.append(self._mixer("step", batch, 1, order, state))
        rows.append(self._mixer("step, packed", 1024, 1, 4, torch.float16, packed=True))
        rows.append(self._mixer("step, interleaved", 1024, 1, 4, torch.float16, block=1))
        return rows

    def prefills(self) -> list[dict[str, Any]]:
        return [self._mixer("prefill", *size, 4, torch.float32) for size in ((1, 512), (1, 4096), (16, 512))]

    def _mixer(
        self,
        name: str,
        batch: int,
        time: int,
        order: int,
        state: torch.dtype,
        packed: bool = False,
        block: int = WIDTH,
        apart: bool = False,
    ) -> dict[str, Any]:
        past = 2 * 6 * (1 if apart else 2)  # read, and written
        moved = batch * WIDTH * (2 * 4 * time + past + 2 * order * state.itemsize) + WIDTH * 4 * (13 + 3 * order)
        index = None
        if packed:
            index = torch.arange(order * WIDTH, dtype=torch.int32, device="cuda").view(order, WIDTH)
        tables = [_random(3, 3 * WIDTH), _random(3 * WIDTH), *(0.5 * _random(order, WIDTH) for _ in range(3))]

        def call() -> Call:
            states = (batch, 1, order * WIDTH) if packed else (batch, order, WIDTH)
            changing = _random(batch, time, 3 * WIDTH, dtype=HALF), _random(batch, 2, 3 * WIDTH, dtype=HALF)
            inputs = (*changing, _random(*states, dtype=state), *tables, _random(WIDTH), index)
            if apart:
                past = [token.contiguous() for token in changing[1].split(1, 1)]
                return self.kernels.step((inputs[0], *inputs[2:], *past), block, 0)[1]
            return self.kernels.mixer(inputs, block, 0)[1]

        def copies(work: Callable[[Tensor, Tensor], object]) -> Call:
            source, target = (torch.zeros(int(moved / 8), dtype=torch.int32, device="cuda") for _ in range(2))
            return partial(work, target, source)

        seconds = _timed(call, moved)
        what = {"name": name, "batch": batch, "time": time, "order": order, "state": str(state)[6:]}
        # a copy of as many bytes, in graphs like those of the operator, by the faster of two ways
        copied = (Tensor.copy_, lambda target, source: torch.add(source, 1, out=target))
        copy = min(_timed(partial(copies, work), moved) for work in copied)
        return self.row(seconds, moved, **what, copy_us=1e6 * copy)

    def linears(self) -> list[dict[str, Any]]:
        return self._linears(16)

    def eights(self) -> list[dict[str, Any]]:
        """LinearFp8; the arithmetic floor is that of products of float16, halved."""
        return self._linears(8)

    def fours(self) -> list[dict[str, Any]]:
        """LinearInt4; the arithmetic floor is that of products of float16."""
        return self._linears(4)

    def mlps(self) -> list[dict[str, Any]]:
        """MlpFp8 beside two LinearFp8, whose time is `apart_us`; the floors are those of `eights`."""
        rows = []
        for batch in self.batches:
            moved = 2 * _weight_bytes(8, WIDTH * HIDDEN) + 2 * batch * 3 * WIDTH
            seconds = _timed(partial(self._mlp, batch), moved)
            apart = sum(
                _timed(partial(self._linear, name, batch, bits=8), moved / 2 + 2 * batch * HIDDEN)
                for name in ("up", "down")
            )
            work = 2 * batch * WIDTH * HIDDEN
            rows.append(self.row(seconds, moved, work, name="mlp", rows=batch, apart_us=1e6 * apart))
        return rows

    def _mlp(self, batch: int) -> Call:
        up, down = (torch.randn(shape, device="cuda") for shape in ((HIDDEN, WIDTH), (WIDTH, HIDDEN)))
        inputs = (
            *(_random(batch, 1, WIDTH, dtype=HALF), up.to(torch.float8_e4m3fn), _random(HIDDEN, dtype=HALF)),
            *(down.to(torch.float8_e4m3fn), _random(WIDTH, dtype=HALF), _random(batch, 1, WIDTH, dtype=HALF)),
            *(_random(WIDTH), _random(WIDTH)),
            *(torch.rand(size, device="cuda") / width**0.5 for size, width in ((HIDDEN, WIDTH), (WIDTH, HIDDEN))),
            torch.tensor([1.0, 4.0], device="cuda"),
        )
        return self.kernels.mlp(inputs, "layer", "gelu_tanh")[1]

    def _linears(self, bits: int) -> list[dict[str, Any]]:
        rows = []
        for name, width, out, norm, activation, residual in _NODES:
            for batch in self.batches:
                moved = _weight_bytes(bits, width * out) + 2 * batch * (width + out * (1 + residual))
                seconds = _timed(partial(self._linear, name, batch, bits=bits), moved)
                work = (1 if bits == 8 else 2) * batch * width * out
                rows.append(self.row(seconds, moved, work, name=name, rows=batch, norm=norm, activation=activation))
        return rows

    def _linear(self, name: str, batch: int, x: Tensor | None = None, bits: int = 16) -> Call:
        return self._linear_with_output(name, batch, x, bits)[1]

    def _linear_with_output(
        self, name: str, batch: int, x: Tensor | None = None, bits: int = 16
    ) -> tuple[Tensor, Call]:
        width, out, norm, activation, residual = next(node[1:] for node in _NODES if node[0] == name)
        inputs: tuple[Tensor | None, ...] = (
            _random(batch, 1, width, dtype=HALF) if x is None else x,
            _random(out, width, dtype=HALF) / width**0.5,
            _random(out, dtype=HALF),
            _random(batch, 1, out, dtype=HALF) if residual else None,
            _random(width) if norm != "none" else None,
            _random(width) if norm != "none" else None,
        )
        if bits == 8:
            weight = torch.randn(out, width, device="cuda").to(torch.float8_e4m3fn)
            inputs = (inputs[0], weight, *inputs[2:], torch.rand(out, device="cuda") / width**0.5)
        if bits == 4:
            weight = torch.randint(256, (out, width // 32, 16), dtype=torch.uint8, device="cuda")
            scales = torch.rand(out, width // 32, dtype=HALF, device="cuda") / width**0.5
            inputs = (inputs[0], weight, *inputs[2:], scales)
        outputs, call = self.kernels.linear(inputs, norm, activation)
        return outputs[0], call

    def whole_step(self) -> list[dict[str, Any]]:
        """All layers of a model in one graph, five operators a layer, and the logits: nothing else of the step."""
        rows = []
        for bits, batch in ((bits, batch) for bits in (16, 8, 4) for batch in (1, 4, 8, 16, 32, 64, 128, 512)):
            calls = [call for _ in range(LAYERS) for call in self._layer(batch, bits)]
            calls.append(self._linear("logits", batch, bits=bits))
            weights = LAYERS * sum(w * o for name, w, o, *_ in _NODES if name != "logits") + WIDTH * VOCABULARY
            moved = _weight_bytes(bits, weights) + LAYERS * batch * WIDTH * (24 + 2 * 4 * 2)
            seconds = _replayed(calls)
            rows.append(self.row(seconds, moved, 2 * batch * weights, name="all layers", bits=bits, batch=batch))
        return rows

    def _layer(self, batch: int, bits: int = 16) -> list[Call]:
        tables = [_random(3, 3 * WIDTH), _random(3 * WIDTH), *(0.5 * _random(4, WIDTH) for _ in range(3))]
        past = [_random(batch, 1, 3 * WIDTH, dtype=HALF) for _ in range(2)]
        then = (_random(batch, 4, WIDTH, dtype=HALF), *tables, _random(WIDTH), None, *past)
        projected, first = self._linear_with_output("in", batch, bits=bits)
        (mixed, _), second = self.kernels.step((projected, *then), WIDTH, 0)
        x, third = self._linear_with_output("out", batch, mixed, bits)
        if bits == 8:
            return [first, second, third, self._mlp(batch)]
        hidden, fourth = self._linear_with_output("up", batch, x, bits)
        return [first, second, third, fourth, self._linear("down", batch, hidden, bits)]

    def samples(self) -> list[dict[str, Any]]:
        rows = []
        for name, temperature, top_k, top_p in (
            ("greedy", 0.0, 0, 1.0),
            ("temperature", 1.0, 0, 1.0),
            ("top_k", 1.0, 50, 1.0),
            ("top_p", 1.0, 0, 0.9),
        ):
            for batch in (1, 256, 2048):

                def call(batch: int = batch, settings: tuple[float, int, float] = (temperature, top_k, top_p)) -> Call:
                    inputs = (
                        3 * _random(batch, 1, VOCABULARY, dtype=HALF),
                        torch.rand(batch, device="cuda"),
                        torch.full((batch,), settings[0], device="cuda"),
                        torch.full((batch,), settings[1], dtype=torch.int64, device="cuda"),
                        torch.full((batch,), settings[2], device="cuda"),
                    )
                    return self.kernels.sample(inputs)[1]

                moved = 2 * batch * VOCABULARY
                rows.append(self.row(_timed(call, moved), moved, name=name, batch=batch))
        return rows

    def embeddings(self) -> list[dict[str, Any]]:
        """Embedding of a table of float16, and EmbeddingInt4."""
        table = _random(VOCABULARY, WIDTH, dtype=HALF)
        codes = torch.randint(256, (VOCABULARY, WIDTH // 32, 16), dtype=torch.uint8, device="cuda")
        scale = _random(VOCABULARY, WIDTH // 32, dtype=HALF)
        rows = []
        for bits, read in ((16, 2.0 * WIDTH), (4, 9 / 16 * WIDTH)):
            for batch in (1, 256, 4096, 16896):

                def call(batch: int = batch, bits: int = bits) -> Call:
                    tokens = torch.randint(VOCABULARY, (batch, 1), device="cuda")
                    return self.kernels.embedding((table, tokens) if bits == 16 else (codes, tokens, scale))[1]

                moved = int(batch * (read + 2 * WIDTH))
                rows.append(self.row(_timed(call, moved), moved, name="embedding", bits=bits, batch=batch))
        return rows


_PARTS = ["steps", "whole_step", "prefills", "linears", "eights", "mlps", "fours", "samples", "embeddings"]
_NODES = [
    ("in", WIDTH, 3 * WIDTH, "layer", "none", False),
    ("out", WIDTH, WIDTH, "none", "none", True),
    ("up", WIDTH, HIDDEN, "layer", "gelu_tanh", False),
    ("down", HIDDEN, WIDTH, "none", "none", True),
    ("logits", WIDTH, VOCABULARY, "layer", "none", False),
]


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def _weight_bytes(bits: int, count: int) -> int:
    """Of so many weights; those of 4 bits have a scale of 16 for 32."""
    return count * bits // 8 + (count // 16 if bits == 4 else 0)


def _timed(make: Callable[[], Call], moved: float) -> float:
    """Seconds of one call: a graph of as many as move twice what the cache holds, at least four."""
    count = max(4, min(64, int(2 * CACHE / moved)))
    calls = [make() for _ in range(count)]
    return _replayed(calls * max(1, 16 // count)) / (count * max(1, 16 // count))


def _replayed(calls: list[Call], repeats: int = 15) -> float:
    """Median seconds of a graph of all calls."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    return _events(graph.replay, repeats)


def _events(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return median(times)


def _copy_bandwidth() -> float:
    """Bytes per second of a copy on the device, read plus written."""
    source = torch.empty(1 << 30, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / _events(lambda: target.copy_(source), 10)


def _product_flops() -> float:
    """Operations per second of a large product of random float16 matrices."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=HALF) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * 8192**3 / _events(lambda: a @ b, 10)


if __name__ == "__main__":
    main()
