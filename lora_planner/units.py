"""Base units in, text out: the only place where a number becomes text.

Inside: bytes, seconds, FLOP, tokens, USD, nats. Sizes are shown in GiB (1024^3), rates and
counts in powers of ten.
"""

from __future__ import annotations

GIB = 1024**3
MIB = 1024**2
HOUR = 3600.0
BITS_PER_NAT = 1.4426950408889634
#: three digits of this share of a unit are the unit: 999.9M is 1B, not 1e+03M
ROUNDS_UP = 0.9995


def gib(n: float) -> str:
    """
    >>> gib(18.4 * GIB), gib(5 * MIB), gib(750 * GIB)
    ('18.4 GiB', '5.0 MiB', '750 GiB')
    """
    if abs(n) < GIB:
        digits = 0 if abs(n) >= 100 * MIB else 1
        return f"{n / MIB:.{digits}f} MiB" if abs(n) >= 1024 else f"{n:.0f} B"
    return f"{n / GIB:.0f} GiB" if abs(n) >= 200 * GIB else f"{n / GIB:.1f} GiB"


def count(n: float) -> str:
    """
    >>> count(8190735360), count(43646976), count(999), count(17400), count(999885952)
    ('8.19B', '43.6M', '999', '17.4k', '1B')
    """
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= ROUNDS_UP * size:
            return f"{n / size:.3g}{letter}"
    return f"{n:.3g}" if isinstance(n, float) and n != int(n) else f"{int(n)}"


def flops(n: float) -> str:
    """
    >>> flops(1.6083e10)
    '16.08 GFLOP'
    """
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(n) >= size:
            return f"{n / size:.2f} {letter}FLOP"
    return f"{n:.0f} FLOP"


def duration(seconds: float) -> str:
    """
    >>> duration(0.0123), duration(75), duration(4.2 * 3600), duration(4e5), duration(1e21)
    ('12.3 ms', '1.2 min', '4.2 h', '4.6 d', 'over 100 years')
    """
    if seconds < ROUNDS_UP:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < HOUR:
        return f"{seconds / 60:.2g} min" if seconds < 600 else f"{seconds / 60:.0f} min"
    if seconds < 48 * HOUR:
        return f"{seconds / HOUR:.1f} h"
    days = seconds / 86400
    if days > 36525:
        return "over 100 years"
    return f"{days:.1f} d" if days < 100 else f"{days:.0f} d"


def usd(amount: float) -> str:
    """
    >>> usd(1.7), usd(0.034), usd(1234.5), usd(2e12)
    ('$1.70', '$0.034', '$1,234', 'over $1 trillion')
    """
    if amount >= 1e12:
        return "over $1 trillion"
    if amount >= 100:
        return f"${amount:,.0f}"
    return f"${amount:.2f}" if amount >= 0.1 or amount == 0 else f"${amount:.2g}"


def bits(n: float) -> str:
    """
    >>> bits(16.3e6), bits(320_000)
    ('16.3 Mbit', '320 kbit')
    """
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= ROUNDS_UP * size:
            return f"{n / size:.3g} {letter}bit"
    return f"{n:.3g} bit"


def rate(lr: float) -> str:
    """A learning rate.

    >>> rate(2.86e-4), rate(1e-5)
    ('2.9e-4', '1.0e-5')
    """
    mantissa, exponent = f"{lr:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def percent(x: float) -> str:
    """
    >>> percent(0.0052), percent(0.739)
    ('0.52 %', '73.9 %')
    """
    return f"{100 * x:.3g} %"
