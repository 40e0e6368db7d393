"""Numbers as people read them."""

from __future__ import annotations

import math


def number(value: float | None, digits: int = 4, missing: str = "n/a") -> str:
    """A number with ``digits`` significant digits.

    >>> number(40.7149), number(3.2), number(0.01234567, 3), number(123456.7), number(0.0), number(None)
    ('40.71', '3.200', '0.0123', '123457', '0', 'n/a')
    """
    if value is None:
        return missing
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.0f}" if value == 0 or abs(value) >= 10 ** (digits - 1) else f"{value:#.{digits}g}"


def percent(value: float | None) -> str:
    """A fraction in percent, three significant digits."""
    if value is None:
        return "an unknown amount"
    return f"{number(100 * value, 3)}\N{NO-BREAK SPACE}%" if math.isfinite(value) else "a number that is not finite"


def share(part: float, whole: float) -> str:
    """How ``part`` compares with ``whole``, to be read before "the teacher's ...".

    >>> share(1.0, 4.0), share(4.0, 4.0), share(6.0, 4.0), share(0.0, 4.0)
    ('1/4.00 of', '1.00 times', '1.50 times', 'none of')
    """
    if part == 0 or whole == 0:
        return "none of" if part == 0 else "more than"
    return f"1/{number(whole / part, 3)} of" if part < whole else f"{number(part / whole, 3)} times"
