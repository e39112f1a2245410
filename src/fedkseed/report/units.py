"""Numbers as people read them."""

from __future__ import annotations

import math

NONE = "\N{EN DASH}"
"""What stands where there is no number."""


def size(num_bytes: float) -> str:
    """Bytes in decimal units, three digits: 682 B, 18 kB, 2.08 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.4g} TB"


def amount(num_bytes: float) -> str:
    """Whole bytes below a million, in decimal units above."""
    return f"{num_bytes:,.0f} B" if num_bytes < 1e6 else size(num_bytes)


def loss(value: float | None) -> str:
    """Four decimals; a loss that is not a number says so."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3g}"


def percent(value: float) -> str:
    """With its sign, and a real minus."""
    return f"{value:+.1f} %".replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """The two largest units: 0.42 s, 12.3 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02} min"


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit of an axis up to so many seconds, and how many seconds it has."""
    return ("h", 3600.0) if seconds > 2 * 3600 else ("min", 60.0) if seconds > 2 * 60 else ("s", 1.0)


def times(ratio: float) -> str:
    """How many times more or less: two digits, or whole with separators."""
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"


def power_of_ten(exponent: int) -> str:
    """10 with the exponent above the line."""
    return "10" + "".join(_RAISED[digit] for digit in str(exponent))


_RAISED = dict(zip("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079", strict=True))
