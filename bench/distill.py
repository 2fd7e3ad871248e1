"""Distillation methods side by side: error against order against time, and what the example model makes of it.

    python -m bench.distill --out docs/bench      writes distill.json, and distill.md and distill.svg made from it
    python -m bench.distill --parts planted       prints a part only: filters, patience, starts, planted, …
    python -m bench.distill --quick               everything, so small that it only shows that it works

filters:  every method on a sample of the example's trained filters, in the plain norm and weighted by what they hear
patience: gradient descent as its authors published it, and ours with as many steps, against the default method
starts:   the default method against the best of 60 refined starts, random or near what it found
planted:  random systems of order 8 and 32, well separated or clustered, moduli up to 0.9995, without and with noise
cost:     seconds against length and against number of filters; a curve ends where the next point would take long
scale:    seconds and peak memory of 2048 filters, of 1 000 002 taps, and of 49 152 filters where there is a GPU
model:    held-out loss of the example with the same order everywhere, and with the orders its budget allows
"""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.distill_published import compare
from bench.distill_report import PLOTTED, picture, tables
from bench.machine import describe
from lhcompile.artifacts import LoadedModel, Program, Sequences
from lhcompile.calibrate import calibrate
from lhcompile.capture import capture
from lhcompile.config import CalibrationConfig, DistillConfig
from lhcompile.distill import METHODS, Reduction, distill, reduce
from lhcompile.distill.bank import Bank
from lhcompile.distill.closed import closed
from lhcompile.distill.convolutions import Convolutions
from lhcompile.distill.norm import tap_norm
from lhcompile.distill.spectrum import fit_residues, radius_limit, stabilise
from lhcompile.distill.varpro import refine, to_poles, to_theta
from lhcompile.load import load
from lhcompile.measure import loss
from lhcompile.recognize import recognize
from lhcompile.ssm import ModalSSM

EXAMPLE = Path(__file__).parents[1] / "examples/pysource"
SLOW = ("gradient", "gradient-h2")
"""Methods that are run at fewer orders, not in the weighted norm, and not on planted systems without noise."""
SAMPLE, SEARCHED, PATIENT, PLANTED = 64, 50, 24, 16
"""Filters of the example, spread over its layers: for filters, starts, patience; planted systems of each kind."""
LIMIT = 30.0
"""Seconds that the next point of a cost curve may take, judged by how the last two grew."""
Row = dict[str, Any]


# ---- what is reduced -----------------------------------------------------------------------------------------------


@cache
def example() -> tuple[LoadedModel, Program, Sequences]:
    """The example model, recognized, and its tokens, as a build has them."""
    loaded = load(str(EXAMPLE / "model.pt"), config=EXAMPLE / "config.yaml")
    program = recognize(capture(loaded))
    config = CalibrationConfig(calibration=EXAMPLE / "heldout.txt")
    return loaded, program, calibrate(config, program, loaded.parameters, lambda: program)


@cache
def trained() -> tuple[Convolutions, Tensor]:
    """The example's filters and the power spectra they hear on the calibration tokens."""
    _, program, tokens = example()
    convolutions = Convolutions(program)
    return convolutions, convolutions.heard(tokens.calibration)


def planted(filters: int, length: int, order: int, noise: float, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Unit taps of random systems, and the same with white noise of the given norm, [filters, length] each.

    Moduli are 1 − 0.0005·100^u, u uniform in 0 … 1; angles lie within π·spread, beginning at 0.3 if that is less
    """
    generator = torch.Generator().manual_seed(0)
    pairs = order // 2

    def uniform() -> Tensor:
        return torch.rand(filters, pairs, generator=generator, dtype=torch.float64)

    moduli, angles = 1 - 5e-4 * 100 ** uniform(), (0.3 if spread < 1 else 0.0) + torch.pi * spread * uniform()
    residue = torch.randn(filters, pairs, generator=generator, dtype=torch.complex128)
    first = torch.polar(moduli, angles)
    poles, residues = (torch.stack([x, x.conj()], -1).flatten(1) for x in (first, residue))
    taps = ModalSSM(poles, residues, torch.zeros(filters, dtype=torch.float64)).taps(length)
    taps = taps / taps.norm(dim=-1, keepdim=True)
    rough = torch.randn(taps.shape, generator=generator, dtype=torch.float64)
    return taps, taps + noise * rough / rough.norm(dim=-1, keepdim=True)


# ---- the parts -----------------------------------------------------------------------------------------------------


def filters(quick: bool) -> list[Row]:
    """Errors on the example's filters; see the module's text."""
    convolutions, heard = trained()
    sample, layer = _sample(4 if quick else SAMPLE)
    rows = []
    for norm, weights in (("l2", None), ("heard", heard[sample])):
        for method in METHODS:
            for order in _orders(method, norm, quick):
                result = reduce(convolutions.taps[sample], order, weights=weights, method=method)
                row = {"norm": norm, "method": method, "order": order, "filters": len(sample), **_figures(result)}
                row["layers"] = [float(result.error[layer == each].mean()) for each in layer.unique()]
                rows.append(_said(row | {"milliseconds": 1e3 * result.seconds / len(sample)}))
    return rows


def patience(quick: bool) -> list[Row]:
    """Gradient descent with the steps its authors took against the default method; see the module's text."""
    sample, layer = _sample(4 if quick else PATIENT)
    return [_said(row) for row in compare(trained()[0].taps[sample], layer, quick)]


def _sample(count: int) -> tuple[Tensor, Tensor]:
    """Filters of the example, spread over its layers, and the layer of each."""
    convolutions, _ = trained()
    sample = torch.linspace(0, len(convolutions.taps) - 1, count).round().long()
    return sample, torch.arange(len(convolutions.counts)).repeat_interleave(torch.tensor(convolutions.counts))[sample]


def starts(quick: bool) -> list[Row]:
    """The default method against the best local optimum from many starts; see the module's text."""
    convolutions, _ = trained()
    sample = torch.linspace(0, len(convolutions.taps) - 1, 2 if quick else SEARCHED).round().long()
    norm = tap_norm(convolutions.taps[sample], None)
    form, rows = closed(norm), []
    for order in (2,) if quick else (2, 4, 6, 8):
        found = reduce(norm.taps, order)
        least = torch.full((len(sample),), torch.inf, dtype=torch.float64)
        for seed in range(4 if quick else 60):
            shake = torch.randn(len(sample), order // 2, 2, generator=torch.Generator().manual_seed(seed)).double()
            if seed % 3:  # near what was found, and farther
                poles = to_poles(to_theta(found.system.poles) + (0.3, 1.0)[seed % 2] * shake)
            else:  # anywhere
                poles = to_poles(shake * torch.tensor([1.5, 3.0]) + torch.tensor([0.0, 2.0]))
            best = stabilise(refine(poles, form, order)[0], radius_limit(norm.length))
            least = torch.minimum(least, fit_residues(best, norm)[1])
        ratio = found.error / least
        row = {"order": order, "filters": len(sample), "mean": float(ratio.mean()), "worst": float(ratio.max())}
        rows.append(_said(row))
    return rows


def _orders(method: str, norm: str, quick: bool) -> tuple[int, ...]:
    if quick:
        return (2,) if norm == "l2" or method not in SLOW else ()
    if method in SLOW:
        return (2, 4, 8, 16) if norm == "l2" else ()
    return (1, 2, 3, 4, 6, 8, 16, 24) if norm == "l2" else (2, 4, 8, 16)


def recovery(quick: bool) -> list[Row]:
    """Errors on planted systems, of the taps given and of the noiseless ones; see the module's text."""
    rows = []
    for kind, spread in (("separated", 1.0), ("clustered", 0.03)):
        for noise in (0.0, 1e-3):
            for order in (8,) if quick else (8, 32):
                clean, taps = planted(2 if quick else PLANTED, 256 if quick else 1024, order, noise, spread)
                for method in (m for m in METHODS if m not in SLOW or (noise and order == 8 and not quick)):
                    result = reduce(taps, order, method=method)
                    missed = (result.taps(clean.shape[1]) - clean).norm(dim=-1)
                    row = {"kind": kind, "noise": noise, "order": order, "method": method, **_figures(result)}
                    row |= {"missed_mean": float(missed.mean()), "milliseconds": 1e3 * result.seconds / len(taps)}
                    rows.append(_said(row))
    return rows


def cost(quick: bool) -> list[Row]:
    """Seconds of a reduction to order 4 by length (one filter) and by number of filters (1024 taps).

    Below a second the shortest of three.
    """
    lengths = [1 << k for k in range(8, 11 if quick else 21, 2)]
    counts = [1 << k for k in range(0, 4 if quick else 13, 2)]
    rows: list[Row] = []
    for method in (m for m in METHODS if m != "gradient-h2"):  # costs what the other does
        for what, sizes in (("length", lengths), ("filters", counts)):
            before = seconds = 0.0
            for size in sizes if not (quick and method in SLOW) else []:
                if before and seconds * min(max(seconds / before, 1), 4) > LIMIT:
                    break
                _, taps = planted(*((1, size) if what == "length" else (size, 1024)), 8, 1e-3)
                before, seconds = seconds, reduce(taps, 4, method=method).seconds
                if seconds < 1:
                    seconds = min(seconds, *(reduce(taps, 4, method=method).seconds for _ in range(2)))
                rows.append(_said({"what": what, "size": size, "method": method, "seconds": seconds}))
    return rows


def scale(quick: bool) -> list[Row]:
    """Seconds and peak memory of a model's filters and of the longest there are; see the module's text."""
    cpu = [(64, 256)] if quick else [(1, 1_000_002), (2048, 1024)]
    gpu = [(49_152, 2048)] if torch.cuda.is_available() and not quick else []
    rows = []
    for device, sizes in (("cuda", gpu), ("cpu", cpu)):
        for filters, length in sizes:
            taps = implicit(filters, length, device)
            weights = 1 / (1e-3 + torch.linspace(0, 1, min(length, 4096) + 1, device=device).double().square())
            for method, order in (("hankel", 8), ("varpro", 4), ("varpro", 8)):
                if device == "cuda":
                    reduce(taps[:64], order, weights=weights.expand(64, -1), method=method)  # its kernels are loaded
                    torch.cuda.reset_peak_memory_stats()
                before = _peak(device)
                result = reduce(taps, order, weights=weights.expand(filters, -1), method=method)
                row = {"device": device, "filters": filters, "length": length, "method": method, "order": order}
                row |= {"seconds": result.seconds, "gib": _peak(device) - before, "threads": torch.get_num_threads()}
                rows.append(_said(row | {"error_mean": float(result.error.mean())}))
    return rows


def implicit(filters: int, length: int, device: str) -> Tensor:
    """Taps such as implicit filters have: decays of 12 rates times waves, with a little decaying noise."""
    generator = torch.Generator(device=device).manual_seed(0)

    def draw(kind: Callable[..., Tensor], columns: int = 1) -> Tensor:
        return kind(filters, columns, generator=generator, device=device, dtype=torch.float64)

    lag = torch.arange(length, device=device, dtype=torch.float64)
    taps = 0.1 * draw(torch.randn, length) * torch.exp(-3 * lag / length)
    for _ in range(12):
        rate, wave, size = length ** -draw(torch.rand), 3.1 * draw(torch.rand).square(), draw(torch.randn)
        taps += size * torch.exp(-rate * lag) * torch.cos(wave * lag + 6 * size)
    return taps


def _peak(device: str) -> float:
    """Most memory used so far, GiB: by the process, or since the last reset on the accelerator."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def model(quick: bool) -> list[Row]:
    """Held-out losses of the example; see the module's text."""
    _, program, tokens = example()
    convolutions, heard = trained()
    heldout = tokens.heldout[:2] if quick else tokens.heldout
    reference = loss(program, heldout)
    rows = [{"fit": "undistilled", "mean_order": None, "loss": reference, "rise": 0.0}]

    def row(fit: str, order: float, variant: Program) -> None:
        value = loss(variant, heldout)
        rows.append(_said({"fit": fit, "mean_order": order, "loss": value, "rise": value / reference - 1}))

    bank = Bank(convolutions.taps, heard, DistillConfig().method, lambda _: None)
    for order in (2,) if quick else (2, 4, 8, 16, 32):
        for name, taps in _variants(convolutions.taps, heard, bank, order):
            row(name, order, convolutions.with_taps(taps))
    if not quick:
        full = distill(program, DistillConfig(), tokens.calibration, judging=tokens.judging)
        orders = torch.cat([layer.orders for layer in full.layers if layer.orders is not None]).double()
        row("default, budget 0.1 %", float(orders.mean()), full.program)
    return rows


def _variants(taps: Tensor, heard: Tensor, bank: Bank, order: int) -> Iterator[tuple[str, Tensor]]:
    """Taps of Hankel reductions in the l2 norm, their residues refitted to what is heard; a build's of one order."""
    plain = reduce(taps, order, method="hankel").system
    yield "plain poles, plain residues", plain.taps(taps.shape[1])
    yield "plain poles, heard residues", fit_residues(plain.poles, tap_norm(taps, heard))[0].taps(taps.shape[1])
    yield "default", bank.reduce(order).single().taps(taps.shape[1])


def _figures(result: Reduction) -> Row:
    error, bound = result.error, result.bound
    return {"error_mean": float(error.mean()), "error_worst": float(error.max()), "bound_mean": float(bound.mean())}


def _said(row: Row) -> Row:
    shown = [value for value in row.values() if not isinstance(value, list)]
    print(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in shown), flush=True)
    return row


PARTS = {
    "filters": filters,
    "patience": patience,
    "starts": starts,
    "planted": recovery,
    "cost": cost,
    "scale": scale,
    "model": model,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="small samples, to see that it works")
    parser.add_argument("--out", type=Path, help="folder for distill.json, .md and .svg; other parts there are kept")
    options = parser.parse_args()
    reduce(planted(4, 256, 4, 1e-3)[1], 4)  # what only the first call pays is not measured
    path = None if options.out is None else options.out / "distill.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.is_file() else {}
    for part in options.parts:
        command = f"python -m bench.distill --parts {part}" + " --quick" * options.quick
        result[part] = {"command": command, "machine": describe(), "rows": PARTS[part](options.quick)}
    text = tables(result)
    print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".md").write_text(text + "\n")
        if PLOTTED & result.keys():
            path.with_suffix(".svg").write_text(picture(result))


if __name__ == "__main__":
    main()
