"""Every tolerance of a build, with its reason. A gate that is not met raises ParityError; it is never widened."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CAPTURED", "ONNX", "RECOGNIZED", "STREAMED", "Tolerance"]


@dataclass(frozen=True)
class Tolerance:
    """Largest |Δ| allowed, as a share of the reference's root mean square, and why no smaller."""

    name: str
    relative: float
    reason: str


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
