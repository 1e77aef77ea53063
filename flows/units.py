"""Numbers as people read them."""

import math

MINUS = "\N{MINUS SIGN}"
ABSENT = "\N{EN DASH}"


def size(count: float) -> str:
    """Bytes in decimal units, three significant digits.

    >>> size(105_453_920)
    '105 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{significant(count)} {unit}"
        count /= 1000
    return f"{significant(count)} TB"


def size_unit(largest: float) -> tuple[str, float]:
    """Return the unit for an axis of sizes up to `largest` bytes, and its bytes.

    >>> size_unit(270e6)
    ('MB', 1000000.0)
    """
    return next(((name, unit) for name, unit in (("GB", 1e9), ("MB", 1e6)) if largest >= 2 * unit), ("kB", 1e3))


def duration(seconds: float) -> str:
    """Wall time in the two largest units that matter.

    >>> duration(204.2), duration(3.14), duration(7322)
    ('3 min 24 s', '3.1 s', '2 h 2 min')
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def significant(value: float, digits: int = 3) -> str:
    """Round to so many significant digits, without an exponent down to a millionth.

    >>> significant(12.697), significant(0.00213), significant(1234.5), significant(0.0)
    ('12.7', '0.00213', '1,234', '0')
    """
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) < 1e-6:
        return f"{value:.0e}".replace("-", MINUS)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def fixed(value: float, decimals: int = 3) -> str:
    """Round to so many decimals.

    >>> fixed(0.6123), fixed(0.5, 1)
    ('0.612', '0.5')
    """
    return f"{value:.{decimals}f}".replace("-", MINUS)


def percent(value: float) -> str:
    """A share as a percentage.

    >>> percent(0.9637)
    '96.4 %'
    """
    return f"{100 * value:.1f} %".replace("-", MINUS)


def signed(value: float) -> str:
    """A difference with its sign, three decimals.

    >>> signed(0.2)
    '+0.200'
    """
    return f"{value:+.3f}".replace("-", MINUS)


def signed_percent(value: float) -> str:
    """A relative change with its sign; a growth to more than tenfold as a factor.

    >>> signed_percent(0.0341), signed_percent(14.0)
    ('+3.4 %', '15 times')
    """
    if value >= 9:
        return f"{value + 1:,.0f} times"
    return f"{100 * value:+.1f} %".replace("-", MINUS)


def factor(value: float) -> str:
    """A relative change as a factor: a change of -0.61 is 0.39 times the reference."""
    return f"{significant(value + 1, 2)}\N{MULTIPLICATION SIGN}"
