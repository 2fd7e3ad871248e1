"""Every tolerance of a build, with its reason. A gate that is not met raises ParityError; it is never widened."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CAPTURED", "ONNX", "RECOGNIZED", "STREAMED", "Tolerance", "quantized_tolerance"]


@dataclass(frozen=True)
class Tolerance:
    """Largest |Δ| allowed, as a share of the reference's root mean square, and why no smaller.

    on_average: the root mean square of Δ is meant, where errors are random and the largest of many has no bound
    """

    name: str
    relative: float
    reason: str
    on_average: bool = False


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


def quantized_tolerance(target: str, precision: str) -> Tolerance:
    """For graphs with quantized weights against those of the weights' rounded values in single precision."""
    if precision == "none":
        return ONNX
    if target == "cuda" and precision in ("fp16", "bf16"):
        share = {"fp16": 5e-3, "bf16": 4e-2}[precision]
        return Tolerance(precision, share, "signals are rounded to 16 bits around every product", on_average=True)
    if precision in ("int8", "int4"):
        bits, share = (7, 0.1) if (target, precision) == ("cpu", "int8") else (8, 0.03)
        reason = f"kernels round signals to {bits} bits before every product"
        return Tolerance(precision, share, reason, on_average=True)
    return Tolerance(precision, ONNX.relative, f"products are computed in single precision: {ONNX.reason}")
