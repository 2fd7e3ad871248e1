"""Every tolerance of a build, with its reason. A gate that is not met raises ParityError; it is never widened."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

__all__ = [
    "CAPTURED",
    "ONNX",
    "RECOGNIZED",
    "STREAMED",
    "Tolerance",
    "added_tolerance",
    "codes_tolerance",
    "kept_tolerance",
    "quantized_tolerance",
    "rounded_to",
    "state_tolerance",
]


@dataclass(frozen=True)
class Tolerance:
    """Largest |Δ| allowed, as a share of the reference's root mean square, and why no smaller.

    on_average: the root mean square of Δ is meant, where errors are random and the largest of many has no bound
    of_each: of a number larger than the root mean square the share is of itself, where rounding is all that differs
    """

    name: str
    relative: float
    reason: str
    on_average: bool = False
    of_each: bool = False


CAPTURED = Tolerance(
    "captured",
    1e-5,
    "the same operators in the same order, only fused kernels may round differently; a module that takes longer "
    "sequences than its filters last needs --context",
)
RECOGNIZED = Tolerance(
    "recognized", 5e-4, "taps are read back from single-precision spectra: 1e-7 a tap, over all taps and layers"
)
STREAMED = Tolerance("streamed", 5e-4, "sums over time are taken in another order in single precision")
ONNX = Tolerance("onnx", 5e-4, "another library's kernels, and states rounded to single precision between calls")


def codes_tolerance(terms: int) -> Tolerance:
    """For quantized graphs whose products are made in float32, against those of the weights' rounded values.

    terms: of the products that follow one another, added up. Rounding errors of as many are √terms · 2⁻²⁴ together,
    with a probability that does not depend on terms (Higham and Mary, SIAM J. Sci. Comput. 41, 2019); measured are 0.3
    to 0.5 of it. It is 2e-5 for 112 000 terms, as 8 layers of width 2048 have; small models keep that.
    """
    reason = (
        "both graphs make their products of the same numbers in single precision, in another order at most; "
        f"{terms} terms part by about their root times 2⁻²⁴, large numbers by such a share of themselves"
    )
    return Tolerance("codes", max(2e-5, math.sqrt(terms) * 2.0**-24), reason, of_each=True)


class Kept(Protocol):
    """A state, as the stages or as the manifest have it."""

    @property
    def dtype(self) -> str: ...

    @property
    def kind(self) -> str: ...


def rounded_to(states: Collection[Kept]) -> str | None:
    """What states are kept in, where that loses something: the past of a float16 signal alone, in float16 beside others
    in float32, loses nothing."""
    kept = {state.dtype for state in states}
    if "int8" in kept:
        return "int8"
    beside = {state.dtype for state in states if state.kind != "fir"}
    return "float16" if "float16" in beside or ("float16" in kept and "float32" not in kept) else None


def kept_tolerance(states: Collection[Kept]) -> Tolerance:
    """For graphs that keep their states so against the same graphs whose states are rounded from outside."""
    dtype = rounded_to(states)
    if dtype is None:
        return Tolerance("states", 0.0, "what float16 keeps is the past of a float16 signal, bit for bit")
    share = 1e-3 if dtype == "int8" else 2e-4
    reason = "the same kernels read the same states; a number halfway between two codes may be rounded to either"
    return Tolerance("states", share, reason, on_average=True)


def state_tolerance(dtype: str) -> Tolerance:
    """For outputs of states kept in `dtype`, fed token by token, against those of float32 states."""
    bits, share = {"float16": (11, 1e-2), "int8": (8, 0.1)}[dtype]
    reason = f"states are rounded to {bits} bits at every token, which slow poles add up"
    return Tolerance(f"{dtype} states", share, reason, on_average=True)


def added_tolerance(signals: float, states: Tolerance) -> Tolerance:
    """For outputs of rounded signals and states in fewer bits, against those of neither.

    signals: share of the root mean square by which rounded signals alone part from it; states: of those alone
    """
    share = 1.1 * math.hypot(signals, states.relative)
    reason = f"rounded signals alone make it {signals:.2g}, and independent errors add in squares, within a tenth"
    return Tolerance(states.name, share, reason, on_average=True)


def quantized_tolerance(target: str, precision: str) -> Tolerance:
    """For graphs with quantized weights against those of the weights' rounded values in single precision."""
    if precision == "none":
        return ONNX
    if target == "cuda" and precision in ("fp16", "bf16"):
        bits, share = {"fp16": (11, 5e-3), "bf16": (8, 8e-2)}[precision]
        reason = f"every signal is rounded to {bits} bits, also what residuals add up; tiny models come close"
        return Tolerance(precision, share, reason, on_average=True)
    if precision == "fp8":
        reason = "signals are rounded to 4 bits before every product, 2 % of each number; tiny models reach half of it"
        return Tolerance(precision, 0.3, reason, on_average=True)
    if precision in ("int8", "int4"):
        bits, share = (7, 0.1) if (target, precision) == ("cpu", "int8") else (8, 0.03)
        reason = f"kernels round signals to {bits} bits before every product"
        return Tolerance(precision, share, reason, on_average=True)
    return Tolerance(precision, ONNX.relative, f"products are computed in single precision: {ONNX.reason}")
