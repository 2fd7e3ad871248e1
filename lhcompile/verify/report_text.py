"""How figures are written in the report: short, with units, and a dash where there is nothing to say."""

from __future__ import annotations

import math

__all__ = ["count", "number", "percent", "power_of_ten", "seconds", "signed_percent", "size"]

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_DASH = "–"
_MINUS = "−"
_NBSP = "\u00a0"


def power_of_ten(value: float) -> str:
    """0.001 → 10⁻³, for the decades of a logarithmic axis."""
    exponent = round(math.log10(value))
    return "1" if exponent == 0 else "10" + str(exponent).translate(_SUPERSCRIPT)


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits; powers of ten outside 0.001 … 100 000."""
    if value is None:
        return _DASH
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
        return f"{value:.{decimals}f}".replace("-", _MINUS)
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPT)}".replace("-", _MINUS)


def signed_percent(value: float | None) -> str:
    """0.0006 → +0.060 %; below a thousandth of a percent it is 0."""
    if value is None or not math.isfinite(value):
        return number(value)
    if abs(value) < 5e-6:
        return f"0{_NBSP}%"
    decimals = 3 if abs(value) < 1e-2 else 2
    return f"{100 * value:+.{decimals}f}{_NBSP}%".replace("-", _MINUS)


def percent(value: float | None) -> str:
    """0.9987 → 99.87 %."""
    return number(value) if value is None or not math.isfinite(value) else f"{100 * value:.2f}{_NBSP}%"


def count(value: int | None) -> str:
    """6896640 → 6 896 640."""
    return _DASH if value is None else f"{value:,}".replace(",", "\u202f")


def size(value: float | None) -> str:
    """Bytes in units of 1024."""
    if value is None:
        return _DASH
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f}{_NBSP}B" if unit == "B" else f"{number(value)}{_NBSP}{unit}"


def seconds(value: float) -> str:
    """Seconds, or minutes from two minutes on."""
    return f"{value:.2f}{_NBSP}s" if value < 120 else f"{int(value // 60)}{_NBSP}min {value % 60:.0f}{_NBSP}s"
