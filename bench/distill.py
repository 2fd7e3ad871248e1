"""Distillation methods side by side: error and time by order.

    python -m bench.distill --taps FILE.npy [--weights FILE.npy] [--orders 2 4 8] [--methods hankel varpro]
    python -m bench.distill --planted [--noise 1e-3]

FILE.npy holds taps [filters, length] (weights: power spectra [filters, bins]). Prints a table and, with --json,
writes every figure with hardware, versions and commit.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.machine import describe
from lhcompile.distill import METHODS, factorize
from lhcompile.ssm import ModalSSM


def planted(filters: int, length: int, order: int, noise: float) -> Tensor:
    """Unit taps of random systems, radius up to 0.9995, and white noise of the given norm."""
    generator = torch.Generator().manual_seed(0)
    pairs = order // 2

    def uniform() -> Tensor:
        return torch.rand(filters, pairs, generator=generator, dtype=torch.float64)

    first = torch.polar(1 - 5e-4 * 100 ** uniform(), torch.pi * uniform())
    residue = torch.randn(filters, pairs, generator=generator, dtype=torch.complex128)
    poles, residues = (torch.stack([x, x.conj()], -1).flatten(1) for x in (first, residue))
    taps = ModalSSM(poles, residues, torch.zeros(filters, dtype=torch.float64)).taps(length)
    rough = torch.randn(taps.shape, generator=generator, dtype=torch.float64)
    return taps / taps.norm(dim=-1, keepdim=True) + noise * rough / rough.norm(dim=-1, keepdim=True)


def measure(taps: Tensor, weights: Tensor | None, orders: list[int], methods: list[str]) -> list[dict]:
    """One row per order and method; the time includes the factorization, made anew for each."""
    rows = []
    for order in orders:
        for method in methods:
            reducer = factorize(taps, order, weights)
            result = reducer.reduce(order, method)
            row = {
                "method": method,
                "order": order,
                "error_mean": float(result.error.mean()),
                "error_max": float(result.error.max()),
                "bound_mean": float(result.bound.mean()),
                "seconds": result.seconds,
            }
            figures = " ".join(f"{row[name]:11.4e}" for name in ("error_mean", "error_max", "bound_mean"))
            print(f"{method:>9} {order:5d} {figures} {result.seconds:9.2f}", flush=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--taps", type=Path)
    source.add_argument("--planted", action="store_true", help="random systems of order 8")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--noise", type=float, default=1e-3)
    parser.add_argument("--filters", type=int, default=64, help="of --planted, or the first of --taps")
    parser.add_argument("--orders", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 16])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.planted:
        taps = planted(options.filters, 1024, 8, options.noise)
    else:
        taps = torch.from_numpy(np.load(options.taps)).double()[: options.filters]
    weights = None if options.weights is None else torch.from_numpy(np.load(options.weights))[: options.filters]
    print(f"{taps.shape[0]} filters of length {taps.shape[1]}, {'plain' if weights is None else 'input-weighted'} norm")
    print(f"{'method':>9} {'order':>5} {'mean error':>11} {'max error':>11} {'mean bound':>11} {'seconds':>9}")
    rows = measure(taps, weights, options.orders, options.methods)
    if options.json is not None:
        record = {"filters": taps.shape[0], "length": taps.shape[1], "rows": rows, **describe()}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
